"""Reads the config files of a checkpoint.

`hf_config` makes transformers' config and names the class of the model, `quantizer`
makes transformers' quantizer, which tells how its weights are quantised. `trust`
decides whose code may run.
"""
