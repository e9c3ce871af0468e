"""Keeps the keys and values of all caches of one model, in the tiers that have room.

KvStore        opens, prefetches and closes the buffers of each cache
  KvBudget     which tier has room for how many bytes
  KvTier       makes a buffer in one tier (a Protocol)
  CacheHandle  one cache: its buffers by layer
"""
