"""Ways to read bytes from files. `reader` says what all of them do; `threads`,
`libaio_reader`, `aiofiles_reader` and `gds` are the ways, `choice` tries which is the
fastest. `files` opens and aligns, `checksums` compares what was read; `backlog`,
`queued` and `workers` keep requests in order."""
