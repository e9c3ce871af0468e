"""Readers bring bytes of files into buffers, in the background.

`Reader` (reader) is the contract. The implementations are `ThreadReader` (threads),
`LibaioReader` (libaio_reader), `AiofilesReader` (aiofiles_reader), and `GdsReader`
(gds), which reads into GPU memory. All derive from `QueuedReader`
(queued_reader), which cuts a read into parts and queues them.

Most queue them in a `PartQueue`, from which `Workers`, which are threads, take them one
by one (both in queued_reader). `Files` (files) opens files, with O_DIRECT where
possible, and notices changes. `choice` measures which reader is fastest. `checksums`
finds bytes that have changed since they were written.
"""
