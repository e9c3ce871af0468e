"""Reads what the files of a checkpoint hold, before any weight is read.

`read_header` (header) turns the header of one safetensors file into `TensorEntry`s and
the `FileStamp` of the file. `open_checkpoint` (index) joins those of all files into a
`Checkpoint`; `HeaderCache` (header_cache) keeps them between runs. `dtypes` lists the
dtypes of the format.
"""
