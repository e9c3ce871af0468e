"""Connects transformers' caches to Penstock's tiers of keys and values.

`open_kv` (tiers) opens the tiers of one model and its `KvStore`, as the policy says.
`install` (cache) makes the model's `generate` use it: it replaces the layers of each
new cache by a `TieredLayer` or `TieredSlidingLayer` (layers), which keep their tokens
in the store. `install` (attention) makes the CPU attend to keys and values in host
memory.
"""
