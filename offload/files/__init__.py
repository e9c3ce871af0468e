"""Rows in files: where those are, how they are read, cut and written."""
