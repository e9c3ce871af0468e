// What torch asks an accelerator for: devices, streams, events, generators.
#include "tensors.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <atomic>
#include <memory>
#include <vector>

namespace simgpu {
namespace {

struct Event {
  Mark mark;
  std::shared_ptr<std::atomic<double>> at; // milliseconds; negative before it
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override {
    return kType;
  }
  c10::Device getDevice() const override {
    return {kType, c10::DeviceIndex(current_device())};
  }
  void setDevice(c10::Device device) const override {
    set_current_device(device.index());
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    const auto before = getDevice();
    setDevice(device);
    return before;
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0 && device.index() < kNumDevices)
      set_current_device(device.index());
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return kNumDevices;
  }
  c10::Stream getStream(c10::Device device) const override {
    return current_stream(given_or_current(device).index());
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, given_or_current(device));
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    return next_stream(given_or_current(device).index());
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return getNewStream(device, 0);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return set_current_stream(stream);
  }
  void* getStreamNativeHandle(c10::Stream stream) const override {
    return &queue_of(stream);
  }
  bool queryStream(const c10::Stream& stream) const override {
    return passed(end_of(queue_of(stream)));
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    wait(end_of(queue_of(stream)), Sync::stream);
  }
  void synchronizeDevice(const c10::DeviceIndex device) const override {
    wait_for_device(device, Sync::device);
  }
  void recordDataPtrOnStream(
      const c10::DataPtr& data, const c10::Stream& stream) const override {
    device_allocator().recordStream(data, stream);
  }

  void record(
      void** event, const c10::Stream& stream, const c10::DeviceIndex,
      const c10::EventFlag) const override {
    if (!*event)
      *event = new Event();
    auto& made = *static_cast<Event*>(*event);
    auto at = std::make_shared<std::atomic<double>>(-1);
    made.at = at;
    made.mark = push(queue_of(stream), [at] { *at = milliseconds(); });
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event)
      push_wait(queue_of(stream), static_cast<Event*>(event)->mark);
  }
  bool queryEvent(void* event) const override {
    return !event || passed(static_cast<Event*>(event)->mark);
  }
  void synchronizeEvent(void* event) const override {
    if (event)
      wait_for_event(static_cast<Event*>(event)->mark);
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<Event*>(event);
  }
  double elapsedTime(void* first, void* last, const c10::DeviceIndex) const override {
    TORCH_CHECK(first && last, "simgpu: both events must have been recorded");
    const double begin = *static_cast<Event*>(first)->at;
    const double end = *static_cast<Event*>(last)->at;
    TORCH_CHECK(begin >= 0 && end >= 0, "simgpu: both events must have passed");
    return end - begin;
  }
};

// The CPU's generator under the device's name. How it goes on is known when a kernel is
// queued (see `draw` in dispatch.cpp): numbers do not depend on when kernels run.
struct Generator final : c10::GeneratorImpl {
  explicit Generator(int device)
      : GeneratorImpl(
            {kType, c10::DeviceIndex(device)},
            c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        cpu(at::detail::createCPUGenerator()) {}
  void set_current_seed(uint64_t seed) override {
    cpu.set_current_seed(seed);
  }
  void set_offset(uint64_t offset) override {
    cpu.set_offset(offset);
  }
  uint64_t get_offset() const override {
    return cpu.get_offset();
  }
  uint64_t current_seed() const override {
    return cpu.current_seed();
  }
  uint64_t seed() override {
    return cpu.seed();
  }
  void set_state(const c10::TensorImpl& state) override {
    cpu.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return cpu.unsafeGetGeneratorImpl()->get_state();
  }
  Generator* clone_impl() const override {
    auto* made = new Generator(device().index());
    made->cpu = cpu.clone();
    return made;
  }

  mutable at::Generator cpu;
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }
  c10::DeviceIndex deviceCount() const override {
    return kNumDevices;
  }
  void setCurrentDevice(c10::DeviceIndex device) const override {
    set_current_device(device);
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return c10::DeviceIndex(current_device());
  }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    const auto before = getCurrentDevice();
    set_current_device(device);
    return before;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
    return exchangeDevice(device);
  }
  bool isPinnedPtr(const void* address) const override {
    return is_pinned(address);
  }
  at::Allocator* getPinnedMemoryAllocator() const override {
    return &pinned_allocator();
  }
  at::Device getDeviceFromPtr(void* address) const override {
    TORCH_CHECK(is_device_address(address), "simgpu: not an address of the device");
    return {kType, c10::DeviceIndex(device_of(address))};
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex device) const override {
    return default_generator(device < 0 ? current_device() : device);
  }
  at::Generator getNewGenerator(c10::DeviceIndex device) const override {
    return make_generator(device < 0 ? current_device() : device);
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t n) const override {
    resize_storage(storage, n);
  }
};

} // namespace

at::Generator make_generator(int device) {
  return at::make_generator<Generator>(device);
}

const at::Generator& default_generator(int device) {
  static auto* found = [] {
    auto* made = new std::vector<at::Generator>();
    for (int d = 0; d < kNumDevices; ++d)
      made->push_back(make_generator(d));
    return made;
  }();
  return found->at(device);
}

at::Generator& cpu_generator(const at::Generator& generator) {
  TORCH_CHECK(
      generator.device().type() == kType, "Expected a '", c10::Device(kType),
      "' device type for generator but found '", generator.device(), "'");
  return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->cpu;
}

void register_hooks() {
  static c10::impl::DeviceGuardImplRegistrar guard(kType, new Guard());
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  pinned_allocator();
  at::globalContext().lazyInitDevice(kType);
}

} // namespace simgpu
