// The text of a PTX module as a tree: what is written, not what it means.
#pragma once
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "engine.h"
#include "types.h"

namespace vgpu::ptx {

struct Operand {
  enum Kind { kName, kInteger, kFloat, kAddress, kVector, kSink } kind = kName;
  std::string name;         // register, symbol, label; of an address: its base, or empty
  std::string pair;         // q of p|q
  bool negated = false;     // !p
  int64_t value = 0;        // integer, offset of an address
  double number = 0;        // kFloat
  std::vector<Operand> items;
};

struct Statement {
  std::string opcode;
  std::vector<std::string> modifiers;
  std::vector<Operand> operands;
  std::string guard;  // predicate, or empty
  bool guard_not = false;
  int line = 0, scope = 0;
  int source_file = 0, source_line = 0;  // of the last .loc
};

struct Variable {
  std::string name, space;
  Type type = Type::kNone;
  size_t bytes = 0, align = 1;
  bool external = false;
  std::vector<uint8_t> data;
  int line = 0;
};

struct Function {
  std::string name;
  std::vector<Variable> params, results;
  std::vector<Variable> variables;             // shared, local, and .param of calls ("name#scope")
  std::map<std::string, Type> registers;       // "name" or "name#scope"
  std::map<std::string, int> labels;           // statement index
  std::map<std::string, std::vector<std::string>> tables;  // .branchtargets
  std::vector<int> scope_parent{-1};
  std::vector<Statement> statements;
  uint32_t max_threads = 0;  // .maxntid or .reqntid
  bool exact_threads = false;  // .reqntid
  int line = 0;
};

struct File {
  std::vector<Function> kernels;
  std::vector<Variable> variables;
  std::map<int, std::string> sources;  // .file
  std::vector<std::string> lines;
};

File parse(const std::string& text);

std::string in_scope(const std::string& name, int scope);

[[noreturn]] void fail(int line, const std::string& message);

}  // namespace vgpu::ptx
