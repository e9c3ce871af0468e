"""From a checkpoint's tensors to a slot, where modules see them. A `recipe` says how a
parameter is made of tensors, `layout` decides which bytes go where, and a `transfer`
follows one unit on its way. Bytes come from files (`loader`), from host memory
(`host`) or from another GPU (`peer`), over a `link`; `copier` moves what cannot land in
its place, `direct` lets a GPU read files by itself, `overlay` and `layered` put updated
tensors over those of the files."""
