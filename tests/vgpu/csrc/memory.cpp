#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>
#include <type_traits>

namespace vgpu {
namespace {

// Zeroed pages that cost nothing until they are touched.
void* map_pages(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return p;
}

// N stamps at a time. Comparisons give all ones or zero per stamp.
template <int N> struct Stamps {
  typedef uint64_t type __attribute__((vector_size(8 * N)));
};
template <int N> using V = typename Stamps<N>::type;

template <class T> inline T load(const void* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <int N> inline bool any(V<N> v) {
  uint64_t bits = v[0];
  for (int i = 1; i < N; i++) bits |= v[i];
  return bits != 0;
}

// Where an access with `stamp` and one with `other`, at least one a write, are unordered.
template <int N> inline V<N> unordered(V<N> other, V<N> stamp) {
  const V<N> x = other ^ stamp;
  const V<N> race = (x < kLaunchUnit) & ((x >= kBlockUnit) | ((x < kIntervalUnit) &
                                                             (x >= kWarpUnit)));
  return race & ((other & stamp & kAtomic) == 0);
}

template <int N> inline V<N> unordered_with_reads(V<N> reads, V<N> stamp) {
  const V<N> x = reads ^ stamp;
  const V<N> many_blocks = (reads & kManyBlocks) != 0, many_warps = (reads & kManyWarps) != 0;
  const V<N> race = (x < kLaunchUnit) &
                    ((x >= kBlockUnit) | many_blocks |
                     ((x < kIntervalUnit) & ((x >= kWarpUnit) | many_warps)));
  return race & ((reads & stamp & kAtomic) == 0);
}

template <int N> inline V<N> merge_reads(V<N> old, V<N> stamp) {
  const V<N> x = old ^ stamp;
  const V<N> other_block = x >= kBlockUnit, other_warp = x >= kWarpUnit;
  const V<N> same_interval = x < kIntervalUnit, same_launch = x < kLaunchUnit;
  const V<N> flags = ((other_block | old) & kManyBlocks) |
                     ((other_warp | old) & same_interval & kManyWarps);
  const V<N> merged = (stamp | flags) & (old | ~kAtomic);
  return (merged & same_launch) | (stamp & ~same_launch);
}

// A plain write of this warp in this interval stays one, whatever atomics follow.
template <int N> inline V<N> merge_writes(V<N> old, V<N> stamp) {
  const V<N> same = (old ^ stamp) < kWarpUnit;
  return stamp & (old | ~kAtomic | ~same);
}

Conflict race_of(const Shadow& s, uint64_t first, uint64_t count, Access access, uint64_t stamp,
                 const Order& order, bool rewrites) {
  for (uint64_t k = first; k < first + count; k++) {
    Conflict c{Conflict::kRace, (s.base & ~15ull) + (k << s.granule)};
    const V<1> written{s.written[k]}, read{s.read[k]}, own{stamp};
    if (!rewrites && any<1>(unordered<1>(written, own)) && !order.ordered(written[0])) {
      c.stamp = s.written[k];
      c.other_wrote = true;
      return c;
    }
    if (writes(access) && any<1>(unordered_with_reads<1>(read, own)) && !order.ordered(read[0])) {
      c.stamp = s.read[k];
      return c;
    }
  }
  return {};
}

// f(k, N) over [0, count) in pieces of N = 8, 4, 2 or 1, known to the compiler.
template <class F> inline void in_pieces(uint64_t count, F f) {
  uint64_t k = 0;
  for (; k + 8 <= count; k += 8) f(k, std::integral_constant<int, 8>());
  if (count & 4) f(k, std::integral_constant<int, 4>()), k += 4;
  if (count & 2) f(k, std::integral_constant<int, 2>()), k += 2;
  if (count & 1) f(k, std::integral_constant<int, 1>());
}

template <class Word> inline uint64_t bad_init(const uint8_t* init, bool reads) {
  const Word each = Word(0x0101010101010101ull), x = load<Word>(init);
  return Word(reads ? x ^ Word(each * kInitialised) : x & Word(each * kInFlight));
}

Conflict init_conflict(const Shadow& s, uint64_t address, uint64_t size, Access access) {
  const uint8_t* init = s.init + (address - s.base);
  const bool reads = access == Access::kRead || access == Access::kAtomicUpdate;
  uint64_t bad = 0, k = 0;
  for (; k + 8 <= size; k += 8) bad |= bad_init<uint64_t>(init + k, reads);
  if (size & 4) bad |= bad_init<uint32_t>(init + k, reads), k += 4;
  if (size & 2) bad |= bad_init<uint16_t>(init + k, reads), k += 2;
  if (size & 1) bad |= bad_init<uint8_t>(init + k, reads);
  if (bad) {
    uint64_t i = 0;
    while (reads ? init[i] == kInitialised : !(init[i] & kInFlight)) i++;
    return {init[i] == kInFlight ? Conflict::kFlying : Conflict::kNotInitialised, address + i};
  }
  return {};
}

void set_init(Shadow& s, uint64_t address, uint64_t size, Access access) {
  if (!s.init || access == Access::kRead || access == Access::kAtomicUpdate) return;
  const int value = access == Access::kAsyncWrite ? kInFlight : kInitialised;
  uint8_t* init = s.init + (address - s.base);
  if (size == 16) std::memset(init, value, 16);  // sizes that the compiler knows
  else if (size == 4) std::memset(init, value, 4);
  else std::memset(init, value, size);
}

void touch(Shadow& s, uint64_t address, uint64_t size) {
  if (!s.touched) return;
  const uint64_t offset = address - s.base;  // one warp's run is no longer than a chunk
  s.touched[offset / Shadow::kChunk] = 1;
  s.touched[(offset + size - 1) / Shadow::kChunk] = 1;
}

struct Lanes {
  uint32_t mask;
  const uint64_t* at;
  int bytes;
  Access access;
  uint64_t stamp, lane_unit;
  uint64_t stamp_of(int i) const { return stamp + uint64_t(i) * lane_unit; }
};

template <class F> inline void each(uint32_t mask, F f) {
  for (; mask; mask &= mask - 1) f(__builtin_ctz(mask));
}

template <class Word, int kWords> bool lanes_have_init(const Shadow& s, const Lanes& l) {
  const bool reads = l.access == Access::kRead || l.access == Access::kAtomicUpdate;
  uint64_t bad = 0;
  each(l.mask, [&](int i) {
    const uint8_t* init = s.init + (l.at[i] - s.base);
    for (int k = 0; k < kWords; k++) bad |= bad_init<Word>(init + k * sizeof(Word), reads);
  });
  return bad == 0;
}

bool lanes_have_init(const Shadow& s, const Lanes& l) {
  switch (s.init ? l.bytes : 0) {
    case 0: return true;
    case 1: return lanes_have_init<uint8_t, 1>(s, l);
    case 2: return lanes_have_init<uint16_t, 1>(s, l);
    case 4: return lanes_have_init<uint32_t, 1>(s, l);
    case 8: return lanes_have_init<uint64_t, 1>(s, l);
    default: return lanes_have_init<uint64_t, 2>(s, l);
  }
}

// Each lane's access covers N granules.
template <int N, bool kReads> bool mark_lanes(Shadow& s, const Lanes& l) {
  V<N> race{};
  each(l.mask, [&](int i) {
    const uint64_t k = s.index(l.at[i]);
    const V<N> stamp = V<N>{} + l.stamp_of(i);
    race |= unordered<N>(load<V<N>>(s.written + k), stamp);
    if (!kReads) race |= unordered_with_reads<N>(load<V<N>>(s.read + k), stamp);
  });
  if (any<N>(race)) return false;
  uint64_t* const stamps = kReads ? s.read : s.written;
  each(l.mask, [&](int i) {
    uint64_t* at = stamps + s.index(l.at[i]);
    const V<N> old = load<V<N>>(at);
    const V<N> stamp = V<N>{} + l.stamp_of(i);
    const V<N> now = kReads ? merge_reads<N>(old, stamp) : merge_writes<N>(old, stamp);
    std::memcpy(at, &now, sizeof now);
  });
  return true;
}

// One granule per lane: the stamps of eight lanes at a time.
template <bool kReads> bool mark_single_granules(Shadow& s, const Lanes& l) {
  alignas(64) uint64_t written[32], read[32], own[32], now[32], at[32];
  for (int i = 0; i < 32; i++) written[i] = read[i] = own[i] = l.stamp_of(i);
  each(l.mask, [&](int i) {
    at[i] = s.index(l.at[i]);
    written[i] = s.written[at[i]];
    read[i] = s.read[at[i]];
  });
  V<8> race{};
  for (int k = 0; k < 32; k += 8) {
    const V<8> stamp = load<V<8>>(own + k);
    race |= unordered<8>(load<V<8>>(written + k), stamp);
    if (!kReads) race |= unordered_with_reads<8>(load<V<8>>(read + k), stamp);
  }
  if (any<8>(race)) return false;
  for (int k = 0; k < 32; k += 8) {
    const V<8> stamp = load<V<8>>(own + k);
    const V<8> merged = kReads ? merge_reads<8>(load<V<8>>(read + k), stamp)
                               : merge_writes<8>(load<V<8>>(written + k), stamp);
    std::memcpy(now + k, &merged, sizeof merged);
  }
  uint64_t* const stamps = kReads ? s.read : s.written;
  each(l.mask, [&](int i) { stamps[at[i]] = now[i]; });
  return true;
}

template <bool kReads> bool mark_lanes(Shadow& s, const Lanes& l) {
  switch (l.bytes >> s.granule) {
    case 1: return mark_single_granules<kReads>(s, l);
    case 2: return mark_lanes<2, kReads>(s, l);
    case 4: return mark_lanes<4, kReads>(s, l);
    case 8: return mark_lanes<8, kReads>(s, l);
    default: return false;
  }
}

}  // namespace

bool check_lanes(Shadow& s, uint32_t lanes, const uint64_t* at, int bytes, Access access,
                 uint64_t stamp, uint64_t lane_unit) {
  const Lanes l{lanes, at, bytes, access, stamp, lane_unit};
  if (!lanes_have_init(s, l)) return false;
  if (!(access == Access::kRead ? mark_lanes<true>(s, l) : mark_lanes<false>(s, l))) return false;
  if (s.init) each(lanes, [&](int i) { set_init(s, at[i], uint64_t(bytes), access); });
  if (s.touched) each(lanes, [&](int i) { touch(s, at[i], uint64_t(bytes)); });
  return true;
}

Conflict inspect(const Shadow& s, uint64_t address, uint64_t size, Access access, uint64_t stamp,
                 const Order& order, bool rewrites) {
  if (s.init) {
    const Conflict c = init_conflict(s, address, size, access);
    if (c.kind != Conflict::kNone) return c;
  }
  const uint64_t first = s.index(address), count = s.index(address + size - 1) + 1 - first;
  bool bad = false;
  in_pieces(count, [&](uint64_t k, auto n) {
    constexpr int N = decltype(n)::value;
    V<N> race = unordered<N>(load<V<N>>(s.written + first + k), V<N>{} + stamp);
    if (writes(access))
      race |= unordered_with_reads<N>(load<V<N>>(s.read + first + k), V<N>{} + stamp);
    bad |= any<N>(race);
  });
  return bad ? race_of(s, first, count, access, stamp, order, rewrites) : Conflict{};
}

void mark(Shadow& s, uint64_t address, uint64_t size, Access access, uint64_t stamp) {
  const uint64_t first = s.index(address), count = s.index(address + size - 1) + 1 - first;
  in_pieces(count, [&](uint64_t k, auto n) {
    constexpr int N = decltype(n)::value;
    uint64_t* at = (access == Access::kRead ? s.read : s.written) + first + k;
    const V<N> old = load<V<N>>(at);
    const V<N> now = access == Access::kRead ? merge_reads<N>(old, V<N>{} + stamp)
                                             : merge_writes<N>(old, V<N>{} + stamp);
    std::memcpy(at, &now, sizeof now);
  });
  set_init(s, address, size, access);
  touch(s, address, size);
}

Memory::~Memory() {
  for (Allocation& a : allocations_) release(a);
}

void Memory::release(Allocation& a) {
  if (a.init) munmap(a.init, a.bytes);
  if (a.touched) munmap(a.touched, a.bytes / Shadow::kChunk + 1);
  if (a.written) munmap(a.written, 2 * a.stamp_bytes);
  a.init = a.touched = nullptr;
  a.written = a.read = nullptr;
}

void Memory::add(uint64_t base, uint64_t bytes, bool initialised) {
  if (bytes == 0) return;
  Allocation joined;
  joined.base = base;
  joined.bytes = bytes;
  joined.members = {base};
  for (size_t i = 0; i < allocations_.size();) {
    Allocation& a = allocations_[i];
    if (a.base >= joined.base + joined.bytes || joined.base >= a.base + a.bytes) {
      i++;
      continue;
    }
    if (a.contains(base, bytes)) {
      a.members.push_back(base);
      return;
    }
    if (a.init) throw std::invalid_argument("vgpu: memory overlaps an uninitialised allocation");
    const uint64_t end = std::max(a.base + a.bytes, joined.base + joined.bytes);
    joined.base = std::min(a.base, joined.base);
    joined.bytes = end - joined.base;
    joined.members.insert(joined.members.end(), a.members.begin(), a.members.end());
    release(a);
    allocations_.erase(allocations_.begin() + i);
    i = 0;
  }
  if (!initialised) joined.init = static_cast<uint8_t*>(map_pages(joined.bytes));
  joined.touched = static_cast<uint8_t*>(map_pages(joined.bytes / Shadow::kChunk + 1));
  auto at = std::find_if(allocations_.begin(), allocations_.end(),
                         [&](const Allocation& a) { return a.base > joined.base; });
  allocations_.insert(at, joined);
}

void Memory::remove(uint64_t base) {
  for (size_t i = 0; i < allocations_.size(); i++) {
    std::vector<uint64_t>& members = allocations_[i].members;
    const auto found = std::find(members.begin(), members.end(), base);
    if (found == members.end()) continue;
    members.erase(found);
    if (members.empty()) {
      release(allocations_[i]);
      allocations_.erase(allocations_.begin() + i);
    }
    return;
  }
}

void Memory::mark(uint64_t base, uint64_t bytes, bool initialised) {
  Allocation* a = find(base);
  if (!a || !a->contains(base, bytes))
    throw std::invalid_argument("vgpu: mark_memory: not within one allocation");
  if (!a->init && !initialised) {
    a->init = static_cast<uint8_t*>(map_pages(a->bytes));
    std::memset(a->init, kInitialised, a->bytes);
  }
  if (a->init) std::memset(a->init + (base - a->base), initialised, bytes);
}

void Memory::begin_launch(int granule) {
  launch_++;
  const bool wrapped = launch_ > kMaxLaunch;
  if (wrapped) launch_ = 1;
  for (Allocation& a : allocations_) {
    const size_t need = ((((a.bytes + 31) >> granule) + 2) * 8 + 4095) & ~size_t(4095);
    if (a.written && (wrapped || need > a.stamp_bytes)) {
      munmap(a.written, 2 * a.stamp_bytes);
      a.written = nullptr;
    }
    if (!a.written) {
      a.written = static_cast<uint64_t*>(map_pages(2 * need));
      a.read = a.written + need / 8;
      a.stamp_bytes = need;
    }
    a.granule = granule;
  }
}

void Memory::count_touched(uint64_t* read, uint64_t* written) {
  *read = *written = 0;
  const uint64_t stamp = launch_ * kLaunchUnit;
  for (Allocation& a : allocations_) {
    for (uint64_t chunk = 0; chunk * Shadow::kChunk < a.bytes; chunk++) {
      if (!a.touched[chunk]) continue;
      a.touched[chunk] = 0;
      const uint64_t begin = a.base + chunk * Shadow::kChunk;
      const uint64_t end = std::min(begin + Shadow::kChunk, a.base + a.bytes);
      uint64_t reads = 0, writes = 0;
      // A granule across two chunks counts in the one in which it begins.
      const uint64_t first = a.index(begin + (chunk ? (1u << a.granule) - 1 : 0));
      for (uint64_t k = first; k <= a.index(end - 1); k++) {
        reads += (a.read[k] ^ stamp) < kLaunchUnit;
        writes += (a.written[k] ^ stamp) < kLaunchUnit;
      }
      *read += reads << a.granule;
      *written += writes << a.granule;
    }
  }
}

Allocation* Memory::find(uint64_t address) {
  auto after = std::upper_bound(allocations_.begin(), allocations_.end(), address,
                                [](uint64_t x, const Allocation& a) { return x < a.base; });
  if (after == allocations_.begin() || !std::prev(after)->contains(address, 1)) return nullptr;
  return &*std::prev(after);
}

const Allocation* Memory::nearest(uint64_t address) const {
  const Allocation* best = nullptr;
  uint64_t best_distance = ~0ull;
  for (const Allocation& a : allocations_) {
    const uint64_t distance = address < a.base ? a.base - address : address - a.base - a.bytes + 1;
    if (distance < best_distance) best_distance = distance, best = &a;
  }
  return best;
}

}  // namespace vgpu
