"""Where models compute. `device` says what is asked of a device (memory, streams,
events) and is the CPU; `cuda` is a GPU."""
