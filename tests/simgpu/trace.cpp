// The device's part of a trace, as torch's profiler (libkineto) asks for it: kernels,
// copies and fills by device and stream, waits of the host by thread.
#include "trace.h"

#include <libkineto.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace simgpu {
namespace {

using libkineto::ActivityType;
using Activity = libkineto::GenericTraceActivity;

const std::set<ActivityType> kTypes = {
    ActivityType::CONCURRENT_KERNEL, ActivityType::GPU_MEMCPY, ActivityType::GPU_MEMSET,
    ActivityType::PRIVATEUSE1_RUNTIME};

// Calls by the names that CUDA's have, in the order of `Sync`.
constexpr const char* kWaits[] = {
    "simgpuStreamSynchronize", "simgpuDeviceSynchronize", "simgpuEventSynchronize",
    "simgpuEventSynchronize",  "simgpuMemcpy",            "simgpuMemcpy",
    "simgpuStreamSynchronize", "simgpuFree"};
static_assert(std::size(kWaits) == size_t(Sync::count));

struct Recorded {
  std::atomic<bool> is_on{false};
  std::mutex lock;
  std::unique_ptr<libkineto::CpuTraceBuffer> buffer;
};

Recorded& recorded() {
  static auto* found = new Recorded();
  return *found;
}

int64_t now() {
  using Clock = std::chrono::system_clock;
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             Clock::now().time_since_epoch())
      .count();
}

void add(
    ActivityType type, const char* name, int64_t begin, int device, int resource) {
  auto& r = recorded();
  std::lock_guard lock(r.lock);
  if (!r.buffer)
    return;
  auto made = std::make_unique<Activity>(r.buffer->span, type, name);
  made->startTime = begin;
  made->endTime = now();
  made->device = device;
  made->resource = resource;
  made->threadId = resource;
  r.buffer->activities.push_back(std::move(made));
}

ActivityType type_of(const char* name) {
  if (std::strncmp(name, "Memcpy", 6) == 0)
    return ActivityType::GPU_MEMCPY;
  return std::strncmp(name, "Memset", 6) == 0 ? ActivityType::GPU_MEMSET
                                              : ActivityType::CONCURRENT_KERNEL;
}

struct Session final : libkineto::IActivityProfilerSession {
  void start() override {
    auto& r = recorded();
    std::lock_guard lock(r.lock);
    r.buffer = std::make_unique<libkineto::CpuTraceBuffer>();
    r.buffer->span = libkineto::TraceSpan(now(), 0, "simgpu");
    r.is_on = true;
    status_ = libkineto::TraceStatus::RECORDING;
  }
  void stop() override {
    auto& r = recorded();
    std::lock_guard lock(r.lock);
    r.is_on = false;
    buffer_ = std::move(r.buffer);
    buffer_->span.endTime = now();
    buffer_->gpuOpCount = int(buffer_->activities.size());
    status_ = libkineto::TraceStatus::PROCESSING;
  }
  std::vector<std::string> errors() override {
    return {};
  }
  void processTrace(libkineto::ActivityLogger& logger) override {
    for (const auto& each : buffer_->activities)
      each->log(logger);
  }
  std::unique_ptr<libkineto::DeviceInfo> getDeviceInfo() override {
    return {};
  }
  std::vector<libkineto::ResourceInfo> getResourceInfos() override {
    return {};
  }
  std::unique_ptr<libkineto::CpuTraceBuffer> getTraceBuffer() override {
    return std::move(buffer_);
  }

 private:
  std::unique_ptr<libkineto::CpuTraceBuffer> buffer_;
};

struct Profiler final : libkineto::IActivityProfiler {
  const std::string& name() const override {
    static const std::string found = "simgpu";
    return found;
  }
  const std::set<ActivityType>& availableActivities() const override {
    return kTypes;
  }
  std::unique_ptr<libkineto::IActivityProfilerSession> configure(
      const std::set<ActivityType>& asked, const libkineto::Config&) override {
    if (!asked.count(ActivityType::PRIVATEUSE1_RUNTIME))
      return {};
    return std::make_unique<Session>();
  }
  std::unique_ptr<libkineto::IActivityProfilerSession> configure(
      int64_t, int64_t, const std::set<ActivityType>& asked,
      const libkineto::Config& config) override {
    return configure(asked, config);
  }
};

} // namespace

int64_t trace_time() {
  return recorded().is_on ? now() : 0;
}

void trace_work(int device, int stream, const char* name, int64_t begin) {
  if (begin)
    add(type_of(name), name, begin, device, stream);
}

TracedWait::~TracedWait() {
  if (begin_)
    add(ActivityType::PRIVATEUSE1_RUNTIME, kWaits[size_t(reason_)], begin_,
        libkineto::processId(), libkineto::systemThreadId());
}

void register_profiler() {
  libkineto::api().registerProfilerFactory([] { return std::make_unique<Profiler>(); });
}

} // namespace simgpu
