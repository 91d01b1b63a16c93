// Logic and bits: and or xor not cnot lop3 shl shr shf prmt bfe bfi bfind brev clz popc.
#include "decode.h"

namespace vgpu {
namespace {

constexpr auto kAnd = [](auto a, auto b) { return a & b; };
constexpr auto kOr = [](auto a, auto b) { return a | b; };
constexpr auto kXor = [](auto a, auto b) { return a ^ b; };
constexpr auto kNot = [](auto a) { return ~a; };
constexpr auto kCnot = [](auto a) { return a == 0; };

template <auto F> void predicates(Warp& w, const Instr& in) {
  w.set_pred(in.d, F(w.pred(in.a), w.pred(in.b)));
}
void not_predicate(Warp& w, const Instr& in) { w.set_pred(in.d, ~w.pred(in.a)); }

// The shift count is 32 bits whatever the type; counts beyond the width clamp.
template <class T> void shl(Warp& w, const Instr& in) {
  const T* a = w.src<T>(in.a);
  const uint32_t* n = w.src<uint32_t>(in.b);
  constexpr uint32_t kBits = 8 * sizeof(T);
  each_lane<T>(w, in.d, [=](int i) {
    return n[i] >= kBits ? T(0) : T(uint64_t(a[i]) << (n[i] & (kBits - 1)));
  });
}
template <class T> void shr(Warp& w, const Instr& in) {
  const T* a = w.src<T>(in.a);
  const uint32_t* n = w.src<uint32_t>(in.b);
  constexpr uint32_t kBits = 8 * sizeof(T);
  each_lane<T>(w, in.d, [=](int i) {
    const T fill = a[i] < 0 ? T(-1) : T(0);
    return n[i] >= kBits ? fill : T(a[i] >> (n[i] & (kBits - 1)));
  });
}

// Funnel shift of c:b (mode: 1 right, 2 clamp).
void shf(Warp& w, const Instr& in) {
  const uint32_t *a = w.src<uint32_t>(in.a), *b = w.src<uint32_t>(in.b);
  const uint32_t* c = w.src<uint32_t>(in.c);
  const bool right = in.mode & 1, clamp = in.mode & 2;
  each_lane<uint32_t>(w, in.d, [=](int i) {
    const uint32_t n = clamp ? (c[i] < 32 ? c[i] : 32) : c[i] & 31;
    const uint64_t both = uint64_t(b[i]) << 32 | a[i];
    return right ? uint32_t(both >> n) : uint32_t(both << n >> 32);
  });
}

// All lanes share the table: a sum of products over the bits that are set in it.
void lop3(Warp& w, const Instr& in) {
  const uint32_t *a = w.src<uint32_t>(in.a), *b = w.src<uint32_t>(in.b);
  const uint32_t* c = w.src<uint32_t>(in.c);
  uint32_t term[8];
  for (int k = 0; k < 8; k++) term[k] = in.imm >> k & 1 ? ~0u : 0;
  each_lane<uint32_t>(w, in.d, [=](int i) {
    const uint32_t x = a[i], y = b[i], z = c[i];
    const uint32_t low = (~y & ((~z & term[0]) | (z & term[1]))) |
                         (y & ((~z & term[2]) | (z & term[3])));
    const uint32_t high = (~y & ((~z & term[4]) | (z & term[5]))) |
                          (y & ((~z & term[6]) | (z & term[7])));
    return (~x & low) | (x & high);
  });
}

// Selector nibbles of the modes f4e b4e rc8 ecl ecr rc16, by the low two bits of c.
constexpr uint16_t kPermutations[6][4] = {
    {0x3210, 0x4321, 0x5432, 0x6543}, {0x5670, 0x6701, 0x7012, 0x0123},
    {0x0000, 0x1111, 0x2222, 0x3333}, {0x3210, 0x3211, 0x3222, 0x3333},
    {0x0000, 0x1110, 0x2210, 0x3210}, {0x1010, 0x3232, 0x1010, 0x3232}};

void prmt(Warp& w, const Instr& in) {
  const uint32_t *a = w.src<uint32_t>(in.a), *b = w.src<uint32_t>(in.b);
  const uint32_t* c = w.src<uint32_t>(in.c);
  each_lane<uint32_t>(w, in.d, [=](int i) {
    const uint64_t both = uint64_t(b[i]) << 32 | a[i];
    const uint32_t selector = in.mode ? kPermutations[in.mode - 1][c[i] & 3] : c[i];
    uint32_t result = 0;
    for (int k = 0; k < 4; k++) {
      const uint32_t nibble = selector >> (4 * k) & 15;
      uint32_t byte = uint32_t(both >> (8 * (nibble & 7))) & 255;
      if (nibble & 8) byte = byte & 128 ? 255 : 0;
      result |= byte << (8 * k);
    }
    return result;
  });
}

template <class T, bool kSigned> void bfe(Warp& w, const Instr& in) {
  const T* a = w.src<T>(in.a);
  const uint32_t *b = w.src<uint32_t>(in.b), *c = w.src<uint32_t>(in.c);
  constexpr uint32_t kBits = 8 * sizeof(T);
  each_lane<T>(w, in.d, [=](int i) {
    const uint32_t position = b[i] & 255, length = c[i] & 255;
    if (length == 0) return T(0);
    const T shifted = position >= kBits ? T(0) : T(a[i] >> position);
    const uint32_t top = position + length - 1 < kBits ? position + length - 1 : kBits - 1;
    const bool sign = kSigned && a[i] >> top & 1;
    if (length >= kBits && !kSigned) return shifted;
    const uint32_t kept = position + length > kBits ? (position < kBits ? kBits - position : 0)
                                                    : length;
    const T mask = kept >= kBits ? T(~T(0)) : T((T(1) << kept) - 1);
    return T((shifted & mask) | (sign ? T(~mask) : T(0)));
  });
}

template <class T> void bfi(Warp& w, const Instr& in) {
  const T *a = w.src<T>(in.a), *b = w.src<T>(in.b);
  const uint32_t *c = w.src<uint32_t>(in.c), *e = w.src<uint32_t>(in.e);
  constexpr uint32_t kBits = 8 * sizeof(T);
  each_lane<T>(w, in.d, [=](int i) {
    const uint32_t position = c[i] & 255, length = e[i] & 255;
    if (position >= kBits || length == 0) return b[i];
    const T ones = length >= kBits ? T(~T(0)) : T((T(1) << length) - 1);
    const T mask = T(ones << position);
    return T((b[i] & ~mask) | (T(a[i] << position) & mask));
  });
}

template <class T, auto F> void count_bits(Warp& w, const Instr& in) {
  const T* a = w.src<T>(in.a);
  each_lane<uint32_t>(w, in.d, [=](int i) { return uint32_t(F(a[i])); });
}
constexpr auto kPopc = [](auto a) { return std::popcount(a); };
constexpr auto kClz = [](auto a) { return std::countl_zero(a); };
template <bool kShift> constexpr auto kFind = [](auto a) {
  using U = std::make_unsigned_t<decltype(a)>;
  const U bits = a < 0 ? U(~a) : U(a);
  const int zeros = std::countl_zero(bits);
  if (bits == 0) return -1;
  return kShift ? zeros : int(8 * sizeof(a)) - 1 - zeros;
};
constexpr auto kReverse = [](auto a) {
  decltype(a) r = 0;
  for (size_t k = 0; k < 8 * sizeof(a); k++) r |= (a >> k & 1) << (8 * sizeof(a) - 1 - k);
  return r;
};

bool decode_logic(Decode& d) {
  const bool one = d.is("not") || d.is("cnot");
  const Type t = d.type();
  d.expect_operands(one ? 2 : 3);
  d.in.d = d.dst(0, t);
  d.in.a = d.src(1, t);
  if (!one) d.in.b = d.src(2, t);
  if (t == Type::kPred) {
    if (d.is("cnot")) d.fail("cnot of predicates");
    d.in.run = one ? not_predicate
               : d.is("and") ? predicates<kAnd>
               : d.is("or") ? predicates<kOr> : predicates<kXor>;
    return true;
  }
  if (d.is("and")) d.in.run = integer_binary<kAnd>(d, t);
  if (d.is("or")) d.in.run = integer_binary<kOr>(d, t);
  if (d.is("xor")) d.in.run = integer_binary<kXor>(d, t);
  if (d.is("not")) d.in.run = integer_unary<kNot>(d, t);
  if (d.is("cnot")) d.in.run = integer_unary<kCnot>(d, t);
  return true;
}

bool decode_shift(Decode& d) {
  const Type t = d.type();
  d.expect_operands(3);
  d.in.d = d.dst(0, t);
  d.in.a = d.src(1, t);
  d.in.b = d.src(2, Type::kU32);
  const int bytes = bytes_of(t);
  if (d.is("shl"))
    d.in.run = bytes == 2 ? shl<uint16_t> : bytes == 4 ? shl<uint32_t> : shl<uint64_t>;
  else if (is_signed(t))
    d.in.run = bytes == 2 ? shr<int16_t> : bytes == 4 ? shr<int32_t> : shr<int64_t>;
  else
    d.in.run = bytes == 2 ? shr<uint16_t> : bytes == 4 ? shr<uint32_t> : shr<uint64_t>;
  return true;
}

bool decode_field(Decode& d) {
  const Type t = d.type();
  const bool wide = bytes_of(t) == 8;
  d.in.d = d.dst(0, t);
  d.in.a = d.src(1, t);
  if (d.is("bfi")) {
    d.expect_operands(5);
    d.in.b = d.src(2, t);
    d.in.c = d.src(3, Type::kU32);
    d.in.e = d.src(4, Type::kU32);
    d.in.run = wide ? bfi<uint64_t> : bfi<uint32_t>;
    return true;
  }
  d.expect_operands(4);
  d.in.b = d.src(2, Type::kU32);
  d.in.c = d.src(3, Type::kU32);
  if (is_signed(t)) d.in.run = wide ? bfe<uint64_t, true> : bfe<uint32_t, true>;
  else d.in.run = wide ? bfe<uint64_t, false> : bfe<uint32_t, false>;
  return true;
}

bool decode_count(Decode& d) {
  const Type t = d.type();
  const bool wide = bytes_of(t) == 8;
  d.expect_operands(2);
  d.in.a = d.src(1, t);
  if (d.is("brev")) {
    d.in.d = d.dst(0, t);
    d.in.run = wide ? unary<uint64_t, kReverse> : unary<uint32_t, kReverse>;
    return true;
  }
  d.in.d = d.dst(0, Type::kU32);
  if (d.is("popc")) {
    d.in.run = wide ? count_bits<uint64_t, kPopc> : count_bits<uint32_t, kPopc>;
  } else if (d.is("clz")) {
    d.in.run = wide ? count_bits<uint64_t, kClz> : count_bits<uint32_t, kClz>;
  } else if (d.take("shiftamt")) {
    if (is_signed(t))
      d.in.run = wide ? count_bits<int64_t, kFind<true>> : count_bits<int32_t, kFind<true>>;
    else
      d.in.run = wide ? count_bits<uint64_t, kFind<true>> : count_bits<uint32_t, kFind<true>>;
  } else if (is_signed(t)) {
    d.in.run = wide ? count_bits<int64_t, kFind<false>> : count_bits<int32_t, kFind<false>>;
  } else {
    d.in.run = wide ? count_bits<uint64_t, kFind<false>> : count_bits<uint32_t, kFind<false>>;
  }
  return true;
}

}  // namespace

bool decode_bits(Decode& d) {
  if (d.is("and") || d.is("or") || d.is("xor") || d.is("not") || d.is("cnot"))
    return decode_logic(d);
  if (d.is("shl") || d.is("shr")) return decode_shift(d);
  if (d.is("bfe") || d.is("bfi")) return decode_field(d);
  if (d.is("popc") || d.is("clz") || d.is("bfind") || d.is("brev")) return decode_count(d);
  const Type u32 = Type::kU32;
  if (d.is("lop3")) {
    d.type();
    d.expect_operands(5);
    d.in.imm = d.integer(4);
    d.in.run = lop3;
  } else if (d.is("shf")) {
    d.expect_operands(4);
    d.in.mode = d.take("r") ? 1 : d.take("l") ? 0 : (d.fail("expected .l or .r"), 0);
    d.in.mode |= d.take("clamp") ? 2 : d.take("wrap") ? 0 : (d.fail("expected .clamp or .wrap"), 0);
    d.type();
    d.in.run = shf;
  } else if (d.is("prmt")) {
    d.expect_operands(4);
    d.type();
    const char* const kModes[] = {"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"};
    for (int k = 0; k < 6; k++)
      if (d.take(kModes[k])) d.in.mode = uint8_t(k + 1);
    d.in.run = prmt;
  } else {
    return false;
  }
  d.in.d = d.dst(0, u32);
  d.in.a = d.src(1, u32);
  d.in.b = d.src(2, u32);
  d.in.c = d.src(3, u32);
  return true;
}

}  // namespace vgpu
