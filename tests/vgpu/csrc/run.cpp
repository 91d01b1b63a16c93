// A block's warps take turns in a seeded random order, for random numbers of instructions. The
// groups of a diverged warp run lowest address first, which joins them again as early as the
// layout of the code allows.
#include "run.h"

#include <algorithm>
#include <cstring>

namespace vgpu {

void fault(const Warp& w, const Instr& in, int lane, const std::string& reason) {
  const Block& b = *w.block;
  const Dim& size = b.launch->block;
  const uint32_t thread = w.index * kLanes + uint32_t(lane);
  Fault f(reason);
  f.reason = reason;
  f.kernel = b.kernel->name;
  f.block = b.index;
  f.thread = {thread % size.x, thread / size.x % size.y, thread / size.x / size.y};
  f.line = in.line;
  f.source = b.kernel->sources[size_t(&in - b.kernel->code.data())];
  throw f;
}

Worker::Worker(Launch& launch) {
  const Kernel& kernel = *launch.kernel;
  block_.launch = &launch;
  block_.kernel = &kernel;
  block_.threads = launch.block.x * launch.block.y * launch.block.z;
  block_.executions.assign(kernel.code.size(), 0);
  const size_t warps = (block_.threads + kLanes - 1) / kLanes;
  block_.warps.resize(warps);
  registers_.reset(static_cast<uint8_t*>(
      std::aligned_alloc(64, std::max<size_t>(warps * kernel.register_bytes, 64))));
  std::memset(registers_.get(), 0xcb, warps * kernel.register_bytes);
  local_.resize(warps * kLanes * kernel.local_bytes);
  local_init_.resize(local_.size());
  for (size_t i = 0; i < warps; i++) {
    Warp& w = block_.warps[i];
    w.block = &block_;
    w.index = uint32_t(i);
    w.base[0] = registers_.get() + i * kernel.register_bytes;
    w.base[1] = reinterpret_cast<uint8_t*>(const_cast<uint64_t*>(kernel.constants.data()));
    w.local = local_.data() + i * kLanes * kernel.local_bytes;
    w.local_init = local_init_.data() + i * kLanes * kernel.local_bytes;
  }
  Shadow& shadow = block_.shared_shadow;
  const size_t bytes = launch.shared_bytes;
  block_.shared.resize(bytes + 16);
  block_.shared_init.resize(bytes);
  const size_t granules = (bytes >> kernel.shared_granule) + 2;
  block_.shared_stamps.resize(2 * granules);
  shadow.bytes = bytes;
  shadow.granule = kernel.shared_granule;
  shadow.init = block_.shared_init.data();
  shadow.written = block_.shared_stamps.data();
  shadow.read = shadow.written + granules;
}

void Worker::begin(uint64_t number) {
  Launch& launch = *block_.launch;
  const Dim &grid = launch.grid, &size = launch.block;
  block_.number = number;
  block_.index = {uint32_t(number % grid.x), uint32_t(number / grid.x % grid.y),
                  uint32_t(number / grid.x / grid.y)};
  block_.random = (launch.seed * 0x9e3779b97f4a7c15ull ^ (number + 1) * 0xd1342543de82ef95ull) | 1;
  for (int i = 0; i < 4; i++) block_.next_random();
  block_.interval = 0;
  block_.executed = 0;
  block_.fence_interval = -1;
  block_.known.clear();
  block_.barriers = {};
  block_.last_allocation = nullptr;
  std::fill(block_.shared_init.begin(), block_.shared_init.end(), kUninitialised);
  std::fill(local_init_.begin(), local_init_.end(), kUninitialised);
  if (const Kernel& k = *block_.kernel; k.local_params)
    for (size_t i = 0; i < local_init_.size(); i += k.local_bytes)
      std::fill_n(local_init_.begin() + long(i), k.local_params, kInitialised);
  block_.next_shared_interval();
  ready_.clear();
  for (Warp& w : block_.warps) {
    const uint32_t first = w.index * kLanes;
    const uint32_t threads = std::min<uint32_t>(block_.threads - first, kLanes);
    w.lanes = w.alive = w.active = threads == kLanes ? kAllLanes : (1u << threads) - 1;
    w.pc = 0;
    w.merge_pc = ~0u;
    w.carry = 0;
    w.state = Warp::kReady;
    w.groups.clear();
    w.transfers.clear();
    w.async_group.fill(0);
    uint32_t* special = w.reg<uint32_t>(block_.kernel->special);
    const uint32_t same[] = {
        size.x, size.y, size.z, block_.index.x, block_.index.y, block_.index.z, grid.x, grid.y,
        grid.z};
    for (uint32_t i = 0; i < kLanes; i++) {
      const uint32_t t = first + i, bit = 1u << i;
      const uint32_t value[kSpecialCount] = {
          t % size.x, t / size.x % size.y, t / size.x / size.y, same[0], same[1], same[2], same[3],
          same[4], same[5], same[6], same[7], same[8], i, w.index, uint32_t(block_.warps.size()),
          uint32_t(number % 108), 108, bit, bit - 1, bit | (bit - 1), ~(bit | (bit - 1)),
          ~(bit - 1), uint32_t(launch.dynamic_shared), uint32_t(launch.shared_bytes), 0};
      for (int k = 0; k < kSpecialCount; k++) special[k * kLanes + int(i)] = value[k];
    }
    ready_.push_back(&w);
  }
}

void Worker::run_warp(Warp& w, uint32_t budget) {
  const Instr* code = block_.kernel->code.data();
  uint64_t* executions = block_.executions.data();
  const uint32_t whole = budget;
  w.stop = false;
  while (budget && !w.stop) {
    budget--;
    if (w.pc == w.merge_pc) reschedule(w);
    const Instr& in = code[w.pc];
    executions[w.pc]++;
    w.pc++;
    w.exec = w.active;
    if (in.guard != kNoOperand) w.exec &= w.pred(in.guard) ^ in.guard_not;
    if (w.exec) in.run(w, in);
  }
  block_.executed += whole - budget;
}

void Worker::deadlock() {
  for (const Barrier& barrier : block_.barriers) {
    if (barrier.waiting.empty()) continue;
    Warp& w = *barrier.waiting.front();
    std::string gone;
    for (const Warp& other : block_.warps)
      if (other.state == Warp::kDone)
        gone = "; warp " + std::to_string(other.index) + " has exited";
    fault(w, block_.kernel->code[w.pc - 1], std::countr_zero(w.lanes),
          "a barrier that is never complete: " + std::to_string(barrier.arrived) + " of " +
              std::to_string(barrier.expected) + " threads arrive" + gone);
  }
  throw std::logic_error("vgpu: no warp can run, and none waits");
}

void Worker::run(uint64_t number) {
  begin(number);
  while (!ready_.empty()) {
    const uint64_t random = block_.next_random();
    const size_t pick = ready_.size() == 1 ? 0 : size_t((random >> 20) % ready_.size());
    Warp& w = *ready_[pick];
    run_warp(w, 64 + uint32_t(random & 1023));
    if (block_.executed > block_.launch->limit)
      fault(w, block_.kernel->code[w.pc ? w.pc - 1 : 0], std::countr_zero(w.active | w.lanes),
            "the block does not end: " + std::to_string(block_.executed) + " warp instructions");
    if (block_.launch->stopped.load(std::memory_order_relaxed)) return;
    if (w.state == Warp::kReady && !w.stop) continue;
    // A barrier or an exit: see who can run now.
    ready_.clear();
    bool done = true;
    for (Warp& other : block_.warps) {
      if (other.state == Warp::kReady) ready_.push_back(&other);
      done = done && other.state == Warp::kDone;
    }
    if (ready_.empty() && !done) deadlock();
  }
}

}  // namespace vgpu
