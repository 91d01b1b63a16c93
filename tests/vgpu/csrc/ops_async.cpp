// cp.async: the bytes arrive when the thread waits for their group, and not before. Until then
// nobody may read or write where they go.
#include <cstring>

#include "access.h"
#include "decode.h"

namespace vgpu {
namespace {

inline void copy(void* to, const void* from, int bytes) {
  if (bytes == 16) std::memcpy(to, from, 16);
  else std::memcpy(to, from, size_t(bytes));
}

// in.a, in.imm: from global; in.d: to shared, at offset in.target; in.c: bytes to read, optional.
void cp_async(Warp& w, const Instr& in) {
  const bool wide_target = in.mode & 1;
  const int32_t offset = std::bit_cast<int32_t>(in.target);
  Addresses from = addresses(w, in), to = addresses(w, in, in.d, wide_target, offset);
  const uint32_t exec = w.exec;
  Transfer& transfer = w.transfers.emplace_back();
  transfer.bytes = in.bytes;
  for (int i = 0; i < kLanes; i++) transfer.to[i] = uint32_t(to.at[i]);
  std::memset(transfer.data, 0, sizeof transfer.data);
  uint32_t whole = exec, part = 0;
  const uint32_t* wanted = in.c == kNoOperand ? nullptr : w.src<uint32_t>(in.c);
  if (wanted) {
    each_executing(w, [&](int i) {
      if (wanted[i] > in.bytes) fault(w, in, i, "cp.async: the source is larger than the copy");
    });
    whole = exec & lane_mask([&](int i) { return wanted[i] == in.bytes; });
    part = exec & ~whole & lane_mask([&](int i) { return wanted[i] != 0; });
  }
  if (whole) {
    w.exec = whole;
    access(w, in, Space::kGlobal, from, in.bytes, Access::kRead);
    each_executing(w, [&](int i) {
      copy(transfer.data[i], reinterpret_cast<const void*>(from.at[i]), in.bytes);
    });
  }
  for (uint32_t m = part; m; m &= m - 1) {  // byte by byte: any length may be left
    const int i = std::countr_zero(m);
    w.exec = 1u << i;
    for (uint32_t k = 0; k < wanted[i]; k++) {
      Addresses byte = from;
      byte.at[i] += k;
      access(w, in, Space::kGlobal, byte, 1, Access::kRead);
      transfer.data[i][k] = *reinterpret_cast<const uint8_t*>(byte.at[i]);
    }
  }
  w.exec = exec;
  access(w, in, Space::kShared, to, in.bytes, Access::kAsyncWrite);
  // One transfer for the lanes with the same number of groups behind them.
  auto same_group = [&](uint32_t lanes, uint32_t group) {
    return lanes & lane_mask([&](int i) { return w.async_group[i] == group; });
  };
  transfer.group = w.async_group[std::countr_zero(exec)];
  transfer.lanes = same_group(exec, transfer.group);
  for (uint32_t left = exec & ~transfer.lanes; left;) {
    Transfer other = w.transfers.back();
    other.group = w.async_group[std::countr_zero(left)];
    other.lanes = same_group(left, other.group);
    left &= ~other.lanes;
    w.transfers.push_back(other);
  }
}

void commit_group(Warp& w, const Instr&) {
  each_executing(w, [&](int i) { w.async_group[i]++; });
}

void arrive(Warp& w, const Instr& in, const Transfer& t, uint32_t lanes) {
  Block& b = *w.block;
  alignas(64) uint64_t at[kLanes];
  for (int i = 0; i < kLanes; i++) at[i] = t.to[i];
  for (uint32_t m = lanes; m; m &= m - 1)
    std::memset(b.shared_init.data() + at[std::countr_zero(m)], kInitialised, t.bytes);
  const uint64_t stamp = b.shared_stamp(w);
  if (!check_lanes(b.shared_shadow, lanes, at, t.bytes, Access::kWrite, stamp, kWarpUnit))
    fault(w, in, std::countr_zero(lanes), "race: cp.async copies to where another copy goes");
  for (uint32_t m = lanes; m; m &= m - 1) {
    const int i = std::countr_zero(m);
    copy(b.shared.data() + t.to[i], t.data[i], t.bytes);
  }
}

// in.imm: groups that may still be on their way; -1: not even uncommitted copies.
void wait_group(Warp& w, const Instr& in) {
  for (Transfer& t : w.transfers) {
    const uint32_t done = t.lanes & w.exec & lane_mask([&](int i) {
      return in.imm < 0 || t.group + uint64_t(in.imm) < w.async_group[i];
    });
    if (done) arrive(w, in, t, done);
    t.lanes &= ~done;
  }
  std::erase_if(w.transfers, [](const Transfer& t) { return t.lanes == 0; });
}

}  // namespace

bool decode_async(Decode& d) {
  if (!d.is("cp")) return false;
  if (!d.take("async")) d.fail("only cp.async is on sm_80");
  Instr& in = d.in;
  in.pipe = Pipe::kLsu;
  if (d.take("commit_group")) return d.expect_operands(0), in.run = commit_group, true;
  if (d.take("wait_all")) return in.imm = -1, in.run = wait_group, true;
  if (d.take("wait_group")) return in.imm = d.integer(0), in.run = wait_group, true;
  d.take("ca") || d.take("cg");
  if (!(d.take("shared") || d.take("shared::cta")) || !d.take("global"))
    d.fail("expected .shared.global");
  d.take("L2::64B") || d.take("L2::128B") || d.take("L2::256B");
  const bool hinted = d.take("L2::cache_hint");
  d.expect_operands(3u + hinted, 4u + hinted);
  d.address(0, Space::kShared);
  in.d = in.a;
  in.mode = in.wide_address;
  in.target = std::bit_cast<uint32_t>(int32_t(in.imm));
  d.address(1, Space::kGlobal);
  in.bytes = uint8_t(d.integer(2));
  if (in.bytes != 4 && in.bytes != 8 && in.bytes != 16) d.fail("cp.async copies 4, 8 or 16 bytes");
  if (d.s.operands.size() == 4u + hinted) in.c = d.src(3, Type::kU32);
  in.run = cp_async;
  d.covers(Space::kShared, in.bytes);
  d.covers(Space::kGlobal, in.bytes);
  return true;
}

}  // namespace vgpu
