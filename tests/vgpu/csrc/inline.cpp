// A copy of the callee gets scopes of its own, so that its registers and labels stay apart. The
// parameters of the call become local variables of the caller, which both sides name.
#include "inline.h"

#include <algorithm>

namespace vgpu::ptx {
namespace {

constexpr int kDeepest = 32;
const std::string kReturn = "$return";

// "name" or "name#3" of the callee, in the caller whose scope `root` is the callee's outermost.
std::string moved(const std::string& name, int root) {
  const size_t mark = name.rfind('#');
  if (mark == std::string::npos) return in_scope(name, root);
  return in_scope(name.substr(0, mark), root + std::stoi(name.substr(mark + 1)));
}

// The key of a .param variable that a statement names, or "" if it is none of the body's.
std::string parameter(const Function& f, const std::string& name, int scope) {
  for (; scope >= 0; scope = f.scope_parent[size_t(scope)])
    for (const Variable& v : f.variables)
      if (v.space != "shared" && v.name == in_scope(name, scope)) return v.name;
  return "";
}

std::vector<std::string> names(const Operand& o) {
  if (o.kind != Operand::kVector) return {o.name};
  std::vector<std::string> list;
  for (const Operand& item : o.items) list.push_back(item.name);
  return list;
}

// Gives variables their new names, and makes ld.param and st.param of them local accesses.
void redirect(Statement& s, const std::map<std::string, std::string>& to) {
  const auto space = std::find(s.modifiers.begin(), s.modifiers.end(), "param");
  for (Operand& o : s.operands) {
    const auto found = to.find(o.name);
    if (o.kind != Operand::kAddress || found == to.end()) continue;
    o.name = found->second;
    if (space != s.modifiers.end()) *space = "local";
  }
}

class Inliner {
 public:
  Inliner(Function& caller, const std::map<std::string, Function>& functions, int depth)
      : caller_(caller), functions_(functions), depth_(depth) {}

  void run() {
    const std::vector<Statement> statements = std::move(caller_.statements);
    std::vector<int> place;
    for (const Statement& s : statements) {
      place.push_back(int(out_.size()));
      const size_t callee = position(s);
      if (callee == s.operands.size()) out_.push_back(s);
      else insert(s, callee);
    }
    place.push_back(int(out_.size()));
    for (auto& [name, index] : caller_.labels) index = place[size_t(index)];
    caller_.labels.merge(labels_);
    for (Statement& s : out_) {
      std::map<std::string, std::string> own;
      for (const Operand& o : s.operands) {
        const std::string key = parameter(caller_, o.name, s.scope);
        if (std::find(used_.begin(), used_.end(), key) != used_.end()) own[o.name] = key;
      }
      redirect(s, own);
    }
    for (Variable& v : caller_.variables)
      if (std::find(used_.begin(), used_.end(), v.name) != used_.end()) v.space = "local";
    caller_.statements = std::move(out_);
  }

 private:
  size_t position(const Statement& s) const {
    size_t i = 0;
    if (s.opcode != "call") return s.operands.size();
    while (i < s.operands.size() && !functions_.count(s.operands[i].name)) i++;
    return i;
  }

  void insert(const Statement& call, size_t callee) {
    Function body = functions_.at(call.operands[callee].name);
    if (depth_ > kDeepest) fail(call.line, "a recursive function");
    if (!call.guard.empty()) fail(call.line, "a call under a predicate");
    inline_calls(body, functions_, depth_ + 1);
    const int root = int(caller_.scope_parent.size());
    for (const int parent : body.scope_parent)
      caller_.scope_parent.push_back(parent < 0 ? -1 : parent + root);
    for (const auto& [name, type] : body.registers) caller_.registers[moved(name, root)] = type;
    for (const auto& [name, table] : body.tables) caller_.tables[moved(name, root)] = table;
    const int first = int(out_.size());
    for (const auto& [name, index] : body.labels) labels_[moved(name, root)] = first + index;

    std::map<std::string, std::string> bound;
    bind(bound, body.results, callee > 0 ? names(call.operands[0]) : std::vector<std::string>{},
         call);
    const bool arguments = callee + 1 < call.operands.size();
    bind(bound, body.params,
         arguments ? names(call.operands[callee + 1]) : std::vector<std::string>{}, call);
    for (Variable& v : body.variables) {
      const bool of_call = v.name.find('#') != std::string::npos;
      if (of_call) v.name = bound[v.name] = moved(v.name, root);
      caller_.variables.push_back(v);
    }
    for (Statement& s : body.statements) {
      s.scope += root;
      if (s.opcode == "ret") {
        s.opcode = "bra";
        s.modifiers.clear();
        s.operands = {Operand{.name = kReturn}};
      }
      redirect(s, bound);
      out_.push_back(std::move(s));
    }
    labels_[in_scope(kReturn, root)] = int(out_.size());
  }

  void bind(std::map<std::string, std::string>& bound, const std::vector<Variable>& formal,
            const std::vector<std::string>& actual, const Statement& call) {
    if (formal.size() != actual.size()) fail(call.line, "a call with the wrong parameters");
    for (size_t i = 0; i < formal.size(); i++) {
      const std::string key = parameter(caller_, actual[i], call.scope);
      if (key.empty()) fail(call.line, "an argument that is no .param variable: " + actual[i]);
      bound[formal[i].name] = key;
      used_.push_back(key);
    }
  }

  Function& caller_;
  const std::map<std::string, Function>& functions_;
  const int depth_;
  std::vector<Statement> out_;
  std::map<std::string, int> labels_;
  std::vector<std::string> used_;
};

}  // namespace

void inline_calls(Function& function, const std::map<std::string, Function>& functions,
                  int depth) {
  Inliner(function, functions, depth).run();
}

}  // namespace vgpu::ptx
