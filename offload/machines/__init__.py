"""What computers can do: files of rates, and how they are measured."""
