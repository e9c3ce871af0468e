// The addresses of the devices: reserved twice, once for tensors, where nothing can be
// read, and once for kernels.
#include "memory.h"

#include <c10/util/Exception.h>
#include <sys/mman.h>

namespace simgpu {
namespace {

constexpr size_t kSpan = size_t(1) << 36; // of a device

char* reserve(int protection) {
  void* found = mmap(
      nullptr, kSpan * kNumDevices, protection,
      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  TORCH_CHECK(found != MAP_FAILED, "simgpu: no addresses are left for its memory");
  return static_cast<char*>(found);
}

char* given() {
  static char* found = reserve(PROT_NONE);
  return found;
}

char* for_kernels() {
  static char* found = reserve(PROT_READ | PROT_WRITE);
  return found;
}

} // namespace

char* first_address(int device) {
  return given() + device * kSpan;
}

bool is_device_address(const void* address) {
  return address >= first_address(0) && address < first_address(kNumDevices);
}

void* real(const void* address) {
  if (!address)
    return nullptr;
  TORCH_CHECK(is_device_address(address), "simgpu: not an address of the device");
  return for_kernels() + (static_cast<const char*>(address) - given());
}

int device_of(const void* address) {
  return int((static_cast<const char*>(address) - given()) / kSpan);
}

} // namespace simgpu
