"""The keys of a policy: their values, the files that hold them, and how they fit
together.

`read_policy` (extends) reads a policy file and the files that it extends, by
`marked_yaml`; `Origin` (origin) remembers where each key was written, for errors.
`values` are the types of keys, `kv` is the section of keys and values. `explain` turns
pydantic's errors into sentences, `contradictions` finds keys that contradict each
other, and `installed` those that ask for more than the machine has. `counts` fills in
counts that were left open. `divide_memory` (memory_budget) divides what `room_for`
(room) says that the process may take. `reference` makes the documentation of all keys.
"""
