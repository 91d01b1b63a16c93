// The parser. Directives that only matter to a debugger or to ptxas are skipped.
#include "ptx.h"

#include <sstream>

#include "inline.h"
#include "lexer.h"

namespace vgpu::ptx {

void fail(int line, const std::string& message) {
  throw LoadError("PTX line " + std::to_string(line) + ": " + message);
}

std::string in_scope(const std::string& name, int scope) {
  return scope == 0 ? name : name + "#" + std::to_string(scope);
}

namespace {

class Parser {
 public:
  explicit Parser(const std::string& text) : tokens_(tokenize(text)) {
    std::istringstream stream(text);
    for (std::string line; std::getline(stream, line);) file_.lines.push_back(line);
  }

  File parse() {
    while (peek().kind != Token::kEnd) top_level();
    for (Function& kernel : file_.kernels) inline_calls(kernel, functions_);
    return std::move(file_);
  }

 private:
  const Token& peek(int ahead = 0) const {
    return tokens_[std::min(next_ + ahead, tokens_.size() - 1)];
  }
  const Token& take() { return tokens_[next_ < tokens_.size() - 1 ? next_++ : next_]; }
  bool is(const char* text, int ahead = 0) const {
    return peek(ahead).kind != Token::kString && peek(ahead).text == text;
  }
  bool accept(const char* text) { return is(text) ? (take(), true) : false; }
  void expect(const char* text) {
    if (!accept(text))
      fail(peek().line, std::string("expected '") + text + "', got '" + peek().text + "'");
  }
  void skip_line() {
    for (const int line = peek().line; peek().kind != Token::kEnd && peek().line == line;) take();
  }
  void skip_braces() {
    expect("{");
    for (int depth = 1; depth > 0;) {
      if (peek().kind == Token::kEnd) fail(peek().line, "the text ends inside braces");
      depth += is("{") ? 1 : is("}") ? -1 : 0;
      take();
    }
  }
  int64_t integer() {
    const bool negative = accept("-");
    const Token& t = take();
    if (t.kind != Token::kNumber) fail(t.line, "expected a number, got '" + t.text + "'");
    const int64_t value = int64_t(std::stoull(t.text, nullptr, 0));
    return negative ? -value : value;
  }

  void top_level() {
    const Token& t = peek();
    if (t.text == ".version" || t.text == ".target" || t.text == ".address_size" ||
        t.text == ".file" || t.text == ".pragma") {
      if (t.text == ".file") source_file();
      skip_line();
    } else if (t.text == ".section") {
      while (!is("{")) take();
      skip_braces();
    } else if (t.text == ".visible" || t.text == ".weak" || t.text == ".common") {
      take();
    } else if (t.text == ".extern") {
      take();
      external_ = true;
    } else if (t.text == ".entry" || t.text == ".func") {
      function();
    } else if (t.text == ".global" || t.text == ".const" || t.text == ".shared") {
      file_.variables.push_back(variable());
      expect(";");
    } else {
      fail(t.line, "unknown directive '" + t.text + "'");
    }
  }

  void source_file() {
    if (peek(1).kind == Token::kNumber && peek(2).kind == Token::kString) {
      const std::string& path = peek(2).text;
      file_.sources[std::stoi(peek(1).text)] = path.substr(path.rfind('/') + 1);
    }
  }

  // .space .align n .type name[n] = {...}; also a parameter.
  Variable variable() {
    Variable v;
    v.line = peek().line;
    v.space = take().text.substr(1);
    v.external = external_;
    external_ = false;
    size_t align = 0, element = 0;
    while (peek().kind == Token::kWord && peek().text[0] == '.') {
      const std::string word = take().text;
      if (word == ".align") align = integer();
      else if (word == ".ptr") continue;
      else if (word == ".global" || word == ".shared" || word == ".const") continue;
      else if (type_of(word.substr(1)) != Type::kNone) v.type = type_of(word.substr(1));
      else fail(v.line, "unknown attribute '" + word + "' of a variable");
    }
    if (v.type == Type::kNone) fail(v.line, "a variable without a type");
    v.name = take().text;
    element = bytes_of(v.type);
    v.bytes = element;
    // The alignment of what a pointer points to comes before the type too; it is not the pointer's.
    v.align = align;
    bool array = false;
    while (accept("[")) {
      const size_t n = is("]") ? 0 : integer();
      v.bytes = array ? v.bytes * n : element * n;
      array = true;
      expect("]");
    }
    if (v.align == 0 || (v.space == "param" && !array)) v.align = element;
    if (accept("=")) initializer(v);
    return v;
  }

  void initializer(Variable& v) {
    const int element = bytes_of(v.type);
    v.data.clear();
    int depth = 0;
    do {
      if (accept("{")) {
        depth++;
      } else if (accept("}")) {
        depth--;
      } else if (!accept(",")) {
        const Operand value = operand();
        if (value.kind != Operand::kInteger && value.kind != Operand::kFloat)
          fail(v.line, "an initial value that is not a number");
        uint64_t bits = value.value;
        if (value.kind == Operand::kFloat)
          bits = v.type == Type::kF32 ? as_bits(float(value.number))
                                      : std::bit_cast<uint64_t>(value.number);
        for (int i = 0; i < element; i++) v.data.push_back(uint8_t(bits >> (8 * i)));
      }
    } while (depth > 0);
    if (v.data.size() > v.bytes) v.bytes = v.data.size();
  }

  std::vector<Variable> parameters() {
    std::vector<Variable> list;
    if (!accept("(")) return list;
    while (!accept(")")) {
      list.push_back(variable());
      accept(",");
    }
    return list;
  }

  void function() {
    const bool kernel = take().text == ".entry";
    external_ = false;
    function_ = Function{};
    function_.line = peek().line;
    function_.results = parameters();
    function_.name = take().text;
    function_.params = parameters();
    while (!is("{") && !is(";")) {
      const std::string directive = take().text;
      if (directive != ".maxntid" && directive != ".reqntid") continue;
      function_.exact_threads = directive == ".reqntid";
      function_.max_threads = integer();
      while (accept(",")) function_.max_threads *= integer();
    }
    if (accept(";")) return;
    expect("{");
    source_file_ = source_line_ = 0;
    body(0);
    if (kernel) file_.kernels.push_back(std::move(function_));
    else functions_[function_.name] = std::move(function_);
  }

  void body(int scope) {
    while (!accept("}")) {
      const Token& t = peek();
      if (t.kind == Token::kEnd) fail(t.line, "the text ends inside a function");
      if (accept("{")) {
        function_.scope_parent.push_back(scope);
        body(int(function_.scope_parent.size()) - 1);
      } else if (t.text == ".reg" || t.text.starts_with(".reg.")) {
        registers(scope);
      } else if (t.text == ".loc") {
        source_file_ = std::stoi(peek(1).text);
        source_line_ = std::stoi(peek(2).text);
        skip_line();
      } else if (t.text == ".shared" || t.text == ".local" || t.text == ".param") {
        Variable v = variable();
        if (v.space == "param") v.name = in_scope(v.name, scope);
        function_.variables.push_back(std::move(v));
        expect(";");
      } else if (t.text == ".pragma" || t.text == ".file") {
        skip_line();
      } else if (is(":", 1)) {
        label(scope);
      } else if (!accept(";")) {
        statement(scope);
      }
    }
  }

  void label(int scope) {
    const std::string name = in_scope(take().text, scope);
    expect(":");
    if (is(".branchtargets")) {
      take();
      do function_.tables[name].push_back(take().text);
      while (accept(","));
      expect(";");
    } else {
      function_.labels[name] = int(function_.statements.size());
    }
  }

  void registers(int scope) {
    const bool joined = peek().text != ".reg";  // .reg.b16
    if (!joined) take();
    const Token& kind = take();
    const Type type = type_of(kind.text.substr(joined ? 5 : 1));
    if (type == Type::kNone || type == Type::kB128)
      fail(kind.line, "unknown register type '" + kind.text + "'");
    do {
      const std::string name = take().text;
      if (accept("<")) {
        const int64_t count = integer();
        expect(">");
        for (int64_t i = 0; i < count; i++)
          function_.registers[in_scope(name + std::to_string(i), scope)] = type;
      } else {
        function_.registers[in_scope(name, scope)] = type;
      }
    } while (accept(","));
    expect(";");
  }

  void statement(int scope) {
    Statement s;
    s.scope = scope;
    s.line = peek().line;
    s.source_file = source_file_;
    s.source_line = source_line_;
    if (accept("@")) {
      s.guard_not = accept("!");
      s.guard = take().text;
      s.line = peek().line;
    }
    const Token& t = take();
    if (t.kind != Token::kWord) fail(t.line, "expected an instruction, got '" + t.text + "'");
    size_t dot = t.text.find('.');
    s.opcode = t.text.substr(0, dot);
    while (dot != std::string::npos) {
      const size_t end = t.text.find('.', dot + 1);
      s.modifiers.push_back(t.text.substr(dot + 1, end - dot - 1));
      dot = end;
    }
    while (!is(";")) {
      s.operands.push_back(operand());
      if (!accept(",") && !is(";"))
        fail(s.line, "expected ',' or ';', got '" + peek().text + "'");
    }
    expect(";");
    function_.statements.push_back(std::move(s));
  }

  Operand operand() {
    Operand o;
    const Token& t = peek();
    if (accept("{") || accept("(")) {
      o.kind = Operand::kVector;
      while (!accept("}") && !accept(")")) {
        o.items.push_back(operand());
        accept(",");
      }
      if (o.items.size() == 1) return Operand(o.items[0]);  // {x} is x
    } else if (accept("[")) {
      o.kind = Operand::kAddress;
      if (peek().kind == Token::kWord) o.name = take().text;
      while (!accept("]")) {
        if (accept(",")) fail(t.line, "an address of several parts (a tensor or a texture)");
        accept("+");
        o.value += integer();
      }
    } else if (is("-") || t.kind == Token::kNumber) {
      number(o);
    } else if (t.text == "_") {
      take();
      o.kind = Operand::kSink;
    } else {
      o.negated = accept("!");
      if (peek().kind != Token::kWord) fail(t.line, "expected an operand, got '" + t.text + "'");
      o.name = take().text;
      if (accept("+")) {
        o.kind = Operand::kAddress;  // symbol + offset, as mov takes it
        o.value = integer();
      }
    }
    if (accept("|")) o.pair = take().text;
    return o;
  }

  void number(Operand& o) {
    const std::string& text = peek(is("-")).text;
    const bool real = text.find('.') != std::string::npos;
    if (text.starts_with("0f") || text.starts_with("0F")) {
      o.kind = Operand::kFloat;
      o.number = as_float(uint32_t(std::stoul(text.substr(2), nullptr, 16)));
    } else if (text.starts_with("0d") || text.starts_with("0D")) {
      o.kind = Operand::kFloat;
      o.number = std::bit_cast<double>(uint64_t(std::stoull(text.substr(2), nullptr, 16)));
    } else if (real) {
      o.kind = Operand::kFloat;
      o.number = std::stod(text) * (is("-") ? -1 : 1);
    } else {
      o.kind = Operand::kInteger;
      o.value = integer();
      return;
    }
    accept("-");
    take();
  }

  std::vector<Token> tokens_;
  size_t next_ = 0;
  File file_;
  Function function_;
  std::map<std::string, Function> functions_;
  bool external_ = false;
  int source_file_ = 0, source_line_ = 0;
};

}  // namespace

File parse(const std::string& text) { return Parser(text).parse(); }

}  // namespace vgpu::ptx
