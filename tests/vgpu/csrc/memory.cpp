// Allocations by address. Shadows are mapped pages, so that a tensor of more than 2^31 elements can
// be registered too.
#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <new>
#include <stdexcept>
#include <utility>

namespace vgpu {

size_t Pages::rounded(size_t bytes) {
  return bytes > kLargest ? bytes : std::bit_ceil(std::max<size_t>(bytes, 4096));
}

void* Pages::take(size_t bytes) {
  std::vector<void*>& spare = spare_[rounded(bytes)];
  if (spare.empty()) {
    void* p = mmap(nullptr, rounded(bytes), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    if (bytes <= kLargest) madvise(p, rounded(bytes), MADV_HUGEPAGE);
    return p;
  }
  void* p = spare.back();
  spare.pop_back();
  if (zeroed_) std::memset(p, 0, bytes);
  return p;
}

void Pages::give(void* pages, size_t bytes) {
  if (!pages) return;
  if (bytes > kLargest) munmap(pages, bytes);
  else spare_[rounded(bytes)].push_back(pages);
}

void Pages::clear() {
  for (auto& [bytes, spare] : spare_)
    for (void* p : spare) munmap(p, bytes);
  spare_.clear();
}

Memory::~Memory() {
  for (Allocation& a : allocations_) release(a);
}

void Memory::release(Allocation& a) {
  pages_.give(a.init, a.bytes);
  pages_.give(a.touched, a.bytes / Shadow::kChunk + 1);
  stamps_.give(a.written, 2 * a.stamp_bytes);
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
  if (!initialised) joined.init = static_cast<uint8_t*>(pages_.take(joined.bytes));
  joined.touched = static_cast<uint8_t*>(pages_.take(joined.bytes / Shadow::kChunk + 1));
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
    a->init = static_cast<uint8_t*>(pages_.take(a->bytes));
    std::memset(a->init, kInitialised, a->bytes);
  }
  if (a->init) std::memset(a->init + (base - a->base), initialised, bytes);
}

void Memory::begin_launch(int granule) {
  launch_++;
  if (launch_ > kMaxLaunch) {
    launch_ = 1;
    for (Allocation& a : allocations_)
      stamps_.give(std::exchange(a.written, nullptr), 2 * a.stamp_bytes);
    stamps_.clear();
  }
  for (Allocation& a : allocations_) {
    const size_t need = ((((a.bytes + 31) >> granule) + 2) * 8 + 4095) & ~size_t(4095);
    if (a.written && need > a.stamp_bytes)
      stamps_.give(std::exchange(a.written, nullptr), 2 * a.stamp_bytes);
    if (!a.written) {
      a.written = static_cast<uint64_t*>(stamps_.take(2 * need));
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
