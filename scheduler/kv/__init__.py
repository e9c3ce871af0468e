"""Which tier keeps the keys and values of a cache (`budget`), and the caches of one
model (`store`)."""
