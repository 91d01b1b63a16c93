// Attention forward: what one warp does with a tile of keys, on tensor cores. The weights of a row,
// exp(scale * score) over their sum, are made tile by tile (online softmax).
#pragma once
#include <cfloat>
#include <cmath>

#include "attention.cuh"

namespace lx {

// What a kernel is compiled for. Each of kWarps warps has kRowBlocks x 16 queries, a tile kKeys
// keys; kKept of the head dim's blocks of 16 columns of Q stay in registers, the others are read
// from shared memory for every tile; kBlocks thread blocks are to fit an SM.
template <class T_, int kHeadDim_, int kRowBlocks_, int kWarps_, int kKeys_, int kKept_,
          int kBlocks_>
struct Shape {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_, kRowBlocks = kRowBlocks_, kWarps = kWarps_;
  static constexpr int kKeys = kKeys_, kBlocks = kBlocks_;
  static constexpr int kWarpRows = kRowBlocks * 16, kRows = kWarps * kWarpRows;
  static constexpr int kThreads = kWarps * 32, kColumns = kHeadDim / 16, kKeyBlocks = kKeys / 16;
#if __CUDA_ARCH__ >= 900  // where all else takes some registers more
  static constexpr int kKept = kKept_ < kColumns ? kKept_ - 2 : kKept_;
#else
  static constexpr int kKept = kKept_;
#endif
  using Layout = Padded<kHeadDim>;
  static constexpr int kWarpBytes = kWarpRows * Layout::kRowBytes;  // of Q
  static constexpr int kTileBytes = kKeys * Layout::kRowBytes;      // of K or V; two of each
  static constexpr int kSharedBytes = kWarps * kWarpBytes + 4 * kTileBytes;
  using BlockOfQ = BlockAddress<kHeadDim, false, Layout>;
  using BlockOfK = BlockAddress<kHeadDim, true, Layout>;
  using BlockOfV = BlockAddress<kHeadDim, false, Layout>;
  static_assert(kKept <= kColumns, "no more of Q is kept than there is");
};

// Weights are exp2(c * score - shift), c = |scale| * log2(e). Any shift will do that is one of the
// row's c * score, so that not all weights underflow, and not far below the largest, so that none
// overflows T. So a tile that is seen whole needs no search for the largest score: when a lane's
// weights of a row add up to more than kTooLarge, the tile is done again with shift risen to the
// row's largest score so far.
template <class T> constexpr float kTooLarge = std::is_same_v<T, f16> ? 0x1p12f : 0x1p40f;

// What a warp knows of its queries. Of row block r its lane has rows lane / 4 (index 0) and
// lane / 4 + 8 (1).
template <class S> struct WarpState {
  float out[S::kRowBlocks][S::kColumns][2][4];  // sums of weight * v, 16 x 8 blocks
  float sum[S::kRowBlocks][2];                  // of this lane's weights only
  float shift[S::kRowBlocks][2];                // -FLT_MAX: no score yet

  __device__ WarpState() {
#pragma unroll
    for (int r = 0; r < S::kRowBlocks; r++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        sum[r][half] = 0;
        shift[r][half] = -FLT_MAX;
#pragma unroll
        for (int d = 0; d < S::kColumns; d++)
          for (int e = 0; e < 4; e++) out[r][d][half][e] = 0;
      }
  }
};

template <class S> using Scores = float[S::kRowBlocks][S::kKeyBlocks][2][4];
template <class S> using Kept = uint32_t[S::kRowBlocks][S::kKept ? S::kKept : 1][4];

// scores = q k^T for one tile of keys, `at` bytes after k.
template <class S>
__device__ void scores_of(Scores<S>& scores, const Kept<S>& kept,
                          const typename S::BlockOfQ& q, const typename S::BlockOfK& k, int at) {
  float zero[4] = {};
#pragma unroll
  for (int d = 0; d < S::kColumns; d++) {
    uint32_t r_q[S::kRowBlocks][4];
#pragma unroll
    for (int r = 0; r < S::kRowBlocks; r++) {
      if (d < S::kKept)
        for (int e = 0; e < 4; e++) r_q[r][e] = kept[r][d][e];
      else
        ptx::ldmatrix(r_q[r], q.block(r * 16, d));
    }
#pragma unroll
    for (int n = 0; n < S::kKeyBlocks; n++) {
      uint32_t r_k[4];
      ptx::ldmatrix(r_k, k.block(n * 16, d) + at);
#pragma unroll
      for (int r = 0; r < S::kRowBlocks; r++) {
        auto& s = scores[r][n];
        mma<typename S::T>(s[0], r_q[r], r_k[0], r_k[1], d ? s[0] : zero);
        mma<typename S::T>(s[1], r_q[r], r_k[2], r_k[3], d ? s[1] : zero);
      }
    }
  }
}

// -inf for the keys that a query doesn't see. query(row): the query in a row of the warp's; j0: the
// tile's first key.
template <class S, class Query>
__device__ void hide(Scores<S>& scores, const Sequence& s, const Query& query, int j0) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < S::kRowBlocks; r++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int i = query(r * 16 + half * 8 + lane / 4);
      const int first = s.first_key(i), end = s.end_key(i);
#pragma unroll
      for (int n = 0; n < S::kKeyBlocks; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int j = j0 + n * 16 + e / 2 * 8 + lane % 4 * 2 + e % 2;
          if (j < first || j >= end) scores[r][n][e / 2][half * 2 + e % 2] = -INFINITY;
        }
    }
}

// Raises shift to the rows' largest scores so far, and shrinks what has been summed accordingly.
template <class S>
__device__ void raise_shift(WarpState<S>& w, const Scores<S>& scores, float c) {
#pragma unroll
  for (int r = 0; r < S::kRowBlocks; r++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float top = scores[r][0][0][half * 2];
#pragma unroll
      for (int n = 0; n < S::kKeyBlocks; n++)
        for (int e = 0; e < 4; e++) top = fmaxf(top, scores[r][n][e / 2][half * 2 + e % 2]);
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));  // of the four lanes with this row
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
      const float shift = fmaxf(w.shift[r][half], top * c);
      const float factor = ptx::ex2(w.shift[r][half] - shift);
      w.shift[r][half] = shift;
      w.sum[r][half] *= factor;
#pragma unroll
      for (int d = 0; d < S::kColumns; d++)
        for (int e = 0; e < 4; e++) w.out[r][d][e / 2][half * 2 + e % 2] *= factor;
    }
}

// Turns scores into weights; sums: this lane's sums of them.
template <class S>
__device__ void weights_of(Scores<S>& scores, float (&sums)[S::kRowBlocks][2],
                           const WarpState<S>& w, float c) {
#pragma unroll
  for (int n = 0; n < S::kKeyBlocks; n++)
#pragma unroll
    for (int r = 0; r < S::kRowBlocks; r++)
#pragma unroll
      for (int e = 0; e < 8; e++) {
        const int half = e % 4 / 2;
        float& s = scores[r][n][e / 4][e % 4];
        s = ptx::ex2(fmaf(s, c, -w.shift[r][half]));
        sums[r][half] = n == 0 && e % 6 == half * 2 ? s : sums[r][half] + s;
      }
}

template <class S> __device__ void add_sums(WarpState<S>& w, float (&sums)[S::kRowBlocks][2]) {
#pragma unroll
  for (int r = 0; r < S::kRowBlocks; r++)
    for (int half = 0; half < 2; half++) w.sum[r][half] += sums[r][half];
}

// out += weights v for one tile of keys, `at` bytes after v.
template <class S>
__device__ void add_values(WarpState<S>& w, const Scores<S>& weights,
                           const typename S::BlockOfV& v, int at) {
#pragma unroll
  for (int n = 0; n < S::kKeyBlocks; n++) {
    uint32_t r_p[S::kRowBlocks][4];
#pragma unroll
    for (int r = 0; r < S::kRowBlocks; r++)
      to_operand<typename S::T>(r_p[r], weights[r][n][0], weights[r][n][1]);
#pragma unroll
    for (int d = 0; d < S::kColumns; d++) {
      uint32_t r_v[4];
      ptx::ldmatrix_trans(r_v, v.block(n * 16, d) + at);
#pragma unroll
      for (int r = 0; r < S::kRowBlocks; r++) {
        mma<typename S::T>(w.out[r][d][0], r_p[r], r_v[0], r_v[1]);
        mma<typename S::T>(w.out[r][d][1], r_p[r], r_v[2], r_v[3]);
      }
    }
  }
}

}  // namespace lx
