// Streams of the simulated GPU: queues of work, each with a thread that does it.
#pragma once

#include "schedule.h"

#include <c10/core/Stream.h>

#include <cstdint>
#include <functional>
#include <string>

namespace simgpu {

constexpr int kNumDevices = 2;
constexpr int kStreamsPerDevice = 33; // the default one, and a pool as CUDA's of 32
constexpr auto kType = c10::DeviceType::PrivateUse1;

// Why the host waits for a device. The names are in sim_device.py, in this order.
enum class Sync {
  stream, device, event, covered, item, copy, shape, allocator, count
};
// So many pieces of work behind an event keep its stream busy while the host wakes up.
constexpr uint64_t kCover = 16;

struct Queue;

// A point in the work of a queue: behind its first `seq` pieces.
struct Mark {
  Queue* queue = nullptr;
  uint64_t seq = 0;
};

Queue& queue_at(int device, int id);
Queue& queue_of(c10::Stream stream);
c10::Stream next_stream(int device);

// Adds work, returns the point behind it. Work holds addresses, never tensors. In traces
// it has this name; without one it is in none.
Mark push(Queue& queue, std::function<void()> work, const char* name = nullptr);
// Later work of `queue` begins after `mark`.
void push_wait(Queue& queue, Mark mark);
Mark end_of(Queue& queue);

bool passed(Mark mark); // a call by the host: held work comes closer to its turn
void wait(Mark mark, Sync reason);
void wait_for_event(Mark mark); // free if it has passed
void finish(Mark mark); // waits without counting it
void wait_for_device(int device, Sync reason);

void set_schedule(Schedule schedule);
// The stream begins nothing until it is released, or somebody waits for it.
void hold(Queue& queue, bool held);
uint64_t num_pieces(); // of work, that were queued so far
std::string take_error(); // the first one of a kernel; nobody sees it any more

// Of the calling thread.
int current_device();
void set_current_device(int device);
Queue& current_queue(int device);
c10::Stream current_stream(int device);
c10::Stream set_current_stream(c10::Stream stream); // returns the one before
// Counts a point where CUDA would wait; raises where these are forbidden.
void count_sync(Sync reason);
void forbid_syncs(bool forbidden);
uint64_t num_syncs(Sync reason, bool of_this_thread);

void check_process(); // raises in a process that was forked from the device's
bool is_forked();
double milliseconds(); // since the process began

} // namespace simgpu
