"""What a model does with rows: scores, completes, embeds or classifies them.

A `Task` (`task.py`) is what one command does, as a frozen value: `Score`, `Generate`,
`Embed` and `Classify`, each in its `*_task.py` and named in `registry.py`. The command
line, jobs, plans and searches know tasks by nothing else. The file without `_task`
beside it runs the model and holds the Python function of that name. A `PackedTask` has
a `RowRunner`, which cuts rows into pieces, runs some of them and makes results;
`Packed` packs the pieces into micro-batches and sends them through a sweep. `Generate`
runs its own micro-batches, since sequences end at different times.
"""
