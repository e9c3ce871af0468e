"""The measured search around a plan: `penstock tune`.

`candidates.py` lists the settings to try. `race.py` says what to measure next, from
what was measured, and in the end which settings won. `Tuning` measures it on a `Slice`
of a `RowSample`; `TuneLog` keeps each timing, so that a search that was stopped goes
on; `tuned.py` writes the policy that won.
"""
