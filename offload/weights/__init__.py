"""Maps a checkpoint's files to a model's modules, and binds loaded weights.

`build` (hf) makes a model on meta, with a recipe for each tensor (hf_names). Recipes of
tensors that transformers merges, cuts or computes are made by `conversions`, those of
quantised weights by `dequantising`, each in its format (formats; those of compressed-
tensors in compressed_formats). `spill` (spill) does the same for a module in memory, in
a `SpillFolder`. While a unit is not loaded, its parameters are `StreamedParameter`s;
while it is, `Binding` (binding) puts `BoundParameter`s there. `MovedTensors` keeps
other tensors on the device. `RowGatherer` reads rows of an embedding table.
`new_values` checks what `penstock.update` writes, `gradients` refuses backward passes,
`stored` checks dtypes of files, and `blueprint` makes a model without its weights.
Where there are none, recipes are imagined from its config (imagined,
imagined_schemes).
"""
