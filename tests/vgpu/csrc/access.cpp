// Faults say here what went wrong; the checks themselves are in shadow.cpp.
#include "access.h"

#include <algorithm>
#include <cstring>

namespace vgpu {
namespace {

std::string text(uint64_t n) { return std::to_string(n); }
std::string bytes_text(uint64_t n) { return text(n) + (n == 1 ? " byte" : " bytes"); }
const char* verb(Access kind) {
  return kind == Access::kRead ? "reads" : kind == Access::kAtomicUpdate ? "updates" : "writes";
}

std::string block_text(const Block& b, uint64_t number) {
  const Dim& g = b.launch->grid;
  return "(" + text(number % g.x) + ", " + text(number / g.x % g.y) + ", " +
         text(number / g.x / g.y) + ")";
}

int lane_at(const Warp& w, const uint64_t* at, uint64_t bytes, uint64_t address) {
  for (uint32_t m = w.exec; m; m &= m - 1) {
    const int lane = std::countr_zero(m);
    if (address + 16 > at[lane] && address < at[lane] + bytes) return lane;
  }
  return std::countr_zero(w.exec);
}

[[noreturn]] void report(const Warp& w, const Instr& in, const uint64_t* at, int bytes,
                         Access kind, bool shared, const Conflict& c) {
  const int lane = lane_at(w, at, uint64_t(bytes), c.address);
  const std::string where = shared ? "shared memory (byte " + text(c.address) + ")"
                                   : "global memory";
  if (c.kind == Conflict::kNotInitialised)
    fault(w, in, lane, std::string(verb(kind)) + " uninitialised " + where);
  if (c.kind == Conflict::kFlying)
    fault(w, in, lane, std::string(verb(kind)) + " " + where +
                           " into which cp.async is still copying: no wait_group has passed");
  const uint64_t number = block_of(c.stamp);  // in shared memory: the warp
  std::string other = "warp " + text(shared ? number : warp_of(c.stamp));
  std::string between = "barrier";
  const bool many_lanes = shared && number == w.index && c.stamp & kManyWarps;
  if (shared && number == w.index) {
    other = many_lanes ? "other lanes" : "lane " + text(warp_of(c.stamp));
    between = "__syncwarp";
  } else if (!shared && number != w.block->number) {
    other += " of block " + block_text(*w.block, number);
    between = "order";
  }
  if (c.stamp & kManyBlocks) other += " (and others)";
  fault(w, in, lane, "race: " + std::string(verb(kind)) + " " + where + " that " + other +
                         (c.other_wrote ? " writes" : many_lanes ? " read" : " reads") +
                         " with no " + between +
                         " between the two");
}

struct Range {
  uint64_t low, high;  // first and last byte
};

// Of the executing lanes' memory, which must be aligned.
Range range_of(const Warp& w, const Instr& in, const uint64_t* at, int bytes) {
  Range r{~0ull, 0};
  uint64_t bits = 0;
  auto widen = [&](int i) {
    r.low = std::min(r.low, at[i]);
    r.high = std::max(r.high, at[i]);
    bits |= at[i];
  };
  if (w.exec == kAllLanes)
    for (int i = 0; i < kLanes; i++) widen(i);
  else
    each_executing(w, widen);
  r.high += uint64_t(bytes) - 1;
  if ((bits & uint64_t(bytes - 1)) == 0) return r;
  each_executing(w, [&](int i) {
    const uint64_t beyond = at[i] & uint64_t(bytes - 1);
    if (beyond)
      fault(w, in, i, "a misaligned access: " + bytes_text(bytes) + " at an address that is " +
                          bytes_text(beyond) + " past a multiple of " + text(bytes));
  });
  return r;
}

bool contiguous(uint32_t exec, const uint64_t* at, uint64_t bytes) {
  if (exec != kAllLanes) return false;
  uint64_t differs = 0;
  for (int i = 0; i < kLanes; i++) differs |= at[i] ^ (at[0] + bytes * uint64_t(i));
  return differs == 0;
}

// 32-byte sectors that the lanes touch; an aligned access of at most 16 bytes lies in one. A real
// allocation begins at one, so that they count from its base.
uint64_t count_sectors(uint32_t exec, const uint64_t* at, uint64_t base) {
  uint64_t sectors[kLanes];
  int n = 0;
  uint64_t last = ~0ull;
  bool ascending = true;
  for (uint32_t m = exec; m; m &= m - 1) {
    const uint64_t sector = (at[std::countr_zero(m)] - base) >> 5;
    if (sector == last) continue;
    if (n && sector < last) ascending = false;
    last = sectors[n++] = sector;
  }
  if (ascending) return uint64_t(n);
  std::sort(sectors, sectors + n);
  return uint64_t(std::unique(sectors, sectors + n) - sectors);
}

void count_global(Block& b, uint32_t exec, const uint64_t* at, int bytes,
                  Access kind, bool dense, uint64_t base) {
  Counters& c = b.counters;
  const uint64_t lanes = uint64_t(std::popcount(exec)), total = lanes * uint64_t(bytes);
  const uint64_t begin = at[0] - base;
  const uint64_t sectors = dense ? ((begin + total - 1) >> 5) - (begin >> 5) + 1
                                 : count_sectors(exec, at, base);
  const uint64_t ideal = std::min(sectors, (total + 31) / 32);
  if (kind == Access::kAtomicUpdate) c.atomics += lanes;
  const bool store = writes(kind);
  (store ? c.store_requests : c.load_requests)++;
  (store ? c.store_sectors : c.load_sectors) += sectors;
  (store ? c.store_sectors_ideal : c.load_sectors_ideal) += ideal;
  (store ? c.store_bytes : c.load_bytes) += total;
}

bool global_access(Warp& w, const Instr& in, const uint64_t* at, int bytes, Access kind) {
  Block& b = *w.block;
  const Range r = range_of(w, in, at, bytes);
  const uint64_t span = r.high - r.low + 1;
  Allocation*& cached = b.last_allocation;
  if (!cached || !cached->contains(r.low, span)) cached = b.launch->memory->find(r.low);
  Allocation* all = cached && cached->contains(r.low, span) ? cached : nullptr;
  if (!all) {
    each_executing(w, [&](int i) {
      const Allocation* a = b.launch->memory->find(at[i]);
      if (a && a->contains(at[i], uint64_t(bytes))) return;
      std::string where = "where no memory is";
      if ((a = b.launch->memory->nearest(at[i]))) {
        const uint64_t end = a->base + a->bytes;
        where = at[i] >= a->base ? bytes_text(at[i] >= end ? at[i] - end : 0) + " past the end"
                                 : bytes_text(a->base - at[i]) + " before the beginning";
        where += " of an allocation of " + bytes_text(a->bytes);
      }
      fault(w, in, i, std::string(verb(kind)) + " " + bytes_text(bytes) + " out of bounds, " +
                          where);
    });
  }
  const uint64_t stamp = b.global_stamp(w) | (in.strong ? kAtomic : 0);
  const bool dense = contiguous(w.exec, at, uint64_t(bytes));
  auto run = [&](uint64_t start, uint64_t size) {
    Allocation* a = all ? all : b.launch->memory->find(start);
    const Conflict c = inspect(*a, start, size, kind, stamp, b);
    if (c.kind != Conflict::kNone) report(w, in, at, bytes, kind, false, c);
    mark(*a, start, size, kind, stamp);
  };
  if (!all) each_executing(w, [&](int i) { run(at[i], uint64_t(bytes)); });
  else if (dense) run(at[0], uint64_t(kLanes) * uint64_t(bytes));
  else if (!check_lanes(*all, w.exec, at, bytes, kind, stamp, 0))
    each_run(w.exec, at, uint64_t(bytes), run);
  count_global(b, w.exec, at, bytes, kind, dense, all ? all->base & ~15ull : 0);
  return dense;
}

// Shared memory serves 128 bytes per clock: 32 lanes of 4 bytes, 16 of 8, 8 of 16. Lanes of such
// a phase that want different words of one bank take turns.
void count_shared(Block& b, uint32_t exec, const uint64_t* at, int bytes) {
  Counters& c = b.counters;
  const int shift = bytes == 16 ? 4 : bytes == 8 ? 3 : 2, phase = kLanes >> (shift - 2);
  auto bank = [&](int i) { return uint32_t(at[i] >> shift) & uint32_t(phase - 1); };
  auto lanes_of = [&](int first) {
    return exec & (phase == kLanes ? kAllLanes : ((1u << phase) - 1) << first);
  };
  uint64_t phases = 0;
  for (int first = 0; first < kLanes; first += phase) phases += lanes_of(first) != 0;
  c.shared_requests++;
  c.shared_wavefronts_ideal += phases;
  uint32_t banks = 0;  // a bit per bank and phase
  for (int i = 0; i < kLanes; i++)
    banks |= (exec >> i & 1) << (bank(i) + uint32_t(i & -phase));
  if (std::popcount(banks) == std::popcount(exec)) {  // to each lane its own
    c.shared_wavefronts += phases;
    return;
  }
  for (int first = 0; first < kLanes; first += phase) {
    uint64_t units[kLanes];
    uint32_t seen = 0;
    bool conflict = false;
    for (uint32_t m = lanes_of(first); m; m &= m - 1) {
      const int i = std::countr_zero(m);
      const uint64_t unit = at[i] >> shift;
      conflict = conflict || ((seen >> bank(i) & 1) && units[bank(i)] != unit);
      units[bank(i)] = unit;
      seen |= 1u << bank(i);
    }
    if (!conflict) {
      c.shared_wavefronts += seen != 0;
      continue;
    }
    int n = 0;
    for (uint32_t m = lanes_of(first); m; m &= m - 1)
      units[n++] = at[std::countr_zero(m)] >> shift;
    std::sort(units, units + n);
    n = int(std::unique(units, units + n) - units);
    int depth[kLanes] = {}, most = 0;
    for (int i = 0; i < n; i++) most = std::max(most, ++depth[units[i] % uint64_t(phase)]);
    c.shared_wavefronts += uint64_t(most);
  }
}

// Whether a lane finds the value that it stores there already. Some compilers let several warps
// store the same values.
bool rewrites(const Warp& w, const Instr& in, int lane, uint64_t at) {
  const uint32_t* registers = w.block->kernel->lists.data() + in.list;
  const int element = in.bytes / in.count;
  bool same = true;
  for (int k = 0; k < in.count; k++)
    same = same && !std::memcmp(w.block->shared.data() + at + k * element,
                                w.src<uint8_t>(registers[k]) + lane * int(in.d), size_t(element));
  return same;
}

struct Unordered : Order {
  bool ordered(uint64_t) const override { return false; }
};

bool shared_access(Warp& w, const Instr& in, const uint64_t* at, int bytes, Access kind) {
  Block& b = *w.block;
  const uint64_t size = b.launch->shared_bytes;
  const Range r = range_of(w, in, at, bytes);
  if (r.high >= size || r.low >= size) each_executing(w, [&](int i) {
    if (at[i] + uint64_t(bytes) > size || at[i] >= size)
      fault(w, in, i, std::string(verb(kind)) + " " + bytes_text(bytes) + " at byte " +
                          text(at[i]) + " of shared memory, but the block has " +
                          bytes_text(size) + " (" + text(b.kernel->static_shared) +
                          " static, " + text(b.launch->dynamic_shared) + " dynamic)");
  });
  const uint64_t stamp = b.shared_stamp(w) | (in.strong ? kAtomic : 0);
  const bool dense = contiguous(w.exec, at, uint64_t(bytes));
  if (!check_lanes(b.shared_shadow, w.exec, at, bytes, kind, stamp, kWarpUnit)) {
    const auto length = uint64_t(bytes);
    each_executing(w, [&](int i) {
      const uint64_t own = stamp + uint64_t(i) * kWarpUnit;
      const bool same = kind == Access::kWrite && rewrites(w, in, i, at[i]);
      const Conflict c = inspect(b.shared_shadow, at[i], length, kind, own, Unordered(), same);
      if (c.kind != Conflict::kNone) report(w, in, at, bytes, kind, true, c);
    });
    each_executing(w, [&](int i) {
      mark(b.shared_shadow, at[i], length, kind, stamp + uint64_t(i) * kWarpUnit);
    });
  }
  count_shared(b, w.exec, at, bytes);
  if (kind == Access::kAtomicUpdate) b.counters.atomics += uint64_t(std::popcount(w.exec));
  return dense;
}

void local_access(Warp& w, const Instr& in, const uint64_t* at, int bytes, Access kind) {
  range_of(w, in, at, bytes);
  const uint64_t size = w.block->kernel->local_bytes;
  each_executing(w, [&](int i) {
    if (at[i] + uint64_t(bytes) > size || at[i] >= size)
      fault(w, in, i, std::string(verb(kind)) + " " + bytes_text(bytes) + " at byte " +
                          text(at[i]) + " of local memory, but a thread has " +
                          bytes_text(size));
    uint8_t* init = w.local_init + uint64_t(i) * size + at[i];
    if (kind == Access::kWrite) std::fill(init, init + bytes, kInitialised);
    else if (std::find(init, init + bytes, kUninitialised) != init + bytes)
      fault(w, in, i, "reads uninitialised local memory");
  });
}

void param_access(Warp& w, const Instr& in, const uint64_t* at, int bytes, Access kind) {
  const uint64_t size = w.block->launch->params.size();
  each_executing(w, [&](int i) {
    if (at[i] + uint64_t(bytes) > size || at[i] >= size)
      fault(w, in, i, "an access beyond the kernel's parameters");
    if (kind != Access::kRead) fault(w, in, i, "writes to the kernel's parameters");
  });
}

}  // namespace

Addresses addresses(const Warp& w, const Instr&, uint32_t reg, bool wide, int64_t offset) {
  Addresses a;
  if (wide) {
    const uint64_t* from = w.src<uint64_t>(reg);
    for (int i = 0; i < kLanes; i++) a.at[i] = from[i] + uint64_t(offset);
  } else {
    const uint32_t* from = w.src<uint32_t>(reg);
    for (int i = 0; i < kLanes; i++) a.at[i] = from[i] + uint32_t(offset);
  }
  return a;
}

bool access(Warp& w, const Instr& in, Space space, Addresses& a, int bytes, Access kind) {
  Block& b = *w.block;
  if (space == Space::kGeneric) {
    const uint64_t window = a.at[std::countr_zero(w.exec)] & kWindowMask;
    const uint32_t here = lane_mask([&](int i) { return (a.at[i] & kWindowMask) == window; });
    const uint32_t all = w.exec;
    if ((all & here) != all) {  // lanes in several spaces: one after the other
      w.exec = all & ~here;
      access(w, in, space, a, bytes, kind);
    }
    w.exec = all & here;
    if (window)
      each_executing(w, [&](int i) { a.at[i] &= ~kWindowMask; });
    const Space real = window == kSharedWindow  ? Space::kShared
                       : window == kLocalWindow ? Space::kLocal
                       : window == kParamWindow ? Space::kParam
                                                : Space::kGlobal;
    const bool dense = access(w, in, real, a, bytes, kind);
    w.exec = all;
    return dense && (all & here) == all;
  }
  if (space == Space::kGlobal) return global_access(w, in, a.at, bytes, kind);
  bool dense = false;
  uint64_t host = 0, per_lane = 0;
  if (space == Space::kShared) {
    dense = shared_access(w, in, a.at, bytes, kind);
    host = reinterpret_cast<uint64_t>(b.shared.data());
  } else if (space == Space::kLocal) {
    local_access(w, in, a.at, bytes, kind);
    host = reinterpret_cast<uint64_t>(w.local);
    per_lane = b.kernel->local_bytes;
  } else {
    param_access(w, in, a.at, bytes, kind);
    host = reinterpret_cast<uint64_t>(b.launch->params.data());
  }
  if (w.exec == kAllLanes)
    for (int i = 0; i < kLanes; i++) a.at[i] += host + per_lane * uint64_t(i);
  else
    each_executing(w, [&](int i) { a.at[i] += host + per_lane * uint64_t(i); });
  return dense;
}

void publish(Warp& w, uint64_t address, bool release, bool acquire) {
  Block& b = *w.block;
  const int64_t mine = release ? int64_t(b.interval) : b.fence_interval;
  const std::lock_guard lock(b.launch->published_lock);
  if (mine < 0 && !b.launch->published.count(address)) return;
  Known& there = b.launch->published[address];
  auto join = [](Known& to, const Known& from) {
    for (const auto& [block, interval] : from) to[block] = std::max(to[block], interval);
  };
  if (acquire) join(b.known, there);
  if (mine >= 0) {
    there[b.number] = std::max(there[b.number], uint64_t(mine));
    join(there, b.known);
  }
}

}  // namespace vgpu
