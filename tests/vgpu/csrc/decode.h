// From a parsed statement to an Instr. Each family of instructions (ops_*.cpp) has a decoder that
// takes the statements it knows; every modifier must be taken by someone.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "code.h"
#include "ptx.h"
#include "warp.h"

namespace vgpu {

// The variables of the module, and where they are.
using Globals = std::map<std::string, uint64_t>;

// A kernel under construction.
struct Builder {
  const ptx::File& file;
  const ptx::Function& function;
  const Globals& globals;
  Kernel kernel{};
  struct Register {
    Type type;
    uint32_t offset;
  };
  std::map<std::string, Register> registers{};
  struct Symbol {
    Space space;
    uint64_t address;  // within its space
  };
  std::map<std::string, Symbol> symbols{};
  std::map<std::pair<uint64_t, int>, uint32_t> constants{};

  uint32_t constant(uint64_t bits, int bytes);
  void lay_out();
};

struct Decode {
  Builder& builder;
  const ptx::Statement& s;
  Instr& in;
  std::vector<bool> taken;

  bool is(const char* opcode) const { return s.opcode == opcode; }
  bool has(std::string_view modifier) const;
  bool take(std::string_view modifier);
  Type type();           // takes the first modifier that is a type
  Type type_or_none();
  Type peek_type() const;  // the first type, taken or not
  bool integer_type() const {
    const Type t = peek_type();
    return t != Type::kPred && t != Type::kF16x2 && t != Type::kBF16x2 && !is_float(t);
  }
  void expect_operands(size_t least, size_t most);
  void expect_operands(size_t n) { expect_operands(n, n); }
  void all_taken();

  uint32_t src(size_t i, Type t) { return src(s.operands.at(i), t); }
  uint32_t src(const ptx::Operand& o, Type t);
  uint32_t dst(size_t i, Type t) { return dst(s.operands.at(i), t); }
  uint32_t dst(const ptx::Operand& o, Type t);
  uint32_t pred_src(const ptx::Operand& o);  // a negation is the caller's business
  uint32_t pred_dst(const std::string& name);
  uint32_t any_register(const ptx::Operand& o, Type* type);  // whatever its width
  const Builder::Register& find_register(const std::string& name);
  const Builder::Register* look_up(const std::string& name);
  const Builder::Symbol* symbol(const std::string& name);
  uint32_t label(const std::string& name);
  const std::vector<std::string>& branch_table(const std::string& name);
  int64_t integer(size_t i);
  void address(size_t i, Space space);  // fills a, imm, wide_address
  void covers(Space space, int bytes);  // an access: the race detector's granule
  uint32_t list(const std::vector<uint32_t>& operands);

  [[noreturn]] void fail(const std::string& message) const;
};

// unary, binary or ternary over the integer type t.
template <auto F> Run integer_unary(const Decode& d, Type t) {
  switch (t) {
    case Type::kU16: case Type::kB16: return unary<uint16_t, F>;
    case Type::kS16: return unary<int16_t, F>;
    case Type::kU32: case Type::kB32: return unary<uint32_t, F>;
    case Type::kS32: return unary<int32_t, F>;
    case Type::kU64: case Type::kB64: return unary<uint64_t, F>;
    case Type::kS64: return unary<int64_t, F>;
    default: d.fail("not an integer type");
  }
}
template <auto F> Run integer_binary(const Decode& d, Type t) {
  switch (t) {
    case Type::kU16: case Type::kB16: return binary<uint16_t, F>;
    case Type::kS16: return binary<int16_t, F>;
    case Type::kU32: case Type::kB32: return binary<uint32_t, F>;
    case Type::kS32: return binary<int32_t, F>;
    case Type::kU64: case Type::kB64: return binary<uint64_t, F>;
    case Type::kS64: return binary<int64_t, F>;
    default: d.fail("not an integer type");
  }
}

// Each returns false if the opcode is not one of its own.
bool decode_integer(Decode& d);
bool decode_bits(Decode& d);
bool decode_compare(Decode& d);
bool decode_float(Decode& d);
bool decode_half(Decode& d);
bool decode_approx(Decode& d);
bool decode_convert(Decode& d);
bool decode_move(Decode& d);
bool decode_memory(Decode& d);
bool decode_async(Decode& d);
bool decode_atomic(Decode& d);
bool decode_matrix(Decode& d);
bool decode_warp(Decode& d);
bool decode_control(Decode& d);

Kernel decode(const ptx::File& file, const ptx::Function& function, const Globals& globals);

}  // namespace vgpu
