"""Decides when weights are loaded and which micro-batch runs next, and does both.

sweep         runs many micro-batches through one pass over the weights
activations   moves what suspended micro-batches hold to host memory and back
kv            which memory keeps the keys and values of each cache
slots         loads weights into slots of fast memory, and evicts them
cost          predicts how long a job takes (pure arithmetic)
simulation    computes the same by stepping through events, for tests
order, packing, placement: pure functions that the others use
"""
