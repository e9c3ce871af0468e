"""Stores the keys and values of caches on the device, in host memory, or in a file.

    KvTier (scheduler)    one tier; its `open` makes a KvLayerBuffer
      InPlaceTier           -> InPlaceBuffer: attention reads it where it lies
      CopiedTier            -> CopiedBuffer with a MemoryStorage
      DiskTier              -> CopiedBuffer with a FileStorage in the KvFile

    CopiedBuffer --rows--> KvStorage       every appended token, once
                 <-fetch-- KvStorage       into a StagedRows that Staging lends

A `KvLayerBuffer` holds one layer of one cache. A `Codec` turns keys and values into
rows of bytes, one row for each token, and back. `Staging` lends the device memory that
rows are brought to before attention reads them. A `HostBounce` copies between the
device and the threads of the file; each of these threads is a `WorkerStream`. A
`BufferPool` provides the memory of copies.
"""
