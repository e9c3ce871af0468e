// What has to be known of an operation before its kernel runs.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <string>
#include <vector>

namespace simgpu {

struct Traits {
  std::string name;
  bool at_once = false; // done in the call: the host needs its values, or its shapes
  bool from_cpu = false; // its shapes come from a run of the CPU's kernel, on ones
  bool indexing = false;
  bool waits = false; // CUDA waits here, though it need not
  bool only_writes = true; // all results are arguments
  int generator = -1; // index of the argument
  std::vector<int> returned; // argument that a result is, or -1
};

const Traits& traits_of(const c10::OperatorHandle& op);
// Where torch would put an operation together from others though the CPU has a kernel
// of its own, ours is the CPU's: else the last bits differ.
bool has_cpu_kernel_of_its_own(const c10::OperatorHandle& op);

} // namespace simgpu
