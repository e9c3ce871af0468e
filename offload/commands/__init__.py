"""The commands of `penstock`, and the options that they share."""
