// Which table of kernels serves a tensor, and where its work runs.
#include <cstdlib>
#include <cstring>

#include "binding.h"

extern "C" {
const Kernels* lx_cpu_kernels_plain();
#if defined(__x86_64__)
const Kernels* lx_cpu_kernels_avx2();
const Kernels* lx_cpu_kernels_avx512();
const Kernels* lx_cpu_kernels_avx512_bf16();
#endif
}

namespace lx {
namespace {

struct Isa {
  const char* name;
  bool (*present)();
  const Kernels* (*kernels)();
};

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

const Isa kIsas[] = {
    // best first
#if defined(__x86_64__)
    {"avx512_bf16", has_avx512_bf16, lx_cpu_kernels_avx512_bf16},
    {"avx512", has_avx512, lx_cpu_kernels_avx512},
    {"avx2", has_avx2, lx_cpu_kernels_avx2},
#endif
    {"plain", [] { return true; }, lx_cpu_kernels_plain},
};

// The kernels of the named instruction set, of the best one when name is empty.
const Kernels* cpu_kernels(const std::string& name) {
  std::string present;
  for (const Isa& isa : kIsas) {
    if (!isa.present()) continue;
    if (name.empty() || name == isa.name) return isa.kernels();
    present += std::string(present.empty() ? "" : ", ") + isa.name;
  }
  fail("LLAMA_EXT_CPU_ISA: expected one of ", present, " on this CPU, got ", name);
}

const Kernels*& cpu_table() {
  static const Kernels* table = [] {
    const char* forced = std::getenv("LLAMA_EXT_CPU_ISA");
    return cpu_kernels(forced ? forced : "");
  }();
  return table;
}

const ThreadPool kTorchPool = {
    .num_threads = [] { return static_cast<int>(torch::stable::get_num_threads()); },
    .parallel_for = [](int64_t begin, int64_t end, int64_t grain,
                       void (*body)(int64_t, int64_t, void*), void* arg) {
      torch_parallel_for(begin, end, grain, body, arg);
    },
};

}  // namespace

Backend kernels_for(const char* op, const char* arg, const Tensor& t) {
  check(t.is_cpu(), op, ": ", arg, ": expected a CPU tensor, got one on another device, for which "
        "this build has no kernels");
  return {cpu_table(), const_cast<ThreadPool*>(&kTorchPool)};
}

// The instruction set in use after switching to `name`; "" switches to the best, "?" not at all.
std::string cpu_isa(std::string name) {
  if (name != "?") cpu_table() = cpu_kernels(name);
  return cpu_table()->name + strlen("CPU ");
}

// The instruction sets of this CPU that have kernels, best first, separated by blanks.
std::string cpu_isas() {
  std::string names;
  for (const Isa& isa : kIsas) {
    if (!isa.present()) continue;
    if (!names.empty()) names += ' ';
    names += isa.name;
  }
  return names;
}

}  // namespace lx
