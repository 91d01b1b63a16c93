// cvt. Integers pass through int64, floats through f64, which hold every source exactly; only the
// directed roundings and 64-bit integers to short floats need more.
#include <cmath>
#include <limits>

#include "decode.h"

namespace vgpu {
namespace {

enum Rounding : uint8_t { kNearest, kZero, kDown, kUp };

// What a cvt does, packed into Instr::imm.
struct Form {
  Type to, from;
  uint8_t to_bytes, from_bytes;  // of the registers
  Rounding rounding;
  bool integral, ftz, sat;       // integral: round to an integer, .rni and so on
};
static_assert(sizeof(Form) == 8);
Form form_of(const Instr& in) { return std::bit_cast<Form>(in.imm); }

template <class T> void load_as(const void* from, int64_t* to) {
  const T* x = static_cast<const T*>(from);
  for (int i = 0; i < kLanes; i++) to[i] = int64_t(x[i]);
}

// Sign- or zero-extended from the type, whatever the register's width.
void load_integers(const Warp& w, uint32_t a, const Form& f, int64_t* x) {
  const void* p = w.src<uint8_t>(a);
  f.from_bytes == 2   ? load_as<uint16_t>(p, x)
  : f.from_bytes == 4 ? load_as<uint32_t>(p, x)
                      : load_as<uint64_t>(p, x);
  const int unused = 64 - 8 * bytes_of(f.from);
  if (is_signed(f.from))
    for (int i = 0; i < kLanes; i++) x[i] = int64_t(uint64_t(x[i]) << unused) >> unused;
  else
    for (int i = 0; i < kLanes; i++) x[i] = int64_t(uint64_t(x[i]) << unused >> unused);
}

void store_integers(Warp& w, uint32_t d, const Form& f, const int64_t* x) {
  const int unused = 64 - 8 * bytes_of(f.to);
  const bool sign = is_signed(f.to);
  auto extended = [=](int i) {
    const uint64_t up = uint64_t(x[i]) << unused;
    return sign ? uint64_t(int64_t(up) >> unused) : up >> unused;
  };
  if (f.to_bytes == 2) each_lane<uint16_t>(w, d, [=](int i) { return uint16_t(extended(i)); });
  else if (f.to_bytes == 4) each_lane<uint32_t>(w, d, [=](int i) { return uint32_t(extended(i)); });
  else each_lane<uint64_t>(w, d, extended);
}

void load_floats(const Warp& w, uint32_t a, const Form& f, double* x) {
  switch (f.from) {
    case Type::kF16:
      for (int i = 0; i < kLanes; i++) x[i] = f16_to_float(w.src<uint16_t>(a)[i]);
      break;
    case Type::kBF16:
      for (int i = 0; i < kLanes; i++) x[i] = bf16_to_float(w.src<uint16_t>(a)[i]);
      break;
    case Type::kF32:
      for (int i = 0; i < kLanes; i++) {
        const float v = w.src<float>(a)[i];
        x[i] = f.ftz ? flush(v) : v;
      }
      break;
    default:
      for (int i = 0; i < kLanes; i++) x[i] = w.src<double>(a)[i];
  }
}

template <class T> T round_integral(T x, Rounding r) {
  switch (r) {
    case kNearest: return std::nearbyint(x);
    case kZero: return std::trunc(x);
    case kDown: return std::floor(x);
    default: return std::ceil(x);
  }
}

// To a format of so many significant bits, with subnormals below min_exponent.
long double round_format(long double x, int bits, int min_exponent, long double most,
                         Rounding r) {
  if (x == 0 || !std::isfinite(x)) return x;
  const int exponent = std::max(std::ilogb(x), min_exponent);
  const int quantum = exponent - bits + 1;
  const long double y = std::ldexp(round_integral(std::ldexp(x, -quantum), r), quantum);
  if (std::fabs(y) <= most) return y;
  const bool to_infinity = r == kNearest || (r == kUp && x > 0) || (r == kDown && x < 0);
  return std::copysign(to_infinity ? std::numeric_limits<long double>::infinity() : most, x);
}

long double round_to(long double x, Type t, Rounding r) {
  switch (t) {
    case Type::kF16: return round_format(x, 11, -14, 65504, r);
    case Type::kBF16: return round_format(x, 8, -126, 0x1.fep127L, r);
    case Type::kF32: return round_format(x, 24, -126, 0x1.fffffep127L, r);
    default: return round_format(x, 53, -1022, 0x1.fffffffffffffp1023L, r);
  }
}

double saturated(double x) { return x > 0 ? (x < 1 ? x : 1.0) : 0.0; }

// The values are those of the type already, so that no cast below rounds.
void store_floats(Warp& w, uint32_t d, const Form& f, const double* x) {
  switch (f.to) {
    case Type::kF16:
      return each_lane<uint16_t>(w, d, [=](int i) { return float_to_f16(float(x[i])); });
    case Type::kBF16:
      return each_lane<uint16_t>(w, d, [=](int i) { return float_to_bf16(float(x[i])); });
    case Type::kF32:
      return each_lane<float>(w, d, [=](int i) {
        const float v = canonical(float(x[i]));
        return f.ftz ? flush(v) : v;
      });
    default:
      return each_lane<double>(w, d, [=](int i) { return x[i]; });
  }
}

void integer_to_integer(Warp& w, const Instr& in) {
  const Form f = form_of(in);
  alignas(64) int64_t x[kLanes];
  load_integers(w, in.a, f, x);
  if (f.sat) {
    const int bits = 8 * bytes_of(f.to);
    const bool from_unsigned = !is_signed(f.from);
    const int64_t low = is_signed(f.to) ? int64_t(~0ull << (bits - 1)) : 0;
    const uint64_t high = is_signed(f.to) ? (1ull << (bits - 1)) - 1
                          : bits == 64 ? ~0ull : (1ull << bits) - 1;
    for (int i = 0; i < kLanes; i++) {
      const bool negative = !from_unsigned && x[i] < 0;
      if (negative) x[i] = std::max(x[i], low);
      else x[i] = int64_t(std::min(uint64_t(x[i]), high));
    }
  }
  store_integers(w, in.d, f, x);
}

void integer_to_float(Warp& w, const Instr& in) {
  const Form f = form_of(in);
  alignas(64) int64_t x[kLanes];
  load_integers(w, in.a, f, x);
  const bool top_is_sign = is_signed(f.from) || bytes_of(f.from) < 8;
  if (f.rounding == kNearest && f.to == Type::kF32 && top_is_sign && !f.sat)
    return each_lane<float>(w, in.d, [&](int i) { return float(x[i]); });
  if (f.rounding == kNearest && f.to == Type::kF64 && top_is_sign)
    return each_lane<double>(w, in.d, [&](int i) { return double(x[i]); });
  double y[kLanes];
  for (int i = 0; i < kLanes; i++) {
    const long double exact = top_is_sign ? (long double)x[i] : (long double)uint64_t(x[i]);
    y[i] = double(round_to(exact, f.to, f.rounding));
    if (f.sat) y[i] = saturated(y[i]);
  }
  store_floats(w, in.d, f, y);
}

// Out of range clamps; NaN gives zero.
void float_to_integer(Warp& w, const Instr& in) {
  const Form f = form_of(in);
  alignas(64) double x[kLanes];
  alignas(64) int64_t y[kLanes];
  load_floats(w, in.a, f, x);
  const int bits = 8 * bytes_of(f.to);
  const bool sign = is_signed(f.to);
  const double high = std::ldexp(1.0, sign ? bits - 1 : bits);  // one more than the largest
  const double low = sign ? -high : 0;
  const uint64_t largest = sign ? (1ull << (bits - 1)) - 1 : bits == 64 ? ~0ull
                                                                        : (1ull << bits) - 1;
  for (int i = 0; i < kLanes; i++) {
    const double r = f.rounding == kZero ? x[i] : round_integral(x[i], f.rounding);
    const bool inside = r > low - 1 && r < high;
    const double safe = inside ? r : 0;
    const int64_t clamped = r >= high ? int64_t(largest) : r <= low ? int64_t(low) : 0;
    const int64_t converted = safe < 0x1p63 ? int64_t(safe) : int64_t(uint64_t(safe));
    y[i] = r <= low || !inside ? clamped : converted;
  }
  store_integers(w, in.d, f, y);
}

void float_to_float(Warp& w, const Instr& in) {
  const Form f = form_of(in);
  alignas(64) double x[kLanes];
  load_floats(w, in.a, f, x);
  if (f.integral) {
    for (double& v : x) v = round_integral(v, f.rounding);
  } else if (bytes_of(f.to) < bytes_of(f.from) || bytes_of(f.to) == 2) {
    if (f.to == Type::kF32 && f.rounding == kNearest)
      for (double& v : x) v = float(v);
    else
      for (double& v : x) v = double(round_to(v, f.to, f.rounding));
  }
  if (f.sat)
    for (double& v : x) v = saturated(v);
  store_floats(w, in.d, f, x);
}

void f32_to_f16(Warp& w, const Instr& in) {
  const float* a = w.src<float>(in.a);
  each_lane<uint16_t>(w, in.d, [=](int i) { return float_to_f16(a[i]); });
}
void f32_to_bf16(Warp& w, const Instr& in) {
  const float* a = w.src<float>(in.a);
  each_lane<uint16_t>(w, in.d, [=](int i) { return float_to_bf16(a[i]); });
}
void f16_to_f32(Warp& w, const Instr& in) {
  const uint16_t* a = w.src<uint16_t>(in.a);
  each_lane<float>(w, in.d, [=](int i) { return canonical(f16_to_float(a[i])); });
}
void bf16_to_f32(Warp& w, const Instr& in) {
  const uint16_t* a = w.src<uint16_t>(in.a);
  each_lane<float>(w, in.d, [=](int i) { return canonical(bf16_to_float(a[i])); });
}

uint16_t narrow(float x, bool f16, Rounding r, bool relu) {
  if (relu && x <= 0) x = 0;  // -0 too
  if (r == kNearest) return f16 ? float_to_f16(x) : float_to_bf16(x);
  const float y = float(round_to(x, f16 ? Type::kF16 : Type::kBF16, r));
  return f16 ? float_to_f16(y) : float_to_bf16(y);
}

// d = {a in the upper half, b in the lower}; mode: 1 f16, 2 relu, 4 toward zero, 8 only a.
template <int kMode> void narrow_pair(Warp& w, const Instr& in) {
  constexpr bool kF16 = kMode & 1, kRelu = kMode & 2;
  constexpr Rounding kRounding = kMode & 4 ? kZero : kNearest;
  const float* a = w.src<float>(in.a);
  if constexpr (kMode & 8) {
    each_lane<uint16_t>(w, in.d, [=](int i) { return narrow(a[i], kF16, kRounding, kRelu); });
  } else {
    const float* b = w.src<float>(in.b);
    each_lane<uint32_t>(w, in.d, [=](int i) {
      return uint32_t(narrow(a[i], kF16, kRounding, kRelu)) << 16 |
             narrow(b[i], kF16, kRounding, kRelu);
    });
  }
}
template <int... kModes> constexpr auto narrow_table(std::integer_sequence<int, kModes...>) {
  return std::array<Run, sizeof...(kModes)>{narrow_pair<kModes>...};
}
constexpr auto kNarrow = narrow_table(std::make_integer_sequence<int, 16>());

// To nearest, ties away from zero; the low 13 bits are zero.
void f32_to_tf32(Warp& w, const Instr& in) {
  const uint32_t* a = w.src<uint32_t>(in.a);
  each_lane<uint32_t>(w, in.d, [=](int i) {
    const bool finite = (a[i] & 0x7f800000) != 0x7f800000;
    return finite ? (a[i] + 0x1000) & ~0x1fffu : (a[i] & 0x7fffff) ? kNan32 : a[i];
  });
}

}  // namespace

bool decode_convert(Decode& d) {
  if (!d.is("cvt")) return false;
  Form f{};
  constexpr const char* kRoundings[] = {"rn", "rz", "rm", "rp"};
  constexpr const char* kIntegral[] = {"rni", "rzi", "rmi", "rpi"};
  bool rounded = false;
  for (int k = 0; k < 4; k++) {
    if (d.take(kRoundings[k])) f.rounding = Rounding(k), rounded = true;
    if (d.take(kIntegral[k])) f.rounding = Rounding(k), f.integral = true;
  }
  const bool away = d.take("rna"), relu = d.take("relu");
  f.ftz = d.take("ftz");
  f.sat = d.take("sat");
  f.to = d.type();
  f.from = d.type();
  const bool packed = f.to == Type::kF16x2 || f.to == Type::kBF16x2;
  d.expect_operands(packed ? 3 : 2);
  if (f.to == Type::kTF32 || away) {
    if (f.to != Type::kTF32 || f.from != Type::kF32 || !away || f.sat) d.fail("not on sm_80");
    d.in.d = d.dst(0, Type::kB32);
    d.in.a = d.src(1, f.from);
    d.in.run = f32_to_tf32;
    return true;
  }
  const bool to_half = f.to == Type::kF16 || f.to == Type::kBF16;
  if (packed || (relu && to_half)) {
    if (f.from != Type::kF32 || f.sat || f.rounding > kZero) d.fail("unknown form");
    d.in.d = d.dst(0, f.to);
    d.in.a = d.src(1, f.from);
    if (packed) d.in.b = d.src(2, f.from);
    const bool f16 = f.to == Type::kF16x2 || f.to == Type::kF16;
    d.in.run = kNarrow[f16 | relu << 1 | (f.rounding == kZero) << 2 | !packed << 3];
    return true;
  }
  if (relu) d.fail("unknown form");
  Type held;
  d.in.d = d.any_register(d.s.operands[0], &held);
  f.to_bytes = uint8_t(lane_bytes(held));
  if (d.s.operands[1].kind == ptx::Operand::kName) {
    d.in.a = d.any_register(d.s.operands[1], &held);
    f.from_bytes = uint8_t(lane_bytes(held));
  } else {
    d.in.a = d.src(1, f.from);
    f.from_bytes = uint8_t(lane_bytes(f.from));
  }
  const bool from_float = is_float(f.from), to_float = is_float(f.to);
  if (f.to_bytes < lane_bytes(f.to) || f.from_bytes < lane_bytes(f.from) ||
      (to_float && f.to_bytes != bytes_of(f.to)) ||
      (from_float && f.from_bytes != bytes_of(f.from)))
    d.fail("a register of the wrong width");
  if (from_float && !to_float && !f.integral) d.fail("a rounding such as .rzi is missing");
  if (!from_float && to_float && !rounded) d.fail("a rounding such as .rn is missing");
  d.in.imm = std::bit_cast<int64_t>(f);
  if (!from_float) d.in.run = to_float ? integer_to_float : integer_to_integer;
  else d.in.run = to_float ? float_to_float : float_to_integer;
  if (!f.integral && !f.sat && !f.ftz && f.rounding == kNearest) {
    if (f.from == Type::kF32 && f.to == Type::kF16) d.in.run = f32_to_f16;
    if (f.from == Type::kF32 && f.to == Type::kBF16) d.in.run = f32_to_bf16;
    if (f.from == Type::kF16 && f.to == Type::kF32) d.in.run = f16_to_f32;
    if (f.from == Type::kBF16 && f.to == Type::kF32) d.in.run = bf16_to_f32;
  }
  return true;
}

}  // namespace vgpu
