"""Processes of one machine that need the same bytes of files read them once for all.

They have a ring of pieces in shared memory (`ring`). Who needs a piece first claims it,
reads it and puts it into the ring; the others copy it from there. Which piece is where,
and who still wants it, stands in a table in the same memory; `table` decides what to do
by it. `SharedReader` (shared_reader) is the reader that acts.

Nobody waits without an end: what does not come, a process reads itself. `patience` says
how long it may wait for others to come to the same place: no longer than reading once
has saved so far.
"""
