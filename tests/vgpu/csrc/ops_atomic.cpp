// atom and red. Lanes take their turns in order; blocks on other CPU threads in any order.
#include <atomic>

#include "access.h"
#include "decode.h"

namespace vgpu {
namespace {

enum Semantics : uint8_t { kAcquire = 1, kRelease = 2 };

template <class T, auto F> void atom(Warp& w, const Instr& in) {
  Addresses a = addresses(w, in);
  if (in.space != Space::kShared)
    each_executing(w, [&](int i) { publish(w, a.at[i], in.mode & kRelease, true); });
  access(w, in, in.space, a, sizeof(T), Access::kAtomicUpdate);
  const T* b = w.src<T>(in.b);
  const T* c = in.c == kNoOperand ? b : w.src<T>(in.c);
  alignas(64) T olds[kLanes] = {};
  each_executing(w, [&](int i) {
    const std::atomic_ref<T> at(*reinterpret_cast<T*>(a.at[i]));
    T old = at.load();
    while (!at.compare_exchange_weak(old, T(F(old, b[i], c[i])))) {
    }
    olds[i] = old;
  });
  if (in.d != kNoOperand) each_lane<T>(w, in.d, [&](int i) { return olds[i]; });
}

constexpr auto kAdd = [](auto old, auto b, auto) { return old + b; };
constexpr auto kMin = [](auto old, auto b, auto) { return old < b ? old : b; };
constexpr auto kMax = [](auto old, auto b, auto) { return old > b ? old : b; };
constexpr auto kAnd = [](auto old, auto b, auto) { return old & b; };
constexpr auto kOr = [](auto old, auto b, auto) { return old | b; };
constexpr auto kXor = [](auto old, auto b, auto) { return old ^ b; };
constexpr auto kExch = [](auto, auto b, auto) { return b; };
constexpr auto kCas = [](auto old, auto b, auto c) { return old == b ? c : old; };
constexpr auto kInc = [](uint32_t old, uint32_t b, uint32_t) { return old >= b ? 0 : old + 1; };
constexpr auto kDec = [](uint32_t old, uint32_t b, uint32_t) {
  return old == 0 || old > b ? b : old - 1;
};
// Floats pass as integers of their size, so that the compare and exchange is of bits.
constexpr auto kAddF32 = [](uint32_t old, uint32_t b, uint32_t) {
  return as_bits(canonical(as_float(old) + as_float(b)));
};
constexpr auto kAddF32Flushed = [](uint32_t old, uint32_t b, uint32_t) {  // in global memory
  return as_bits(canonical(flush(flush(as_float(old)) + flush(as_float(b)))));
};
constexpr auto kAddF64 = [](uint64_t old, uint64_t b, uint64_t) {
  return std::bit_cast<uint64_t>(std::bit_cast<double>(old) + std::bit_cast<double>(b));
};
constexpr auto kAddF16 = [](uint16_t old, uint16_t b, uint16_t) {
  return float_to_f16(f16_to_float(old) + f16_to_float(b));
};
constexpr auto kAddBF16 = [](uint16_t old, uint16_t b, uint16_t) {
  return float_to_bf16(bf16_to_float(old) + bf16_to_float(b));
};
template <auto F> constexpr auto kPair = [](uint32_t old, uint32_t b, uint32_t) {
  return uint32_t(F(uint16_t(old), uint16_t(b), uint16_t(0))) |
         uint32_t(F(uint16_t(old >> 16), uint16_t(b >> 16), uint16_t(0))) << 16;
};

template <auto F> Run integers(const Decode& d, Type t) {
  switch (t) {
    case Type::kB32: case Type::kU32: return atom<uint32_t, F>;
    case Type::kS32: return atom<int32_t, F>;
    case Type::kB64: case Type::kU64: return atom<uint64_t, F>;
    case Type::kS64: return atom<int64_t, F>;
    default: d.fail("no such atomic");
  }
}

Run pick(Decode& d, Type t, bool shared) {
  if (d.take("add")) {
    switch (t) {
      case Type::kF32: return shared ? atom<uint32_t, kAddF32> : atom<uint32_t, kAddF32Flushed>;
      case Type::kF64: return atom<uint64_t, kAddF64>;
      case Type::kF16: return atom<uint16_t, kAddF16>;
      case Type::kBF16: return atom<uint16_t, kAddBF16>;
      case Type::kF16x2: return atom<uint32_t, kPair<kAddF16>>;
      case Type::kBF16x2: return atom<uint32_t, kPair<kAddBF16>>;
      default: return integers<kAdd>(d, t);
    }
  }
  if (d.take("min")) return integers<kMin>(d, t);
  if (d.take("max")) return integers<kMax>(d, t);
  if (d.take("and")) return integers<kAnd>(d, t);
  if (d.take("or")) return integers<kOr>(d, t);
  if (d.take("xor")) return integers<kXor>(d, t);
  if (d.take("exch")) return integers<kExch>(d, t);
  if (d.take("cas")) return t == Type::kB16 ? atom<uint16_t, kCas> : integers<kCas>(d, t);
  if (t != Type::kU32) d.fail("no such atomic");
  if (d.take("inc")) return atom<uint32_t, kInc>;
  if (d.take("dec")) return atom<uint32_t, kDec>;
  d.fail("no such atomic");
}

}  // namespace

bool decode_atomic(Decode& d) {
  const bool reduction = d.is("red");
  if (!reduction && !d.is("atom")) return false;
  Instr& in = d.in;
  in.pipe = Pipe::kLsu;
  in.strong = true;
  if (d.take("relaxed")) in.mode = 0;
  if (d.take("acquire")) in.mode = kAcquire;
  if (d.take("release")) in.mode = kRelease;
  if (d.take("acq_rel")) in.mode = kAcquire | kRelease;
  d.take("gpu") || d.take("cta") || d.take("sys");
  if (d.take("shared") || d.take("shared::cta")) in.space = Space::kShared;
  else if (d.take("global")) in.space = Space::kGlobal;
  d.take("noftz");
  const bool hinted = d.take("L2::cache_hint");
  const Type t = d.type();
  const bool cas = d.has("cas");
  const size_t first = reduction ? 0 : 1;
  d.expect_operands(first + 2 + cas + hinted);
  d.address(first, in.space);
  in.b = d.src(first + 1, t);
  if (cas) in.c = d.src(first + 2, t);
  if (!reduction && d.s.operands[0].kind != ptx::Operand::kSink) in.d = d.dst(0, t);
  in.bytes = uint8_t(bytes_of(t));
  in.run = pick(d, t, in.space == Space::kShared);
  d.covers(in.space, in.bytes);
  return true;
}

}  // namespace vgpu
