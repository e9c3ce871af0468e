"""One model on several ranks: each streams, holds and computes its own blocks.

StageModules      the input embedding, the blocks and the head of a model
  Share           what this rank has of them; the rest is not loaded here
Exchange          counts calls of stages, sends outputs and waits for those of others
  KeptBack        which outputs are not sent, since nobody needs them
  StageHooks      the hooks and replaced forwards through which the model gets there
TcpPost           messages over TCP, as `join` connects the ranks of an environment
  Outbox          those that are to be sent, and wait for copies from an accelerator

Or each computes all of it, and reads a part of each unit:

GatheredLoads     loads units in the order of all ranks, from a thread of its own
  Rounds          the loads under way: parts are sent, and put together
    OwnParts      reads this rank's part, by a GatherPlan
    GatheredReader  reads extents from the parts that have come
"""
