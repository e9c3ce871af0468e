"""What a user touches: policies, models, tasks, jobs, the command line.

`load`, `wrap` and `sweep` (model) are the Python API, with the functions in tasks/. A
`Policy` (policy) says how a model is streamed; engine/ puts the parts together.
commands/ and `cli` are the command line, which runs jobs/.
"""
