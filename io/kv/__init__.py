"""Keys and values of a sweep's caches, in the device's memory, in the host's, or in a
file. A `strip` is one layer of one cache; a `region` holds its rows, a `place` opens
strips in one tier, `staging` brings some of them to where attention reads them."""
