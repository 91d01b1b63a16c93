// f32 and f64 arithmetic, correctly rounded: add sub mul fma mad div rcp sqrt min max neg abs
// copysign.
#include <cfenv>
#include <cmath>

#include "decode.h"

namespace vgpu {
namespace {

template <class T> T finish(T x, bool sat) {
  if (!sat) return x;
  return x > 0 ? (x < 1 ? x : T(1)) : T(0);  // NaN and -0 give +0
}

// Canonical NaN, .ftz and .sat around an operation on values.
template <bool kFtz, bool kSat, auto F, class... A> float f32(A... a) {
  float r = kFtz ? flush(F(flush(a)...)) : F(a...);
  r = canonical(r);
  return finish(r, kSat);
}
template <bool kFtz, bool kSat, auto F> Run f32_unary() {
  return unary<float, [](float a) { return f32<kFtz, kSat, F>(a); }>;
}
template <bool kFtz, bool kSat, auto F> Run f32_binary() {
  return binary<float, [](float a, float b) { return f32<kFtz, kSat, F>(a, b); }>;
}
template <bool kFtz, bool kSat, auto F> Run f32_ternary() {
  return ternary<float, [](float a, float b, float c) { return f32<kFtz, kSat, F>(a, b, c); }>;
}
template <auto F> Run pick_unary(bool ftz) {
  return ftz ? f32_unary<true, false, F>() : f32_unary<false, false, F>();
}
template <auto F> Run pick_binary(bool ftz, bool sat) {
  return ftz ? (sat ? f32_binary<true, true, F>() : f32_binary<true, false, F>())
             : (sat ? f32_binary<false, true, F>() : f32_binary<false, false, F>());
}
template <auto F> Run pick_ternary(bool ftz, bool sat) {
  return ftz ? (sat ? f32_ternary<true, true, F>() : f32_ternary<true, false, F>())
             : (sat ? f32_ternary<false, true, F>() : f32_ternary<false, false, F>());
}

constexpr auto kAdd = [](auto a, auto b) { return a + b; };
constexpr auto kSub = [](auto a, auto b) { return a - b; };
constexpr auto kMul = [](auto a, auto b) { return a * b; };
constexpr auto kDiv = [](auto a, auto b) { return a / b; };
constexpr auto kFma = [](auto a, auto b, auto c) { return std::fma(a, b, c); };
constexpr auto kRcp = [](auto a) { return 1 / a; };
constexpr auto kSqrt = [](auto a) { return std::sqrt(a); };
constexpr auto kNeg = [](auto a) { return -a; };
constexpr auto kAbs = [](auto a) { return std::fabs(a); };
// A NaN loses, and -0 is less than +0.
constexpr auto kMin = [](auto a, auto b) {
  const auto least = a < b || (a == b && std::signbit(a)) ? a : b;
  return a != a ? b : b != b ? a : least;
};
constexpr auto kMax = [](auto a, auto b) {
  const auto most = a > b || (a == b && !std::signbit(a)) ? a : b;
  return a != a ? b : b != b ? a : most;
};
constexpr auto kMinNan = [](auto a, auto b) { return a != a || b != b ? a + b : kMin(a, b); };
constexpr auto kMaxNan = [](auto a, auto b) { return a != a || b != b ? a + b : kMax(a, b); };
// copysign.type d, a, b: the sign of a on the magnitude of b.
constexpr auto kCopysign = [](auto a, auto b) { return std::copysign(b, a); };

// The directed roundings, lane by lane under the CPU's rounding mode (in.mode).
enum Operation { kOpAdd, kOpSub, kOpMul, kOpFma, kOpDiv, kOpRcp, kOpSqrt };

template <class T, int kOp> void rounded(Warp& w, const Instr& in) {
  const T* a = w.src<T>(in.a);
  const T* b = in.b == kNoOperand ? a : w.src<T>(in.b);
  const T* c = in.c == kNoOperand ? a : w.src<T>(in.c);
  const bool ftz = in.count & 1, sat = in.count & 2;
  constexpr int kModes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};
  T result[kLanes];
  std::fesetround(kModes[in.mode]);
  for (int i = 0; i < kLanes; i++) {
    auto value = [&](T v) { return sizeof(T) == 4 && ftz ? T(flush(float(v))) : v; };
    volatile T x = value(a[i]), y = value(b[i]), z = value(c[i]), r;  // stay after fesetround
    if constexpr (kOp == kOpAdd) r = x + y;
    else if constexpr (kOp == kOpSub) r = x - y;
    else if constexpr (kOp == kOpMul) r = x * y;
    else if constexpr (kOp == kOpFma) r = std::fma(T(x), T(y), T(z));
    else if constexpr (kOp == kOpDiv) r = x / y;
    else if constexpr (kOp == kOpRcp) r = 1 / x;
    else r = std::sqrt(T(x));
    result[i] = r;
  }
  std::fesetround(FE_TONEAREST);
  each_lane<T>(w, in.d, [&](int i) {
    T r = result[i];
    if constexpr (sizeof(T) == 4) r = canonical(ftz ? flush(r) : r);
    return finish(r, sat);
  });
}

struct Form {
  const char* opcode;
  int sources;
  Run rounded[2];  // f32, f64
};
template <int kOp> constexpr Form form(const char* opcode, int sources) {
  return {opcode, sources, {rounded<float, kOp>, rounded<double, kOp>}};
}
constexpr Form kForms[] = {form<kOpAdd>("add", 2), form<kOpSub>("sub", 2), form<kOpMul>("mul", 2),
                           form<kOpFma>("fma", 3), form<kOpFma>("mad", 3), form<kOpDiv>("div", 2),
                           form<kOpRcp>("rcp", 1), form<kOpSqrt>("sqrt", 1)};

Run nearest(const std::string& opcode, bool wide, bool ftz, bool sat) {
  if (opcode == "add") return wide ? binary<double, kAdd> : pick_binary<kAdd>(ftz, sat);
  if (opcode == "sub") return wide ? binary<double, kSub> : pick_binary<kSub>(ftz, sat);
  if (opcode == "mul") return wide ? binary<double, kMul> : pick_binary<kMul>(ftz, sat);
  if (opcode == "div") return wide ? binary<double, kDiv> : pick_binary<kDiv>(ftz, sat);
  if (opcode == "rcp") return wide ? unary<double, kRcp> : pick_unary<kRcp>(ftz);
  if (opcode == "sqrt") return wide ? unary<double, kSqrt> : pick_unary<kSqrt>(ftz);
  return wide ? ternary<double, kFma> : pick_ternary<kFma>(ftz, sat);
}

bool decode_arithmetic(Decode& d, const Form& form) {
  const Type t = d.type();
  if (t != Type::kF32 && t != Type::kF64) return false;
  const bool wide = t == Type::kF64;
  constexpr const char* kRoundings[] = {"rn", "rz", "rm", "rp"};
  for (int k = 0; k < 4; k++)
    if (d.take(kRoundings[k])) d.in.mode = uint8_t(k);
  const bool ftz = d.take("ftz"), sat = d.take("sat");
  if (wide && (ftz || sat)) d.fail(".ftz and .sat are for f32");
  d.expect_operands(size_t(form.sources) + 1);
  d.in.d = d.dst(0, t);
  d.in.a = d.src(1, t);
  if (form.sources > 1) d.in.b = d.src(2, t);
  if (form.sources > 2) d.in.c = d.src(3, t);
  d.in.count = uint8_t(ftz | sat << 1);
  d.in.pipe = form.sources == 1 ? Pipe::kMufu : Pipe::kFma;
  d.in.run = d.in.mode ? form.rounded[wide] : nearest(d.s.opcode, wide, ftz, sat);
  return true;
}

bool decode_min_max(Decode& d) {
  const bool ftz = d.take("ftz"), nan = d.take("NaN");
  const Type t = d.type();
  d.expect_operands(3);
  d.in.d = d.dst(0, t);
  d.in.a = d.src(1, t);
  d.in.b = d.src(2, t);
  if (t == Type::kF64) d.in.run = d.is("min") ? binary<double, kMin> : binary<double, kMax>;
  else if (d.is("min")) d.in.run = nan ? pick_binary<kMinNan>(ftz, false)
                                       : pick_binary<kMin>(ftz, false);
  else d.in.run = nan ? pick_binary<kMaxNan>(ftz, false) : pick_binary<kMax>(ftz, false);
  return true;
}

}  // namespace

bool decode_float(Decode& d) {
  const Type t = d.peek_type();
  if (t != Type::kF32 && t != Type::kF64) return false;
  if (d.has("approx") || d.has("full")) return false;
  for (const Form& form : kForms)
    if (d.is(form.opcode)) return decode_arithmetic(d, form);
  if (d.is("min") || d.is("max")) return decode_min_max(d);
  const bool one = d.is("neg") || d.is("abs");
  if (!one && !d.is("copysign")) return false;
  const bool ftz = d.take("ftz"), wide = d.type() == Type::kF64;
  d.expect_operands(one ? 2 : 3);
  d.in.d = d.dst(0, t);
  d.in.a = d.src(1, t);
  if (!one) d.in.b = d.src(2, t);
  if (d.is("neg")) d.in.run = wide ? unary<double, kNeg> : ftz ? f32_unary<true, false, kNeg>()
                                                               : unary<float, kNeg>;
  else if (d.is("abs")) d.in.run = wide ? unary<double, kAbs> : ftz ? f32_unary<true, false, kAbs>()
                                                                    : unary<float, kAbs>;
  else d.in.run = wide ? binary<double, kCopysign> : binary<float, kCopysign>;
  return true;
}

}  // namespace vgpu
