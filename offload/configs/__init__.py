"""Reads the config files of a checkpoint.

`hf_config` makes transformers' config and names the class of the model. `quantizer`
makes transformers' quantizer, which tells how its weights are quantised; checkpoints of
NVIDIA's Model Optimizer are read as another kind (modelopt). `aliases` has published
names of models that transformers has under others. `trust` decides whose code may run.
"""
