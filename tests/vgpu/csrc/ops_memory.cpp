// ld and st in every space and width; ldmatrix is in ops_matrix.cpp, cp.async in ops_async.cpp.
#include <cstring>

#include "access.h"
#include "decode.h"

namespace vgpu {
namespace {

enum : uint8_t { kAcquire = 1, kRelease = 2 };  // Instr::mode

// Memory elements of type M into registers of type R: a signed M extends its sign.
template <class M, class R> void load(Warp& w, const Instr& in) {
  Addresses a = addresses(w, in);
  if (in.strong && in.space != Space::kShared)
    each_executing(w, [&](int i) { publish(w, a.at[i], false, true); });
  const bool dense = access(w, in, in.space, a, in.bytes, Access::kRead);
  const uint32_t* registers = w.block->kernel->lists.data() + in.list;
  for (int k = 0; k < in.count; k++) {
    if (registers[k] == kNoOperand) continue;
    R* d = w.reg<R>(registers[k]);
    auto element = [&](int i) { return *reinterpret_cast<const M*>(a.at[i] + k * sizeof(M)); };
    if (dense && in.count == 1 && sizeof(M) == sizeof(R))
      std::memcpy(d, reinterpret_cast<const void*>(a.at[0]), kLanes * sizeof(M));
    else if (w.exec == kAllLanes)
      for (int i = 0; i < kLanes; i++) d[i] = R(element(i));
    else
      each_executing(w, [&](int i) { d[i] = R(element(i)); });
  }
}

template <class M, class R> void store(Warp& w, const Instr& in) {
  Addresses a = addresses(w, in);
  if (in.strong && in.space != Space::kShared)
    each_executing(w, [&](int i) { publish(w, a.at[i], in.mode & kRelease, false); });
  const bool dense = access(w, in, in.space, a, in.bytes, Access::kWrite);
  const uint32_t* registers = w.block->kernel->lists.data() + in.list;
  for (int k = 0; k < in.count; k++) {
    const R* s = w.src<R>(registers[k]);
    auto element = [&](int i) -> M& { return *reinterpret_cast<M*>(a.at[i] + k * sizeof(M)); };
    if (dense && in.count == 1 && sizeof(M) == sizeof(R)) {
      std::memcpy(reinterpret_cast<void*>(a.at[0]), s, kLanes * sizeof(M));
      return;
    }
    each_executing(w, [&](int i) { element(i) = M(s[i]); });
    if (dense) continue;
    each_executing(w, [&](int i) {
      if (element(i) != M(s[i]) && in.space != Space::kLocal)
        fault(w, in, i, "race: lanes of this warp write different values to one address");
    });
  }
}

// A parameter at a constant offset: the same for every lane.
template <class M, class R> void load_param(Warp& w, const Instr& in) {
  const std::vector<uint8_t>& params = w.block->launch->params;
  const uint32_t* registers = w.block->kernel->lists.data() + in.list;
  for (int k = 0; k < in.count; k++) {
    const size_t offset = size_t(in.imm) + k * sizeof(M);
    if (offset + sizeof(M) > params.size())
      fault(w, in, 0, "an access beyond the kernel's parameters");
    M value;
    std::memcpy(&value, params.data() + offset, sizeof(M));
    each_lane<R>(w, registers[k], [=](int) { return R(value); });
  }
}

void nothing(Warp&, const Instr&) {}

template <template <class, class> class Op> Run by_types(Decode& d, Type t, int register_bytes) {
  const int bytes = bytes_of(t);
  const bool sign = is_signed(t);
  switch (bytes * 100 + register_bytes) {
    case 102: return sign ? Op<int8_t, uint16_t>::run : Op<uint8_t, uint16_t>::run;
    case 104: return sign ? Op<int8_t, uint32_t>::run : Op<uint8_t, uint32_t>::run;
    case 108: return sign ? Op<int8_t, uint64_t>::run : Op<uint8_t, uint64_t>::run;
    case 202: return Op<uint16_t, uint16_t>::run;
    case 204: return sign ? Op<int16_t, uint32_t>::run : Op<uint16_t, uint32_t>::run;
    case 208: return sign ? Op<int16_t, uint64_t>::run : Op<uint16_t, uint64_t>::run;
    case 404: return Op<uint32_t, uint32_t>::run;
    case 408: return sign ? Op<int32_t, uint64_t>::run : Op<uint32_t, uint64_t>::run;
    case 808: return Op<uint64_t, uint64_t>::run;
    default: d.fail("a register narrower than the memory access");
  }
}
template <class M, class R> struct Load { static constexpr Run run = load<M, R>; };
template <class M, class R> struct LoadParam { static constexpr Run run = load_param<M, R>; };
template <class M, class R> struct Store { static constexpr Run run = store<M, R>; };

// Cache hints change nothing here.
void take_hints(Decode& d) {
  for (const char* hint : {"nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "weak",
                           "L1::evict_normal", "L1::evict_unchanged", "L1::evict_first",
                           "L1::evict_last", "L1::no_allocate", "L2::evict_last",
                           "L2::evict_normal", "L2::evict_first", "L2::cache_hint", "L2::64B",
                           "L2::128B", "L2::256B", "unified"})
    d.take(hint);
}

bool decode_ld_st(Decode& d) {
  const bool ld = d.is("ld") || d.is("ldu");
  Instr& in = d.in;
  in.pipe = Pipe::kLsu;
  const bool param = d.take("param") || d.take("param::entry");
  if (d.take("shared") || d.take("shared::cta")) in.space = Space::kShared;
  else if (d.take("global") || d.take("const")) in.space = Space::kGlobal;
  else if (d.take("local")) in.space = Space::kLocal;
  else if (param) in.space = Space::kParam;
  const bool hinted = d.has("L2::cache_hint");
  take_hints(d);
  if (d.take("acquire")) in.mode |= kAcquire, in.strong = true;
  if (d.take("release")) in.mode |= kRelease, in.strong = true;
  if (d.take("volatile") | d.take("relaxed")) in.strong = true;
  d.take("gpu") || d.take("cta") || d.take("sys");
  const int count = d.take("v4") ? 4 : d.take("v2") ? 2 : 1;
  const Type t = d.type();
  in.bytes = uint8_t(count * bytes_of(t));
  if (in.bytes > 16) d.fail("more than 16 bytes per lane are not for sm_80");
  d.expect_operands(2u + hinted);
  const size_t at = ld ? 1 : 0;
  const std::string& base = d.s.operands[at].name;
  if (param && !d.look_up(base) && !d.symbol(base)) {
    in.run = nothing;  // a parameter of a call; the call itself decides what happens
    in.pipe = Pipe::kOther;
    return true;
  }
  d.address(at, in.space);
  const ptx::Operand& value = d.s.operands[1 - at];
  if ((value.kind == ptx::Operand::kVector) != (count > 1)) d.fail("a vector of the wrong size");
  std::vector<uint32_t> registers;
  int register_bytes = lane_bytes(t);
  for (int k = 0; k < count; k++) {
    const ptx::Operand& o = count > 1 ? value.items.at(k) : value;
    Type held = t;
    if (o.kind == ptx::Operand::kSink) registers.push_back(kNoOperand);
    else if (o.kind == ptx::Operand::kName) registers.push_back(d.any_register(o, &held));
    else registers.push_back(d.src(o, t));
    if (o.kind != ptx::Operand::kSink) register_bytes = lane_bytes(held);
  }
  in.list = d.list(registers);
  if (!ld) {
    in.d = uint32_t(register_bytes);  // no register: the width of those that hold the values
    in.run = by_types<Store>(d, t, register_bytes);
  } else if (in.space == Space::kParam && d.symbol(base) && !d.look_up(base)) {
    in.run = by_types<LoadParam>(d, t, register_bytes);
    in.pipe = Pipe::kOther;  // a constant operand of the machine's instructions
  } else {
    in.run = by_types<Load>(d, t, register_bytes);
  }
  d.covers(in.space, in.bytes);
  return true;
}

}  // namespace

bool decode_memory(Decode& d) {
  if (d.is("ld") || d.is("ldu") || d.is("st")) return decode_ld_st(d);
  if (d.is("prefetch") || d.is("prefetchu") || d.is("createpolicy") || d.is("discard") ||
      d.is("applypriority")) {
    d.taken.assign(d.taken.size(), true);
    d.in.run = nothing;
    d.in.pipe = Pipe::kOther;
    if (d.is("createpolicy")) {
      d.in.d = d.dst(0, Type::kB64);
      d.in.a = d.builder.constant(0, 8);
      d.in.run = unary<uint64_t, [](uint64_t a) { return a; }>;
    }
    return true;
  }
  return false;
}

}  // namespace vgpu
