"""How long a pass takes, from rates and sizes. Pure. `shape` is the model, `rates` the
machine, `workload` the rows; `model` and `pipeline` put them together."""
