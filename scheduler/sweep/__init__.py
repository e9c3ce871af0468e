"""Runs many micro-batches through one pass over the weights, layer by layer.

Sweep               what the user holds; takes batches, yields outcomes
  SweepLoop         chooses which micro-batch runs next
    MicroBatch      the user's function in a greenlet, with its own ThreadState
    Admission       how many micro-batches may be in flight
    RankedLoop      a SweepLoop in step with those of other ranks
    SideTransfers   moves activations and caches while others compute
    Coalescing      joins the calls that several micro-batches make of one module
ForwardEntry        called by the hooks of each site: suspends a micro-batch of a
                    sweep until its site is open, lets a plain call through
Turn, Owner         which thread may run the model, and which one runs a sweep
"""
