"""Divides a model into units, and decides where each unit stays.

`find` (sites) finds the sites of a model and groups its tensors into units: a
`ModelDivision`. Stacked experts are cut into pieces: expert_stack says which, and
experts how each is made. `Divider` (division) divides for a given working set, and
`UnitPlans` (unit_plans) says how each unit lies there; capacity says how large that is,
and the least that works. `Arranger` (arrangement) adds the tier
of each unit and the memory budget, for which `Wishes` (wish) says how much memory a
model can use. `describe` computes a model's costs for the planner. `find_row_wise`
(row_wise, row_probe) finds the modules that micro-batches can share.
"""
