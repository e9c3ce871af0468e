"""Simulates sweeps event by event, to check the cost model. Used by tests and `bench/`
only; no command uses it.

    simulate       takes Ranks (devices) and SimulatedLinks, gives a Simulation
      rehearse     runs the real working set and order without data: a Schedule
      turns        how long the micro-batches of each visit compute
      EventLoop    gives a time to each load and each visit
"""
