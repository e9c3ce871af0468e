"""Finds checkpoints and reads their config files.

`checkpoint_folder` finds what a user names, on disk or in the hub's cache; `opening`
describes its files.
`hf_config` makes transformers' config and names the class of the model. `quantizer`
makes transformers' quantizer, which tells how its weights are quantised; checkpoints of
NVIDIA's Model Optimizer are read as another kind (modelopt). `aliases` has published
names of models that transformers has under others. `trust` decides whose code may run.
"""
