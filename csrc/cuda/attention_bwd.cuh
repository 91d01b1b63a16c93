// What the kernels of attention's backward share. Formulas in csrc/api.h.
#pragma once
#include "attention.cuh"
#include "kernels.cuh"

namespace lx {

// The arguments of attention_bwd, as its kernels take them.
struct AttentionGrads {
  Attention a;
  void* dq;          // (B, T, H, D)
  void* dk;          // (B, S, Hkv, D)
  void* dv;          // (B, S, Hkv, D)
  void* delta;       // (B, H, T)
  const void* dout;  // (B, T, H, D) in dout_stride
  int64_t dout_stride[3];
  const void* o;     // (B, T, H, D)
  const void* lse;   // (B, H, T)
  const void* dlse;  // (B, H, T), or null
};

// The element offset of a sequence's first token in dout, head 0.
__device__ inline int64_t dout_at(const AttentionGrads& g, const Sequence& s, int b) {
  return g.a.cu_q ? s.q_row * g.dout_stride[1] : b * g.dout_stride[0];
}

// dk and dv, and then dq, from delta, by tensor cores (bf16 and f16 with aligned rows of D values,
// D a multiple of 8 up to 256) or by plain arithmetic (everything else).
Status attention_bwd_dkdv(const AttentionGrads& g, cudaStream_t stream);
Status attention_bwd_dq(const AttentionGrads& g, cudaStream_t stream);
Status attention_bwd_scalar(const AttentionGrads& g, cudaStream_t stream);

// The number of blocks of a launch with one for each seat and head.
inline Status grid_of(unsigned& blocks, int64_t seats, int64_t heads) {
  if (seats * heads >= int64_t(1) << 31) return kUnsupported;
  blocks = unsigned(seats * heads);
  return kOk;
}

}  // namespace lx
