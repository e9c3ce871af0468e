// Host memory that a copy may read or write at any time: from our allocator (which does
// not reuse it before the copies that it knows of are done), or registered by address
// (where the owner has to wait).
#include "memory.h"

#include <c10/util/Exception.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <vector>

namespace simgpu {
namespace {

constexpr int kInvalid = 1; // cudaErrorInvalidValue
constexpr int kAlreadyRegistered = 712;
constexpr int kNotRegistered = 713;

struct Range {
  size_t size;
  bool registered;
  bool used;
  std::vector<Mark> uses;
};

struct Ranges {
  std::mutex lock;
  std::map<char*, Range> all;
};

Ranges& ranges() {
  static auto* found = new Ranges();
  return *found;
}

// The range that holds `at`.
std::map<char*, Range>::iterator find(char* at) {
  auto& all = ranges().all;
  auto found = all.upper_bound(at);
  if (found == all.begin())
    return all.end();
  --found;
  return at < found->first + found->second.size ? found : all.end();
}

bool is_idle(const Range& range) {
  for (auto mark : range.uses)
    if (!passed(mark))
      return false;
  return true;
}

void* take_pinned(size_t n) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  const size_t size = (n + page - 1) / page * page;
  std::lock_guard lock(ranges().lock);
  for (auto& [at, range] : ranges().all)
    if (!range.registered && !range.used && range.size == size && is_idle(range)) {
      range.used = true;
      range.uses.clear();
      std::memset(at, kPoison, size);
      return at;
    }
  void* made = nullptr;
  TORCH_CHECK(!posix_memalign(&made, page, size), "simgpu: no host memory is left");
  std::memset(made, kPoison, size);
  ranges().all[static_cast<char*>(made)] = {size, false, true, {}};
  return made;
}

void give_pinned_back(void* address) {
  if (is_forked())
    return;
  std::lock_guard lock(ranges().lock);
  auto& [at, range] = *ranges().all.find(static_cast<char*>(address));
  range.used = false;
  if (is_idle(range))
    std::memset(at, kPoison, range.size);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    void* at = n ? take_pinned(n) : nullptr;
    return {at, at, n ? &give_pinned_back : &nothing, c10::Device(c10::DeviceType::CPU)};
  }
  static void nothing(void*) {}
  void copy_data(void* to, const void* from, size_t n) const override {
    std::memcpy(to, from, n);
  }
};

} // namespace

c10::Allocator& pinned_allocator() {
  static auto* found = new PinnedAllocator();
  return *found;
}

bool is_pinned(const void* address) {
  std::lock_guard lock(ranges().lock);
  auto found = find(static_cast<char*>(const_cast<void*>(address)));
  return found != ranges().all.end() && (found->second.registered || found->second.used);
}

bool is_pinned_range(const void* address, size_t num_bytes) {
  if (num_bytes == 0)
    return true;
  auto* first = static_cast<char*>(const_cast<void*>(address));
  std::lock_guard lock(ranges().lock);
  auto end = ranges().all.end();
  const auto begins = find(first), ends = find(first + num_bytes - 1);
  TORCH_CHECK(
      begins == ends,
      "simgpu: invalid argument: a copy from or to host memory of which a part is "
      "registered, or which is registered in parts");
  return begins != end;
}

void record_pinned_use(const void* address, Mark mark) {
  std::lock_guard lock(ranges().lock);
  auto found = find(static_cast<char*>(const_cast<void*>(address)));
  if (found != ranges().all.end() && !found->second.registered)
    found->second.uses.push_back(mark);
}

int register_host(uintptr_t address, size_t num_bytes) {
  auto* at = reinterpret_cast<char*>(address);
  if (!at || num_bytes == 0)
    return kInvalid;
  std::lock_guard lock(ranges().lock);
  auto after = ranges().all.lower_bound(at);
  const bool overlaps = find(at) != ranges().all.end() ||
      (after != ranges().all.end() && after->first < at + num_bytes);
  if (overlaps)
    return kAlreadyRegistered;
  ranges().all[at] = {num_bytes, true, true, {}};
  return 0;
}

int unregister_host(uintptr_t address) {
  std::lock_guard lock(ranges().lock);
  auto found = ranges().all.find(reinterpret_cast<char*>(address));
  if (found == ranges().all.end() || !found->second.registered)
    return kNotRegistered;
  ranges().all.erase(found);
  return 0;
}

} // namespace simgpu
