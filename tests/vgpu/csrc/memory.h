// The allocations that kernels may touch, and their shadows.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "shadow.h"

namespace vgpu {

struct Allocation : Shadow {
  std::vector<uint64_t> members;  // the pointers under which it was added
  size_t stamp_bytes = 0;         // mapped for `written` and for `read`, each
};

class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  ~Memory();
  void add(uint64_t base, uint64_t bytes, bool initialised);
  void remove(uint64_t base);
  void mark(uint64_t base, uint64_t bytes, bool initialised);

  void begin_launch(int granule);
  uint64_t launch() const { return launch_; }
  // Bytes that this launch has read and written, each counted once.
  void count_touched(uint64_t* read, uint64_t* written);

  Allocation* find(uint64_t address);
  const Allocation* nearest(uint64_t address) const;  // for messages; null if there is none

 private:
  void release(Allocation& allocation);
  std::vector<Allocation> allocations_;  // by base
  uint64_t launch_ = 0;
};

}  // namespace vgpu
