// What the kernels of attention's backward share. Formulas in csrc/api.h.
#pragma once
#include <algorithm>

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

// A grid with one block for each seat and head, in groups of `at_once` heads: all blocks of a group
// come before those of the next, so that what they all read stays in L2.
struct Grid {
  int heads, at_once, seats;  // heads: B * H, or H when packed
  int64_t blocks() const { return int64_t(heads) * seats; }

  struct Place {
    int head, seat;
  };
  __device__ Place place(unsigned block) const {
    const unsigned group = block / unsigned(at_once * seats) * at_once;
    const unsigned in_group = block % unsigned(at_once * seats);
    const unsigned size = min(unsigned(at_once), heads - group);
    return {int(group + in_group % size), int(in_group / size)};
  }
};

// head_bytes: what the blocks of one head read.
inline Status make_grid(Grid& grid, int64_t heads, int64_t seats, int64_t head_bytes) {
  if (heads * seats > kMaxBlocks) return kUnsupported;
  const int64_t at_once = std::clamp<int64_t>(kL2Bytes / 2 / (head_bytes + 1), 1, heads);
  grid = {int(heads), int(at_once), int(seats)};
  return kOk;
}

// The sequence and tile of a seat, for one of `heads` heads of a sequence: those that see most, or
// are seen most, first.
__device__ inline Seat seat_of(const Grid::Place& p, const int32_t* cu, int64_t B, int64_t tokens,
                               int height, int heads, int seats, bool descending) {
  if (cu) return seat_of(cu, int(B), int(tokens), height, p.seat, descending);
  return {p.head / heads, descending ? seats - 1 - p.seat : p.seat};
}

// The same in every lane, known to the compiler, which then keeps it apart from lanes' registers.
template <class T> __device__ const T* uniform(const T* p) {
  return reinterpret_cast<const T*>(
      __shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(p), 0));
}

// Writes rows [0, rows) of a tile in shared memory to global memory, `stride` elements apart, 16
// bytes at a time. kRows: of the tile; all kThreads threads of the block take part.
template <class T, class Layout, int kRows, int kThreads>
__device__ void store_tile(T* to, int64_t stride, const char* s_tile, int rows, int D) {
#pragma unroll 4
  for (int at = threadIdx.x; at < kRows * Layout::kPieces; at += kThreads) {
    const int row = at / Layout::kPieces, piece = at % Layout::kPieces;
    if (row < rows && piece * 8 < D)
      *reinterpret_cast<uint4*>(to + row * stride + piece * 8) =
          *reinterpret_cast<const uint4*>(s_tile + Layout::offset(row, piece));
  }
}

// Puts a 16 x 16 block of accumulators, times scale, at row `row` and column 16 * column of a tile.
template <class T, class Layout>
__device__ void put_block(char* s_tile, int row, int column, const float (&block)[2][4],
                          float scale) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < 2; n++)
#pragma unroll
    for (int half = 0; half < 2; half++)
      *reinterpret_cast<uint32_t*>(
          s_tile + Layout::offset(row + half * 8 + lane / 4, 2 * column + n) + lane % 4 * 4) =
          pack<T>(block[n][half * 2] * scale, block[n][half * 2 + 1] * scale);
}

}  // namespace lx
