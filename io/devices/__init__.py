"""Devices that models compute on.

`Device` (device) is the contract: its memory, and its `Stream`s of work, whose order is
given by events. `CpuDevice` (device) and `AcceleratorDevice` (accelerator) implement
it. `accelerators` says which accelerators torch finds, and how much memory they have.
`Crossing` (crossing) copies tensors to host memory and back. `CuFile` (cufile) is a
file that is read into the memory of an NVIDIA GPU.
"""
