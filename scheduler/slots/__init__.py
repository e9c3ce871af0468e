"""Slots of fast memory for the weights that are needed now.

OpenSites        a module may run once its units are loaded and bound
  -> Routing     which experts of a layer are needed, and how often
  -> WorkingSet  loads, keeps and evicts units
       -> Slots            which bytes of the arena hold which unit
       -> PendingRanges    which freed bytes a device may still use
       -> Load             (io/weights) one transfer under way
"""
