"""Files of rows in, a file of results out: kept, continued, shared.

A `Job` reads its input in parts (`Ahead` reads them on a thread of its own), has a task
compute them (`PartsRun` takes the results), and writes each part into an output.
`ResumableOutput` keeps parts in a `PartStore` beside the output until all are done, so
that a job that was killed goes on; its `Manifest` says what the job is. `choosing.py`
chooses what the policy leaves open before the model is `Loaded`. With several workers,
a `WorkerPool` hands parts to processes that run `worker.py`, and `Sharing` adds up what
they count. `RemoteRanks` are such workers on other machines. `Watch` shows how far the
job is.
"""
