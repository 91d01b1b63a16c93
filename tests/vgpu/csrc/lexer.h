// PTX text to tokens.
#pragma once
#include <string>
#include <vector>

namespace vgpu::ptx {

struct Token {
  enum Kind { kWord, kNumber, kString, kSign, kEnd } kind;
  std::string text;
  int line;
};

std::vector<Token> tokenize(const std::string& text);

}  // namespace vgpu::ptx
