// What makes tensors without a kernel: empty ones, and views. And attention, which is
// one kernel unless a gradient is wanted.
#include "tensors.h"

#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/_scaled_dot_product_attention_math.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DefaultDtype.h>
#include <torch/library.h>

namespace simgpu {
namespace {

using Dtype = std::optional<at::ScalarType>;
using Layout = std::optional<at::Layout>;
using Device = std::optional<c10::Device>;
using Sizes = c10::SymIntArrayRef;
using Bool = std::optional<bool>;

at::ScalarType given_or_default(Dtype dtype) {
  return dtype.value_or(c10::typeMetaToScalarType(c10::get_default_dtype()));
}

at::Tensor make_empty(
    Sizes size, Dtype dtype, Layout, Device device, Bool,
    std::optional<at::MemoryFormat> format) {
  return empty(
      C10_AS_INTARRAYREF_SLOW(size), given_or_default(dtype), given_or_current(device),
      format);
}

at::Tensor make_strided(
    Sizes size, Sizes stride, Dtype dtype, Layout, Device device, Bool) {
  return empty_strided(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
      given_or_default(dtype), given_or_current(device));
}

const at::Tensor& resized(
    const at::Tensor& t, Sizes size, std::optional<at::MemoryFormat>) {
  resize_to(t, C10_AS_INTARRAYREF_SLOW(size));
  return t;
}

at::Tensor& set_storage(
    at::Tensor& t, at::Storage storage, c10::SymInt offset, Sizes size, Sizes stride) {
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  std::vector<int64_t> strides(sizes.size(), 1);
  if (stride.size() == sizes.size())
    strides = C10_AS_INTARRAYREF_SLOW(stride).vec();
  else
    for (auto i = int64_t(sizes.size()) - 2; i >= 0; --i)
      strides[i] = strides[i + 1] * std::max<int64_t>(sizes[i + 1], 1);
  auto* impl = t.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_sizes_and_strides(sizes, strides, offset.expect_int());
  return t;
}

at::Tensor& set_tensor(at::Tensor& t, const at::Tensor& other) {
  return set_storage(
      t, other.storage(), other.sym_storage_offset(), other.sym_sizes(),
      other.sym_strides());
}

at::Tensor& set_whole_storage(at::Tensor& t, at::Storage storage) {
  const auto num = int64_t(storage.nbytes() / t.element_size());
  return set_storage(t, storage, 0, c10::fromIntArrayRefSlow({num}), {});
}

at::Tensor& set_nothing(at::Tensor& t) {
  return set_tensor(t, empty({0}, t.scalar_type(), t.device(), std::nullopt));
}

at::Tensor as_strided(
    const at::Tensor& t, Sizes size, Sizes stride, std::optional<c10::SymInt> offset) {
  return at::native::as_strided_tensorimpl(
      t, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
      offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt);
}

at::Tensor view(const at::Tensor& t, Sizes size) {
  return at::native::view(t, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor reshape_alias(const at::Tensor& t, Sizes size, Sizes stride) {
  return at::native::_reshape_alias(
      t, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

at::Tensor attention(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const std::optional<at::Tensor>& mask, double dropout, bool causal,
    std::optional<double> scale, bool grouped) {
  const bool differentiable = at::GradMode::is_enabled() &&
      (q.requires_grad() || k.requires_grad() || v.requires_grad());
  if (differentiable)
    return std::get<0>(at::_scaled_dot_product_attention_math(
        q, k, v, mask, dropout, causal, std::nullopt, scale, grouped));
  at::AutoDispatchBelowADInplaceOrView below;
  return at::scaled_dot_product_attention(
      q, k, v, mask, dropout, causal, scale, grouped);
}

} // namespace
} // namespace simgpu

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &simgpu::make_empty);
  m.impl("empty_strided", &simgpu::make_strided);
  m.impl("resize_", &simgpu::resized);
  m.impl("set_.source_Storage", &simgpu::set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", &simgpu::set_storage);
  m.impl("set_.source_Tensor", &simgpu::set_tensor);
  m.impl("set_", &simgpu::set_nothing);
  m.impl("as_strided", &simgpu::as_strided);
  m.impl("view", &simgpu::view);
  m.impl("_reshape_alias", &simgpu::reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("view_as_real", &at::native::view_as_real);
  m.impl("view_as_complex", &at::native::view_as_complex);
}

TORCH_LIBRARY_IMPL(aten, AutogradPrivateUse1, m) {
  m.impl("scaled_dot_product_attention", &simgpu::attention);
}
