// Host code writes tensors without telling anybody, so that what it wrote is found by what it did
// not: fresh memory is filled with poison, 4-byte words that depend on their place. A word that
// still holds its poison at a launch is uninitialised. What kernels write the engine knows, byte by
// byte.
//
// Poison is a NaN in every dtype: every 16 bits of it are one in bf16 and fp16, and so the upper
// bits of fp32 and fp64. An output that a kernel leaves unwritten therefore fails the tests, too.
#include "allocator.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>

#include "engine.h"

namespace vgpu {
namespace {

constexpr size_t kWord = 4;
constexpr size_t kHuge = size_t{1} << 30;  // not filled: no page of it exists until touched

struct Block {
  size_t bytes = 0;
  bool written = false;        // all of it, so that there is nothing to look for any more
  std::vector<uint8_t> marks;  // per byte, as of the latest launch: 0 where nobody has written
};

std::mutex lock;
std::map<char*, Block>& blocks() {
  static auto* all = new std::map<char*, Block>;
  return *all;
}

uint32_t poison(size_t word) {
  uint32_t bits = uint32_t(word + 1) * 0x9e3779b1u;
  bits ^= bits >> 15;
  return (bits & 0x803f803fu) | 0x7f817f81u;  // never a NaN that libraries write: bit 6 is 0
}

// Brings the marks up to what the host has written since the latest launch: of a word that does not
// hold its poison any more, all that no kernel wrote.
void look_for_writes(const char* data, Block& b) {
  b.marks.resize(b.bytes, 0);
  b.written = true;
  for (size_t at = 0; at < b.bytes; at += kWord) {
    const size_t n = std::min(kWord, b.bytes - at);
    const uint32_t word = poison(at / kWord);
    const char* expected = reinterpret_cast<const char*>(&word);
    bool by_host = n < kWord;  // too little to tell poison from a value
    for (size_t i = 0; i < n; i++) by_host |= !b.marks[at + i] && data[at + i] != expected[i];
    if (by_host) std::memset(&b.marks[at], 1, n);
    for (size_t i = 0; i < n; i++) b.written &= b.marks[at + i] != 0;
  }
}

// Where the mapping that holds p ends; p itself if nothing is mapped there. Sizes and strides are
// told by being small, numbers of fp64 by being large.
char* mapping_end(char* p) {
  const auto at = reinterpret_cast<uint64_t>(p);
  if (at < uint64_t{1} << 32 || at >= uint64_t{1} << 47) return p;
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    const size_t dash = line.find('-');
    const auto begin = std::stoull(line.substr(0, dash), nullptr, 16);
    const auto end = std::stoull(line.substr(dash + 1), nullptr, 16);
    if (at >= begin && at < end) return reinterpret_cast<char*>(end);
  }
  return p;
}

}  // namespace

void* allocate(size_t bytes) {
  if (bytes == 0) return nullptr;
  void* data = nullptr;
  if (posix_memalign(&data, 64, bytes)) return nullptr;
  if (bytes < kHuge) {
    const size_t whole = bytes / kWord;
    for (size_t i = 0; i < whole; i++) static_cast<uint32_t*>(data)[i] = poison(i);
    const uint32_t word = poison(whole);
    std::memcpy(static_cast<uint32_t*>(data) + whole, &word, bytes % kWord);
  }
  const std::lock_guard guard(lock);
  Block& b = blocks()[static_cast<char*>(data)];
  b.bytes = bytes;
  b.written = bytes >= kHuge;
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
    const auto next = blocks().upper_bound(at);
    const auto found = next == blocks().begin() ? blocks().end() : std::prev(next);
    if (found == blocks().end() || at >= found->first + found->second.bytes) {
      // Not torch's own: a number, or memory of numpy's or of a checkpoint, whose size is unknown.
      char* end = mapping_end(at);
      if (next != blocks().end()) end = std::min(end, next->first);
      if (end > at) device.add_memory(at, size_t(end - at), true), foreign_.push_back(at);
      continue;
    }
    auto& [data, block] = *found;
    if (std::find(lent_.begin(), lent_.end(), data) != lent_.end()) continue;
    lent_.push_back(data);
    if (!block.written) look_for_writes(data, block);
    device.add_memory(data, block.bytes, block.written);
    for (size_t at = 0, from = 0; !block.written && at <= block.bytes; at++) {
      if (at < block.bytes && block.marks[at]) continue;
      if (at > from) device.mark_memory(data + from, at - from, true);
      from = at + 1;
    }
  }
}

LentMemory::~LentMemory() {
  const std::lock_guard guard(lock);
  for (char* data : foreign_) device_.remove_memory(data);
  for (char* data : lent_) {
    Block& block = blocks()[data];
    if (!block.written) device_.read_marks(data, block.bytes, block.marks.data());
    device_.remove_memory(data);
  }
}

}  // namespace vgpu
