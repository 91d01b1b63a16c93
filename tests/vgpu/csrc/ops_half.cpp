// f16 and bf16 arithmetic, single and packed: add sub mul fma neg abs min max.
//
// A sum or product of two is exact enough in f32 for one more rounding to be harmless
// (24 >= 2 * 11 + 2); fma goes through an f64 that is rounded to odd, then once to the result.
#include <cmath>

#include "decode.h"

namespace vgpu {
namespace {

struct F16 {
  static constexpr int kMantissa = 11, kMinExponent = -14;
  static constexpr double kOverflow = 65520;
  static float load(uint16_t x) { return f16_to_float(x); }
  static uint16_t store(float x) { return float_to_f16(x); }
};
struct BF16 {
  static constexpr int kMantissa = 8, kMinExponent = -126;
  static constexpr double kOverflow = 0x1.ffp127;
  static float load(uint16_t x) { return bf16_to_float(x); }
  static uint16_t store(float x) { return float_to_bf16(x); }
};

// x + y rounded to odd: the last bit is set if anything was lost.
double add_to_odd(double x, double y) {
  const double sum = x + y;
  const double part = sum - x;
  const double lost = (x - (sum - part)) + (y - part);
  uint64_t bits = std::bit_cast<uint64_t>(sum);
  const bool inexact = lost != 0 && std::isfinite(sum);
  const bool toward_zero = (lost > 0) == (sum < 0);
  const uint64_t odd = toward_zero ? bits - 1 : bits + 1;
  bits = inexact && (bits & 1) == 0 ? odd : bits;
  return std::bit_cast<double>(bits);
}

// To the nearest value of the format, even on ties.
template <class H> uint16_t round_to(double x) {
  const int exponent = int(std::bit_cast<uint64_t>(x) >> 52 & 2047) - 1023;
  const int quantum = (exponent > H::kMinExponent ? exponent : H::kMinExponent) - H::kMantissa + 1;
  const double magic = std::bit_cast<double>(uint64_t(quantum + 52 + 1023) << 52) * 1.5;
  const double magnitude = std::fabs(x);
  const double rounded = std::copysign((magnitude + magic) - magic, x);
  return H::store(magnitude >= H::kOverflow || x != x ? float(x) : float(rounded));
}

template <class H, auto F> constexpr auto kOne = [](uint16_t a) { return H::store(F(H::load(a))); };
template <class H, auto F> constexpr auto kTwo = [](uint16_t a, uint16_t b) {
  return H::store(F(H::load(a), H::load(b)));
};
template <class H, bool kRelu> constexpr auto kFma = [](uint16_t a, uint16_t b, uint16_t c) {
  const double product = double(H::load(a)) * double(H::load(b));
  const uint16_t r = round_to<H>(add_to_odd(product, H::load(c)));
  if (!kRelu) return r;
  const bool nan = (r & 0x7fff) == kNan16;
  return uint16_t(r >> 15 && !nan ? 0 : r);
};

constexpr auto kAdd = [](float a, float b) { return a + b; };
constexpr auto kSub = [](float a, float b) { return a - b; };
constexpr auto kMul = [](float a, float b) { return a * b; };
constexpr auto kMin = [](float a, float b) {
  const float least = a < b || (a == b && std::signbit(a)) ? a : b;
  return a != a ? b : b != b ? a : least;
};
constexpr auto kMax = [](float a, float b) {
  const float most = a > b || (a == b && !std::signbit(a)) ? a : b;
  return a != a ? b : b != b ? a : most;
};
constexpr auto kMinNan = [](float a, float b) { return a != a || b != b ? a + b : kMin(a, b); };
constexpr auto kMaxNan = [](float a, float b) { return a != a || b != b ? a + b : kMax(a, b); };
constexpr auto kSaturate = [](float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; };
constexpr auto kAddSat = [](float a, float b) { return kSaturate(a + b); };
constexpr auto kSubSat = [](float a, float b) { return kSaturate(a - b); };
constexpr auto kMulSat = [](float a, float b) { return kSaturate(a * b); };
constexpr auto kNeg = [](uint16_t a) { return uint16_t(a ^ 0x8000); };
constexpr auto kAbs = [](uint16_t a) { return uint16_t(a & 0x7fff); };

// One operand per lane, or two in each 32-bit register: the same function over twice the elements.
template <bool kPacked, class F> void each_half(Warp& w, uint32_t d, F f) {
  if constexpr (kPacked)
    each_lane<uint32_t>(w, d, [=](int i) { return f(2 * i) | uint32_t(f(2 * i + 1)) << 16; });
  else
    each_lane<uint16_t>(w, d, f);
}
template <bool kPacked, auto F> void half1(Warp& w, const Instr& in) {
  const uint16_t* a = w.src<uint16_t>(in.a);
  each_half<kPacked>(w, in.d, [=](int i) { return uint16_t(F(a[i])); });
}
template <bool kPacked, auto F> void half2(Warp& w, const Instr& in) {
  const uint16_t *a = w.src<uint16_t>(in.a), *b = w.src<uint16_t>(in.b);
  each_half<kPacked>(w, in.d, [=](int i) { return uint16_t(F(a[i], b[i])); });
}
template <bool kPacked, auto F> void half3(Warp& w, const Instr& in) {
  const uint16_t *a = w.src<uint16_t>(in.a), *b = w.src<uint16_t>(in.b);
  const uint16_t* c = w.src<uint16_t>(in.c);
  each_half<kPacked>(w, in.d, [=](int i) { return uint16_t(F(a[i], b[i], c[i])); });
}

template <class H, bool kPacked> Run pick(Decode& d) {
  const bool sat = d.take("sat"), relu = d.take("relu"), nan = d.take("NaN");
  if (d.is("add")) return sat ? half2<kPacked, kTwo<H, kAddSat>> : half2<kPacked, kTwo<H, kAdd>>;
  if (d.is("sub")) return sat ? half2<kPacked, kTwo<H, kSubSat>> : half2<kPacked, kTwo<H, kSub>>;
  if (d.is("mul")) return sat ? half2<kPacked, kTwo<H, kMulSat>> : half2<kPacked, kTwo<H, kMul>>;
  if (sat) d.fail(".sat is for add, sub and mul");
  if (d.is("min")) return nan ? half2<kPacked, kTwo<H, kMinNan>> : half2<kPacked, kTwo<H, kMin>>;
  if (d.is("max")) return nan ? half2<kPacked, kTwo<H, kMaxNan>> : half2<kPacked, kTwo<H, kMax>>;
  if (d.is("neg")) return half1<kPacked, kNeg>;
  if (d.is("abs")) return half1<kPacked, kAbs>;
  return relu ? half3<kPacked, kFma<H, true>> : half3<kPacked, kFma<H, false>>;
}

}  // namespace

bool decode_half(Decode& d) {
  const Type t = d.peek_type();
  const bool packed = t == Type::kF16x2 || t == Type::kBF16x2;
  if (!packed && t != Type::kF16 && t != Type::kBF16) return false;
  const bool one = d.is("neg") || d.is("abs");
  const bool two = d.is("add") || d.is("sub") || d.is("mul") || d.is("min") || d.is("max");
  if (!one && !two && !d.is("fma")) return false;
  d.type();
  d.take("rn");
  if (d.take("ftz")) d.fail("flushing of 16-bit subnormals");
  d.expect_operands(one ? 2 : two ? 3 : 4);
  d.in.d = d.dst(0, t);
  d.in.a = d.src(1, t);
  if (!one) d.in.b = d.src(2, t);
  if (!one && !two) d.in.c = d.src(3, t);
  const bool f16 = t == Type::kF16 || t == Type::kF16x2;
  d.in.run = f16 ? (packed ? pick<F16, true>(d) : pick<F16, false>(d))
                 : (packed ? pick<BF16, true>(d) : pick<BF16, false>(d));
  if (!one && !d.is("min") && !d.is("max")) d.in.pipe = Pipe::kFma;
  return true;
}

}  // namespace vgpu
