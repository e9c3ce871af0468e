// Memory of the simulated GPU, and host memory that it can read at any time.
//
// The addresses that tensors of the device have are reserved and not accessible: host
// code that reads there dies. Kernels use the same bytes at other addresses (`real`).
#pragma once

#include "streams.h"

#include <c10/core/CachingDeviceAllocator.h>

#include <cstddef>
#include <utility>

namespace simgpu {

constexpr int kPoison = 0xff; // NaN in float32, bfloat16, float16 and float8

bool is_device_address(const void* address);
void* real(const void* address); // where a kernel finds the bytes
int device_of(const void* address);

c10::DeviceAllocator& device_allocator();
void set_capacity(int device, size_t num_bytes);

// Pinned memory: of torch's `pin_memory`, or registered by address.
c10::Allocator& pinned_allocator();
bool is_pinned(const void* address);
// Raises if `num_bytes` from `address` on are pinned in part, or by two registrations.
bool is_pinned_range(const void* address, size_t num_bytes);
// Pinned memory from our allocator is not reused before `mark` has passed.
void record_pinned_use(const void* address, Mark mark);
int register_host(uintptr_t address, size_t num_bytes); // 0, or CUDA's error code
int unregister_host(uintptr_t address);

} // namespace simgpu
