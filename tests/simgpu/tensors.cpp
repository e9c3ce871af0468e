// Tensors of the device, and those that stand for them in a kernel.
#include "tensors.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <cstring>

namespace simgpu {

at::Tensor address_of(const at::Tensor& t) {
  const auto& storage = t.storage();
  void* data = const_cast<void*>(storage.data());
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(
          c10::Storage::use_byte_size_t(), storage.nbytes(),
          c10::DataPtr(is_ours(t) ? real(data) : data, c10::Device(at::kCPU)), nullptr,
          false),
      c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  return made;
}

at::Tensor meta_of(const at::Tensor& t) {
  return at::empty_strided(t.sizes(), t.strides(), t.options().device(at::kMeta));
}

at::Tensor ones_like(const at::Tensor& t) {
  auto made = at::empty_strided(t.sizes(), t.strides(), t.options().device(at::kCPU));
  return made.fill_(1);
}

at::Tensor empty_like(const at::Tensor& meta, c10::Device device) {
  return empty_strided(meta.sizes(), meta.strides(), meta.scalar_type(), device);
}

at::Tensor empty(
    at::IntArrayRef size, at::ScalarType dtype, c10::Device device,
    std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(device);
  return at::detail::empty_generic(
      size, &device_allocator(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
      dtype, format);
}

at::Tensor empty_strided(
    at::IntArrayRef size, at::IntArrayRef stride, at::ScalarType dtype,
    c10::Device device) {
  c10::DeviceGuard guard(device);
  return at::detail::empty_strided_generic(
      size, stride, &device_allocator(),
      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), dtype);
}

c10::Device given_or_current(std::optional<c10::Device> device) {
  if (device && device->has_index())
    return *device;
  return {kType, c10::DeviceIndex(current_device())};
}

void resize_storage(const c10::Storage& storage, size_t num_bytes) {
  auto* impl = storage.unsafeGetStorageImpl();
  c10::DeviceGuard guard(impl->device());
  auto fresh = device_allocator().allocate(num_bytes);
  if (const auto kept = std::min(num_bytes, impl->nbytes()))
    device_allocator().copy_data(fresh.get(), impl->data(), kept);
  impl->set_data_ptr_noswap(std::move(fresh)); // the old block is free in this order
  impl->set_nbytes(num_bytes);
}

void resize_to(const at::Tensor& t, at::IntArrayRef size) {
  int64_t num = 1;
  for (auto each : size)
    num *= each;
  const size_t needed = num ? (num + t.storage_offset()) * t.element_size() : 0;
  if (t.storage().nbytes() < needed)
    resize_storage(t.storage(), needed);
  t.unsafeGetTensorImpl()->set_sizes_contiguous(size);
}

} // namespace simgpu
