// Comments go, lines are counted; a word keeps its dots and double colons.
#include "lexer.h"

#include <cctype>

#include "ptx.h"

namespace vgpu::ptx {
namespace {

bool starts_word(char c) { return std::isalpha(c) || c == '_' || c == '$' || c == '%' || c == '.'; }
bool in_word(char c) { return std::isalnum(c) || c == '_' || c == '$' || c == '.'; }

}  // namespace

std::vector<Token> tokenize(const std::string& text) {
  std::vector<Token> tokens;
  int line = 1;
  const size_t n = text.size();
  size_t i = 0;
  auto at = [&](size_t k) { return k < n ? text[k] : '\0'; };
  while (i < n) {
    const char c = text[i];
    const size_t begin = i;
    if (c == '\n') {
      line++, i++;
    } else if (std::isspace(c) || c == '\0') {
      i++;
    } else if (c == '/' && at(i + 1) == '/') {
      while (i < n && text[i] != '\n') i++;
    } else if (c == '/' && at(i + 1) == '*') {
      for (i += 2; i < n && !(text[i] == '*' && at(i + 1) == '/'); i++) line += text[i] == '\n';
      i += 2;
    } else if (c == '"') {
      for (i++; i < n && text[i] != '"'; i++) line += text[i] == '\n';
      i++;
      tokens.push_back({Token::kString, text.substr(begin + 1, i - begin - 2), line});
    } else if (starts_word(c)) {
      i++;
      while (i < n && (in_word(text[i]) || (text[i] == ':' && at(i + 1) == ':')))
        i += text[i] == ':' ? 2 : 1;
      tokens.push_back({Token::kWord, text.substr(begin, i - begin), line});
    } else if (std::isdigit(c)) {
      while (i < n && (in_word(text[i]) ||
                       ((text[i] == '+' || text[i] == '-') && std::tolower(text[i - 1]) == 'e' &&
                        text.substr(begin, i - begin).find('.') != std::string::npos)))
        i++;
      tokens.push_back({Token::kNumber, text.substr(begin, i - begin), line});
    } else {
      i++;
      tokens.push_back({Token::kSign, std::string(1, c), line});
    }
  }
  tokens.push_back({Token::kEnd, "", line});
  return tokens;
}

}  // namespace vgpu::ptx
