"""Moves the activations of suspended micro-batches to host memory and back.

ActivationOffload   copies storages out and in, on streams of their own
  Ownership         finds the storages that one micro-batch alone refers to
    Referrers       asks the garbage collector what else refers to them
held_bytes          how many bytes a suspended micro-batch keeps alive
"""
