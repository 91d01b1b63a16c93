// Comparisons and selections: setp set selp slct testp.
#include <cmath>

#include "decode.h"

namespace vgpu {
namespace {

// Lanes of floats that are compared as something else than they are held.
struct F16 {
  uint16_t bits;
  operator float() const { return f16_to_float(bits); }
};
struct BF16 {
  uint16_t bits;
  operator float() const { return bf16_to_float(bits); }
};
struct Flushed {
  float held;
  operator float() const { return flush(held); }
};

enum Comparison { kEq, kNe, kLt, kLe, kGt, kGe, kEqu, kNeu, kLtu, kLeu, kGtu, kGeu, kNum, kNan };
constexpr const char* kNames[] = {"eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu",
                                  "gtu", "geu", "num", "nan", "lo", "ls", "hi", "hs"};
constexpr int kUnsignedNames[] = {kLt, kLe, kGt, kGe};  // lo ls hi hs

template <int kOp, class V> bool holds(V a, V b) {
  const bool nan = a != a || b != b;
  switch (kOp) {
    case kEq: return a == b;
    case kNe: return !nan && a != b;
    case kLt: return a < b;
    case kLe: return a <= b;
    case kGt: return a > b;
    case kGe: return a >= b;
    case kEqu: return nan || a == b;
    case kNeu: return a != b;
    case kLtu: return !(a >= b);
    case kLeu: return !(a > b);
    case kGtu: return !(a <= b);
    case kGeu: return !(a < b);
    case kNum: return !nan;
    default: return nan;
  }
}

template <class T> struct ValueOf { using type = T; };
template <> struct ValueOf<F16> { using type = float; };
template <> struct ValueOf<BF16> { using type = float; };
template <> struct ValueOf<Flushed> { using type = float; };

// kStride 2: the first or second half of packed pairs.
template <class T, int kOp, int kStride>
uint32_t compare_lanes(const Warp& w, uint32_t a, uint32_t b, int first) {
  using V = typename ValueOf<T>::type;
  const T *x = w.src<T>(a) + first, *y = w.src<T>(b) + first;
  return lane_mask([=](int i) { return holds<kOp, V>(x[kStride * i], y[kStride * i]); });
}

// mode: the boolean operation with predicate c: 0 none, 1 and, 2 or, 3 xor; 4: c is negated.
uint32_t combine(const Warp& w, const Instr& in, uint32_t mask) {
  if ((in.mode & 3) == 0) return mask;
  const uint32_t c = w.pred(in.c) ^ (in.mode & 4 ? ~0u : 0);
  return (in.mode & 3) == 1 ? mask & c : (in.mode & 3) == 2 ? mask | c : mask ^ c;
}

template <class T, int kOp> void setp(Warp& w, const Instr& in) {
  const uint32_t mask = compare_lanes<T, kOp, 1>(w, in.a, in.b, 0);
  const uint32_t p = combine(w, in, mask), q = combine(w, in, ~mask);
  w.set_pred(in.d, p);
  w.set_pred(in.e, q);
}
template <class T, int kOp> void setp_pair(Warp& w, const Instr& in) {
  const uint32_t p = combine(w, in, compare_lanes<T, kOp, 2>(w, in.a, in.b, 0));
  const uint32_t q = combine(w, in, compare_lanes<T, kOp, 2>(w, in.a, in.b, 1));
  w.set_pred(in.d, p);
  w.set_pred(in.e, q);
}
// count: 1 for a float result (1.0), else all ones.
template <class T, int kOp> void set(Warp& w, const Instr& in) {
  const uint32_t mask = combine(w, in, compare_lanes<T, kOp, 1>(w, in.a, in.b, 0));
  const uint32_t yes = in.count ? 0x3f800000u : ~0u;
  each_lane<uint32_t>(w, in.d, [=](int i) { return mask >> i & 1 ? yes : 0; });
}

// Packed: imm is what a half becomes where the comparison holds.
template <class T, int kOp> void set_pair(Warp& w, const Instr& in) {
  const uint32_t low = combine(w, in, compare_lanes<T, kOp, 2>(w, in.a, in.b, 0));
  const uint32_t high = combine(w, in, compare_lanes<T, kOp, 2>(w, in.a, in.b, 1));
  const uint32_t yes = uint32_t(in.imm);
  each_lane<uint32_t>(w, in.d, [=](int i) {
    return (low >> i & 1 ? yes : 0) | (high >> i & 1 ? yes << 16 : 0);
  });
}

template <class T, template <class, int> class Op, int kOp = 0> Run by_comparison(int op) {
  if (op == kOp) return Op<T, kOp>::run;
  if constexpr (kOp < kNan) return by_comparison<T, Op, kOp + 1>(op);
  return nullptr;
}
template <class T, int kOp> struct Setp { static constexpr Run run = setp<T, kOp>; };
template <class T, int kOp> struct SetpPair { static constexpr Run run = setp_pair<T, kOp>; };
template <class T, int kOp> struct SetPair { static constexpr Run run = set_pair<T, kOp>; };
template <class T, int kOp> struct Set { static constexpr Run run = set<T, kOp>; };

template <template <class, int> class Op> Run by_type(Decode& d, Type t, int op, bool ftz) {
  switch (t) {
    case Type::kB16: case Type::kU16: return by_comparison<uint16_t, Op>(op);
    case Type::kS16: return by_comparison<int16_t, Op>(op);
    case Type::kB32: case Type::kU32: return by_comparison<uint32_t, Op>(op);
    case Type::kS32: return by_comparison<int32_t, Op>(op);
    case Type::kB64: case Type::kU64: return by_comparison<uint64_t, Op>(op);
    case Type::kS64: return by_comparison<int64_t, Op>(op);
    case Type::kF32: return ftz ? by_comparison<Flushed, Op>(op) : by_comparison<float, Op>(op);
    case Type::kF64: return by_comparison<double, Op>(op);
    case Type::kF16: return by_comparison<F16, Op>(op);
    case Type::kBF16: return by_comparison<BF16, Op>(op);
    default: d.fail("not a type to compare");
  }
}

bool decode_set(Decode& d) {
  const bool to_predicate = d.is("setp");
  int op = -1;
  for (int k = 0; k < 18 && op < 0; k++)
    if (d.take(kNames[k])) op = k < 14 ? k : kUnsignedNames[k - 14];
  if (op < 0) d.fail("expected a comparison");
  const bool combined = d.take("and") ? (d.in.mode = 1) : d.take("or") ? (d.in.mode = 2)
                      : d.take("xor") ? (d.in.mode = 3) : false;
  const bool ftz = d.take("ftz");
  Type result = Type::kPred;
  if (!to_predicate) result = d.type();
  const Type t = d.type();
  d.expect_operands(3 + combined);
  const ptx::Operand& target = d.s.operands[0];
  d.in.a = d.src(1, t);
  d.in.b = d.src(2, t);
  if (combined) {
    d.in.c = d.pred_src(d.s.operands[3]);
    if (d.s.operands[3].negated) d.in.mode |= 4;
  }
  if (!to_predicate) {
    if (bytes_of(result) != 4) d.fail("set with this type");
    d.in.d = d.dst(0, result);
    if (t == Type::kF16x2 || t == Type::kBF16x2) {
      d.in.imm = result == Type::kF16x2 ? 0x3c00 : result == Type::kBF16x2 ? 0x3f80 : 0xffff;
      d.in.run = t == Type::kF16x2 ? by_comparison<F16, SetPair>(op)
                                   : by_comparison<BF16, SetPair>(op);
      return true;
    }
    d.in.count = result == Type::kF32;
    d.in.run = by_type<Set>(d, t, op, ftz);
    return true;
  }
  d.in.d = target.kind == ptx::Operand::kSink ? kNoOperand : d.pred_dst(target.name);
  if (!target.pair.empty()) d.in.e = d.pred_dst(target.pair);
  if (t == Type::kF16x2) d.in.run = by_comparison<F16, SetpPair>(op);
  else if (t == Type::kBF16x2) d.in.run = by_comparison<BF16, SetpPair>(op);
  else d.in.run = by_type<Setp>(d, t, op, ftz);
  return true;
}

template <class T> void selp(Warp& w, const Instr& in) {
  const T *a = w.src<T>(in.a), *b = w.src<T>(in.b);
  const uint32_t p = w.pred(in.c) ^ (in.mode ? ~0u : 0);
  each_lane<T>(w, in.d, [=](int i) { return p >> i & 1 ? a[i] : b[i]; });
}

template <class T, class C> void slct(Warp& w, const Instr& in) {
  const T *a = w.src<T>(in.a), *b = w.src<T>(in.b);
  const C* c = w.src<C>(in.c);
  each_lane<T>(w, in.d, [=](int i) { return c[i] >= 0 ? a[i] : b[i]; });
}

bool decode_select(Decode& d) {
  const Type t = d.type();
  const int bytes = bytes_of(t);
  d.expect_operands(4);
  d.in.d = d.dst(0, t);
  d.in.a = d.src(1, t);
  d.in.b = d.src(2, t);
  if (d.is("selp")) {
    d.in.c = d.pred_src(d.s.operands[3]);
    d.in.mode = d.s.operands[3].negated;
    d.in.run = bytes == 2 ? selp<uint16_t> : bytes == 4 ? selp<uint32_t> : selp<uint64_t>;
    return true;
  }
  const Type c = d.type();
  d.in.c = d.src(3, c);
  if (c == Type::kF32) {
    d.in.run = d.take("ftz") ? (bytes == 4 ? slct<uint32_t, Flushed> : slct<uint64_t, Flushed>)
                             : (bytes == 4 ? slct<uint32_t, float> : slct<uint64_t, float>);
  } else {
    d.in.run = bytes == 4 ? slct<uint32_t, int32_t> : slct<uint64_t, int32_t>;
  }
  if (bytes == 2) d.fail("slct of 16 bits");
  return true;
}

template <class T, int kTest> void testp(Warp& w, const Instr& in) {
  const T* a = w.src<T>(in.a);
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; i++) {
    const bool yes = kTest == 0 ? std::isfinite(a[i]) : kTest == 1 ? std::isinf(a[i])
                   : kTest == 2 ? !std::isnan(a[i]) : kTest == 3 ? std::isnan(a[i])
                   : kTest == 4 ? std::isnormal(a[i]) : std::fpclassify(a[i]) == FP_SUBNORMAL;
    mask |= uint32_t(yes) << i;
  }
  w.set_pred(in.d, mask);
}

bool decode_testp(Decode& d) {
  constexpr const char* kTests[] = {"finite", "infinite", "number", "notanumber", "normal",
                                    "subnormal"};
  constexpr Run kSingle[] = {testp<float, 0>, testp<float, 1>, testp<float, 2>,
                             testp<float, 3>, testp<float, 4>, testp<float, 5>};
  constexpr Run kDouble[] = {testp<double, 0>, testp<double, 1>, testp<double, 2>,
                             testp<double, 3>, testp<double, 4>, testp<double, 5>};
  const Type t = d.type();
  for (int k = 0; k < 6; k++)
    if (d.take(kTests[k])) d.in.run = t == Type::kF64 ? kDouble[k] : kSingle[k];
  if (!d.in.run) d.fail("expected a test");
  d.expect_operands(2);
  d.in.d = d.dst(0, Type::kPred);
  d.in.a = d.src(1, t);
  return true;
}

}  // namespace

bool decode_compare(Decode& d) {
  if (d.is("setp") || d.is("set")) return decode_set(d);
  if (d.is("selp") || d.is("slct")) return decode_select(d);
  if (d.is("testp")) return decode_testp(d);
  return false;
}

}  // namespace vgpu
