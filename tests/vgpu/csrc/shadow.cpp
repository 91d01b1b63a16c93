// The checks, on vectors of stamps: a warp's access is a few comparisons unless something is wrong.
#include "shadow.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace vgpu {
namespace {

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
  if (mask == ~0u)
    for (int i = 0; i < 32; i++) f(i);
  else
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

// Whether stamps are of another launch or interval than those that they were compared with by xor:
// true of most, and then nothing races and nothing is merged.
template <int N> inline V<N> least(V<N> a, V<N> b) { return a < b ? a : b; }
template <int N> inline bool old(V<N> least_difference) {
  return !any<N>((V<N>)(least_difference < kLaunchUnit));
}

// Whether lanes that were marked as readers are no longer, because others read the same.
inline bool shares_granules(const Shadow& s, const Lanes& l) {
  uint64_t differs = 0;
  each(l.mask, [&](int i) { differs |= s.read[s.index(l.at[i])] ^ l.stamp_of(i); });
  return differs >= kWarpUnit;
}

// Each lane's access covers N granules.
template <int N, bool kReads> bool mark_lanes(Shadow& s, const Lanes& l) {
  V<N> written = V<N>{} - 1, read = written, race{};
  each(l.mask, [&](int i) {
    const uint64_t k = s.index(l.at[i]);
    written = least<N>(written, load<V<N>>(s.written + k) ^ l.stamp_of(i));
    read = least<N>(read, load<V<N>>(s.read + k) ^ l.stamp_of(i));
  });
  const bool old_writes = old<N>(written), old_reads = old<N>(read);
  if (!old_writes || !(kReads || old_reads)) each(l.mask, [&](int i) {
    const uint64_t k = s.index(l.at[i]);
    const V<N> stamp = V<N>{} + l.stamp_of(i);
    race |= unordered<N>(load<V<N>>(s.written + k), stamp);
    if (!kReads) race |= unordered_with_reads<N>(load<V<N>>(s.read + k), stamp);
  });
  if (any<N>(race)) return false;
  uint64_t* const stamps = kReads ? s.read : s.written;
  if (kReads ? old_reads : old_writes) {
    each(l.mask, [&](int i) {
      const V<N> stamp = V<N>{} + l.stamp_of(i);
      std::memcpy(stamps + s.index(l.at[i]), &stamp, sizeof stamp);
    });
    if (kReads && shares_granules(s, l)) each(l.mask, [&](int i) {
      uint64_t* at = stamps + s.index(l.at[i]);
      for (int k = 0; k < N; k++) at[k] |= at[k] == l.stamp_of(i) ? 0 : kManyWarps;
    });
  } else each(l.mask, [&](int i) {
    uint64_t* at = stamps + s.index(l.at[i]);
    const V<N> stamp = V<N>{} + l.stamp_of(i);
    const V<N> now = kReads ? merge_reads<N>(load<V<N>>(at), stamp)
                            : merge_writes<N>(load<V<N>>(at), stamp);
    std::memcpy(at, &now, sizeof now);
  });
  return true;
}

// One granule per lane: where stamps are recent, those of eight lanes at a time.
template <bool kReads> bool mark_single_granules(Shadow& s, const Lanes& l) {
  alignas(64) uint64_t written[32], read[32], own[32], at[32];
  uint64_t least_written = ~0ull, least_read = ~0ull;
  if (l.mask != ~0u)
    for (int i = 0; i < 32; i++) written[i] = read[i] = own[i] = 0;  // in order, whatever it is
  each(l.mask, [&](int i) {
    at[i] = s.index(l.at[i]);
    own[i] = l.stamp_of(i);
    written[i] = s.written[at[i]];
    read[i] = s.read[at[i]];
    least_written = std::min(least_written, written[i] ^ own[i]);
    least_read = std::min(least_read, read[i] ^ own[i]);
  });
  const bool old_writes = least_written >= kLaunchUnit, old_reads = least_read >= kLaunchUnit;
  if (!old_writes || !(kReads || old_reads)) {
    V<8> race{};
    for (int k = 0; k < 32; k += 8) {
      const V<8> stamp = load<V<8>>(own + k);
      race |= unordered<8>(load<V<8>>(written + k), stamp);
      if (!kReads) race |= unordered_with_reads<8>(load<V<8>>(read + k), stamp);
    }
    if (any<8>(race)) return false;
  }
  uint64_t* const stamps = kReads ? s.read : s.written;
  if (!(kReads ? old_reads : old_writes))
    for (int k = 0; k < 32; k += 8) {
      const V<8> stamp = load<V<8>>(own + k);
      const V<8> merged = kReads ? merge_reads<8>(load<V<8>>(read + k), stamp)
                                 : merge_writes<8>(load<V<8>>(written + k), stamp);
      std::memcpy(own + k, &merged, sizeof merged);
    }
  each(l.mask, [&](int i) { stamps[at[i]] = own[i]; });
  if (kReads && shares_granules(s, l))
    each(l.mask, [&](int i) { stamps[at[i]] |= stamps[at[i]] == own[i] ? 0 : kManyWarps; });
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
  if (s.init && writes(access))
    each(lanes, [&](int i) { set_init(s, at[i], uint64_t(bytes), access); });
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

}  // namespace vgpu
