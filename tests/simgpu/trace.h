// What torch's profiler is told: the work of the streams, and the waits of the host.
#pragma once

#include "streams.h"

#include <cstdint>

namespace simgpu {

// Nanoseconds on the profiler's clock; 0 while nobody records.
int64_t trace_time();
// A piece of work that is done and began at `begin`; nothing if that is 0.
void trace_work(int device, int stream, const char* name, int64_t begin);

// The host waits for as long as this lives.
class TracedWait {
 public:
  explicit TracedWait(Sync reason) : reason_(reason), begin_(trace_time()) {}
  ~TracedWait();

 private:
  Sync reason_;
  int64_t begin_;
};

void register_profiler();

} // namespace simgpu
