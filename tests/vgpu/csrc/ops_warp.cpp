// What the lanes of a warp do together: shfl vote match redux activemask. bar.warp.sync is in
// ops_control.cpp.
#include "decode.h"

namespace vgpu {
namespace {

std::string hex(uint32_t x) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", x);
  return text;
}

}  // namespace

bool arrive_together(Warp& w, const Instr& in, uint32_t mask_operand, bool exited_allowed) {
  const uint32_t* masks = w.src<uint32_t>(mask_operand);
  each_executing(w, [&](int i) {
    if (!(masks[i] >> i & 1))
      fault(w, in, i, "lane " + std::to_string(i) + " is not in the mask " + hex(masks[i]));
  });
  const uint32_t members = masks[std::countr_zero(w.exec)];
  const uint32_t others = w.exec & ~lane_mask([&](int i) { return masks[i] == members; });
  if (others) {  // groups of lanes with a mask each: one group after the other
    w.groups.push_back({w.pc - 1, others, false});
    w.active &= ~others;
    w.exec &= ~others;
    w.merge_pc = w.pc;  // before the next instruction, it is the turn of those
  }
  const uint32_t gone = members & ~w.alive;
  if (gone && !exited_allowed)
    fault(w, in, std::countr_zero(w.exec),
          "the mask " + hex(members) + " names lanes that have exited or have no thread: " +
              hex(gone));
  return converge(w, in, members);
}

namespace {

enum Direction : uint8_t { kUp, kDown, kBfly, kIdx };

template <int kMode> void shfl(Warp& w, const Instr& in) {
  if (!arrive_together(w, in, w.block->kernel->lists[in.list], false)) return;
  const uint32_t *a = w.src<uint32_t>(in.a), *b = w.src<uint32_t>(in.b);
  const uint32_t* c = w.src<uint32_t>(in.c);
  alignas(64) uint32_t from[kLanes];
  uint32_t inside = 0, sources = 0;
  for (uint32_t i = 0; i < kLanes; i++) {
    const uint32_t clamp = c[i] & 31, segment = c[i] >> 8 & 31, offset = b[i] & 31;
    const uint32_t most = (i & segment) | (clamp & ~segment), least = i & segment;
    int32_t j = int32_t(i);
    if (kMode == kUp) j = int32_t(i - offset);
    if (kMode == kDown) j = int32_t(i + offset);
    if (kMode == kBfly) j = int32_t(i ^ offset);
    if (kMode == kIdx) j = int32_t(least | (offset & ~segment));
    const bool in_range = kMode == kUp ? j >= int32_t(most) : j <= int32_t(most);
    from[i] = in_range ? uint32_t(j) & 31 : i;
    inside |= uint32_t(in_range) << i;
    if (w.exec >> i & 1) sources |= 1u << from[i];
  }
  if (sources & ~w.exec)
    each_executing(w, [&](int i) {
      if (!(w.exec >> from[i] & 1))
        fault(w, in, i, "reads the register of lane " + std::to_string(from[i]) +
                            ", which does not take part");
    });
  alignas(64) uint32_t value[kLanes];
  for (int i = 0; i < kLanes; i++) value[i] = a[from[i]];
  each_lane<uint32_t>(w, in.d, [&](int i) { return value[i]; });
  w.set_pred(in.e, inside);
}

bool decode_shfl(Decode& d) {
  if (!d.take("sync")) d.fail("expected .sync");
  d.in.run = d.take("up") ? shfl<kUp> : d.take("down") ? shfl<kDown>
             : d.take("bfly") ? shfl<kBfly> : d.take("idx") ? shfl<kIdx> : nullptr;
  if (!d.in.run) d.fail("expected a direction");
  d.type();
  d.expect_operands(5);
  const Type u32 = Type::kU32;
  d.in.d = d.dst(0, u32);
  if (!d.s.operands[0].pair.empty()) d.in.e = d.pred_dst(d.s.operands[0].pair);
  d.in.a = d.src(1, u32);
  d.in.b = d.src(2, u32);
  d.in.c = d.src(3, u32);
  d.in.list = d.list({d.src(4, u32)});
  return true;
}

enum Vote : uint8_t { kAll, kAny, kUni, kBallot };

// in.mode: the vote, 4: the predicate is negated; in.c: the mask.
void vote(Warp& w, const Instr& in) {
  if (!arrive_together(w, in, in.c, false)) return;
  const uint32_t p = (w.pred(in.a) ^ (in.mode & 4 ? ~0u : 0)) & w.exec;
  const bool all = p == w.exec, none = p == 0;
  switch (in.mode & 3) {
    case kAll: return w.set_pred(in.d, all ? ~0u : 0);
    case kAny: return w.set_pred(in.d, none ? 0 : ~0u);
    case kUni: return w.set_pred(in.d, all || none ? ~0u : 0);
    default: return each_lane<uint32_t>(w, in.d, [=](int) { return p; });
  }
}

bool decode_vote(Decode& d) {
  if (!d.take("sync")) d.fail("expected .sync");
  d.in.mode = d.take("all") ? kAll : d.take("any") ? kAny : d.take("uni") ? kUni
              : d.take("ballot") ? kBallot : (d.fail("expected a vote"), kAll);
  const Type t = d.type();
  d.expect_operands(3);
  d.in.d = d.dst(0, t);
  d.in.a = d.pred_src(d.s.operands[1]);
  if (d.s.operands[1].negated) d.in.mode |= 4;
  d.in.c = d.src(2, Type::kU32);
  d.in.run = vote;
  return true;
}

template <class T, bool kAllEqual> void match(Warp& w, const Instr& in) {
  if (!arrive_together(w, in, in.c, false)) return;
  const T* a = w.src<T>(in.a);
  alignas(64) uint32_t same[kLanes];
  for (int i = 0; i < kLanes; i++) {
    same[i] = lane_mask([&](int j) { return a[j] == a[i]; }) & w.exec;
    if (kAllEqual && same[i] != w.exec) same[i] = 0;
  }
  each_lane<uint32_t>(w, in.d, [&](int i) { return same[i]; });
  w.set_pred(in.e, lane_mask([&](int i) { return same[i] == w.exec; }));
}

bool decode_match(Decode& d) {
  const bool all = d.take("all");
  if ((!all && !d.take("any")) || !d.take("sync")) d.fail("expected .any.sync or .all.sync");
  const Type t = d.type();
  const bool wide = bytes_of(t) == 8;
  d.expect_operands(3);
  d.in.d = d.dst(0, Type::kU32);
  if (!d.s.operands[0].pair.empty()) d.in.e = d.pred_dst(d.s.operands[0].pair);
  d.in.a = d.src(1, t);
  d.in.c = d.src(2, Type::kU32);
  d.in.run = wide ? (all ? match<uint64_t, true> : match<uint64_t, false>)
                  : (all ? match<uint32_t, true> : match<uint32_t, false>);
  return true;
}

template <class T, auto F> void redux(Warp& w, const Instr& in) {
  if (!arrive_together(w, in, in.c, false)) return;
  const T* a = w.src<T>(in.a);
  T total = a[std::countr_zero(w.exec)];
  for (uint32_t m = w.exec & (w.exec - 1); m; m &= m - 1) total = F(total, a[std::countr_zero(m)]);
  each_lane<T>(w, in.d, [=](int) { return total; });
}

bool decode_redux(Decode& d) {
  if (!d.take("sync")) d.fail("expected .sync");
  using U = uint32_t;
  using S = int32_t;
  constexpr auto kMin = [](auto a, auto b) { return a < b ? a : b; };
  constexpr auto kMax = [](auto a, auto b) { return a > b ? a : b; };
  const bool add = d.take("add"), min = d.take("min"), max = d.take("max");
  const bool bit_and = d.take("and"), bit_or = d.take("or");
  const Type t = d.type();
  if (bytes_of(t) != 4 || is_float(t) || (!add && !min && !max && !bit_and && !bit_or &&
                                          !d.take("xor")))
    d.fail("no such reduction");
  if (add) d.in.run = redux<U, [](U a, U b) { return a + b; }>;
  else if (min) d.in.run = is_signed(t) ? redux<S, kMin> : redux<U, kMin>;
  else if (max) d.in.run = is_signed(t) ? redux<S, kMax> : redux<U, kMax>;
  else if (bit_and) d.in.run = redux<U, [](U a, U b) { return a & b; }>;
  else if (bit_or) d.in.run = redux<U, [](U a, U b) { return a | b; }>;
  else d.in.run = redux<U, [](U a, U b) { return a ^ b; }>;
  d.expect_operands(3);
  d.in.d = d.dst(0, t);
  d.in.a = d.src(1, t);
  d.in.c = d.src(2, Type::kU32);
  return true;
}

void activemask(Warp& w, const Instr& in) {
  const uint32_t exec = w.exec;
  each_lane<uint32_t>(w, in.d, [=](int) { return exec; });
}

}  // namespace

bool decode_warp(Decode& d) {
  if (d.is("shfl")) return decode_shfl(d);
  if (d.is("vote")) return decode_vote(d);
  if (d.is("match")) return decode_match(d);
  if (d.is("redux")) return decode_redux(d);
  if (!d.is("activemask")) return false;
  d.type();
  d.expect_operands(1);
  d.in.d = d.dst(0, Type::kU32);
  d.in.run = activemask;
  return true;
}

}  // namespace vgpu
