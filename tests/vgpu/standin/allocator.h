// Which host memory stands for which device allocation, and which of its bytes were never written.
#pragma once
#include <cstddef>
#include <vector>

namespace vgpu {

class Device;

void* allocate(size_t bytes);  // filled with the poison of allocator.cpp
void release(void* data);

// The allocations that any of the pointers points into, as the device's memory while this lives.
// Other mapped memory is lent from the pointer to the next allocation, and counts as written.
class LentMemory {
 public:
  LentMemory(Device& device, const std::vector<const void*>& pointers);
  ~LentMemory();

 private:
  Device& device_;
  std::vector<char*> lent_, foreign_;
};

}  // namespace vgpu
