"""How many rows a product needs that several micro-batches make at once. Pure."""

# float32, 2048 x 5632, two cores: 22 GFLOP/s at 4 rows, 29 at 8, 49 at 16, 81 at 32,
# 116 at 64, 168 at 128, 200 at 256, 232 at 512, 218 at 1024. Who has so many rows has
# little to gain by waiting for others,
WIDE_ROWS = 256
# and more than so many at once gain nothing: the rest of them come after those.
MAX_ROWS = 512
