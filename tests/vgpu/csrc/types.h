// PTX types, and the bits of the 16-bit floats.
#pragma once
#include <bit>
#include <cstdint>
#include <string_view>

namespace vgpu {

enum class Type : uint8_t {
  kNone, kPred, kB8, kU8, kS8, kB16, kU16, kS16, kF16, kBF16, kB32, kU32, kS32, kF32, kF16x2,
  kBF16x2, kTF32, kB64, kU64, kS64, kF64, kB128
};

inline Type type_of(std::string_view name) {
  constexpr std::string_view kNames[] = {
      "", "pred", "b8", "u8", "s8", "b16", "u16", "s16", "f16", "bf16", "b32", "u32", "s32", "f32",
      "f16x2", "bf16x2", "tf32", "b64", "u64", "s64", "f64", "b128"};
  for (int i = 1; i <= int(Type::kB128); i++)
    if (kNames[i] == name) return Type(i);
  return Type::kNone;
}

inline int bytes_of(Type t) {
  if (t <= Type::kPred) return 4;
  if (t <= Type::kS8) return 1;
  if (t <= Type::kBF16) return 2;
  if (t <= Type::kTF32) return 4;
  return t == Type::kB128 ? 16 : 8;
}

// Bytes of one lane of a register: 8-bit registers are held as 16-bit ones.
inline int lane_bytes(Type t) { return bytes_of(t) == 1 ? 2 : bytes_of(t); }

inline bool is_signed(Type t) {
  return t == Type::kS8 || t == Type::kS16 || t == Type::kS32 || t == Type::kS64;
}
inline bool is_float(Type t) {
  return t == Type::kF16 || t == Type::kBF16 || t == Type::kF32 || t == Type::kF64 ||
         t == Type::kTF32;
}

inline constexpr uint32_t kNan32 = 0x7fffffff;  // PTX's canonical NaNs
inline constexpr uint16_t kNan16 = 0x7fff;

inline float as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline uint32_t as_bits(float x) { return std::bit_cast<uint32_t>(x); }

inline float bf16_to_float(uint16_t h) { return as_float(uint32_t(h) << 16); }

inline float f16_to_float(uint16_t h) {
  const uint32_t magnitude = uint32_t(h & 0x7fff) << 13;
  const uint32_t finite = as_bits(as_float(magnitude) * 0x1p112f);
  const uint32_t bits = magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : finite;
  return as_float(bits | uint32_t(h & 0x8000) << 16);
}

// Rounds to nearest even.
inline uint16_t float_to_bf16(float f) {
  const uint32_t x = as_bits(f);
  const uint32_t rounded = (x + 0x7fff + (x >> 16 & 1)) >> 16;
  return (x & 0x7fffffff) > 0x7f800000 ? kNan16 : uint16_t(rounded);
}

inline uint16_t float_to_f16(float f) {
  const uint32_t sign = as_bits(f) >> 16 & 0x8000, x = as_bits(f) & 0x7fffffff;
  const uint32_t tiny = as_bits(as_float(x) + 0.5f) - 0x3f000000;
  const uint32_t normal = (x + 0xfff + (x >> 13 & 1) - 0x38000000) >> 13;
  uint32_t h = x < 0x38800000 ? tiny : normal;
  h = x >= 0x477ff000 ? 0x7c00 : h;
  return x > 0x7f800000 ? kNan16 : uint16_t(h | sign);
}

// Flushes a subnormal to a zero of the same sign.
inline float flush(float f) {
  const uint32_t x = as_bits(f);
  return as_float((x & 0x7f800000) == 0 ? x & 0x80000000 : x);
}

inline float canonical(float f) { return f != f ? as_float(kNan32) : f; }

}  // namespace vgpu
