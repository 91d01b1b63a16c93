// A stand-in for the CUDA runtime: object files that nvcc made link against it instead of cudart,
// and every launch runs on the virtual A100. Part of the test library only (see ../library.py).
//
// A kernel may touch the memory (allocator.h) that its arguments point into, nothing else.
// What it does wrong comes back as the launch's error text.
#include <cstring>
#include <mutex>
#include <utility>

#include "allocator.h"
#include "engine.h"

namespace {

struct Dim3 {
  unsigned x, y, z;
};

struct Kernel {
  std::string name;
  vgpu::Module* module = nullptr;
  size_t dynamic_shared_limit = 0;  // 0: 48 KB together with static shared memory
};

struct LaunchConfig {
  Dim3 grid, block;
  size_t shared;
  void* stream;
};

struct Runtime {
  std::mutex lock;
  vgpu::Device device;
  std::vector<std::shared_ptr<vgpu::Module>> modules;
  std::map<const void*, Kernel> kernels;  // by the address of the host's stub
  std::string log;                        // a JSON object per launch, comma-separated
};

Runtime& runtime() {
  static auto* r = new Runtime;  // never destroyed: libraries may still unregister
  return *r;
}

constexpr int kLaunchFailure = 719;  // cudaErrorLaunchFailure
thread_local int last_error = 0;
thread_local std::string error_text;
thread_local std::vector<LaunchConfig> configs;

int failed(const std::string& text) {
  error_text = text;
  return last_error = kLaunchFailure;
}

template <class T> T read(const char* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

// The PTX texts in a fat binary: a header (its size at +6, that of what follows at +8), then
// entries (kind at +0: 1 is PTX; size of the entry's header at +4, of its payload at +8).
std::vector<std::string> ptx_texts(const char* fat) {
  std::vector<std::string> texts;
  const char* at = fat + read<uint16_t>(fat + 6);
  const char* end = at + read<uint64_t>(fat + 8);
  while (at < end) {
    const char* payload = at + read<uint32_t>(at + 4);
    const uint64_t size = read<uint64_t>(at + 8);
    if (read<uint16_t>(at) == 1) texts.emplace_back(payload, strnlen(payload, size));
    at = payload + size;
  }
  return texts;
}

void append_log(const vgpu::Stats& stats, const std::string& name, Dim3 grid, Dim3 block) {
  std::string& log = runtime().log;
  const auto triple = [](Dim3 d) {
    return "[" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) +
           "]";
  };
  log += std::string(log.empty() ? "" : ",\n") + "{\"kernel\": \"" + name + "\", \"grid\": " +
         triple(grid) + ", \"block\": " + triple(block);
  for (const auto& [key, n] : stats.counts) log += ", \"" + key + "\": " + std::to_string(n);
  log += ", \"seconds\": " + std::to_string(stats.seconds) + "}";
}

int launch(const void* stub, Dim3 grid, Dim3 block, void** args, size_t shared) {
  Runtime& r = runtime();
  const std::lock_guard guard(r.lock);
  if (last_error) return last_error;  // nothing runs on what a failed kernel left
  const auto found = r.kernels.find(stub);
  if (found == r.kernels.end()) return failed("a launch of a kernel that was never registered");
  const Kernel& kernel = found->second;
  const size_t fixed = kernel.module->static_shared(kernel.name), usual = 48 * 1024 - fixed;
  const size_t limit = kernel.dynamic_shared_limit ? kernel.dynamic_shared_limit : usual;
  if (shared > limit)
    return failed("launch of " + kernel.name + ": " + std::to_string(shared) +
                  " bytes of dynamic shared memory, more than it was allowed with "
                  "cudaFuncSetAttribute");
  std::vector<const void*> candidates;  // whatever among the arguments may be a pointer
  for (size_t i = 0; i < kernel.module->params(kernel.name).size(); i++) {
    const vgpu::Param& p = kernel.module->params(kernel.name)[i];
    for (size_t at = 0; at + 8 <= p.bytes; at += 8)
      candidates.push_back(read<const void*>(static_cast<const char*>(args[i]) + at));
  }
  const vgpu::LentMemory memory(r.device, candidates);
  try {
    const auto stats = r.device.launch(*kernel.module, kernel.name, {grid.x, grid.y, grid.z},
                                       {block.x, block.y, block.z}, shared, args);
    append_log(stats, kernel.name, grid, block);
    return 0;
  } catch (const std::exception& e) {
    return failed(e.what());
  }
}

}  // namespace

#define EXPORT __attribute__((visibility("default")))

extern "C" {

// What the Python side calls. The log of launches since the last call:
EXPORT const char* vgpu_take_log() {
  thread_local std::string taken;
  taken = "[" + std::exchange(runtime().log, "") + "]";
  return taken.c_str();
}

EXPORT void vgpu_run_edges(double share) { runtime().device.run_edges(share); }
EXPORT void vgpu_set_seed(uint64_t seed) { runtime().device.set_seed(seed); }
EXPORT void vgpu_set_threads(int threads) { runtime().device.set_threads(threads); }

// What nvcc's host code calls.
void** __cudaRegisterFatBinary(void* wrapper) {
  Runtime& r = runtime();
  const std::lock_guard guard(r.lock);
  const auto texts = ptx_texts(*reinterpret_cast<const char**>(static_cast<char*>(wrapper) + 8));
  r.modules.push_back(texts.empty() ? nullptr : r.device.load(texts[0]));
  return reinterpret_cast<void**>(new vgpu::Module*(r.modules.back().get()));
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void** handle, const char* stub, char*, const char* name, int, void*,
                            void*, void*, void*, int*) {
  Kernel& kernel = runtime().kernels[stub];
  kernel.name = name;
  kernel.module = *reinterpret_cast<vgpu::Module**>(handle);
}
char __cudaInitModule(void**) { return 1; }
unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void* stream) {
  configs.push_back({grid, block, shared, stream});
  return 0;
}
int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, void** stream) {
  const LaunchConfig c = configs.back();
  configs.pop_back();
  *grid = c.grid, *block = c.block, *shared = c.shared, *stream = c.stream;
  return 0;
}
int __cudaGetKernel(const void** kernel, const void* stub) {
  *kernel = stub;
  return 0;
}
int __cudaLaunchKernel(const void* stub, Dim3 grid, Dim3 block, void** args, size_t shared, void*) {
  return launch(stub, grid, block, args, shared);
}
int cudaLaunchKernel(const void* stub, Dim3 grid, Dim3 block, void** args, size_t shared, void*) {
  return launch(stub, grid, block, args, shared);
}

// What launchers call.
int cudaGetLastError() { return std::exchange(last_error, 0); }
const char* cudaGetErrorString(int) { return error_text.c_str(); }
int cudaFuncSetAttribute(const void* stub, int attribute, int value) {
  constexpr int kMaxDynamicSharedMemorySize = 8;
  if (attribute == kMaxDynamicSharedMemorySize)
    runtime().kernels[stub].dynamic_shared_limit = size_t(value);
  return 0;
}

}  // extern "C"
