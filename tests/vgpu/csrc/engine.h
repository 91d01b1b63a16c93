// The virtual A100: runs PTX on the CPU and faults on anything a real GPU would let pass.
//
// Device memory is host memory. Every pointer that a kernel dereferences must lie in memory that
// was added with add_memory (or in a variable of the module). Nothing here needs Python.
//
//   vgpu::Device gpu({.seed = 0});
//   auto module = gpu.load(ptx_text);
//   gpu.add_memory(x, bytes, /*initialised=*/true);
//   void* args[] = {&x, &n};                       // as cudaLaunchKernel hands them
//   vgpu::Stats stats = gpu.launch(*module, "kernel", {blocks}, {128}, 0, args);
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace vgpu {

struct Dim {
  uint32_t x = 1, y = 1, z = 1;
};

// What a kernel did wrong, where. what() is one sentence with all of it.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
  std::string kernel, reason, ptx, source;  // ptx: the line's text; source: "file:line" if known
  Dim block, thread;
  int line = 0;  // of the PTX text, from 1
};

// PTX that does not parse, or that the engine does not know. The message names the line.
struct LoadError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Stats {
  std::map<std::string, uint64_t> counts;  // documented in tests/vgpu/README.md
  std::map<std::string, uint64_t> mma;     // by shape and types
  double seconds = 0;
};

struct Param {
  std::string type;  // PTX name without the dot: "u64", "f32", "b8" for a struct
  size_t offset = 0, bytes = 0, align = 1;
};

class Module {
 public:
  virtual ~Module() = default;
  virtual std::vector<std::string> kernels() const = 0;
  virtual const std::vector<Param>& params(const std::string& kernel) const = 0;
  virtual size_t static_shared(const std::string& kernel) const = 0;
  // A __device__ or __constant__ variable, in place; nullptr and 0 if there is none of that name.
  virtual std::pair<void*, size_t> variable(const std::string& name) const = 0;
};

struct Options {
  uint64_t seed = 0;               // order of blocks and warps, and where warps are switched
  int threads = 0;                 // CPU threads; 0: one per core. 1: faults repeat exactly
  uint64_t limit = 1'000'000'000;  // warp instructions after which a block counts as stuck
};

class Device {
 public:
  explicit Device(Options options = {});
  ~Device();

  std::shared_ptr<Module> load(const std::string& ptx);

  // Overlapping memory is joined. Uninitialised memory may not be read before it is written.
  void add_memory(const void* data, size_t bytes, bool initialised);
  void remove_memory(const void* data);
  // The bytes count as written (by a copy from the host), or as uninitialised again.
  void mark_memory(const void* data, size_t bytes, bool initialised);
  // Per byte of memory that was added with initialised = false: 0 where it still may not be read.
  void read_marks(const void* data, size_t bytes, uint8_t* marks) const;

  // From now on launches run only their first and their last blocks, this share of the grid at each
  // end, rounded up: for tensors that are too large to run through. 1: all.
  void run_edges(double share);

  // From now on launches take this seed instead of options.seed.
  void set_seed(uint64_t seed);

  // From now on launches take so many threads instead of options.threads.
  void set_threads(int threads);

  // args[i] points to the bytes of parameter i. Throws Fault, or std::invalid_argument for a
  // launch that a driver would refuse.
  Stats launch(const Module& module, const std::string& kernel, Dim grid, Dim block,
               size_t dynamic_shared, const void* const* args);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace vgpu
