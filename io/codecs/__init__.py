"""How the elements of a tensor are stored, and how parameters are made of them.

A codec stands between the *stored image* of a unit (the bytes that lie in files) and
its *slot image* (the parameters that modules see). `Codec` (codec) is the contract.
`Cast` (cast) copies elements and changes their dtype; `Computed` (computed) calls a
function on whole tensors. `Scaled` (scaled) multiplies small codes (codes) by the
scales of their blocks. `Lossless` (lossless) unpacks numbers of bfloat16 that take 12
bits (packed). Loops over many numbers are `Kernels` (kernels): in torch, a tile at a
time (tiles), or in C where there is a compiler (compiled). A recipe names the codec of
each of its slices. The code that reads, places and moves
bytes only asks whether it is `CAST`: then both images may be equal, and bytes are read
straight into place.
"""
