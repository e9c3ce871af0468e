// What belongs to the thread that calls: its device, its streams, how often it waited.
#include "streams.h"

#include <c10/util/Exception.h>
#include <pthread.h>

#include <array>
#include <atomic>
#include <chrono>

namespace simgpu {
namespace {

using Counts = std::array<std::atomic<uint64_t>, size_t(Sync::count)>;

thread_local int t_device = 0;
thread_local std::array<int, kNumDevices> t_streams{};
thread_local bool t_forbidden = false;
thread_local Counts t_counts{};
Counts counts{};
std::atomic<bool> forked{false};
const int at_fork = pthread_atfork(nullptr, nullptr, [] { forked = true; });

} // namespace

int current_device() {
  return t_device;
}

void set_current_device(int device) {
  TORCH_CHECK(device >= 0 && device < kNumDevices, "simgpu: invalid device ordinal");
  t_device = device;
}

Queue& current_queue(int device) {
  return queue_at(device, t_streams.at(device));
}

c10::Stream current_stream(int device) {
  return c10::Stream(
      c10::Stream::UNSAFE, c10::Device(kType, c10::DeviceIndex(device)),
      t_streams.at(device));
}

c10::Stream set_current_stream(c10::Stream stream) {
  const auto before = current_stream(stream.device_index());
  t_streams.at(stream.device_index()) = int(stream.id());
  return before;
}

void count_sync(Sync reason) {
  check_process();
  TORCH_CHECK(
      !t_forbidden || reason == Sync::covered, "simgpu: called a synchronizing operation");
  ++counts.at(size_t(reason));
  ++t_counts.at(size_t(reason));
}

void forbid_syncs(bool forbidden) {
  t_forbidden = forbidden;
}

uint64_t num_syncs(Sync reason, bool of_this_thread) {
  return (of_this_thread ? t_counts : counts).at(size_t(reason));
}

bool is_forked() {
  return forked;
}

void check_process() {
  TORCH_CHECK(!forked, "Cannot use simgpu in a process forked from its own");
}

double milliseconds() {
  using Clock = std::chrono::steady_clock;
  static const auto start = Clock::now();
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

} // namespace simgpu
