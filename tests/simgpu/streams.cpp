// The queues, their threads, and who waits for whom. One lock guards all of it; work
// itself runs outside of it.
//
// Work that fails (an index out of range) fails later than the call that queued it: the
// first error is raised by whoever waits next, and by all others until it is taken.
#include "trace.h"

#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>

#include <array>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>

namespace simgpu {

using Clock = std::chrono::steady_clock;

struct Piece {
  std::function<void()> work;
  Mark before; // what it waits for, without work
  const char* name = nullptr;
  uint64_t tick = 0; // when it was queued
  Clock::time_point time;
};

struct Queue {
  int device = 0;
  int id = 0;
  std::deque<Piece> pieces;
  uint64_t queued = 0;
  uint64_t done = 0;
  uint64_t wanted = 0; // somebody waits for the pieces up to here
  bool held = false;
  bool started = false;
  uint64_t begins_at = 0; // ticks, of the first piece
  Delays delays;
  std::condition_variable wake;
};

namespace {

struct World { // leaked: threads outlive static destructors
  std::mutex lock;
  std::condition_variable progress;
  uint64_t ticks = 0; // calls by the host
  Schedule schedule;
  std::array<std::array<Queue, kStreamsPerDevice>, kNumDevices> queues;
  std::array<int, kNumDevices> next{};
  std::string error;
  uint64_t num_pieces = 0;
};

World& world() {
  static World* found = [] {
    auto* made = new World();
    for (int d = 0; d < kNumDevices; ++d)
      for (int s = 0; s < kStreamsPerDevice; ++s) {
        made->queues[d][s].device = d;
        made->queues[d][s].id = s;
      }
    return made;
  }();
  return *found;
}

void want(Queue& q, uint64_t seq) {
  if (q.wanted >= seq)
    return;
  q.wanted = seq;
  q.wake.notify_one();
}

void tick(World& w) {
  ++w.ticks;
  for (auto& queues : w.queues)
    for (auto& q : queues)
      if (!q.pieces.empty() && w.ticks == q.begins_at)
        q.wake.notify_one();
}

void done(World& w, Queue& q) {
  q.pieces.pop_front();
  ++q.done;
  w.progress.notify_all();
  for (auto& queues : w.queues)
    for (auto& other : queues)
      if (!other.pieces.empty() && other.pieces.front().before.queue == &q)
        other.wake.notify_one();
}

Clock::time_point after(Clock::time_point time, double seconds) {
  return time +
      std::chrono::duration_cast<Clock::duration>(
             std::chrono::duration<double>(seconds));
}

// Blocks the queue's thread until its first piece may begin.
void await_turn(World& w, Queue& q, std::unique_lock<std::mutex>& lock) {
  const Piece& piece = q.pieces.front();
  const Mark before = piece.before;
  q.begins_at = piece.tick + q.delays.draw(w.schedule, q.id == 0);
  const auto latest = after(piece.time, w.schedule.held_seconds);
  const auto earliest =
      q.begins_at > piece.tick ? after(piece.time, w.schedule.late_seconds) : piece.time;
  for (;;) {
    const auto now = Clock::now();
    const bool wanted = q.wanted > q.done;
    const bool late = w.ticks >= q.begins_at || now >= latest;
    const bool ordered = !before.queue || before.queue->done >= before.seq;
    if (wanted && !ordered)
      want(*before.queue, before.seq);
    if (ordered && ((wanted && now >= earliest) || (late && !q.held)))
      return;
    if (wanted && now < earliest)
      q.wake.wait_until(lock, earliest);
    else if (!late && !q.held)
      q.wake.wait_until(lock, latest);
    else
      q.wake.wait(lock);
  }
}

void serve(Queue& q) {
  World& w = world();
  at::set_num_threads(1); // of this thread: the sums of the CPU with one thread
  c10::InferenceMode inference; // arguments may come from there
  std::unique_lock lock(w.lock);
  for (;;) {
    q.wake.wait(lock, [&] { return !q.pieces.empty(); });
    await_turn(w, q, lock);
    auto work = std::move(q.pieces.front().work);
    const char* name = q.pieces.front().name;
    if (work) {
      lock.unlock();
      std::string error;
      const auto begin = name ? trace_time() : 0;
      try {
        work();
      } catch (const c10::Error& raised) {
        error = raised.what_without_backtrace();
      } catch (const std::exception& raised) {
        error = raised.what();
      }
      trace_work(q.device, q.id, name, begin);
      work = nullptr;
      lock.lock();
      if (w.error.empty())
        w.error = error;
    }
    done(w, q);
  }
}

Mark add(Queue& q, Piece piece) {
  check_process();
  World& w = world();
  std::lock_guard lock(w.lock);
  tick(w);
  ++w.num_pieces;
  piece.tick = w.ticks;
  piece.time = Clock::now();
  q.pieces.push_back(std::move(piece));
  ++q.queued;
  if (!q.started) {
    q.started = true;
    std::thread([&q] { serve(q); }).detach();
  }
  q.wake.notify_one();
  return {&q, q.queued};
}

void wait_unlocked(World& w, Mark mark, std::unique_lock<std::mutex>& lock) {
  want(*mark.queue, mark.seq);
  w.progress.wait(lock, [&] { return mark.queue->done >= mark.seq; });
}

void raise_error(World& w) {
  TORCH_CHECK(
      w.error.empty(),
      "simgpu: a kernel that was queued before has failed: ",
      w.error);
}

} // namespace

Queue& queue_at(int device, int id) {
  return world().queues.at(device).at(id);
}

Queue& queue_of(c10::Stream stream) {
  return queue_at(stream.device_index(), int(stream.id()));
}

c10::Stream next_stream(int device) {
  World& w = world();
  std::lock_guard lock(w.lock);
  const int id = 1 + w.next.at(device)++ % (kStreamsPerDevice - 1);
  return c10::Stream(
      c10::Stream::UNSAFE, c10::Device(kType, c10::DeviceIndex(device)), id);
}

Mark push(Queue& queue, std::function<void()> work, const char* name) {
  return add(queue, {std::move(work), {}, name});
}

void push_wait(Queue& queue, Mark mark) {
  if (mark.queue && mark.queue != &queue)
    add(queue, {nullptr, mark});
}

Mark end_of(Queue& queue) {
  std::lock_guard lock(world().lock);
  return {&queue, queue.queued};
}

bool passed(Mark mark) {
  if (!mark.queue || is_forked())
    return true;
  World& w = world();
  std::lock_guard lock(w.lock);
  tick(w);
  return mark.queue->done >= mark.seq;
}

void wait(Mark mark, Sync reason) {
  count_sync(reason);
  TracedWait traced(reason);
  finish(mark);
}

void wait_for_event(Mark mark) {
  bool has_passed = true, is_covered = false;
  if (mark.queue) {
    std::lock_guard lock(world().lock);
    has_passed = mark.queue->done >= mark.seq;
    is_covered = mark.queue->queued >= mark.seq + kCover;
  }
  if (has_passed)
    finish(mark);
  else
    wait(mark, is_covered ? Sync::covered : Sync::event);
}

void finish(Mark mark) {
  World& w = world();
  std::unique_lock lock(w.lock);
  tick(w);
  if (mark.queue)
    wait_unlocked(w, mark, lock);
  raise_error(w);
}

void wait_for_device(int device, Sync reason) {
  count_sync(reason);
  TracedWait traced(reason);
  World& w = world();
  std::unique_lock lock(w.lock);
  tick(w);
  for (auto& q : w.queues.at(device))
    wait_unlocked(w, {&q, q.queued}, lock);
  raise_error(w);
}

void set_schedule(Schedule schedule) {
  World& w = world();
  std::lock_guard lock(w.lock);
  w.schedule = schedule;
  for (auto& queues : w.queues)
    for (auto& q : queues) {
      q.delays = Delays(schedule.seed * 1000003 + q.device * 101 + q.id);
      q.wake.notify_one();
    }
}

void hold(Queue& queue, bool held) {
  std::lock_guard lock(world().lock);
  queue.held = held;
  queue.wake.notify_one();
}

uint64_t num_pieces() {
  std::lock_guard lock(world().lock);
  return world().num_pieces;
}

std::string take_error() {
  std::lock_guard lock(world().lock);
  return std::exchange(world().error, "");
}

} // namespace simgpu
