// `torch.ops.simgpu`: what tests and `torch.simgpu` ask for that torch has no call for.
#include "tensors.h"
#include "trace.h"

#include <torch/library.h>

#include <string>

namespace simgpu {

void register_hooks();
void register_kernels();

namespace {

Queue& stream_queue(int64_t device, int64_t stream) {
  return queue_of(c10::Stream(
      c10::Stream::UNSAFE, c10::Device(kType, c10::DeviceIndex(device)), stream));
}

} // namespace
} // namespace simgpu

TORCH_LIBRARY(simgpu, m) {
  using namespace simgpu;
  using Int = int64_t;
  m.def("register_device", [] {
    register_hooks();
    register_kernels();
    register_profiler();
  });
  m.def("schedule", [](Int seed, Int most_held_ops, double held, double late) {
    set_schedule({uint64_t(seed), uint64_t(most_held_ops), held, late});
  });
  m.def("hold", [](Int device, Int stream, bool held) {
    hold(stream_queue(device, stream), held);
  });
  m.def("forbid_syncs", [](bool forbidden) { forbid_syncs(forbidden); });
  m.def("num_syncs", [](Int reason, bool of_this_thread) {
    return Int(num_syncs(Sync(reason), of_this_thread));
  });
  m.def("num_pieces", [] { return Int(num_pieces()); });
  m.def("take_error", [] { return take_error(); });
  m.def("set_capacity", [](Int device, Int num_bytes) {
    set_capacity(int(device), size_t(num_bytes));
  });
  m.def("register_host", [](Int address, Int num_bytes) {
    return Int(register_host(uintptr_t(address), size_t(num_bytes)));
  });
  m.def("unregister_host", [](Int address) {
    return Int(unregister_host(uintptr_t(address)));
  });
  m.def("default_generator", [](Int device) { return default_generator(int(device)); });
  m.def("is_forked", [] { return is_forked(); });
}
