"""Divides a model into units, and decides where each unit stays.

`find` (sites) finds the sites of a model and groups its tensors into units: a
`ModelDivision`. Stacked experts are cut into pieces: expert_stack says which, and
experts how each is made. `Divider` (division) divides for a given working set; capacity
says how large that is, and the least that works. `Arranger` (arrangement) adds the tier
of each unit and the memory budget, for which `Wishes` (wish) says how much memory a
model can use. `describe` computes a model's costs for the planner. `find_row_wise`
(row_wise, row_probe) finds the modules that micro-batches can share. `model_kind`
answers questions about a model's classes.

`model_cache` says what a model keeps of each token: `trace_cache` (cache_trace) runs a
few tokens through its `meta_twin`, one of the blocks that are alike (alike_blocks) for
all, under `OnMeta` (on_meta), while a `CacheWatch` (cache_watch) notes what comes into
its cache (cache_contents).
"""
