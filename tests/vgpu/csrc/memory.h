// The allocations that kernels may touch, and their shadows.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

#include "shadow.h"

namespace vgpu {

// Pages that cost nothing until they are touched. Up to kLargest bytes they are kept when given
// back: the system would clear them anew, and interrupt the other cores, at every launch.
class Pages {
 public:
  explicit Pages(bool zeroed) : zeroed_(zeroed) {}
  Pages(const Pages&) = delete;
  ~Pages() { clear(); }
  void* take(size_t bytes);  // zeroed, or with what was in them when they were given back
  void give(void* pages, size_t bytes);
  void clear();

 private:
  static constexpr size_t kLargest = size_t{256} << 20;
  static size_t rounded(size_t bytes);
  const bool zeroed_;
  std::map<size_t, std::vector<void*>> spare_;
};

struct Allocation : Shadow {
  std::vector<uint64_t> members;  // the pointers under which it was added
  size_t stamp_bytes = 0;         // taken for `written` and for `read`, each
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
  Pages pages_{true}, stamps_{false};  // stamps of earlier launches mean nothing
  std::vector<Allocation> allocations_;  // by base
  uint64_t launch_ = 0;
};

}  // namespace vgpu
