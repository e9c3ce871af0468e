"""Predicts how long a job takes, from sizes and rates alone. Pure.

predict (workload)    a whole job: its passes, one after the other
  CostModel (model)   one pass: compute time of each site, of its parts (site_time)
    ModelShape        FLOPs and bytes of a model
    Rates             FLOP/s and bytes/s of a machine
    SiteLoads         what each site waits for (site_loads), unit by unit (load_cost)
    run_passes        when loads and computing overlap (pipeline)
  RankedModel         one pass of a model that ranks share (ranked_model, ranked_pass)
  TensorModel         one pass of a model whose products ranks divide (tensor_model)
switch                from how many tokens a pass on another way is faster
memory_need           bytes that a job needs beside its weights
worth                 what tokens cost, and the share of the peak FLOP/s
partitioning          formulas for one model over many chips
"""
