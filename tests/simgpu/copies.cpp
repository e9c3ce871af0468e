// Copies: within a device, between the two, from and to the host.
//
// As with CUDA, the host waits for a copy from or to its memory unless that memory is
// pinned and the caller has asked not to wait.
#include "tensors.h"
#include "trace.h"

#include <ATen/ops/_local_scalar_dense.h>
#include <torch/library.h>

#include <algorithm>

namespace simgpu {
namespace {

// Whether the bytes of a CPU tensor, from its first to its last, are pinned.
bool is_pinned_tensor(const at::Tensor& t) {
  int64_t span = 1;
  for (int64_t d = 0; d < t.dim(); ++d)
    span += (t.size(d) - 1) * t.stride(d);
  return is_pinned_range(t.const_data_ptr(), span * t.element_size());
}

// On the stream of the source's device. Both devices' streams wait for each other.
void copy_to_peer(const at::Tensor& from, const at::Tensor& to) {
  Queue& source = current_queue(from.device().index());
  Queue& target = current_queue(to.device().index());
  push_wait(source, end_of(target));
  const auto done =
      push(
          source, [a = address_of(from), b = address_of(to)] { b.copy_(a); },
          "Memcpy PtoP (Device -> Device)");
  push_wait(target, done);
}

void copy_with_host(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  const auto& host = is_ours(from) ? to : from;
  const auto& device = is_ours(from) ? from : to;
  const bool is_pinned = is_pinned_tensor(host);
  const bool waits = !(is_pinned && non_blocking);
  const char* name = is_ours(to)
      ? (is_pinned ? "Memcpy HtoD (Pinned -> Device)" : "Memcpy HtoD (Pageable -> Device)")
      : (is_pinned ? "Memcpy DtoH (Device -> Pinned)" : "Memcpy DtoH (Device -> Pageable)");
  if (waits)
    count_sync(Sync::copy); // which may raise: nothing is queued yet
  const auto done = push(
      current_queue(device.device().index()),
      [a = address_of(from), b = address_of(to)] { b.copy_(a); }, name);
  if (waits) {
    TracedWait traced(Sync::copy);
    finish(done);
  } else {
    record_pinned_use(host.const_data_ptr(), done);
  }
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  if (from.numel() == 0 || to.numel() == 0)
    return to;
  if (is_ours(from) && is_ours(to)) {
    if (from.device() != to.device())
      copy_to_peer(from, to);
    else
      push(
          current_queue(to.device().index()),
          [a = address_of(from), b = address_of(to)] { b.copy_(a); },
          "Memcpy DtoD (Device -> Device)");
  } else {
    copy_with_host(from, to, non_blocking);
  }
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) {
    if (is_ours(to))
      resize_to(to, from.sizes());
    else
      to.resize_(from.sizes());
  }
  return copy_from(from, to, false);
}

at::Scalar item(const at::Tensor& t) {
  wait(end_of(current_queue(t.device().index())), Sync::item);
  return at::_local_scalar_dense(address_of(t));
}

void record_stream(at::Tensor& t, c10::Stream stream) {
  device_allocator().recordStream(t.storage().data_ptr(), stream);
}

} // namespace
} // namespace simgpu

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("_copy_from", &simgpu::copy_from);
  m.impl("_copy_from_and_resize", &simgpu::copy_from_and_resize);
  m.impl("_local_scalar_dense", &simgpu::item);
  m.impl("record_stream", &simgpu::record_stream);
}
