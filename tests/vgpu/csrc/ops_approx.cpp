// The approximations: ex2 lg2 sin cos tanh rcp rsqrt sqrt div, .approx and .full.
//
// Each is computed in f64 and rounded once, which is within the ISA's error bounds and more exact
// than a real multi-function unit. Where the ISA names a result (huge divisors), it is that result.
#include <cmath>

#include "decode.h"

namespace vgpu {
namespace {

// 2^x for a float, relative error below 1e-10 before the rounding.
inline double exp2_of(float x) {
  const double y = x < -200 ? -200 : x > 200 ? 200 : double(x);
  const double n = (y + 0x1.8p52) - 0x1.8p52;
  const double f = (y - n) * 0.69314718055994530942;
  double p = 1.0 / 40320;
  for (const double c : {1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0})
    p = p * f + c;
  const double scale = std::bit_cast<double>(uint64_t(int64_t(n) + 1023) << 52);
  return x != x ? double(x) : p * scale;
}

constexpr auto kEx2 = [](float x) { return float(exp2_of(x)); };
constexpr auto kLg2 = [](float x) { return float(std::log2(double(x))); };
constexpr auto kSin = [](float x) { return float(std::sin(double(x))); };
constexpr auto kCos = [](float x) { return float(std::cos(double(x))); };
constexpr auto kTanh = [](float x) { return float(std::tanh(double(x))); };
constexpr auto kRcp = [](float x) { return 1 / x; };
constexpr auto kSqrt = [](float x) { return std::sqrt(x); };
constexpr auto kRsqrt = [](float x) { return float(1 / std::sqrt(double(x))); };
constexpr auto kDivFull = [](float a, float b) { return a / b; };
constexpr auto kDivApprox = [](float a, float b) {
  const bool huge = std::fabs(b) > 0x1p126f && !std::isinf(b);
  const float zero = std::copysign(0.0f, a) * std::copysign(1.0f, b);
  return huge ? (std::isinf(a) ? as_float(kNan32) : zero) : a / b;
};

template <bool kFtz, auto F> constexpr auto kOne = [](float a) {
  return canonical(kFtz ? flush(F(flush(a))) : F(a));
};
template <bool kFtz, auto F> constexpr auto kTwo = [](float a, float b) {
  return canonical(kFtz ? flush(F(flush(a), flush(b))) : F(a, b));
};
template <auto F> constexpr auto kHalf = [](uint16_t a) {
  return float_to_f16(F(f16_to_float(a)));
};
template <auto F> constexpr auto kBrain = [](uint16_t a) {
  return float_to_bf16(F(bf16_to_float(a)));
};
template <auto F> constexpr auto kPair = [](uint32_t a) {
  return uint32_t(F(uint16_t(a))) | uint32_t(F(uint16_t(a >> 16))) << 16;
};

// The .ftz.f64 forms look at the upper 32 bits only, and give no others.
inline double upper(double x) {
  return std::bit_cast<double>(std::bit_cast<uint64_t>(x) & 0xffffffff00000000ull);
}
inline double flush_double(double x) {
  const uint64_t bits = std::bit_cast<uint64_t>(x);
  return (bits & 0x7ff0000000000000ull) ? x : std::bit_cast<double>(bits & (1ull << 63));
}
constexpr auto kRcp64Upper = [](double x) {
  return upper(flush_double(1 / flush_double(upper(x))));
};
constexpr auto kRsqrt64Upper = [](double x) {
  return upper(1 / std::sqrt(flush_double(upper(x))));
};
constexpr auto kRsqrt64 = [](double x) { return 1 / std::sqrt(x); };

template <auto F> Run single(bool ftz) {
  return ftz ? unary<float, kOne<true, F>> : unary<float, kOne<false, F>>;
}

template <auto F> Run any_float(Decode& d, Type t, bool ftz) {
  switch (t) {
    case Type::kF32: return single<F>(ftz);
    case Type::kF16: return unary<uint16_t, kHalf<F>>;
    case Type::kBF16: return unary<uint16_t, kBrain<F>>;
    case Type::kF16x2: return unary<uint32_t, kPair<kHalf<F>>>;
    case Type::kBF16x2: return unary<uint32_t, kPair<kBrain<F>>>;
    default: d.fail("no approximation of this type");
  }
}

}  // namespace

bool decode_approx(Decode& d) {
  const bool divide = d.is("div");
  if (!divide && !d.is("ex2") && !d.is("lg2") && !d.is("sin") && !d.is("cos") && !d.is("tanh") &&
      !d.is("rcp") && !d.is("sqrt") && !d.is("rsqrt"))
    return false;
  const bool full = d.take("full");
  if (!full && !d.take("approx")) d.fail("expected .approx");
  if (full && !divide) d.fail(".full is for div");
  const bool ftz = d.take("ftz");
  const Type t = d.type();
  d.expect_operands(divide ? 3 : 2);
  d.in.d = d.dst(0, t);
  d.in.a = d.src(1, t);
  d.in.pipe = Pipe::kMufu;
  if (divide) {
    if (t != Type::kF32) d.fail("approximate division is of f32");
    d.in.b = d.src(2, t);
    if (full) d.in.run = ftz ? binary<float, kTwo<true, kDivFull>>
                             : binary<float, kTwo<false, kDivFull>>;
    else d.in.run = ftz ? binary<float, kTwo<true, kDivApprox>>
                        : binary<float, kTwo<false, kDivApprox>>;
    return true;
  }
  if (d.is("ex2")) return d.in.run = any_float<kEx2>(d, t, ftz), true;
  if (d.is("tanh")) return d.in.run = any_float<kTanh>(d, t, ftz), true;
  if (t == Type::kF64 && d.is("rcp") && ftz) return d.in.run = unary<double, kRcp64Upper>, true;
  if (t == Type::kF64 && d.is("rsqrt"))
    return d.in.run = ftz ? unary<double, kRsqrt64Upper> : unary<double, kRsqrt64>, true;
  if (t != Type::kF32) d.fail("no approximation of this type");
  if (d.is("lg2")) d.in.run = single<kLg2>(ftz);
  else if (d.is("sin")) d.in.run = single<kSin>(ftz);
  else if (d.is("cos")) d.in.run = single<kCos>(ftz);
  else if (d.is("rcp")) d.in.run = single<kRcp>(ftz);
  else if (d.is("sqrt")) d.in.run = single<kSqrt>(ftz);
  else d.in.run = single<kRsqrt>(ftz);
  return true;
}

}  // namespace vgpu
