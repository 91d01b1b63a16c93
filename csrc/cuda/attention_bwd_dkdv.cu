// Attention backward on tensor cores, for bf16 and fp16: dk and dv. Formulas in csrc/api.h; letters
// and what is seen in attention.cuh.
//
// Scores are transposed, keys down and queries across, so that p^T and ds^T, as they leave one
// matrix product, are the operands of the next. Two warps share the same keys. The first has K in
// registers, makes p = exp(scale * k q^T - lse) and adds p^T dout to dv; the second has V there,
// makes v dout^T - delta, gets p from the first, and adds ds^T q to dk. So each keeps one operand
// and one sum of 16 * kKeyBlocks keys in registers, and every block that it reads from shared
// memory serves all of its keys: with 32 keys a read feeds four products.
#include "attention_bwd.cuh"

namespace lx {
namespace {

constexpr int kPairs = 4;               // of warps in a block
constexpr int kThreads = 2 * kPairs * 32;
constexpr int kQuadBytes = 16;          // four fp32 numbers

// What a kernel is compiled for: kKeyBlocks x 16 keys for each pair of warps, tiles of kQueries,
// kBlocks thread blocks on an SM.
template <class T_, int kHeadDim_, int kKeyBlocks_, int kQueries_, int kBlocks_> struct Shape {
  using T = T_;
  using Layout = Padded<kHeadDim_>;
  static constexpr int kHeadDim = kHeadDim_, kKeyBlocks = kKeyBlocks_, kQueries = kQueries_;
  static constexpr int kBlocks = kBlocks_, kColumns = kHeadDim / 16, kSteps = kQueries / 16;
  static constexpr int kPairKeys = kKeyBlocks * 16, kKeys = kPairs * kPairKeys;
  // Shared memory: two stages of (Q, dout), at first K and V and at last dv and dk; then p on its
  // way; then, of each query, what is added to its scores and dweights.
  static constexpr int kTileBytes = kQueries * Layout::kRowBytes, kStageBytes = 2 * kTileBytes;
  static constexpr int kKeyTileBytes = kKeys * Layout::kRowBytes;
  static constexpr int kTilesBytes = 2 * std::max(kStageBytes, kKeyTileBytes);
  static constexpr int kHandOverBytes = kKeyBlocks * 2 * 32 * kQuadBytes;  // of a pair
  static constexpr int kRowsBytes = kQueries * 12;                         // of a stage
  static constexpr int kHandOver = kTilesBytes, kZeros = kHandOver + kPairs * kHandOverBytes;
  static constexpr int kRows = kZeros + kQueries * 8, kSharedBytes = kRows + 2 * kRowsBytes;
  static_assert(2 * kQueries <= kThreads, "a thread loads lse or delta of one query");
};

template <class S> using Sums = float[S::kKeyBlocks][S::kColumns][2][4];
template <class S> using Kept = uint32_t[S::kKeyBlocks][S::kColumns][4];

// A warp's place and what it reads.
template <class S> struct Warp {
  int pair, role;  // role 0: K, p and dv; 1: V, ds and dk
  BlockAddress<S::kHeadDim, true, typename S::Layout> columns;  // of Q or dout, transposed
  BlockAddress<S::kHeadDim, false, typename S::Layout> rows;
  char* s_hand_over;  // this lane's quads of p
  float c;            // scale * log2(e)

  __device__ Warp(char* s_dynamic, float scale)
      : pair(__shfl_sync(kAllLanes, threadIdx.x / 32 % kPairs, 0)),
        role(__shfl_sync(kAllLanes, threadIdx.x / 32 / kPairs, 0)),
        columns(ptx::shared_address(s_dynamic)),
        rows(ptx::shared_address(s_dynamic)),
        s_hand_over(s_dynamic + S::kHandOver + pair * S::kHandOverBytes +
                    threadIdx.x % 32 * kQuadBytes),
        c(scale * kLog2E) {}
  __device__ int full() const { return 1 + pair; }            // barrier: p is there
  __device__ int empty() const { return 1 + kPairs + pair; }  // barrier: p has been read
};

// Adds the products of one tile of queries to the warp's sums. j0: the pair's first key; i0: the
// tile's first query; stage: where the tile is.
template <class S, bool kMasked>
__device__ void add_tile(Sums<S>& sums, const Kept<S>& kept, const Warp<S>& w, const Sequence& s,
                         int j0, int i0, int stage, const char* s_dynamic) {
  using T = typename S::T;
  const int lane = threadIdx.x % 32;
  const uint32_t first = stage * S::kStageBytes + w.role * S::kTileBytes;
  const uint32_t second = stage * S::kStageBytes + (1 - w.role) * S::kTileBytes;
  const char* s_rows = s_dynamic + S::kRows + stage * S::kRowsBytes;
  const char* s_start = (w.role ? s_rows + S::kQueries * 4 : s_dynamic + S::kZeros) +
                        lane % 4 * kQuadBytes;
  const char* s_lse = s_rows + lane % 4 * 8;
#pragma unroll 1  // unrolled, it asks for more registers than there are
  for (int step = 0; step < S::kSteps; step++) {
    const int i = i0 + step * 16;
    if constexpr (kMasked) {
      const bool some = i < s.T && j0 - min(i + 15, s.T - 1) <= s.ahead &&
                        min(j0 + S::kPairKeys, s.S) - 1 - i >= -s.behind;
      if (!some) continue;
    }
    float start[2][4], x[S::kKeyBlocks][2][4];
#pragma unroll
    for (int n = 0; n < 2; n++) {
      const float4 quad =
          *reinterpret_cast<const float4*>(s_start + (step * 8 + n * 4) * kQuadBytes);
      start[n][0] = quad.x, start[n][1] = quad.y, start[n][2] = quad.z, start[n][3] = quad.w;
    }
#pragma unroll
    for (int d = 0; d < S::kColumns; d++) {
      uint32_t r_y[4];
      ptx::ldmatrix(r_y, w.columns.block(step * 16, d) + first);
#pragma unroll
      for (int m = 0; m < S::kKeyBlocks; m++) {
        mma<T>(x[m][0], kept[m][d], r_y[0], r_y[1], d ? x[m][0] : start[0]);
        mma<T>(x[m][1], kept[m][d], r_y[2], r_y[3], d ? x[m][1] : start[1]);
      }
    }
    const auto hidden = [&](int m, int n, int e) {
      const int query = i + n * 8 + lane % 4 * 2 + e % 2;
      const int ahead = j0 + m * 16 + e / 2 * 8 + lane / 4 - query;
      return ahead > s.ahead || ahead < -s.behind || query >= s.T;
    };
    if (w.role == 0) {
#pragma unroll
      for (int n = 0; n < 2; n++) {
        const float2 lse = *reinterpret_cast<const float2*>(s_lse + (step * 16 + n * 8) * 4);
#pragma unroll
        for (int m = 0; m < S::kKeyBlocks; m++)
#pragma unroll
          for (int e = 0; e < 4; e++) {
            x[m][n][e] = ptx::ex2(fmaf(x[m][n][e], w.c, e % 2 ? lse.y : lse.x));
            if (kMasked && hidden(m, n, e)) x[m][n][e] = 0;
          }
      }
      ptx::bar_sync(w.empty(), 64);  // the other warp has read the p of before
#pragma unroll
      for (int m = 0; m < S::kKeyBlocks; m++)
#pragma unroll
        for (int n = 0; n < 2; n++)
          *reinterpret_cast<float4*>(w.s_hand_over + (m * 2 + n) * 32 * kQuadBytes) =
              make_float4(x[m][n][0], x[m][n][1], x[m][n][2], x[m][n][3]);
      ptx::bar_arrive(w.full(), 64);  // p is there
    } else {
      ptx::bar_sync(w.full(), 64);  // p is there
#pragma unroll
      for (int m = 0; m < S::kKeyBlocks; m++)
#pragma unroll
        for (int n = 0; n < 2; n++) {
          const float4 p =
              *reinterpret_cast<const float4*>(w.s_hand_over + (m * 2 + n) * 32 * kQuadBytes);
          x[m][n][0] *= p.x, x[m][n][1] *= p.y, x[m][n][2] *= p.z, x[m][n][3] *= p.w;
          if constexpr (kMasked)
            for (int e = 0; e < 4; e++)
              if (hidden(m, n, e)) x[m][n][e] = 0;
        }
      ptx::bar_arrive(w.empty(), 64);  // p has been read
    }
    uint32_t r_x[S::kKeyBlocks][4];
#pragma unroll
    for (int m = 0; m < S::kKeyBlocks; m++) to_operand<T>(r_x[m], x[m][0], x[m][1]);
#pragma unroll
    for (int d = 0; d < S::kColumns; d++) {
      uint32_t r_y[4];
      ptx::ldmatrix_trans(r_y, w.rows.block(step * 16, d) + second);
#pragma unroll
      for (int m = 0; m < S::kKeyBlocks; m++) {
        mma<T>(sums[m][d][0], r_x[m], r_y[0], r_y[1]);
        mma<T>(sums[m][d][1], r_x[m], r_y[2], r_y[3]);
      }
    }
  }
}

// dk = scale ds^T q and dv = p^T dout, of kKeys keys of one key/value head, summed over the query
// heads that share it.
//
// Grid: as Grid says, key tiles that most queries see first. Block: 4 pairs of warps, each with a
// quarter of the keys, and all tiles of queries that see any of them, head by head. Dynamic shared
// memory: Shape. Preconditions: rows are aligned to 16 bytes, D % 8 == 0, D <= kHeadDim; delta.
//
// Barriers: 0 for the block, once a tile; two for each pair, by which the second warp waits for p,
// and the first one only where its p of the step before has not been read. Loads in flight: the
// next tile of Q and dout, while this one is multiplied.
template <class S>
__global__ void __launch_bounds__(kThreads, S::kBlocks)
    attention_bwd_dkdv_kernel(const __grid_constant__ AttentionGrads g, Grid grid) {
  using T = typename S::T;
  using Layout = typename S::Layout;
  extern __shared__ __align__(1024) char s_dynamic[];
  const Attention& a = g.a;
  const int Hkv = int(a.Hkv), D = int(a.D), group = int(a.H) / Hkv;
  const Grid::Place place = grid.place(blockIdx.x);
  const int kv = place.head % Hkv;
  const Seat seat = seat_of(place, a.cu_k, a.B, a.S, S::kKeys, Hkv, grid.seats, false);
  const Sequence s(a, seat.b);
  const int j0 = seat.tile * S::kKeys;
  if (j0 >= s.S) return;

  const Warp<S> w(s_dynamic, float(a.scale));
  const int warp_j0 = j0 + w.pair * S::kPairKeys;
  const uint32_t s_tiles = ptx::shared_address(s_dynamic);
  using Loader = TileLoader<T, S::kHeadDim, kThreads, Layout>;
  Kept<S> kept;
  {
    const Loader load_k(static_cast<const T*>(a.k) + s.k_at + kv * a.k_stride[2], a.k_stride[1], D,
                        threadIdx.x);
    const Loader load_v(static_cast<const T*>(a.v) + s.v_at + kv * a.v_stride[2], a.v_stride[1], D,
                        threadIdx.x);
    load_k.template zero_columns<S::kTilesBytes / S::Layout::kRowBytes>(s_tiles);
    load_k.template load<S::kKeys>(s_tiles, j0, s.S);
    load_v.template load<S::kKeys>(s_tiles + S::kKeyTileBytes, j0, s.S);
    ptx::cp_async_commit();
    for (int at = threadIdx.x; at < S::kQueries * 2; at += kThreads)
      reinterpret_cast<float*>(s_dynamic + S::kZeros)[at] = 0;
    ptx::cp_async_wait<0>();
    __syncthreads();  // K and V are there
    const uint32_t mine = w.role * S::kKeyTileBytes + w.pair * S::kPairKeys * S::Layout::kRowBytes;
#pragma unroll
    for (int m = 0; m < S::kKeyBlocks; m++)
#pragma unroll
      for (int d = 0; d < S::kColumns; d++)
        ptx::ldmatrix(kept[m][d], w.rows.block(m * 16, d) + mine);
    __syncthreads();  // and read, so that Q and dout may take their place
  }

  const int head = kv * group;  // the first of the group
  const T* g_q = static_cast<const T*>(a.q) + s.q_at + head * a.q_stride[2];
  const T* g_dout = static_cast<const T*>(g.dout) + dout_at(g, s, seat.b) + head * g.dout_stride[2];
  int64_t row_at = s.lse_at + head * s.lse_stride;  // of lse and delta
  const TileRange tiles = uniform(query_tiles<S::kQueries>(s, j0, min(j0 + S::kKeys, s.S)));
  // Thread t has lse of query t of a tile, and thread kQueries + t its delta.
  float r_row = 0;
  const auto prefetch = [&](int tile, int stage) {
    const int thread = ptx::thread_index(), i = tile * S::kQueries + thread % S::kQueries;
    const Loader load_q(g_q, a.q_stride[1], D, thread);
    const Loader load_dout(g_dout, g.dout_stride[1], D, thread);
    const uint32_t s_stage = s_tiles + stage * S::kStageBytes;
    load_q.template load<S::kQueries>(s_stage, tile * S::kQueries, s.T);
    load_dout.template load<S::kQueries>(s_stage + S::kTileBytes, tile * S::kQueries, s.T);
    ptx::cp_async_commit();
    if (thread < 2 * S::kQueries && i < s.T)
      r_row = static_cast<const float*>(thread < S::kQueries ? g.lse : g.delta)[row_at + i];
  };
  const auto put_rows = [&](int stage) {
    const int thread = ptx::thread_index(), row = thread % S::kQueries;
    float* s_rows = reinterpret_cast<float*>(s_dynamic + S::kRows + stage * S::kRowsBytes);
    if (thread < S::kQueries) {
      s_rows[row] = -r_row * kLog2E;
    } else if (thread < 2 * S::kQueries) {
      s_rows += S::kQueries + row / 2 * 4 + row % 2;
      s_rows[0] = s_rows[2] = -r_row;
    }
  };

  Sums<S> sums = {};
  int stage = 0, left = (tiles.end - tiles.begin) * group, tile = tiles.begin;
  if (w.role == 1) ptx::bar_arrive(w.empty(), 64);  // nothing is waiting to be read
  if (left) {
    prefetch(tile, stage);
    put_rows(stage);
  }
  for (; left; left--) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this tile is there, and the one before is read
    int next = tile + 1;
    if (left > 1) {
      if (next == tiles.end) {
        next = tiles.begin;
        g_q += a.q_stride[2];
        g_dout += g.dout_stride[2];
        row_at += s.lse_stride;
      }
      prefetch(next, 1 - stage);
    }
    const int i0 = tile * S::kQueries;
    if (tile >= tiles.full_begin && tile < tiles.full_end)
      add_tile<S, false>(sums, kept, w, s, warp_j0, i0, stage, s_dynamic);
    else
      add_tile<S, true>(sums, kept, w, s, warp_j0, i0, stage, s_dynamic);
    put_rows(1 - stage);
    stage = 1 - stage;
    tile = next;
  }
  if (w.role == 0) ptx::bar_sync(w.empty(), 64);  // the last p has been read

  __syncthreads();  // the last tile is read, so that dv and dk may take its place
  char* s_mine = s_dynamic + w.role * S::kKeyTileBytes;
  const float scale = w.role ? float(a.scale) : 1;
#pragma unroll
  for (int m = 0; m < S::kKeyBlocks; m++)
#pragma unroll
    for (int d = 0; d < S::kColumns; d++)
      put_block<T, Layout>(s_mine, w.pair * S::kPairKeys + m * 16, d, sums[m][d], scale);
  __syncthreads();  // dv and dk are there
  const int64_t stride = int64_t(Hkv) * D, at = (s.k_row + j0) * stride + int64_t(kv) * D;
  store_tile<T, Layout, S::kKeys, kThreads>(static_cast<T*>(g.dv) + at, stride, s_dynamic,
                                            s.S - j0, D);
  store_tile<T, Layout, S::kKeys, kThreads>(static_cast<T*>(g.dk) + at, stride,
                                            s_dynamic + S::kKeyTileBytes, s.S - j0, D);
}

template <class S> Status launch(const AttentionGrads& g, cudaStream_t stream) {
  const Attention& a = g.a;
  Grid grid;
  const int64_t seats = tile_seats(a.cu_k, a.cu_k ? a.B : 1, a.S, S::kKeys);
  const int64_t read = a.T / (a.cu_q ? a.B : 1) * (a.H / a.Hkv) * a.D * 2 * sizeof(typename S::T);
  if (make_grid(grid, (a.cu_k ? 1 : a.B) * a.Hkv, seats, read) != kOk) return kUnsupported;
  const auto kernel = attention_bwd_dkdv_kernel<S>;
  // Of the current device, each time: a process may have several. A refusal shows at the launch.
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes);
  kernel<<<unsigned(grid.blocks()), kThreads, S::kSharedBytes, stream>>>(g, grid);
  return launch_status();
}

template <class T> Status launch_for(const AttentionGrads& g, cudaStream_t stream) {
  if (g.a.D <= 64) return launch<Shape<T, 64, 4, 128, 1>>(g, stream);
  if (g.a.D <= 128) return launch<Shape<T, 128, 2, 64, 1>>(g, stream);
  return launch<Shape<T, 256, 1, 32, 1>>(g, stream);
}

}  // namespace

Status attention_bwd_dkdv(const AttentionGrads& g, cudaStream_t stream) {
  return g.a.dtype == kBFloat16 ? launch_for<bf16>(g, stream) : launch_for<f16>(g, stream);
}

}  // namespace lx
