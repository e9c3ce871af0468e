"""The working set: which parts of the model have a slot. `working_set` decides what is
loaded and dropped, `arena_map` where it lies, `load` follows one on its way, `doors`
lets a module in once its weights are there."""
