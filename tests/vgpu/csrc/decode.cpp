// Operands to offsets, and the choice of the family.
#include "decode.h"

#include <algorithm>

namespace vgpu {

uint32_t Builder::constant(uint64_t bits, int bytes) {
  const auto [found, inserted] = constants.try_emplace({bits, bytes}, 0);
  if (!inserted) return found->second;
  std::vector<uint64_t>& pool = kernel.constants;
  found->second = kConstant | uint32_t(pool.size() * 8);
  uint64_t word = bits;
  if (bytes == 2) word = (bits & 0xffff) * 0x0001000100010001ull;
  if (bytes == 4) word = (bits & 0xffffffff) * 0x0000000100000001ull;
  pool.insert(pool.end(), kLanes * bytes / 8, word);
  return found->second;
}

namespace {
size_t align_up(size_t n, size_t to) { return (n + to - 1) / to * to; }
}  // namespace

void Builder::lay_out() {
  size_t offset = 0;
  auto place = [&](bool predicates) {
    for (const auto& [name, type] : function.registers) {
      if ((type == Type::kPred) != predicates) continue;
      registers[name] = {type, uint32_t(offset)};
      offset += predicates ? 4 : size_t(kLanes) * lane_bytes(type);
    }
    offset = align_up(offset, 64);
  };
  place(true);
  kernel.special = uint32_t(offset);
  for (const char* name : kSpecials) {
    registers[name] = {Type::kU32, uint32_t(offset)};
    offset += kLanes * 4;
  }
  place(false);
  kernel.register_bytes = offset;

  for (const ptx::Variable& v : function.params) {
    kernel.param_bytes = align_up(kernel.param_bytes, v.align);
    std::string type = "b8";
    for (const char* name : {"u8", "s8", "b16", "u16", "s16", "f16", "bf16", "b32", "u32", "s32",
                             "f32", "f16x2", "bf16x2", "b64", "u64", "s64", "f64"})
      if (type_of(name) == v.type && size_t(bytes_of(v.type)) == v.bytes) type = name;
    kernel.params.push_back({type, kernel.param_bytes, v.bytes, v.align});
    symbols[v.name] = {Space::kParam, kernel.param_bytes};
    kernel.param_bytes += v.bytes;
  }
  std::vector<const ptx::Variable*> shared;
  for (const auto* variables : {&file.variables, &function.variables})
    for (const ptx::Variable& v : *variables)
      if (v.space == "shared") shared.push_back(&v);
  size_t dynamic_align = 16;
  for (const ptx::Variable* v : shared) {
    if (v->external) {
      dynamic_align = std::max(dynamic_align, v->align);
      continue;
    }
    kernel.static_shared = align_up(kernel.static_shared, v->align);
    symbols[v->name] = {Space::kShared, kernel.static_shared};
    kernel.static_shared += v->bytes;
  }
  const size_t dynamic_base = align_up(kernel.static_shared, dynamic_align);
  for (const ptx::Variable* v : shared) {
    if (!v->external) continue;
    kernel.static_shared = dynamic_base;
    symbols[v->name] = {Space::kShared, dynamic_base};
  }
  for (const bool of_call : {true, false}) {
    for (const ptx::Variable& v : function.variables) {
      if (v.space != "local" || (v.name.find('#') != std::string::npos) != of_call) continue;
      kernel.local_bytes = align_up(kernel.local_bytes, v.align);
      symbols[v.name] = {Space::kLocal, kernel.local_bytes};
      kernel.local_bytes += v.bytes;
    }
    if (of_call) kernel.local_params = kernel.local_bytes;
  }
  for (const auto& [name, address] : globals) symbols[name] = {Space::kGlobal, address};
}

void Decode::fail(const std::string& message) const {
  std::string text = s.opcode;
  for (const std::string& m : s.modifiers) text += "." + m;
  ptx::fail(s.line, message + " (" + text + ")");
}

bool Decode::has(std::string_view modifier) const {
  return std::find(s.modifiers.begin(), s.modifiers.end(), modifier) != s.modifiers.end();
}

bool Decode::take(std::string_view modifier) {
  for (size_t i = 0; i < s.modifiers.size(); i++)
    if (!taken[i] && s.modifiers[i] == modifier) return taken[i] = true;
  return false;
}

Type Decode::type_or_none() {
  for (size_t i = 0; i < s.modifiers.size(); i++) {
    if (taken[i] || type_of(s.modifiers[i]) == Type::kNone) continue;
    taken[i] = true;
    return type_of(s.modifiers[i]);
  }
  return Type::kNone;
}

Type Decode::peek_type() const {
  for (const std::string& m : s.modifiers)
    if (type_of(m) != Type::kNone) return type_of(m);
  return Type::kNone;
}

Type Decode::type() {
  const Type t = type_or_none();
  if (t == Type::kNone) fail("a type is missing");
  return t;
}

void Decode::expect_operands(size_t least, size_t most) {
  if (s.operands.size() < least || s.operands.size() > most)
    fail("expected " + std::to_string(least) + " operands, got " +
         std::to_string(s.operands.size()));
}

void Decode::all_taken() {
  for (size_t i = 0; i < s.modifiers.size(); i++)
    if (!taken[i]) fail("unknown modifier ." + s.modifiers[i]);
}

const Builder::Register* Decode::look_up(const std::string& name) {
  for (int scope = s.scope; scope >= 0; scope = builder.function.scope_parent[scope]) {
    const auto found = builder.registers.find(ptx::in_scope(name, scope));
    if (found != builder.registers.end()) return &found->second;
  }
  return nullptr;
}

const Builder::Register& Decode::find_register(const std::string& name) {
  const Builder::Register* r = look_up(name);
  if (!r) fail("unknown register " + name);
  return *r;
}

const Builder::Symbol* Decode::symbol(const std::string& name) {
  const auto found = builder.symbols.find(name);
  return found == builder.symbols.end() ? nullptr : &found->second;
}

uint32_t Decode::src(const ptx::Operand& o, Type t) {
  if (t == Type::kPred) return pred_src(o);
  if (o.kind == ptx::Operand::kInteger) return builder.constant(uint64_t(o.value), lane_bytes(t));
  if (o.kind == ptx::Operand::kFloat) {
    const bool wide = bytes_of(t) == 8;
    if (bytes_of(t) < 4) fail("a float constant of 16 bits");
    return builder.constant(
        wide ? std::bit_cast<uint64_t>(o.number) : as_bits(float(o.number)), lane_bytes(t));
  }
  if (o.kind != ptx::Operand::kName) fail("expected a register or a number");
  const Builder::Register& r = find_register(o.name);
  if (r.type == Type::kPred || lane_bytes(r.type) != lane_bytes(t))
    fail("register " + o.name + " is not of the instruction's width");
  return r.offset;
}

uint32_t Decode::dst(const ptx::Operand& o, Type t) {
  if (o.kind != ptx::Operand::kName) fail("the destination is not a register");
  if (t == Type::kPred) return pred_dst(o.name);
  const Builder::Register& r = find_register(o.name);
  if (r.type == Type::kPred || lane_bytes(r.type) != lane_bytes(t))
    fail("register " + o.name + " is not of the instruction's width");
  return r.offset;
}

uint32_t Decode::pred_src(const ptx::Operand& o) {
  if (o.kind == ptx::Operand::kInteger) return builder.constant(o.value ? ~0ull : 0, 4);
  const Builder::Register& r = find_register(o.name);
  if (r.type != Type::kPred) fail(o.name + " is not a predicate");
  return r.offset;
}

uint32_t Decode::pred_dst(const std::string& name) {
  if (name == "_") return kNoOperand;
  const Builder::Register& r = find_register(name);
  if (r.type != Type::kPred) fail(name + " is not a predicate");
  return r.offset;
}

uint32_t Decode::any_register(const ptx::Operand& o, Type* type) {
  if (o.kind != ptx::Operand::kName) fail("expected a register");
  const Builder::Register& r = find_register(o.name);
  *type = r.type;
  return r.offset;
}

uint32_t Decode::label(const std::string& name) {
  for (int scope = s.scope; scope >= 0; scope = builder.function.scope_parent[scope]) {
    const auto found = builder.function.labels.find(ptx::in_scope(name, scope));
    if (found != builder.function.labels.end()) return uint32_t(found->second);
  }
  fail("unknown label " + name);
}

const std::vector<std::string>& Decode::branch_table(const std::string& name) {
  for (int scope = s.scope; scope >= 0; scope = builder.function.scope_parent[scope]) {
    const auto found = builder.function.tables.find(ptx::in_scope(name, scope));
    if (found != builder.function.tables.end()) return found->second;
  }
  fail("unknown branch table " + name);
}

int64_t Decode::integer(size_t i) {
  if (s.operands.at(i).kind != ptx::Operand::kInteger) fail("expected a constant");
  return s.operands[i].value;
}

void Decode::address(size_t i, Space space) {
  const ptx::Operand& o = s.operands.at(i);
  if (o.kind != ptx::Operand::kAddress) fail("expected an address");
  in.imm = o.value;
  in.wide_address = true;
  if (const Builder::Register* r = o.name.empty() ? nullptr : look_up(o.name)) {
    in.a = r->offset;
    in.wide_address = lane_bytes(r->type) == 8;
    if (lane_bytes(r->type) < 4) fail("an address of 16 bits");
    return;
  }
  in.a = builder.constant(0, 8);
  if (o.name.empty()) return;
  const Builder::Symbol* named = symbol(o.name);
  if (!named) fail("unknown symbol " + o.name);
  if (named->space != (space == Space::kGeneric ? Space::kGlobal : space))
    fail(o.name + " is in another state space");
  in.imm += int64_t(named->address);
}

void Decode::covers(Space space, int bytes) {
  const int granule = std::countr_zero(unsigned(bytes));
  Kernel& k = builder.kernel;
  if (space == Space::kShared || space == Space::kGeneric)
    k.shared_granule = std::min(k.shared_granule, granule);
  if (space == Space::kGlobal || space == Space::kGeneric)
    k.global_granule = std::min(k.global_granule, granule);
}

uint32_t Decode::list(const std::vector<uint32_t>& operands) {
  std::vector<uint32_t>& lists = builder.kernel.lists;
  in.count = uint8_t(operands.size());
  lists.insert(lists.end(), operands.begin(), operands.end());
  return uint32_t(lists.size() - operands.size());
}

Kernel decode(const ptx::File& file, const ptx::Function& function, const Globals& globals) {
  Builder builder{file, function, globals};
  builder.kernel.name = function.name;
  builder.kernel.max_threads = function.max_threads;
  builder.kernel.exact_threads = function.exact_threads;
  builder.lay_out();
  for (const ptx::Statement& s : function.statements) {
    Instr in;
    in.line = s.line;
    Decode d{builder, s, in, std::vector<bool>(s.modifiers.size())};
    if (!s.guard.empty()) {
      in.guard = d.find_register(s.guard).offset;
      in.guard_not = s.guard_not ? ~0u : 0;
    }
    constexpr decltype(&decode_integer) kFamilies[] = {
        decode_integer, decode_bits, decode_compare, decode_half, decode_float, decode_approx,
        decode_convert, decode_move, decode_memory, decode_async, decode_atomic, decode_matrix,
        decode_warp, decode_control};
    bool known = false;
    for (auto family : kFamilies) known = known || family(d);
    if (!known) d.fail("unknown instruction");
    d.all_taken();
    builder.kernel.code.push_back(in);
    const auto source = file.sources.find(s.source_file);
    builder.kernel.sources.push_back(
        source == file.sources.end() ? ""
                                     : source->second + ":" + std::to_string(s.source_line));
  }
  Instr end;  // a label at the end of the function needs an instruction
  const ptx::Statement ret{.opcode = "ret", .line = function.line};
  Decode d{builder, ret, end, {}};
  end.line = function.line;
  decode_control(d);
  builder.kernel.code.push_back(end);
  builder.kernel.sources.emplace_back();
  return std::move(builder.kernel);
}

}  // namespace vgpu
