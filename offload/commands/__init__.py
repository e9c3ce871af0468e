"""The commands of `penstock`, and the options that they share. `job_command.py` makes a
command of each task; `plan_table.py` shows plans as tables."""
