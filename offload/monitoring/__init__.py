"""Watches a job: how far it is, and what it uses.

A `Monitor` (monitor) takes a `ResourceSample` (samples) a few times per second, and
calls listeners: progress bars and lines (progress), a Prometheus file (metrics), and
`Samples`, which keeps them. `TimeLeft` (time_left) estimates the time left. `memory`
and `cgroup` tell how much memory there is, `host_load` how busy the machine is, `heap`
trims freed memory, and `show` formats numbers.
"""
