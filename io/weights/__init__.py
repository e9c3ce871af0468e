"""Moves a unit's weights from where they are stored into a slot, as parameters.

    Recipe (recipe)      which stored tensors make one parameter
      -> Layout (layout)    which byte of which file lands where in host memory, and by
                            which steps (steps)
      -> Transfer (transfer)  which ranges are copied from there into a slot

    files --Loader--> slot, where the CPU computes
    files --Loader--> host memory --Source--> Link --> slot on a GPU
                      HostTier: units that stay in host memory
                      PeerTier: units that stay in the memory of another GPU
    files --DirectToDevice------------------> slot on a GPU

Recipes, layouts, transfers and overlays are pure plans; the other classes carry them
out. `Load` (load) is one unit on its way.

The bytes that lie in files are the *stored image* of a unit; the parameters in a slot
are its *slot image*. Each slice of a recipe names the codec (io/codecs) between them.
`Loader` (loader) reads aligned ranges straight into place where both images are
equal. Parts of a parameter that a drive cannot read to their final addresses are read
near them, and moved (a `Chain` of steps). It hands the rest to `BounceCopier` (copier),
which reads into a buffer and lets the codec decode it, in the parts that `decoding`
cuts. A `Source`
(source) gives a `Link` (link) the bytes of each unit: `ResidentSource` has them in
memory already, `StagedSource` reads them from disk into a `Ring`. `DirectToDevice`
(direct) lets the GPU read files itself. `overlay` and `layered` replace some tensors of
a checkpoint by updated ones from other files.
"""
