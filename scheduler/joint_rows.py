"""How many rows a joint matrix product of several micro-batches should have. Pure."""

# Measured, float32, 2048 x 5632, two cores: 22 GFLOP/s at 4 rows, 29 at 8, 49 at 16, 81
# at 32, 116 at 64, 168 at 128, 200 at 256, 232 at 512, 218 at 1024.
# A micro-batch with this many rows gains little by waiting for others,
WIDE_ROWS = 256
# and a joint call with more rows than this is no faster: the rest form the next call.
MAX_ROWS = 512
