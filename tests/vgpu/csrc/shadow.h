// What the engine knows about memory beside its contents: where allocations begin and end, which
// bytes were ever written, and who read or wrote last in this launch.
//
// A stamp says who: launch, block, barrier interval of the block, warp, and three flags. Two
// accesses of the same granule race if they are of the same launch, at least one writes, and they
// are of different blocks, or of different warps in the same interval. The granule is the smallest
// access in the kernel to that space, so that an access always covers whole granules.
//
// In shared memory the same four fields hold, one level down: barrier interval, warp, interval
// between the warp's own barriers (bar.warp.sync), lane.
#pragma once
#include <cstddef>
#include <cstdint>

namespace vgpu {

inline constexpr uint64_t kAtomic = 1;      // of a write: by an atomic; of reads: all strong
inline constexpr uint64_t kManyWarps = 2;   // read by several warps (lanes) in this interval
inline constexpr uint64_t kManyBlocks = 4;  // read by several blocks (warps)
inline constexpr uint64_t kWarpUnit = 1ull << 5;
inline constexpr uint64_t kIntervalUnit = 1ull << 10;
inline constexpr uint64_t kBlockUnit = 1ull << 30;
inline constexpr uint64_t kLaunchUnit = 1ull << 54;
inline constexpr uint64_t kMaxInterval = (kBlockUnit / kIntervalUnit) - 1;
inline constexpr uint64_t kMaxBlocks = kLaunchUnit / kBlockUnit;
inline constexpr uint64_t kMaxLaunch = 1023;

inline uint64_t block_of(uint64_t stamp) { return stamp / kBlockUnit % kMaxBlocks; }
inline uint64_t interval_of(uint64_t stamp) { return stamp / kIntervalUnit % (kMaxInterval + 1); }
inline uint64_t warp_of(uint64_t stamp) { return stamp / kWarpUnit % 32; }

enum class Access : uint8_t { kRead, kWrite, kAtomicUpdate, kAsyncWrite };
inline bool writes(Access a) { return a != Access::kRead; }

// Values of Shadow::init.
inline constexpr uint8_t kUninitialised = 0, kInitialised = 1, kInFlight = 2;

struct Shadow {
  uint64_t base = 0, bytes = 0;
  int granule = 4;               // log2
  uint8_t* init = nullptr;       // per byte; null: all of it is initialised
  uint64_t* written = nullptr;   // stamps, per granule, from base rounded down to 16
  uint64_t* read = nullptr;
  uint8_t* touched = nullptr;    // per chunk of kChunk bytes; may be null

  static constexpr uint64_t kChunk = 4096;
  uint64_t index(uint64_t address) const { return (address - (base & ~15ull)) >> granule; }
  bool contains(uint64_t address, uint64_t size) const {
    return address >= base && size <= bytes && address - base <= bytes - size;
  }
};

struct Conflict {
  enum Kind { kNone, kRace, kNotInitialised, kFlying } kind = kNone;
  uint64_t address = 0;  // of the first byte concerned
  uint64_t stamp = 0;    // of the other access
  bool other_wrote = false;
};

// Orderings between blocks that the stamps do not show (release and acquire through atomics).
struct Order {
  virtual bool ordered(uint64_t stamp) const = 0;  // true: that access happened before
};

// Whether an access of `size` bytes is in order. rewrites: it writes what is there already, which
// does not race with other writes.
Conflict inspect(const Shadow& shadow, uint64_t address, uint64_t size, Access access,
                 uint64_t stamp, const Order& order, bool rewrites = false);
void mark(Shadow& shadow, uint64_t address, uint64_t size, Access access, uint64_t stamp);

// Both for `bytes` at the address of each lane; the stamp of lane i is stamp + i * lane_unit.
// False: something is not in order, nothing was marked, and inspect() tells what it is, or that an
// ordering excuses it.
bool check_lanes(Shadow& shadow, uint32_t lanes, const uint64_t* at, int bytes, Access access,
                 uint64_t stamp, uint64_t lane_unit);

}  // namespace vgpu
