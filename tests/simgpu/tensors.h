// Other tensors of the same shape and strides: on the CPU, over the bytes of a device's,
// as a kernel gets it; on the meta device, to learn the shapes of results.
#pragma once

#include "memory.h"

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>

namespace simgpu {

inline bool is_ours(const at::Tensor& t) {
  return t.defined() && t.device().type() == kType;
}

// A CPU tensor over the bytes of `t` (of the device, or of the CPU), which it does not
// keep alive: it holds the address alone.
at::Tensor address_of(const at::Tensor& t);
at::Tensor meta_of(const at::Tensor& t);
at::Tensor ones_like(const at::Tensor& t); // on the CPU
at::Tensor empty_like(const at::Tensor& meta, c10::Device device);
at::Tensor empty(
    at::IntArrayRef size, at::ScalarType dtype, c10::Device device,
    std::optional<at::MemoryFormat> format);
at::Tensor empty_strided(
    at::IntArrayRef size, at::IntArrayRef stride, at::ScalarType dtype,
    c10::Device device);
c10::Device given_or_current(std::optional<c10::Device> device);
void resize_storage(const c10::Storage& storage, size_t num_bytes);
void resize_to(const at::Tensor& t, at::IntArrayRef size);

const at::Generator& default_generator(int device);
at::Generator make_generator(int device);
// The CPU's generator behind one of ours.
at::Generator& cpu_generator(const at::Generator& generator);

} // namespace simgpu
