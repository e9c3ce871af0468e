// The device's allocator: like CUDA's, a block that is freed is at once free for the
// stream that it was allocated on, and for that one only.
//
// It is filled with NaN when it is freed and when it is allocated, in the order of that
// stream. So whoever reads too late, too early or on another stream reads NaN.
#include "memory.h"

#include <c10/core/Storage.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <tuple>
#include <vector>

namespace simgpu {
namespace {

constexpr size_t kAlign = 512;
constexpr size_t kSegment = size_t(1) << 16; // reserved memory is a multiple of it

struct Block {
  size_t size;
  size_t asked;
  char* segment;
  Queue* queue; // of the stream that it was allocated on
  bool used;
  std::set<Queue*> others; // streams that use it, too (record_stream)
};

struct Pool {
  size_t capacity = size_t(1) << 30;
  std::map<char*, Block> blocks;
  std::set<std::tuple<Queue*, size_t, char*>> free;
  std::map<char*, size_t> segments;
  std::map<char*, size_t> holes; // addresses of segments that were given back
  char* end = nullptr;
  std::vector<std::pair<char*, std::vector<Mark>>> pending; // freed, but still in use
  c10::CachingDeviceAllocator::DeviceStats stats;
};

struct Memory { // leaked: tensors are freed at exit, too
  std::mutex lock;
  Pool pools[kNumDevices];
};

Memory& memory() {
  static Memory* found = [] {
    auto* made = new Memory();
    for (int d = 0; d < kNumDevices; ++d)
      made->pools[d].end = first_address(d);
    return made;
  }();
  return *found;
}

c10::CachingAllocator::Stat& all(c10::CachingAllocator::StatArray& stats) {
  return stats[size_t(c10::CachingAllocator::StatType::AGGREGATE)];
}

std::vector<c10::CachingAllocator::Stat*> counted(
    c10::CachingDeviceAllocator::DeviceStats& s) {
  return {
      &all(s.allocation),     &all(s.segment),      &all(s.active),
      &all(s.allocated_bytes), &all(s.active_bytes), &all(s.requested_bytes),
      &all(s.reserved_bytes)};
}

size_t unreserved(Pool& pool) {
  const size_t used = all(pool.stats.reserved_bytes).current;
  return pool.capacity - std::min(used, pool.capacity);
}

void poison(Queue& queue, char* address, size_t size) {
  push(queue, [to = real(address), size] { std::memset(to, kPoison, size); });
}

void make_free(Pool& pool, char* at) {
  auto here = pool.blocks.find(at);
  auto& block = here->second;
  block.used = false;
  block.others.clear();
  all(pool.stats.active).decrease(1);
  all(pool.stats.active_bytes).decrease(block.size);
  poison(*block.queue, at, block.size);
  auto joins = [&](auto other) { // of one segment, and free
    return other->second.segment == block.segment &&
        pool.free.count({block.queue, other->second.size, other->first});
  };
  if (auto next = std::next(here); next != pool.blocks.end() && joins(next)) {
    pool.free.erase({block.queue, next->second.size, next->first});
    block.size += next->second.size;
    pool.blocks.erase(next);
  }
  if (here != pool.blocks.begin()) {
    if (auto before = std::prev(here); joins(before)) {
      pool.free.erase({block.queue, before->second.size, before->first});
      before->second.size += block.size;
      pool.blocks.erase(here);
      here = before;
    }
  }
  pool.free.insert({here->second.queue, here->second.size, here->first});
}

void free_passed(Pool& pool) {
  auto left = std::move(pool.pending);
  pool.pending.clear();
  for (auto& [at, marks] : left) {
    bool done = true;
    for (auto mark : marks)
      done = done && passed(mark);
    if (done)
      make_free(pool, at);
    else
      pool.pending.emplace_back(at, std::move(marks));
  }
}

// Gives segments without a used block back. As cudaFree, it waits for the device.
void release_segments(Pool& pool, int device) {
  wait_for_device(device, Sync::allocator);
  free_passed(pool);
  auto& stats = pool.stats;
  for (auto it = pool.segments.begin(); it != pool.segments.end();) {
    const auto [at, size] = *it;
    auto& block = pool.blocks.at(at);
    if (block.used || block.size != size) {
      ++it;
      continue;
    }
    pool.free.erase({block.queue, size, at});
    pool.blocks.erase(at);
    pool.holes[at] = size;
    all(stats.reserved_bytes).decrease(size);
    all(stats.segment).decrease(1);
    ++stats.num_device_free;
    it = pool.segments.erase(it);
  }
}

bool reserve_segment(Pool& pool, Queue& queue, size_t num_bytes) {
  const size_t size = (num_bytes + kSegment - 1) / kSegment * kSegment;
  auto& stats = pool.stats;
  if (all(stats.reserved_bytes).current + size > pool.capacity)
    return false;
  auto hole = std::find_if(
      pool.holes.begin(), pool.holes.end(), [=](auto& each) { return each.second == size; });
  char* at = hole == pool.holes.end() ? pool.end : hole->first;
  if (at == pool.end) {
    pool.end += size;
    TORCH_CHECK(device_of(at) == device_of(pool.end), "simgpu: no addresses are left");
  } else {
    pool.holes.erase(hole);
  }
  pool.segments[at] = size;
  pool.blocks[at] = {size, 0, at, &queue, false, {}};
  pool.free.insert({&queue, size, at});
  all(stats.reserved_bytes).increase(size);
  all(stats.segment).increase(1);
  ++stats.num_device_alloc;
  return true;
}

// The smallest free block of the stream that is large enough, cut to size.
char* take(Pool& pool, Queue& queue, size_t size, size_t asked) {
  auto found = pool.free.lower_bound({&queue, size, nullptr});
  if (found == pool.free.end() || std::get<0>(*found) != &queue)
    return nullptr;
  char* at = std::get<2>(*found);
  pool.free.erase(found);
  auto& block = pool.blocks.at(at);
  if (block.size > size) {
    pool.blocks[at + size] = {block.size - size, 0, block.segment, &queue, false, {}};
    pool.free.insert({&queue, block.size - size, at + size});
    block.size = size;
  }
  block.used = true;
  block.asked = asked;
  auto& stats = pool.stats;
  all(stats.allocation).increase(1);
  all(stats.allocated_bytes).increase(size);
  all(stats.active).increase(1);
  all(stats.active_bytes).increase(size);
  all(stats.requested_bytes).increase(asked);
  return at;
}

char* allocate(int device, size_t asked) {
  check_process();
  Memory& m = memory();
  Pool& pool = m.pools[device];
  Queue& queue = current_queue(device);
  const size_t size = (asked + kAlign - 1) / kAlign * kAlign;
  std::lock_guard lock(m.lock);
  free_passed(pool);
  char* at = take(pool, queue, size, asked);
  if (!at && !reserve_segment(pool, queue, size)) {
    ++pool.stats.num_alloc_retries;
    release_segments(pool, device);
    if (!reserve_segment(pool, queue, size)) {
      ++pool.stats.num_ooms;
      TORCH_CHECK_WITH(
          OutOfMemoryError, false, "simgpu out of memory. Tried to allocate ", asked,
          " bytes. GPU ", device, " has a total capacity of ", pool.capacity,
          " bytes of which ", unreserved(pool), " bytes are free.");
    }
  }
  if (!at)
    at = take(pool, queue, size, asked);
  poison(queue, at, size);
  return at;
}

void release(void* address) {
  if (is_forked())
    return;
  Memory& m = memory();
  std::lock_guard lock(m.lock);
  char* at = static_cast<char*>(address);
  Pool& pool = m.pools[device_of(at)];
  auto& block = pool.blocks.at(at);
  all(pool.stats.allocation).decrease(1);
  all(pool.stats.allocated_bytes).decrease(block.size);
  all(pool.stats.requested_bytes).decrease(block.asked);
  std::vector<Mark> marks;
  for (Queue* other : block.others)
    marks.push_back(end_of(*other));
  if (marks.empty())
    make_free(pool, at);
  else
    pool.pending.emplace_back(at, std::move(marks));
}

struct DeviceAllocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t n) override {
    const int device = current_device();
    void* at = n ? simgpu::allocate(device, n) : nullptr;
    return {at, at, n ? &release : &nothing, {kType, c10::DeviceIndex(device)}};
  }
  static void nothing(void*) {}
  void copy_data(void* to, const void* from, size_t n) const override {
    auto& queue = current_queue(device_of(to));
    push(queue, [to = real(to), from = real(from), n] { std::memcpy(to, from, n); },
         "Memcpy DtoD (Device -> Device)");
  }
  bool initialized() override {
    return true;
  }
  void emptyCache(c10::MempoolId_t) override {
    std::lock_guard lock(memory().lock);
    for (int d = 0; d < kNumDevices; ++d)
      release_segments(memory().pools[d], d);
  }
  void recordStream(const c10::DataPtr& data, c10::Stream stream) override {
    if (!data.get())
      return;
    std::lock_guard lock(memory().lock);
    auto& blocks = memory().pools[data.device().index()].blocks;
    auto& block = blocks.at(static_cast<char*>(data.get()));
    if (Queue* queue = &queue_of(stream); queue != block.queue)
      block.others.insert(queue);
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex d) override {
    std::lock_guard lock(memory().lock);
    return memory().pools[d].stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex d) override {
    std::lock_guard lock(memory().lock);
    auto& s = memory().pools[d].stats;
    for (auto* each : counted(s))
      each->reset_accumulated();
    s.num_alloc_retries = s.num_ooms = s.num_device_alloc = s.num_device_free = 0;
  }
  void resetPeakStats(c10::DeviceIndex d) override {
    std::lock_guard lock(memory().lock);
    for (auto* each : counted(memory().pools[d].stats))
      each->reset_peak();
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex d) override {
    std::lock_guard lock(memory().lock);
    auto& pool = memory().pools[d];
    return {unreserved(pool), pool.capacity};
  }
};

} // namespace

c10::DeviceAllocator& device_allocator() {
  static auto* found = new DeviceAllocator();
  return *found;
}

void set_capacity(int device, size_t num_bytes) {
  std::lock_guard lock(memory().lock);
  memory().pools[device].capacity = num_bytes;
}

} // namespace simgpu

static bool registered = [] {
  c10::SetAllocator(simgpu::kType, &simgpu::device_allocator());
  return true;
}();
