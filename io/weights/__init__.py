"""Moves a unit's weights from where they are stored into a slot, as parameters.

    Recipe (recipe)      which stored tensors make one parameter
      -> Layout (layout)    which byte of which file lands where in the slot
      -> Transfer (transfer)  which ranges are copied on to another device

    files --Loader--> host memory --Source--> Link --> slot on the device
                      HostTier: units that stay in host memory
                      PeerTier: units that stay in the memory of another GPU
    files --DirectToDevice------------------> slot on the device

Recipes, layouts, transfers and overlays are pure plans; the other classes carry them
out. The bytes that lie in files are the *stored image* of a unit; the parameters in a
slot are its *slot image*. Each slice of a recipe names the codec (io/codecs) between
them. `Loader` (loader) reads aligned ranges straight into place where both images are
equal. It hands the rest to `BounceCopier` (copier), which reads into a buffer and lets
the codec decode it, in the parts that `decoding` cuts. A `Source`
(source) gives a `Link` (link) the bytes of each unit: `ResidentSource` has them in
memory already, `StagedSource` reads them from disk into a `Ring`. `DirectToDevice`
(direct) lets the GPU read files itself. `overlay` and `layered` replace some tensors of
a checkpoint by updated ones from other files.
"""
