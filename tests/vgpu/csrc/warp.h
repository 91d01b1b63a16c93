// A warp and its block while they run, and the 32-lane loops that instructions are made of.
#pragma once
#include <algorithm>
#include <array>
#include <atomic>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "code.h"
#include "memory.h"
#include "types.h"

namespace vgpu {

inline constexpr uint32_t kAllLanes = ~0u;
inline constexpr int kLanes = 32;

// Windows of the generic address space; global addresses are host addresses, below all of them.
inline constexpr uint64_t kSharedWindow = 1ull << 60, kLocalWindow = 2ull << 60,
                          kParamWindow = 3ull << 60, kWindowMask = ~((1ull << 60) - 1);

struct Block;

// cp.async copies of one instruction, on their way.
struct Transfer {
  Transfer() {}  // not zeroed
  uint32_t lanes;
  uint32_t group;
  uint8_t bytes;
  uint32_t to[kLanes];
  alignas(16) uint8_t data[kLanes][16];
};

// Lanes that are not running now: elsewhere in the code, or parked at an instruction that needs
// more lanes than have arrived.
struct Group {
  uint32_t pc, lanes;
  bool parked;
};

struct Warp {
  enum State : uint8_t { kReady, kAtBarrier, kDone };

  uint8_t* base[2] = {};   // registers, constants
  uint32_t exec = 0;       // lanes that execute the current instruction
  uint32_t active = 0;     // lanes of the running group
  uint32_t alive = 0;      // lanes that have not exited
  uint32_t lanes = 0;      // lanes that have a thread
  uint32_t pc = 0;         // of the next instruction
  uint32_t merge_pc = 0;   // where the nearest other group waits
  uint32_t index = 0;      // in the block
  uint32_t carry = 0;      // condition code of add.cc and its kin
  State state = kReady;
  bool stop = false;       // leave the loop: barrier, exit
  uint64_t sync_interval = 0;  // bar.warp.sync so far
  std::vector<Group> groups;
  Block* block = nullptr;
  uint8_t* local = nullptr;       // local_bytes per lane
  uint8_t* local_init = nullptr;  // the same, whether written
  std::vector<Transfer> transfers;
  std::array<uint32_t, kLanes> async_group{};  // number of the open group

  template <class T> T* reg(uint32_t operand) { return reinterpret_cast<T*>(base[0] + operand); }
  template <class T> const T* src(uint32_t operand) const {
    return reinterpret_cast<const T*>(base[operand >> 31] + (operand & ~kConstant));
  }
  uint32_t pred(uint32_t operand) const { return *src<uint32_t>(operand); }
  void set_pred(uint32_t operand, uint32_t value) {
    if (operand == kNoOperand) return;
    uint32_t& p = *reg<uint32_t>(operand);
    p = (p & ~exec) | (value & exec);
  }
};

// Names: counts of one worker, added up at the end of a launch.
struct Counters {
  uint64_t shared_requests = 0, shared_wavefronts = 0, shared_wavefronts_ideal = 0;
  uint64_t load_requests = 0, load_sectors = 0, load_sectors_ideal = 0, load_bytes = 0;
  uint64_t store_requests = 0, store_sectors = 0, store_sectors_ideal = 0, store_bytes = 0;
  uint64_t atomics = 0, barriers = 0;
};

// What another block has published through an atomic: that block's interval at that time.
using Known = std::map<uint64_t, uint64_t>;

struct Launch {
  const Kernel* kernel;
  Memory* memory;
  Dim grid, block;
  size_t dynamic_shared, shared_bytes;
  std::vector<uint8_t> params;
  uint64_t seed, limit;
  std::mutex published_lock;
  std::map<uint64_t, Known> published;  // by address of the atomic
  std::atomic<bool> stopped{false};
};

struct Barrier {
  uint32_t arrived = 0, expected = 0;  // threads
  bool all = true, any = false;        // of bar.red
  uint32_t count = 0;
  std::vector<Warp*> waiting;
};

struct Block : Order {
  Launch* launch = nullptr;
  const Kernel* kernel = nullptr;
  Dim index;
  uint64_t number = 0;
  uint32_t threads = 0;
  std::vector<Warp> warps;
  std::array<Barrier, 16> barriers;
  std::vector<uint8_t> shared, shared_init;
  std::vector<uint64_t> shared_stamps;
  Shadow shared_shadow;
  uint64_t interval = 0;         // barriers of this block so far
  uint64_t shared_interval = 0;  // barriers that this worker has seen
  uint64_t random = 0;
  uint64_t executed = 0;         // warp instructions of this block
  Allocation* last_allocation = nullptr;
  Known known;
  int64_t fence_interval = -1;   // of the last fence: what an atomic publishes
  Counters counters;
  std::vector<uint64_t> executions;  // per instruction

  bool ordered(uint64_t stamp) const override {
    if (known.empty()) return false;
    if (stamp & kManyBlocks) return true;
    const auto found = known.find(block_of(stamp));
    return found != known.end() && interval_of(stamp) <= found->second;
  }
  uint64_t global_stamp(const Warp& w) const {
    return launch->memory->launch() * kLaunchUnit + number * kBlockUnit +
           interval * kIntervalUnit + w.index * kWarpUnit;
  }
  uint64_t shared_stamp(const Warp& w) const {  // of lane 0; see shadow.h
    return shared_interval * kLaunchUnit + w.index * kBlockUnit +
           w.sync_interval % kMaxInterval * kIntervalUnit;
  }
  // All that was done in shared memory is now in order.
  void next_shared_interval() {
    if (++shared_interval <= kMaxLaunch) return;
    shared_interval = 1;
    std::fill(shared_stamps.begin(), shared_stamps.end(), 0);
  }
  uint64_t next_random() {
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    return random;
  }
};

[[noreturn]] void fault(const Warp& w, const Instr& in, int lane, const std::string& reason);

// Gives the lanes in `members` time to arrive at this instruction. False: they are not all here
// yet, and this group is parked.
bool converge(Warp& w, const Instr& in, uint32_t members);
void reschedule(Warp& w);
// converge for the lanes that the mask operand names, after checking the mask itself.
bool arrive_together(Warp& w, const Instr& in, uint32_t mask_operand, bool exited_allowed);

// d[i] = f(i) for the executing lanes. f must not trap for the others.
template <class T, class F> inline void each_lane(Warp& w, uint32_t dst, F f) {
  T* d = w.reg<T>(dst);
  if (w.exec == kAllLanes) {
#pragma GCC ivdep
    for (int i = 0; i < kLanes; i++) d[i] = f(i);
  } else {
    alignas(64) T t[kLanes];
    for (int i = 0; i < kLanes; i++) t[i] = f(i);
    const uint32_t exec = w.exec;
#pragma GCC ivdep
    for (int i = 0; i < kLanes; i++) d[i] = exec >> i & 1 ? t[i] : d[i];
  }
}

template <class F> inline void each_executing(const Warp& w, F f) {
  for (uint32_t m = w.exec; m; m &= m - 1) f(std::countr_zero(m));
}

// A mask with bit i set where f(i).
template <class F> inline uint32_t lane_mask(F f) {
  alignas(32) uint8_t bytes[kLanes];
  for (int i = 0; i < kLanes; i++) bytes[i] = f(i) ? 0xff : 0;
  uint32_t mask = 0;
  for (int k = 0; k < 4; k++) {  // the product gathers the top bits of eight bytes
    uint64_t eight;
    __builtin_memcpy(&eight, bytes + 8 * k, 8);
    mask |= uint32_t((eight & 0x8080808080808080ull) * 0x0002040810204081ull >> 56) << (8 * k);
  }
  return mask;
}

template <class T, auto F> void unary(Warp& w, const Instr& in) {
  const T* a = w.src<T>(in.a);
  each_lane<T>(w, in.d, [=](int i) { return T(F(a[i])); });
}

template <class T, auto F> void binary(Warp& w, const Instr& in) {
  const T *a = w.src<T>(in.a), *b = w.src<T>(in.b);
  each_lane<T>(w, in.d, [=](int i) { return T(F(a[i], b[i])); });
}

template <class T, auto F> void ternary(Warp& w, const Instr& in) {
  const T *a = w.src<T>(in.a), *b = w.src<T>(in.b), *c = w.src<T>(in.c);
  each_lane<T>(w, in.d, [=](int i) { return T(F(a[i], b[i], c[i])); });
}

}  // namespace vgpu
