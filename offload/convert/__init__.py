"""Writes a checkpoint in fewer bytes: `penstock convert`.

`schemes.py` says what a weight becomes: tensors, and the section of config.json that
describes them. `choosing.py` says which weights of a model that is done to. `shard.py`
writes one file of tensors in little memory, and `conversion.py` the whole folder: it
refuses what cannot be done, and goes on where a killed process was.
"""
