// Attention backward on tensor cores, for bf16 and fp16: dq. Formulas in csrc/api.h; letters and
// what is seen in attention.cuh.
//
// A warp keeps Q and dout of 16 * kRowBlocks queries in registers, so that a block of K or V that
// it reads from shared memory serves all of them. Where there is no room beside them for dq of
// these queries (head dims over 64), two warps share them (kShare): each makes ds for every other
// block of 16 keys, hands it to the other, and keeps one half of dq's columns.
#include "attention_bwd.cuh"

namespace lx {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * 32;

// What a kernel is compiled for: kShare warps with kRowBlocks x 16 queries, tiles of kKeys keys,
// kBlocks thread blocks on an SM.
template <class T_, int kHeadDim_, int kShare_, int kRowBlocks_, int kKeys_, int kBlocks_>
struct Shape {
  using T = T_;
  using Layout = Padded<kHeadDim_>;
  static constexpr int kHeadDim = kHeadDim_, kShare = kShare_, kRowBlocks = kRowBlocks_;
  static constexpr int kKeys = kKeys_, kBlocks = kBlocks_;
  static constexpr int kColumns = kHeadDim / 16, kOwnColumns = kColumns / kShare;
  static constexpr int kStepKeys = 16 * kShare, kSteps = kKeys / kStepKeys;
  static constexpr int kTeams = kWarps / kShare, kTeamRows = kRowBlocks * 16;
  static constexpr int kRows = kTeams * kTeamRows;
  // Shared memory: two stages of (K, V), at first Q and dout and at last dq; then two of ds on its
  // way; then, of each query, what is added to its dweights and scores.
  static constexpr int kTileBytes = kKeys * Layout::kRowBytes, kStageBytes = 2 * kTileBytes;
  static constexpr int kRowTileBytes = kRows * Layout::kRowBytes;
  static constexpr int kTilesBytes = 2 * std::max(kStageBytes, kRowTileBytes);
  static constexpr int kHandOverBytes = kShare > 1 ? kWarps * kRowBlocks * 32 * 16 : 0;
  static constexpr int kHandOver = kTilesBytes, kStarts = kHandOver + 2 * kHandOverBytes;
  static constexpr int kLse = kStarts + kRows * 8, kSharedBytes = kLse + kRows * 4;
  static_assert(kRows <= kThreads, "a thread loads lse and delta of one query");
};

template <class S> using Sums = float[S::kRowBlocks][S::kOwnColumns][2][4];
template <class S> using Kept = uint32_t[S::kRowBlocks][S::kColumns][4];

// A warp's place and what it reads.
template <class S> struct Warp {
  int team, part;  // of the kShare warps of a team
  BlockAddress<S::kHeadDim, true, typename S::Layout> columns;  // of a tile of K or V, transposed
  BlockAddress<S::kHeadDim, false, typename S::Layout> rows;
  float c;  // scale * log2(e)

  __device__ Warp(uint32_t s_tiles, float scale)
      : team(__shfl_sync(kAllLanes, threadIdx.x / 32 % S::kTeams, 0)),
        part(__shfl_sync(kAllLanes, threadIdx.x / 32 / S::kTeams, 0)),
        columns(s_tiles),
        rows(s_tiles),
        c(scale * kLog2E) {}
};

// Adds the products of one tile of keys to the warp's sums. i0: the team's first query; j0: the
// tile's first key; stage: where the tile is.
template <class S, bool kMasked>
__device__ void add_tile(Sums<S>& sums, const Kept<S>& q, const Kept<S>& dout, const Warp<S>& w,
                         const Sequence& s, int i0, int j0, int stage, char* s_dynamic) {
  using T = typename S::T;
  const int lane = threadIdx.x % 32;
  const uint32_t k_at = stage * S::kStageBytes, v_at = k_at + S::kTileBytes;
  const uint32_t own_keys = w.part * 16 * S::Layout::kRowBytes;
  const char* s_starts = s_dynamic + S::kStarts + (w.team * S::kTeamRows / 2 + lane / 4) * 16;
  const char* s_lse = s_dynamic + S::kLse + (w.team * S::kTeamRows / 2 + lane / 4) * 8;
#pragma unroll 1  // unrolled, it asks for more registers than there are
  for (int step = 0; step < S::kSteps; step++) {
    const int j = j0 + step * S::kStepKeys;
    if constexpr (kMasked) {
      const bool some = j < s.S && j - min(i0 + S::kTeamRows, s.T) + 1 <= s.ahead &&
                        min(j + S::kStepKeys, s.S) - 1 - i0 >= -s.behind;
      if (!some) continue;
    }
    float p[S::kRowBlocks][2][4], ds[S::kRowBlocks][2][4], zero[4] = {};
#pragma unroll
    for (int d = 0; d < S::kColumns; d++) {
      uint32_t r_k[4];
      ptx::ldmatrix(r_k, w.columns.block(step * S::kStepKeys, d) + own_keys + k_at);
#pragma unroll
      for (int m = 0; m < S::kRowBlocks; m++) {
        mma<T>(p[m][0], q[m][d], r_k[0], r_k[1], d ? p[m][0] : zero);
        mma<T>(p[m][1], q[m][d], r_k[2], r_k[3], d ? p[m][1] : zero);
      }
    }
#pragma unroll
    for (int m = 0; m < S::kRowBlocks; m++) {
      const float2 lse = *reinterpret_cast<const float2*>(s_lse + m * 8 * 8);
#pragma unroll
      for (int n = 0; n < 2; n++)
        for (int e = 0; e < 4; e++)
          p[m][n][e] = ptx::ex2(fmaf(p[m][n][e], w.c, e / 2 ? lse.y : lse.x));
    }
#pragma unroll
    for (int d = 0; d < S::kColumns; d++) {
      uint32_t r_v[4];
      ptx::ldmatrix(r_v, w.columns.block(step * S::kStepKeys, d) + own_keys + v_at);
#pragma unroll
      for (int m = 0; m < S::kRowBlocks; m++) {
        float start[4];
        if (d == 0) {
          const float4 quad = *reinterpret_cast<const float4*>(s_starts + m * 8 * 16);
          start[0] = quad.x, start[1] = quad.y, start[2] = quad.z, start[3] = quad.w;
        }
        mma<T>(ds[m][0], dout[m][d], r_v[0], r_v[1], d ? ds[m][0] : start);
        mma<T>(ds[m][1], dout[m][d], r_v[2], r_v[3], d ? ds[m][1] : start);
      }
    }
    uint32_t r_ds[S::kShare][S::kRowBlocks][4];
#pragma unroll
    for (int m = 0; m < S::kRowBlocks; m++) {
#pragma unroll
      for (int n = 0; n < 2; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          ds[m][n][e] *= p[m][n][e];
          if constexpr (kMasked) {
            const int key = j + w.part * 16 + n * 8 + lane % 4 * 2 + e % 2;
            const int ahead = key - (i0 + m * 16 + e / 2 * 8 + lane / 4);
            if (ahead > s.ahead || ahead < -s.behind || key >= s.S) ds[m][n][e] = 0;
          }
        }
      to_operand<T>(r_ds[0][m], ds[m][0], ds[m][1]);
    }
    if constexpr (S::kShare > 1) {
      uint4* s_ds = reinterpret_cast<uint4*>(s_dynamic + S::kHandOver +
                                             step % 2 * S::kHandOverBytes) + lane;
      const int mine = w.part * S::kTeams + w.team, other = (1 - w.part) * S::kTeams + w.team;
#pragma unroll
      for (int m = 0; m < S::kRowBlocks; m++)
        s_ds[(mine * S::kRowBlocks + m) * 32] =
            make_uint4(r_ds[0][m][0], r_ds[0][m][1], r_ds[0][m][2], r_ds[0][m][3]);
      ptx::bar_sync(1 + w.team, 64);  // ds of both is there, and that of the last step but one read
#pragma unroll
      for (int m = 0; m < S::kRowBlocks; m++) {
        const uint4 quad = s_ds[(other * S::kRowBlocks + m) * 32];
        r_ds[1][m][0] = quad.x, r_ds[1][m][1] = quad.y;
        r_ds[1][m][2] = quad.z, r_ds[1][m][3] = quad.w;
      }
    }
    const uint32_t own_columns = w.part * S::kOwnColumns * 32;
#pragma unroll
    for (int of = 0; of < S::kShare; of++) {  // own keys, then the other warp's
      const uint32_t keys = (of ? 1 - w.part : w.part) * 16 * S::Layout::kRowBytes;
#pragma unroll
      for (int d = 0; d < S::kOwnColumns; d++) {
        uint32_t r_k[4];
        ptx::ldmatrix_trans(r_k, w.rows.block(step * S::kStepKeys, d) + keys + own_columns + k_at);
#pragma unroll
        for (int m = 0; m < S::kRowBlocks; m++) {
          mma<T>(sums[m][d][0], r_ds[of][m], r_k[0], r_k[1]);
          mma<T>(sums[m][d][1], r_ds[of][m], r_k[2], r_k[3]);
        }
      }
    }
  }
}

// dq = scale ds k of kRows queries of one head.
//
// Grid: as Grid says, queries that see most first. Block: kTeams teams of kShare warps, each with
// its own queries, and all tiles of keys that any of them sees. Dynamic shared memory: Shape.
// Preconditions: rows are aligned to 16 bytes, D % 8 == 0, D <= kHeadDim; delta.
//
// Loads in flight: the next tile of K and V, while this one is multiplied.
template <class S>
__global__ void __launch_bounds__(kThreads, S::kBlocks)
    attention_bwd_dq_kernel(const __grid_constant__ AttentionGrads g, Grid grid) {
  using T = typename S::T;
  extern __shared__ __align__(1024) char s_dynamic[];
  const Attention& a = g.a;
  const int H = int(a.H), D = int(a.D);
  const Grid::Place place = grid.place(blockIdx.x);
  const int h = place.head % H, kv = h / (H / int(a.Hkv));
  const Seat seat = seat_of(place, a.cu_q, a.B, a.T, S::kRows, H, grid.seats, true);
  const Sequence s(a, seat.b);
  const int i0 = seat.tile * S::kRows;
  if (i0 < 0 || i0 >= s.T) return;

  const uint32_t s_tiles = ptx::shared_address(s_dynamic);
  const Warp<S> w(s_tiles, float(a.scale));
  const int warp_i0 = i0 + w.team * S::kTeamRows;
  using Loader = TileLoader<T, S::kHeadDim, kThreads, typename S::Layout>;
  Kept<S> q, dout;
  {
    const Loader load_q(static_cast<const T*>(a.q) + s.q_at + h * a.q_stride[2], a.q_stride[1], D,
                        threadIdx.x);
    const Loader load_dout(static_cast<const T*>(g.dout) + dout_at(g, s, seat.b) +
                               h * g.dout_stride[2],
                           g.dout_stride[1], D, threadIdx.x);
    load_q.template zero_columns<S::kTilesBytes / S::Layout::kRowBytes>(s_tiles);
    load_q.template load<S::kRows>(s_tiles, i0, s.T);
    load_dout.template load<S::kRows>(s_tiles + S::kRowTileBytes, i0, s.T);
    ptx::cp_async_commit();
    if (threadIdx.x < S::kRows) {
      const int row = threadIdx.x, place = row / 16 * 8 + row % 8, half = row / 8 % 2;
      const bool exists = i0 + row < s.T;
      const int64_t at = s.lse_at + h * s.lse_stride + i0 + row;
      float* s_start = reinterpret_cast<float*>(s_dynamic + S::kStarts) + place * 4 + half * 2;
      s_start[0] = s_start[1] = exists ? -static_cast<const float*>(g.delta)[at] : 0;
      reinterpret_cast<float*>(s_dynamic + S::kLse)[place * 2 + half] =
          exists ? -static_cast<const float*>(g.lse)[at] * kLog2E : 0;
    }
    ptx::cp_async_wait<0>();
    __syncthreads();  // Q and dout are there
    const uint32_t mine = w.team * S::kTeamRows * S::Layout::kRowBytes;
#pragma unroll
    for (int m = 0; m < S::kRowBlocks; m++)
#pragma unroll
      for (int d = 0; d < S::kColumns; d++) {
        ptx::ldmatrix(q[m][d], w.rows.block(m * 16, d) + mine);
        ptx::ldmatrix(dout[m][d], w.rows.block(m * 16, d) + mine + S::kRowTileBytes);
      }
    __syncthreads();  // and read, so that K and V may take their place
  }

  const T* g_k = uniform(static_cast<const T*>(a.k) + s.k_at + kv * a.k_stride[2]);
  const T* g_v = uniform(static_cast<const T*>(a.v) + s.v_at + kv * a.v_stride[2]);
  const TileRange tiles = uniform(key_tiles<S::kKeys>(s, i0, min(i0 + S::kRows, s.T)));
  const auto prefetch = [&](int tile, int stage) {
    const int thread = ptx::thread_index();
    const Loader load_k(g_k, a.k_stride[1], D, thread);
    const Loader load_v(g_v, a.v_stride[1], D, thread);
    const uint32_t s_stage = s_tiles + stage * S::kStageBytes;
    load_k.template load<S::kKeys>(s_stage, tile * S::kKeys, s.S);
    load_v.template load<S::kKeys>(s_stage + S::kTileBytes, tile * S::kKeys, s.S);
    ptx::cp_async_commit();
  };
  Sums<S> sums = {};
  if (tiles.begin < tiles.end) prefetch(tiles.begin, 0);
  for (int tile = tiles.begin, stage = 0; tile < tiles.end; tile++, stage = 1 - stage) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this tile is there, and the one before is read
    if (tile + 1 < tiles.end) prefetch(tile + 1, 1 - stage);
    if (tile >= tiles.full_begin && tile < tiles.full_end)
      add_tile<S, false>(sums, q, dout, w, s, warp_i0, tile * S::kKeys, stage, s_dynamic);
    else
      add_tile<S, true>(sums, q, dout, w, s, warp_i0, tile * S::kKeys, stage, s_dynamic);
  }

  __syncthreads();  // the last tile is read, so that dq may take its place
#pragma unroll
  for (int m = 0; m < S::kRowBlocks; m++)
#pragma unroll
    for (int d = 0; d < S::kOwnColumns; d++)
      put_block<T, typename S::Layout>(s_dynamic, w.team * S::kTeamRows + m * 16,
                                w.part * S::kOwnColumns + d, sums[m][d], float(a.scale));
  __syncthreads();  // dq is there
  const int64_t stride = int64_t(H) * D;
  store_tile<T, typename S::Layout, S::kRows, kThreads>(
      static_cast<T*>(g.dq) + (s.q_row + i0) * stride + int64_t(h) * D, stride, s_dynamic, s.T - i0,
      D);
}

template <class S> Status launch(const AttentionGrads& g, cudaStream_t stream) {
  const Attention& a = g.a;
  Grid grid;
  const int64_t seats = tile_seats(a.cu_q, a.cu_q ? a.B : 1, a.T, S::kRows);
  const int64_t read = a.S / (a.cu_q ? a.B : 1) * a.Hkv * a.D * 4 / a.H;  // of a group's share
  if (make_grid(grid, (a.cu_q ? 1 : a.B) * a.H, seats, read) != kOk) return kUnsupported;
  const auto kernel = attention_bwd_dq_kernel<S>;
  // Of the current device, each time: a process may have several. A refusal shows at the launch.
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes);
  kernel<<<unsigned(grid.blocks()), kThreads, S::kSharedBytes, stream>>>(g, grid);
  return launch_status();
}

template <class T> Status launch_for(const AttentionGrads& g, cudaStream_t stream) {
  if (g.a.D <= 64) return launch<Shape<T, 64, 1, 2, 128, 1>>(g, stream);
  if (g.a.D <= 128) return launch<Shape<T, 128, 2, 2, 64, 1>>(g, stream);
  return launch<Shape<T, 256, 2, 1, 32, 1>>(g, stream);
}

}  // namespace

Status attention_bwd_dq(const AttentionGrads& g, cudaStream_t stream) {
  return g.a.dtype == kBFloat16 ? launch_for<bf16>(g, stream) : launch_for<f16>(g, stream);
}

}  // namespace lx
