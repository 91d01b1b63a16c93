// Device: modules, memory, and launches over the CPU's cores.
#include <chrono>
#include <cmath>
#include <cstring>
#include <numeric>
#include <thread>

#include "decode.h"
#include "engine.h"
#include "run.h"

namespace vgpu {
namespace {

// Limits of an A100.
constexpr uint32_t kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 163 * 1024;
constexpr uint32_t kMaxGridYZ = 65535, kMaxBlockZ = 64;

// A device's memory, which its modules keep alive. The lock is for the list of allocations, which
// a launch holds throughout: one launch at a time.
struct LockedMemory {
  std::mutex lock;
  Memory memory;
};

struct LoadedModule : Module {
  std::map<std::string, Kernel> by_name;
  std::map<std::string, std::vector<uint8_t>> variables;
  std::vector<std::string> lines;
  std::shared_ptr<LockedMemory> memory;

  ~LoadedModule() override {
    const std::lock_guard guard(memory->lock);
    for (auto& [name, data] : variables)
      memory->memory.remove(reinterpret_cast<uint64_t>(data.data()));
  }
  const Kernel& kernel(const std::string& name) const {
    const auto found = by_name.find(name);
    if (found == by_name.end())
      throw std::invalid_argument("vgpu: the module has no kernel " + name);
    return found->second;
  }
  std::vector<std::string> kernels() const override {
    std::vector<std::string> names;
    for (const auto& [name, kernel] : by_name) names.push_back(name);
    return names;
  }
  const std::vector<Param>& params(const std::string& name) const override {
    return kernel(name).params;
  }
  size_t static_shared(const std::string& name) const override {
    return kernel(name).static_shared;
  }
  std::pair<void*, size_t> variable(const std::string& name) const override {
    const auto found = variables.find(name);
    if (found == variables.end()) return {nullptr, 0};
    return {const_cast<uint8_t*>(found->second.data()), found->second.size()};
  }
};

std::string text(const Dim& d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

[[noreturn]] void refuse(const Kernel& kernel, const std::string& what) {
  throw std::invalid_argument("vgpu: launch of " + kernel.name + ": " + what);
}

void check_launch(const Kernel& kernel, Dim grid, Dim block, size_t shared) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > kMaxBlockZ)
    refuse(kernel, "expected 1 to 1024 threads per block, got " + text(block));
  if (kernel.max_threads && (threads > kernel.max_threads ||
                             (kernel.exact_threads && threads != kernel.max_threads)))
    refuse(kernel, std::string("expected ") + (kernel.exact_threads ? "exactly" : "at most") +
                       " the " + std::to_string(kernel.max_threads) +
                       " threads of its launch bounds, got " + std::to_string(threads));
  if (uint64_t(grid.x) * grid.y * grid.z == 0 || grid.x > 0x7fffffffu || grid.y > kMaxGridYZ ||
      grid.z > kMaxGridYZ)
    refuse(kernel, "a grid that the hardware refuses: " + text(grid));
  if (uint64_t(grid.x) * grid.y * grid.z >= kMaxBlocks)
    refuse(kernel, "more blocks than the engine can tell apart: " + text(grid));
  if (shared > kMaxSharedBytes)
    refuse(kernel, "expected at most 166912 bytes of shared memory, got " +
                       std::to_string(shared));
}

const char* pipe_name(Pipe p) {
  constexpr const char* kNames[] = {"alu", "fma", "mufu", "tensor", "lsu", "other"};
  return kNames[int(p)];
}

Stats collect(const Kernel& kernel, const std::vector<std::unique_ptr<Worker>>& workers) {
  Stats stats;
  auto& counts = stats.counts;
  for (int p = 0; p <= int(Pipe::kOther); p++) counts[pipe_name(Pipe(p))] = 0;
  Counters sum;
  auto add = [&](const char* name, uint64_t n) { counts[name] += n; };
  for (const auto& worker : workers) {
    for (size_t i = 0; i < kernel.code.size(); i++) {
      const Instr& in = kernel.code[i];
      const uint64_t n = worker->executions()[i];
      add("warp_instructions", n);
      add(pipe_name(in.pipe), n);
      if (in.mma) stats.mma[kernel.mma_names[in.mma - 1]] += n;
    }
    const Counters& c = worker->counters();
    add("shared_requests", c.shared_requests);
    add("shared_wavefronts", c.shared_wavefronts);
    add("shared_wavefronts_ideal", c.shared_wavefronts_ideal);
    add("global_load_requests", c.load_requests);
    add("global_load_sectors", c.load_sectors);
    add("global_load_sectors_ideal", c.load_sectors_ideal);
    add("global_load_bytes", c.load_bytes);
    add("global_store_requests", c.store_requests);
    add("global_store_sectors", c.store_sectors);
    add("global_store_sectors_ideal", c.store_sectors_ideal);
    add("global_store_bytes", c.store_bytes);
    add("atomics", c.atomics);
    add("barriers", c.barriers);
  }
  return stats;
}

}  // namespace

struct Device::State {
  Options options;
  double edges = 1;  // see run_edges
  std::shared_ptr<LockedMemory> shared = std::make_shared<LockedMemory>();
  std::mutex& lock = shared->lock;
  Memory& memory = shared->memory;
};

Device::Device(Options options) : state_(std::make_unique<State>()) {
  state_->options = options;
  set_threads(options.threads);
}

Device::~Device() = default;

std::shared_ptr<Module> Device::load(const std::string& ptx) {
  ptx::File file = ptx::parse(ptx);
  auto module = std::make_shared<LoadedModule>();
  module->memory = state_->shared;
  Globals globals;
  for (const ptx::Variable& v : file.variables) {
    if (v.space == "shared") continue;
    if (v.external) ptx::fail(v.line, "an external variable: " + v.name);
    std::vector<uint8_t>& data = module->variables[v.name] = v.data;
    data.resize(v.bytes);
    const uint64_t address = reinterpret_cast<uint64_t>(data.data());
    if (address % v.align) ptx::fail(v.line, "a variable with a large alignment");
    globals[v.name] = address;
  }
  for (const ptx::Function& f : file.kernels) module->by_name[f.name] = decode(file, f, globals);
  const std::lock_guard guard(state_->lock);
  for (auto& [name, data] : module->variables)
    state_->memory.add(reinterpret_cast<uint64_t>(data.data()), data.size(), true);
  module->lines = std::move(file.lines);
  return module;
}

void Device::add_memory(const void* data, size_t bytes, bool initialised) {
  const std::lock_guard guard(state_->lock);
  state_->memory.add(reinterpret_cast<uint64_t>(data), bytes, initialised);
}

void Device::remove_memory(const void* data) {
  const std::lock_guard guard(state_->lock);
  state_->memory.remove(reinterpret_cast<uint64_t>(data));
}

void Device::mark_memory(const void* data, size_t bytes, bool initialised) {
  const std::lock_guard guard(state_->lock);
  state_->memory.mark(reinterpret_cast<uint64_t>(data), bytes, initialised);
}

void Device::read_marks(const void* data, size_t bytes, uint8_t* marks) const {
  const std::lock_guard guard(state_->lock);
  const auto at = reinterpret_cast<uint64_t>(data);
  const Allocation* a = state_->memory.find(at);
  if (!a || !a->init || !a->contains(at, bytes))
    throw std::invalid_argument("vgpu: read_marks: not within one uninitialised allocation");
  std::memcpy(marks, a->init + (at - a->base), bytes);
}

void Device::run_edges(double share) {
  const std::lock_guard guard(state_->lock);
  state_->edges = share;
}

void Device::set_seed(uint64_t seed) {
  const std::lock_guard guard(state_->lock);
  state_->options.seed = seed;
}

void Device::set_threads(int threads) {
  const std::lock_guard guard(state_->lock);
  state_->options.threads =
      threads > 0 ? threads : std::max(1, int(std::thread::hardware_concurrency()));
}

Stats Device::launch(const Module& module, const std::string& name, Dim grid, Dim block,
                     size_t dynamic_shared, const void* const* args) {
  const std::lock_guard guard(state_->lock);
  const auto& loaded = static_cast<const LoadedModule&>(module);
  const Kernel& kernel = loaded.kernel(name);
  const size_t shared_bytes = kernel.static_shared + dynamic_shared;
  check_launch(kernel, grid, block, shared_bytes);

  Launch launch{};
  launch.kernel = &kernel;
  launch.memory = &state_->memory;
  launch.grid = grid;
  launch.block = block;
  launch.dynamic_shared = dynamic_shared;
  launch.shared_bytes = shared_bytes;
  launch.seed = state_->options.seed;
  launch.limit = state_->options.limit;
  launch.params.resize(kernel.param_bytes);
  for (size_t i = 0; i < kernel.params.size(); i++)
    std::memcpy(launch.params.data() + kernel.params[i].offset, args[i], kernel.params[i].bytes);
  state_->memory.begin_launch(kernel.global_granule);

  const uint64_t grid_blocks = uint64_t(grid.x) * grid.y * grid.z;
  const auto edge = uint64_t(std::ceil(state_->edges * double(grid_blocks)));
  // A stride without common factor visits every block once, in an order that the seed picks.
  const uint64_t blocks = std::min(2 * edge, grid_blocks);
  uint64_t stride = (launch.seed * 0x9e3779b97f4a7c15ull >> 20) % blocks | 1;
  while (std::gcd(stride, blocks) != 1) stride += 2;
  const auto begin = std::chrono::steady_clock::now();
  const int threads = int(std::min<uint64_t>(uint64_t(state_->options.threads), blocks));
  std::vector<std::unique_ptr<Worker>> workers(static_cast<size_t>(threads));
  std::atomic<uint64_t> next{0};
  std::mutex error_lock;
  std::exception_ptr error;
  auto work = [&](std::unique_ptr<Worker>& worker) {
    try {
      worker = std::make_unique<Worker>(launch);
      for (uint64_t i; !launch.stopped && (i = next++) < blocks;) {
        const uint64_t number = (i * stride + launch.seed % blocks) % blocks;
        worker->run(number < edge ? number : grid_blocks - blocks + number);
      }
    } catch (...) {
      const std::lock_guard hold(error_lock);
      if (!error) error = std::current_exception();
      launch.stopped = true;
    }
  };
  std::vector<std::thread> pool;
  for (int t = 1; t < threads; t++) pool.emplace_back([&, t] { work(workers[size_t(t)]); });
  work(workers[0]);
  for (std::thread& t : pool) t.join();

  if (error) {
    try {
      std::rethrow_exception(error);
    } catch (const Fault& f) {
      std::string line = loaded.lines.at(size_t(f.line) - 1);
      line.erase(0, line.find_first_not_of(" \t"));
      Fault full("kernel " + f.kernel + ", block " + text(f.block) + ", thread " + text(f.thread) +
                 ", PTX line " + std::to_string(f.line) + " `" + line + "`" +
                 (f.source.empty() ? "" : " (" + f.source + ")") + ": " + f.reason);
      full.kernel = f.kernel;
      full.reason = f.reason;
      full.source = f.source;
      full.ptx = line;
      full.block = f.block;
      full.thread = f.thread;
      full.line = f.line;
      throw full;
    }
  }
  Stats stats = collect(kernel, workers);
  stats.counts["blocks"] = blocks;
  stats.counts["threads_per_block"] = uint64_t(block.x) * block.y * block.z;
  state_->memory.count_touched(&stats.counts["global_unique_bytes_read"],
                               &stats.counts["global_unique_bytes_written"]);
  stats.seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return stats;
}

}  // namespace vgpu
