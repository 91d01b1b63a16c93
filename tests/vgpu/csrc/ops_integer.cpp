// Integer arithmetic: add sub mul mad div rem abs neg min max sad, and the carry forms.
#include <type_traits>

#include "decode.h"

namespace vgpu {
namespace {

template <class T> struct Wider;
template <> struct Wider<uint16_t> { using type = uint32_t; };
template <> struct Wider<int16_t> { using type = int32_t; };
template <> struct Wider<uint32_t> { using type = uint64_t; };
template <> struct Wider<int32_t> { using type = int64_t; };
template <> struct Wider<uint64_t> { using type = unsigned __int128; };
template <> struct Wider<int64_t> { using type = __int128; };
template <class T> using Wide = typename Wider<T>::type;

constexpr auto kAdd = [](auto a, auto b) { return a + b; };
constexpr auto kSub = [](auto a, auto b) { return a - b; };
constexpr auto kMul = [](auto a, auto b) { return a * b; };
constexpr auto kMin = [](auto a, auto b) { return a < b ? a : b; };
constexpr auto kMax = [](auto a, auto b) { return a > b ? a : b; };
constexpr auto kNeg = [](auto a) { return -a; };
constexpr auto kAbs = [](auto a) { return a < 0 ? -a : a; };
constexpr auto kMulHigh = [](auto a, auto b) {
  using W = Wide<decltype(a)>;
  return decltype(a)((W(a) * W(b)) >> (8 * sizeof(a)));
};
constexpr auto kSaturatedAdd = [](int32_t a, int32_t b) {
  const int64_t sum = int64_t(a) + b;
  return int32_t(sum > INT32_MAX ? INT32_MAX : sum < INT32_MIN ? INT32_MIN : sum);
};
constexpr auto kSaturatedSub = [](int32_t a, int32_t b) {
  const int64_t sum = int64_t(a) - b;
  return int32_t(sum > INT32_MAX ? INT32_MAX : sum < INT32_MIN ? INT32_MIN : sum);
};

template <class T> void mad_low(Warp& w, const Instr& in) {
  ternary<T, [](auto a, auto b, auto c) { return a * b + c; }>(w, in);
}
template <class T> void mad_high(Warp& w, const Instr& in) {
  ternary<T, [](auto a, auto b, auto c) { return kMulHigh(a, b) + c; }>(w, in);
}
template <class T> void sad(Warp& w, const Instr& in) {
  ternary<T, [](auto a, auto b, auto c) { return c + (a < b ? b - a : a - b); }>(w, in);
}
template <class T> void mul_wide(Warp& w, const Instr& in) {
  const T *a = w.src<T>(in.a), *b = w.src<T>(in.b);
  each_lane<Wide<T>>(w, in.d, [=](int i) { return Wide<T>(a[i]) * Wide<T>(b[i]); });
}
template <class T> void mad_wide(Warp& w, const Instr& in) {
  const T *a = w.src<T>(in.a), *b = w.src<T>(in.b);
  const Wide<T>* c = w.src<Wide<T>>(in.c);
  each_lane<Wide<T>>(w, in.d, [=](int i) { return Wide<T>(a[i]) * Wide<T>(b[i]) + c[i]; });
}

template <class T, bool kRemainder> void divide(Warp& w, const Instr& in) {
  const T *a = w.src<T>(in.a), *b = w.src<T>(in.b);
  const uint32_t zero = lane_mask([=](int i) { return b[i] == 0; }) & w.exec;
  if (zero) fault(w, in, std::countr_zero(zero), "divides an integer by zero");
  each_lane<T>(w, in.d, [=](int i) {
    if (std::is_signed_v<T> && b[i] == T(-1)) return T(kRemainder ? 0 : -a[i]);
    const T divisor = b[i] == 0 ? T(1) : b[i];
    return T(kRemainder ? a[i] % divisor : a[i] / divisor);
  });
}

// d = a + b (or a - b) with the carry in and out that in.mode asks for: 1 in, 2 out, 4 subtract;
// for mad, 8 (low) or 16 (high half of the product a * b, plus c).
template <class T> void with_carry(Warp& w, const Instr& in) {
  using W = Wide<T>;
  const T *a = w.src<T>(in.a), *b = w.src<T>(in.b);
  const T* c = in.mode & 24 ? w.src<T>(in.c) : nullptr;
  uint32_t out = 0;
  alignas(64) T result[kLanes];
  for (int i = 0; i < kLanes; i++) {
    T x = a[i], y = b[i];
    if (in.mode & 8) x = T(W(a[i]) * b[i]), y = c[i];
    if (in.mode & 16) x = T((W(a[i]) * b[i]) >> (8 * sizeof(T))), y = c[i];
    const bool carry = in.mode & 1 && w.carry >> i & 1;
    const W sum = in.mode & 4 ? W(x) - y - carry : W(x) + y + carry;
    result[i] = T(sum);
    out |= uint32_t((sum >> (8 * sizeof(T))) & 1) << i;
  }
  each_lane<T>(w, in.d, [&](int i) { return result[i]; });
  if (in.mode & 2) w.carry = (w.carry & ~w.exec) | (out & w.exec);
}

template <template <class> class Op> Run by_type(Decode& d, Type t) {
  switch (t) {
    case Type::kU16: return Op<uint16_t>::run;
    case Type::kS16: return Op<int16_t>::run;
    case Type::kU32: return Op<uint32_t>::run;
    case Type::kS32: return Op<int32_t>::run;
    case Type::kU64: return Op<uint64_t>::run;
    case Type::kS64: return Op<int64_t>::run;
    default: d.fail("not an integer type");
  }
}
template <class T> struct MadLow { static constexpr Run run = mad_low<T>; };
template <class T> struct MadHigh { static constexpr Run run = mad_high<T>; };
template <class T> struct Sad { static constexpr Run run = sad<T>; };
template <class T> struct Div { static constexpr Run run = divide<T, false>; };
template <class T> struct Rem { static constexpr Run run = divide<T, true>; };

bool decode_carry(Decode& d) {
  const bool in = d.is("addc") || d.is("subc") || d.is("madc");
  const bool out = d.take("cc");
  if (!in && !out) return false;
  d.in.mode = in | out << 1 | (d.is("sub") || d.is("subc")) << 2;
  if (d.is("mad") || d.is("madc"))
    d.in.mode |= d.take("lo") ? 8 : d.take("hi") ? 16 : (d.fail("mad without .lo or .hi"), 0);
  const Type t = d.type();
  if (bytes_of(t) < 4) d.fail("carry on 16 bits");
  d.in.d = d.dst(0, t);
  d.in.a = d.src(1, t);
  d.in.b = d.src(2, t);
  if (d.in.mode & 24) d.in.c = d.src(3, t);
  const bool wide = bytes_of(t) == 8;
  if (d.in.mode & 16 && is_signed(t)) d.fail("signed .hi with a carry");
  d.in.run = wide ? with_carry<uint64_t> : with_carry<uint32_t>;
  return true;
}

bool decode_multiply(Decode& d) {
  const bool mad = d.is("mad");
  d.expect_operands(3 + mad);
  const bool low = d.take("lo"), high = d.take("hi"), wide = d.take("wide");
  if (low + high + wide != 1) d.fail("expected one of .lo .hi .wide");
  const Type t = d.type();
  d.in.a = d.src(1, t);
  d.in.b = d.src(2, t);
  Type result = t;
  if (wide) {
    result = bytes_of(t) == 2 ? Type::kU32 : Type::kU64;
    if (t == Type::kU16) d.in.run = mad ? mad_wide<uint16_t> : mul_wide<uint16_t>;
    else if (t == Type::kS16) d.in.run = mad ? mad_wide<int16_t> : mul_wide<int16_t>;
    else if (t == Type::kU32) d.in.run = mad ? mad_wide<uint32_t> : mul_wide<uint32_t>;
    else if (t == Type::kS32) d.in.run = mad ? mad_wide<int32_t> : mul_wide<int32_t>;
    else d.fail("no wider type");
  } else if (mad) {
    d.in.run = low ? by_type<MadLow>(d, t) : by_type<MadHigh>(d, t);
  } else {
    d.in.run = low ? integer_binary<kMul>(d, t) : integer_binary<kMulHigh>(d, t);
  }
  d.in.d = d.dst(0, result);
  if (mad) d.in.c = d.src(3, result);
  d.in.pipe = Pipe::kFma;  // IMAD runs there
  return true;
}

}  // namespace

bool decode_integer(Decode& d) {
  if (!d.integer_type()) return false;
  if (d.is("add") || d.is("sub") || d.is("addc") || d.is("subc") || d.is("mad") || d.is("madc"))
    if (decode_carry(d)) return true;
  if (d.is("mul") || d.is("mad")) return decode_multiply(d);
  const bool one = d.is("neg") || d.is("abs");
  const bool two = d.is("add") || d.is("sub") || d.is("min") || d.is("max") || d.is("div") ||
                   d.is("rem");
  if (!one && !two && !d.is("sad")) return false;
  const Type t = d.type();
  d.expect_operands(one ? 2 : two ? 3 : 4);
  d.in.d = d.dst(0, t);
  d.in.a = d.src(1, t);
  if (!one) d.in.b = d.src(2, t);
  if (d.is("sad")) d.in.c = d.src(3, t);
  const bool saturated = d.take("sat");
  if (saturated && t != Type::kS32) d.fail(".sat is for s32");
  if (d.is("add"))
    d.in.run = saturated ? binary<int32_t, kSaturatedAdd> : integer_binary<kAdd>(d, t);
  else if (d.is("sub"))
    d.in.run = saturated ? binary<int32_t, kSaturatedSub> : integer_binary<kSub>(d, t);
  else if (d.is("min")) d.in.run = integer_binary<kMin>(d, t);
  else if (d.is("max")) d.in.run = integer_binary<kMax>(d, t);
  else if (d.is("neg")) d.in.run = integer_unary<kNeg>(d, t);
  else if (d.is("abs")) d.in.run = integer_unary<kAbs>(d, t);
  else if (d.is("div")) d.in.run = by_type<Div>(d, t);
  else if (d.is("rem")) d.in.run = by_type<Rem>(d, t);
  else d.in.run = by_type<Sad>(d, t);
  return true;
}

}  // namespace vgpu
