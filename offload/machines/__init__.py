"""The rates of computers: files of them, and how they are measured.

A `Machine` (machine) holds the rates of one computer; the YAML files here are machines
with published rates. `measure_machine` (measuring) measures this one: drive, memory and
casts by `measure`, matrix products by `measure_products`, overheads of calls by
`measure_calls`, a block's other operations by `measure_between`, loading beside
computing by `measure_beside`, and GPU copies by `measure_gpu`. `estimated_machine`
(estimates) takes a second instead, if there is no machine file. `part_of`
(part_machine) is a machine as each of several processes on it has it.
"""
