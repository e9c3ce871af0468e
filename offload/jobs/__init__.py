"""Files of rows in, a file of results out: kept, gone on with, shared."""
