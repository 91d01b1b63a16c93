// Host code writes tensors without telling anybody, so that what it wrote is found by what it did not:
// fresh memory is filled with poison, 8-byte words that depend on their place. A word that still
// holds its poison at a launch is uninitialised. What kernels write is told by comparing after the
// launch, in 2-byte halves, so that a half-written word is known for what it is.
//
// Poison is a NaN in every dtype: every 16 bits of it are one in bf16 and fp16, and so the upper
// bits of fp32 and fp64. An output that a kernel leaves unwritten therefore fails the tests, too.
#include "allocator.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "engine.h"

namespace vgpu {
namespace {

constexpr size_t kWord = 8, kHalf = 2;

struct Block {
  size_t bytes = 0;
  bool written = false;             // all of it is known to be: nothing to compare any more
  std::vector<uint8_t> part;        // per word: a kernel wrote some of its halves, not all
  std::vector<uint8_t> unwritten;   // per half, as of the latest launch
};

std::mutex lock;
std::map<char*, Block>& blocks() {
  static auto* all = new std::map<char*, Block>;
  return *all;
}

uint64_t poison(size_t word) {
  uint64_t bits = (word + 1) * 0x9e3779b97f4a7c15ull;
  bits ^= bits >> 29;
  bits &= 0x803f803f803f803full;      // sign and low mantissa bits vary: not the NaN of any library
  return bits | 0x7f807f807f807f80ull | 0x0001000100010001ull;
}

bool half_holds_poison(const char* data, size_t half) {
  const uint64_t p = poison(half / 4);
  return std::memcmp(data + half * kHalf, reinterpret_cast<const char*>(&p) + half % 4 * kHalf,
                     kHalf) == 0;
}

// Brings block.unwritten up to what the host has written since the last launch.
void look_before(char* data, Block& b) {
  const size_t words = b.bytes / kWord, halves = b.bytes / kHalf;
  if (b.unwritten.empty()) b.unwritten.assign(halves, 1), b.part.assign(words + 1, 0);
  bool any = false;
  for (size_t w = 0; w * 4 < halves; w++) {
    const size_t n = std::min<size_t>(4, halves - w * 4);
    uint8_t* unwritten = b.unwritten.data() + w * 4;
    bool holds = true, some = false;
    for (size_t h = 0; h < n; h++) {
      some |= unwritten[h];
      holds &= half_holds_poison(data, w * 4 + h);
    }
    if (!some) continue;
    if (!b.part[w] && !holds) std::memset(unwritten, 0, n);
    for (size_t h = 0; h < n; h++) {
      if (b.part[w] && unwritten[h]) unwritten[h] = half_holds_poison(data, w * 4 + h);
      any |= unwritten[h];
    }
  }
  b.written = !any;
}

void look_after(char* data, Block& b) {
  for (size_t half = 0; half < b.unwritten.size(); half++) {
    if (!b.unwritten[half] || half_holds_poison(data, half)) continue;
    b.unwritten[half] = 0;
    b.part[half / 4] = 1;
  }
}

}  // namespace

void* allocate(size_t bytes) {
  if (bytes == 0) return nullptr;
  void* data = nullptr;
  if (posix_memalign(&data, 64, bytes)) return nullptr;
  for (size_t at = 0; at < bytes; at += kWord) {
    const uint64_t word = poison(at / kWord);
    std::memcpy(static_cast<char*>(data) + at, &word, std::min(kWord, bytes - at));
  }
  const std::lock_guard guard(lock);
  Block& b = blocks()[static_cast<char*>(data)];
  b.bytes = bytes;
  b.written = bytes < 2 * kHalf;  // too little to tell poison from a value
  return data;
}

void release(void* data) {
  {
    const std::lock_guard guard(lock);
    blocks().erase(static_cast<char*>(data));
  }
  std::free(data);
}

LentMemory::LentMemory(Device& device, const std::vector<const void*>& pointers) : device_(device) {
  const std::lock_guard guard(lock);
  for (const void* p : pointers) {
    auto* at = static_cast<char*>(const_cast<void*>(p));
    auto found = blocks().upper_bound(at);
    if (found == blocks().begin()) continue;
    auto& [data, block] = *--found;
    if (at >= data + block.bytes) continue;
    if (std::find(lent_.begin(), lent_.end(), data) != lent_.end()) continue;
    lent_.push_back(data);
    if (!block.written) look_before(data, block);
    device.add_memory(data, block.bytes, block.written);
    if (block.written) continue;
    for (size_t half = 0, from = 0; half <= block.unwritten.size(); half++) {
      if (half < block.unwritten.size() && !block.unwritten[half]) continue;
      if (half > from) device.mark_memory(data + from * kHalf, (half - from) * kHalf, true);
      from = half + 1;
    }
    if (block.bytes % kHalf) device.mark_memory(data + block.bytes - 1, 1, true);
  }
}

LentMemory::~LentMemory() {
  const std::lock_guard guard(lock);
  for (char* data : lent_) {
    device_.remove_memory(data);
    const auto found = blocks().find(data);
    if (found != blocks().end() && !found->second.written) look_after(data, found->second);
  }
}

}  // namespace vgpu
