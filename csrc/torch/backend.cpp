// Which table of kernels serves a tensor, and where its work runs.
//
// LLAMA_EXT_CPU_TENSORS_TO names a library with a CUDA table that is to serve CPU tensors: the
// tests' virtual A100 (tests/vgpu).
#include <dlfcn.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>

#include "binding.h"

extern "C" {
const Kernels* lx_cpu_kernels_plain();
#if defined(__x86_64__)
const Kernels* lx_cpu_kernels_avx2();
const Kernels* lx_cpu_kernels_avx512();
const Kernels* lx_cpu_kernels_avx512_bf16();
const Kernels* lx_cpu_kernels_amx();
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
// Linux gives a process the tile registers when it asks for them.
bool has_amx() {
  constexpr int kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return has_avx512_bf16() && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
}
#endif

const Isa kIsas[] = {
    // best first
#if defined(__x86_64__)
    {"amx", has_amx, lx_cpu_kernels_amx},
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

// The table of a library that exports lx_cuda_kernels.
const Kernels* cuda_library(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  check(library, "llama_ext: CUDA kernels: expected the library ", path, ", got: ", dlerror(),
        "; lx.info() tells how to build it");
  const auto kernels = reinterpret_cast<const Kernels* (*)()>(dlsym(library, "lx_cuda_kernels"));
  check(kernels, "llama_ext: CUDA kernels: expected lx_cuda_kernels in ", path, ", got none");
  const int version = kernels()->version;
  check(version == kApiVersion, "llama_ext: CUDA kernels: expected version ", int{kApiVersion},
        " in ", path, ", got ", version, "; build both libraries together");
  return kernels();
}

// The CUDA table of this installation, beside this library.
const Kernels* cuda_table() {
  static const Kernels* table = [] {
    Dl_info self;
    check(dladdr(reinterpret_cast<void*>(&cuda_library), &self), "llama_ext: dladdr failed");
    const std::string path = self.dli_fname;
    return cuda_library(path.substr(0, path.rfind('/') + 1) + "libllama_ext_cuda.so");
  }();
  return table;
}

// torch's current stream of a GPU. The shim is in torch's CUDA library, which a CPU build lacks.
Stream current_stream(int32_t device) {
  using Shim = AOTITorchError (*)(int32_t device, void** stream);
  static const auto shim = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = torch_cuda ? dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream") : nullptr;
    check(symbol, "llama_ext: CUDA tensor: expected a CUDA build of torch, got one without");
    return reinterpret_cast<Shim>(symbol);
  }();
  void* stream;
  STABLE_TORCH_ERROR_CODE_CHECK(shim(device, &stream));
  return stream;
}

const char* routed_to() {
  static const char* path = std::getenv("LLAMA_EXT_CPU_TENSORS_TO");
  return path;
}

const Kernels*& cpu_table() {
  static const Kernels* table = [] {
    if (routed_to()) return cuda_library(routed_to());
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
  if (t.is_cpu()) {
    auto* pool = const_cast<ThreadPool*>(&kTorchPool);
    return {op, cpu_table(), routed_to() ? nullptr : pool, !routed_to(), std::nullopt};
  }
  check(t.is_cuda(), op, ": ", arg, ": expected a CPU or CUDA tensor, got one on another device");
  const int32_t device = t.get_device_index();
  return {op, cuda_table(), current_stream(device), false,
          torch::stable::accelerator::DeviceGuard(device)};
}

// The name of the table for CPU tensors, after switching to that of an instruction set; "" switches
// to the best, "?" not at all.
std::string cpu_isa(std::string name) {
  if (name != "?" && !routed_to()) cpu_table() = cpu_kernels(name);
  const std::string table = cpu_table()->name, prefix = "CPU ";
  return table.rfind(prefix, 0) == 0 ? table.substr(prefix.size()) : table;
}

// The instruction sets of this CPU that have kernels, best first, separated by blanks.
std::string cpu_isas() {
  if (routed_to()) return cpu_table()->name;
  std::string names;
  for (const Isa& isa : kIsas) {
    if (!isa.present()) continue;
    if (!names.empty()) names += ' ';
    names += isa.name;
  }
  return names;
}

// The name of the CUDA table, or the sentence that says why there is none.
std::string cuda_kernels() {
  try {
    return cuda_table()->name;
  } catch (const std::exception& e) {
    return e.what();
  }
}

}  // namespace lx
