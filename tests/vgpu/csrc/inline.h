// Calls of device functions, replaced by the functions' bodies.
#pragma once
#include <map>
#include <string>

#include "ptx.h"

namespace vgpu::ptx {

void inline_calls(Function& function, const std::map<std::string, Function>& functions,
                  int depth = 0);

}  // namespace vgpu::ptx
