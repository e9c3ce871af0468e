"""Where weights are in files, and how they get into a model's modules."""
