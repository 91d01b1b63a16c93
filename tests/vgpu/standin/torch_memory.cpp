// Makes every CPU tensor of torch an allocation of allocator.h, of exactly its size. Uses c10's C++
// interface, so that it is built for the torch at hand.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <malloc.h>

#include <cstring>

#include "allocator.h"

namespace {

struct Exact final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = vgpu::allocate(bytes);
    TORCH_CHECK(data || bytes == 0, "vgpu: no memory for ", bytes, " bytes");
    return {data, data, vgpu::release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return vgpu::release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

}  // namespace

extern "C" __attribute__((visibility("default"))) void vgpu_own_torch_memory() {
  static Exact exact;
  // Memory that is freed is kept for the next tensor.
  mallopt(M_MMAP_THRESHOLD, 32 << 20);
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
  c10::SetCPUAllocator(&exact, /*priority=*/100);
}
