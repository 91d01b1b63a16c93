// mov (with packing and unpacking, special registers, addresses of variables), cvta, isspacep.
#include <chrono>

#include "decode.h"

namespace vgpu {
namespace {

constexpr auto kSame = [](auto a) { return a; };

void mov_predicate(Warp& w, const Instr& in) { w.set_pred(in.d, w.pred(in.a)); }

// d = {list}: the parts, lowest first. kPart and kWhole are the integers that hold them.
template <class Part, class Whole> void pack(Warp& w, const Instr& in) {
  const uint32_t* parts = w.block->kernel->lists.data() + in.list;
  alignas(64) Whole whole[kLanes] = {};
  for (int k = 0; k < in.count; k++) {
    const Part* a = w.src<Part>(parts[k]);
    for (int i = 0; i < kLanes; i++) whole[i] |= Whole(a[i]) << (8 * sizeof(Part) * k);
  }
  each_lane<Whole>(w, in.d, [&](int i) { return whole[i]; });
}

template <class Part, class Whole> void unpack(Warp& w, const Instr& in) {
  const uint32_t* parts = w.block->kernel->lists.data() + in.list;
  alignas(64) Whole whole[kLanes];
  const Whole* a = w.src<Whole>(in.a);
  for (int i = 0; i < kLanes; i++) whole[i] = a[i];
  for (int k = 0; k < in.count; k++)
    if (parts[k] != kNoOperand)
      each_lane<Part>(w, parts[k], [&](int i) { return Part(whole[i] >> (8 * sizeof(Part) * k)); });
}

// Time passes with every instruction, and never stands still between two reads.
void clock32(Warp& w, const Instr& in) {
  const uint32_t now = uint32_t(w.block->executed);
  each_lane<uint32_t>(w, in.d, [=](int) { return now; });
}
void clock64(Warp& w, const Instr& in) {
  const uint64_t now = w.block->executed;
  each_lane<uint64_t>(w, in.d, [=](int) { return now; });
}
void globaltimer(Warp& w, const Instr& in) {
  const uint64_t now = uint64_t(std::chrono::steady_clock::now().time_since_epoch().count());
  each_lane<uint64_t>(w, in.d, [=](int) { return now; });
}

bool decode_packing(Decode& d, Type t, size_t vector) {
  std::vector<uint32_t> parts;
  const std::vector<ptx::Operand>& items = d.s.operands[vector].items;
  const int part_bytes = bytes_of(t) / int(std::max<size_t>(items.size(), 1));
  const Type part = part_bytes == 2 ? Type::kB16 : Type::kB32;
  if (part_bytes != 2 && part_bytes != 4) d.fail("parts of this width");
  for (const ptx::Operand& o : items)
    parts.push_back(vector == 1 ? d.src(o, part)
                    : o.kind == ptx::Operand::kSink ? kNoOperand : d.dst(o, part));
  d.in.list = d.list(parts);
  const bool wide = bytes_of(t) == 8;
  if (vector == 1) {
    d.in.d = d.dst(0, t);
    d.in.run = part_bytes == 4 ? pack<uint32_t, uint64_t>
               : wide ? pack<uint16_t, uint64_t> : pack<uint16_t, uint32_t>;
  } else {
    d.in.a = d.src(1, t);
    d.in.run = part_bytes == 4 ? unpack<uint32_t, uint64_t>
               : wide ? unpack<uint16_t, uint64_t> : unpack<uint16_t, uint32_t>;
  }
  return true;
}

uint64_t window_of(Space space) {
  return space == Space::kShared ? kSharedWindow
         : space == Space::kLocal ? kLocalWindow
         : space == Space::kParam ? kParamWindow : 0;
}

bool decode_mov(Decode& d) {
  const Type t = d.type();
  d.expect_operands(2);
  const ptx::Operand& from = d.s.operands[1];
  if (d.s.operands[0].kind == ptx::Operand::kVector) return decode_packing(d, t, 0);
  if (from.kind == ptx::Operand::kVector) return decode_packing(d, t, 1);
  if (t == Type::kPred) {
    d.in.d = d.dst(0, t);
    d.in.a = d.pred_src(from);
    d.in.run = mov_predicate;
    return true;
  }
  d.in.d = d.dst(0, t);
  const int bytes = bytes_of(t);
  d.in.run = bytes == 2 ? unary<uint16_t, kSame>
             : bytes == 4 ? unary<uint32_t, kSame> : unary<uint64_t, kSame>;
  if (from.name == "%clock" || from.name == "%clock_hi") {
    d.in.run = clock32;
  } else if (from.name == "%clock64") {
    d.in.run = clock64;
  } else if (from.name == "%globaltimer") {
    d.in.run = globaltimer;
  } else if (const Builder::Symbol* s = from.name.empty() || d.look_up(from.name)
                                            ? nullptr : d.symbol(from.name)) {
    d.in.a = d.builder.constant(s->address + uint64_t(from.value), bytes);
  } else {
    d.in.a = d.src(1, t);
  }
  return true;
}

Space take_space(Decode& d) {
  if (d.take("shared") || d.take("shared::cta")) return Space::kShared;
  if (d.take("local")) return Space::kLocal;
  if (d.take("param") || d.take("param::entry")) return Space::kParam;
  if (d.take("global") || d.take("const")) return Space::kGlobal;
  d.fail("expected a state space");
}

void cvta(Warp& w, const Instr& in) {
  const uint64_t* a = w.src<uint64_t>(in.a);
  const uint64_t offset = uint64_t(in.imm);
  each_lane<uint64_t>(w, in.d, [=](int i) { return a[i] + offset; });
}

bool decode_cvta(Decode& d) {
  const bool to = d.take("to");
  const uint64_t window = window_of(take_space(d));
  if (d.type() != Type::kU64) d.fail("expected .u64");
  d.expect_operands(2);
  d.in.d = d.dst(0, Type::kU64);
  d.in.imm = int64_t(to ? -window : window);
  const ptx::Operand& from = d.s.operands[1];
  const Builder::Symbol* s = d.look_up(from.name) ? nullptr : d.symbol(from.name);
  d.in.a = s ? d.builder.constant(s->address, 8) : d.src(1, Type::kU64);
  d.in.run = cvta;
  return true;
}

void isspacep(Warp& w, const Instr& in) {
  const uint64_t* a = w.src<uint64_t>(in.a);
  const uint64_t window = uint64_t(in.imm);
  w.set_pred(in.d, lane_mask([=](int i) { return (a[i] & kWindowMask) == window; }));
}

}  // namespace

bool decode_move(Decode& d) {
  if (d.is("mov")) return decode_mov(d);
  if (d.is("cvta")) return decode_cvta(d);
  if (!d.is("isspacep")) return false;
  d.in.imm = int64_t(window_of(take_space(d)));
  d.expect_operands(2);
  d.in.d = d.dst(0, Type::kPred);
  d.in.a = d.src(1, Type::kU64);
  d.in.run = isspacep;
  return true;
}

}  // namespace vgpu
