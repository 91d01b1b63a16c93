// A kernel as the engine runs it: flat instructions whose operands are offsets.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "engine.h"

namespace vgpu {

struct Warp;
struct Instr;
using Run = void (*)(Warp&, const Instr&);

enum class Pipe : uint8_t { kAlu, kFma, kMufu, kTensor, kLsu, kOther };
enum class Space : uint8_t { kGeneric, kGlobal, kShared, kLocal, kParam };

// An operand is a byte offset into the warp's registers, or, with this bit, into the constants.
// Either way it is an array of 32 lanes; a predicate is a 32-bit mask.
inline constexpr uint32_t kConstant = 1u << 31;
inline constexpr uint32_t kNoOperand = 0x7fffffff;

struct Instr {
  Run run = nullptr;
  uint32_t d = kNoOperand, a = kNoOperand, b = kNoOperand, c = kNoOperand;
  uint32_t e = kNoOperand;         // a second result or a fourth source
  uint32_t guard = kNoOperand;     // predicate
  uint32_t guard_not = 0;          // all ones: execute where the guard is false
  uint32_t list = 0;               // first of `count` operands in Kernel::lists
  uint32_t target = 0;             // instruction, or an entry of Kernel::tables
  int64_t imm = 0;                 // offset of an address, or a small constant
  int32_t line = 0;
  uint8_t count = 0;
  uint8_t bytes = 0;               // of a memory access, all vector elements together
  uint8_t mode = 0;                // of the instruction's own
  Space space = Space::kGeneric;
  bool wide_address = true;        // the address register has 64 bits
  bool strong = false;             // volatile, relaxed, acquire, release or atomic
  Pipe pipe = Pipe::kAlu;
  uint8_t mma = 0;                 // index into Kernel::mma_names, from 1
};

struct Kernel {
  std::string name;
  std::vector<Param> params;
  size_t param_bytes = 0;
  std::vector<Instr> code;
  std::vector<uint32_t> lists;
  std::vector<std::vector<uint32_t>> tables;  // of brx.idx
  std::vector<std::string> mma_names;
  std::vector<uint64_t> constants;
  std::vector<std::string> sources;           // "file:line" of each instruction, if known
  size_t register_bytes = 0;
  uint32_t special = 0;        // first special register
  size_t static_shared = 0;    // with padding up to the dynamic part
  size_t local_bytes = 0;      // per thread
  size_t local_params = 0;     // of these, parameters of calls: structs with gaps, so not checked
  int shared_granule = 4;      // log2 of the smallest access to that space, at most 16 bytes
  int global_granule = 4;
  uint32_t max_threads = 0;    // of the launch bounds, or 0
  bool exact_threads = false;  // that many, no fewer
};

// 32-bit special registers, in this order from Kernel::special; %clock and the like are apart.
inline constexpr const char* kSpecials[] = {
    "%tid.x", "%tid.y", "%tid.z", "%ntid.x", "%ntid.y", "%ntid.z", "%ctaid.x", "%ctaid.y",
    "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid", "%warpid", "%nwarpid", "%smid",
    "%nsmid", "%lanemask_eq", "%lanemask_lt", "%lanemask_le", "%lanemask_gt", "%lanemask_ge",
    "%dynamic_smem_size", "%total_smem_size", "%gridid"};
inline constexpr int kSpecialCount = sizeof(kSpecials) / sizeof(kSpecials[0]);

}  // namespace vgpu
