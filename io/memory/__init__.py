"""Host memory that weights and keys are read into: an `Arena` is one mapping, `shared`
one that several processes see, `pinned` what a GPU copies from by itself, `numa` where
pages lie; `host_buffers` hands one of these out, whichever can be had."""
