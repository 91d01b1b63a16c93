// One warp's access to memory: addresses, bounds, alignment, initialisation, races, counters.
#pragma once
#include "warp.h"

namespace vgpu {

// 32 addresses; those of lanes that do not execute mean nothing.
struct Addresses {
  alignas(64) uint64_t at[kLanes];
};

Addresses addresses(const Warp& w, const Instr& in, uint32_t reg, bool wide, int64_t offset);
inline Addresses addresses(const Warp& w, const Instr& in) {
  return addresses(w, in, in.a, in.wide_address, in.imm);
}

// Checks and counts an access of `bytes` per executing lane, and makes the addresses ones of the
// host. True: the lanes are contiguous, all 32 of them.
bool access(Warp& w, const Instr& in, Space space, Addresses& a, int bytes, Access kind);

// Orderings between blocks: what this block fenced becomes known through the atomic at `address`,
// and what others published there becomes known to this block.
void publish(Warp& w, uint64_t address, bool release, bool acquire);

// Calls f(start, size) for the executing lanes' memory, adjacent lanes joined.
template <class F> void each_run(uint32_t exec, const uint64_t* at, uint64_t bytes, F f) {
  uint64_t start = at[std::countr_zero(exec)], end = start;
  for (uint32_t m = exec; m; m &= m - 1) {
    const uint64_t here = at[std::countr_zero(m)];
    if (here == end) {
      end += bytes;
    } else if (here + bytes != end) {  // not the lane before's very address
      f(start, end - start);
      start = here;
      end = here + bytes;
    }
  }
  f(start, end - start);
}

}  // namespace vgpu
