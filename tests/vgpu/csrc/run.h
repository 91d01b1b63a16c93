// Runs the blocks of a launch.
#pragma once
#include <memory>
#include <vector>

#include "warp.h"

namespace vgpu {

// Storage of one CPU thread that runs blocks, one after the other.
class Worker {
 public:
  explicit Worker(Launch& launch);
  void run(uint64_t number);  // one block
  const Counters& counters() const { return block_.counters; }
  const std::vector<uint64_t>& executions() const { return block_.executions; }

 private:
  void begin(uint64_t number);
  void run_warp(Warp& w, uint32_t budget);
  [[noreturn]] void deadlock();

  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  Block block_;
  std::unique_ptr<uint8_t, Free> registers_;
  std::vector<uint8_t> local_, local_init_;
  std::vector<Warp*> ready_;
};

}  // namespace vgpu
