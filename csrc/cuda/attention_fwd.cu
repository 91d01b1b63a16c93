// Attention forward on tensor cores, for bf16 and fp16. Formulas in csrc/api.h; letters and what is
// seen in attention.cuh.
#include <algorithm>
#include <cfloat>
#include <cmath>

#include "attention.cuh"
#include "kernels.cuh"

namespace lx {
namespace {

// What a kernel is compiled for. Each of kWarps warps has kRowBlocks x 16 queries, a tile kKeys
// keys; kKept of the head dim's blocks of 16 columns of Q stay in registers, the others are read
// from shared memory for every tile; kBlocks thread blocks are to fit an SM.
constexpr int64_t kMaxBlocks = 1 << 30;    // so that they are counted, and divided, as ints
constexpr int64_t kL2Bytes = 40ll << 20;  // of an A100

template <class T_, int kHeadDim_, int kRowBlocks_, int kWarps_, int kKeys_, int kKept_,
          int kBlocks_>
struct Shape {
  using T = T_;
  static constexpr int kHeadDim = kHeadDim_, kRowBlocks = kRowBlocks_, kWarps = kWarps_;
  static constexpr int kKeys = kKeys_, kKept = kKept_, kBlocks = kBlocks_;
  static constexpr int kWarpRows = kRowBlocks * 16, kRows = kWarps * kWarpRows;
  static constexpr int kThreads = kWarps * 32, kColumns = kHeadDim / 16, kKeyBlocks = kKeys / 16;
  static constexpr int kSharedBytes = (kRows + 2 * kKeys) * kHeadDim * 2;
  static_assert(kKept <= kColumns, "no more of Q is kept than there is");
};

// Weights are exp2(c * score - shift), c = |scale| * log2(e). Where that is more than 2^kSlack,
// shift rises to the row's largest score so far; until then a weight is at most 2^kSlack, which
// rounds as well as one below 1, and neither sums nor out are scaled again.
template <class T> constexpr float kSlack = std::is_same_v<T, f16> ? 12 : 40;

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

// scores = q k^T for one tile of keys.
template <class S>
__device__ void scores_of(Scores<S>& scores, const Kept<S>& kept,
                          const BlockAddress<S::kHeadDim, false>& q,
                          const BlockAddress<S::kHeadDim, true>& k) {
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
      ptx::ldmatrix(r_k, k.block(n * 16, d));
#pragma unroll
      for (int r = 0; r < S::kRowBlocks; r++) {
        auto& at = scores[r][n];
        mma<typename S::T>(at[0], r_q[r], r_k[0], r_k[1], d ? at[0] : zero);
        mma<typename S::T>(at[1], r_q[r], r_k[2], r_k[3], d ? at[1] : zero);
      }
    }
  }
}

// -inf for the keys that a query doesn't see. i0, j0: the warp's first query, the tile's first key.
template <class S>
__device__ void hide(Scores<S>& scores, const Sequence& s, int i0, int j0) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < S::kRowBlocks; r++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int i = i0 + r * 16 + half * 8 + lane / 4;
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

// Turns scores into weights and adds them to sum; shift rises, and what has been summed shrinks,
// where a weight would be too large.
template <class S>
__device__ void weights_of(Scores<S>& scores, WarpState<S>& w, float c) {
  float top[S::kRowBlocks][2];
  bool rises = false;
#pragma unroll
  for (int r = 0; r < S::kRowBlocks; r++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float& t = top[r][half];
      t = scores[r][0][0][half * 2];
#pragma unroll
      for (int n = 0; n < S::kKeyBlocks; n++)
        for (int e = 0; e < 4; e++) t = fmaxf(t, scores[r][n][e / 2][half * 2 + e % 2]);
      rises |= fmaf(t, c, -w.shift[r][half]) > kSlack<typename S::T>;
    }
  if (__any_sync(kAllLanes, rises)) {
#pragma unroll
    for (int r = 0; r < S::kRowBlocks; r++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float t = top[r][half];  // of the row, once the four lanes that share it have compared
        t = fmaxf(t, __shfl_xor_sync(kAllLanes, t, 1));
        t = fmaxf(t, __shfl_xor_sync(kAllLanes, t, 2));
        const float shift = fmaxf(w.shift[r][half], t * c);
        const float factor = ptx::ex2(w.shift[r][half] - shift);
        w.shift[r][half] = shift;
        w.sum[r][half] *= factor;
#pragma unroll
        for (int d = 0; d < S::kColumns; d++)
          for (int e = 0; e < 4; e++) w.out[r][d][e / 2][half * 2 + e % 2] *= factor;
      }
  }
#pragma unroll
  for (int n = 0; n < S::kKeyBlocks; n++)
#pragma unroll
    for (int r = 0; r < S::kRowBlocks; r++)
#pragma unroll
      for (int e = 0; e < 8; e++) {
        float& s = scores[r][n][e / 4][e % 4];
        s = ptx::ex2(fmaf(s, c, -w.shift[r][e % 4 / 2]));
        w.sum[r][e % 4 / 2] += s;
      }
}

// out += weights v for one tile of keys.
template <class S>
__device__ void add_values(WarpState<S>& w, const Scores<S>& weights,
                           const BlockAddress<S::kHeadDim, false>& v) {
#pragma unroll
  for (int n = 0; n < S::kKeyBlocks; n++) {
    uint32_t r_p[S::kRowBlocks][4];
#pragma unroll
    for (int r = 0; r < S::kRowBlocks; r++)
      to_operand<typename S::T>(r_p[r], weights[r][n][0], weights[r][n][1]);
#pragma unroll
    for (int d = 0; d < S::kColumns; d++) {
      uint32_t r_v[4];
      ptx::ldmatrix_trans(r_v, v.block(n * 16, d));
#pragma unroll
      for (int r = 0; r < S::kRowBlocks; r++) {
        mma<typename S::T>(w.out[r][d][0], r_p[r], r_v[0], r_v[1]);
        mma<typename S::T>(w.out[r][d][1], r_p[r], r_v[2], r_v[3]);
      }
    }
  }
}

// Writes o = out / sum through the warp's rows of shared memory, and lse. i0: the warp's first query.
template <class S>
__device__ void finish(typename S::T* o, float* lse, WarpState<S>& w, const Sequence& s, int i0,
                       char* s_rows, int64_t o_stride, int D) {
  using T = typename S::T;
  using Layout = Swizzle<S::kHeadDim>;
  const int lane = threadIdx.x % 32;
  __syncwarp();  // the rows' last readers were this warp's lanes
#pragma unroll
  for (int r = 0; r < S::kRowBlocks; r++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = r * 16 + half * 8 + lane / 4, i = i0 + row;
      float sum = w.sum[r][half];
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      const float inverse = s.end_key(i) <= s.first_key(i) ? 0 : 1 / sum;
      const float shift = w.shift[r][half];
      if (lane % 4 == 0 && i < s.T)
        lse[i] = shift == INFINITY ? shift : (shift + log2f(sum)) / kLog2E;
#pragma unroll
      for (int d = 0; d < S::kColumns; d++)
        for (int n = 0; n < 2; n++) {
          const float* at = &w.out[r][d][n][half * 2];
          *reinterpret_cast<uint32_t*>(s_rows + Layout::offset(row, d * 2 + n) + lane % 4 * 4) =
              pack<T>(at[0] * inverse, at[1] * inverse);
        }
    }
  __syncwarp();  // every lane's values are there
#pragma unroll
  for (int at = lane; at < S::kWarpRows * Layout::kPieces; at += 32) {
    const int row = at / Layout::kPieces, piece = at % Layout::kPieces;
    if (i0 + row < s.T && piece * 8 < D)
      *reinterpret_cast<uint4*>(o + (i0 + row) * o_stride + piece * 8) =
          *reinterpret_cast<const uint4*>(s_rows + Layout::offset(row, piece));
  }
}

// o = softmax(scale * q k^T) v and lse, by online softmax over tiles of keys.
//
// Grid: for every head a block for each kRows queries, those that see most first; all blocks of
// `at_once` heads before the next heads', so that their K and V stay in L2. Block: kWarps warps,
// each with its own queries and all tiles of keys. Dynamic shared memory: tiles of Q, K and V.
// Preconditions: q, k, v and their strides are aligned to 16 bytes, D % 8 == 0, D <= kHeadDim.
//
// Tiles that need a mask come first, each by the masked body of the loop; the others know none.
// Loads in flight: V of a tile while its scores are computed, K of the next while its values are
// added.
template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    attention_fwd_kernel(typename S::T* __restrict__ o,  // (B, T, H, D)
                         float* __restrict__ lse,        // (B, H, T), packed (H, T)
                         const __grid_constant__ Attention a, int at_once, int seats) {
  using T = typename S::T;
  extern __shared__ __align__(1024) char s_dynamic[];
  const int heads = a.cu_q ? int(a.H) : int(a.B * a.H);
  const unsigned group = blockIdx.x / unsigned(at_once * seats) * at_once;
  const unsigned in_group = blockIdx.x % unsigned(at_once * seats);
  const unsigned size = min(unsigned(at_once), heads - group);
  const int head = group + in_group % size, H = int(a.H), h = head % H, D = int(a.D);
  const Seat seat = a.cu_q ? seat_of(a.cu_q, int(a.B), int(a.T), S::kRows, in_group / size, true)
                           : Seat{head / H, seats - 1 - int(in_group / size)};
  const Sequence s(a, seat.b);
  const int i0 = seat.tile * S::kRows, warp_i0 = i0 + int(threadIdx.x) / 32 * S::kWarpRows;
  if (seat.tile < 0 || i0 >= s.T) return;

  const int kv = h / int(a.H / a.Hkv);
  const T* g_q = static_cast<const T*>(a.q) + s.q_at + h * a.q_stride[2];
  const T* g_k = static_cast<const T*>(a.k) + s.k_at + kv * a.k_stride[2];
  const T* g_v = static_cast<const T*>(a.v) + s.v_at + kv * a.v_stride[2];
  using Loader = TileLoader<T, S::kHeadDim, S::kThreads>;
  const Loader load_q(g_q, a.q_stride[1], D, threadIdx.x);
  const Loader load_k(g_k, a.k_stride[1], D, threadIdx.x);
  const Loader load_v(g_v, a.v_stride[1], D, threadIdx.x);
  const uint32_t s_q = ptx::shared_address(s_dynamic);
  const uint32_t s_k = s_q + S::kRows * S::kHeadDim * 2, s_v = s_k + S::kKeys * S::kHeadDim * 2;

  const TileRange tiles = uniform(key_tiles<S::kKeys>(s, i0, min(i0 + S::kRows, s.T)));
  // The tiles that need a mask, from the last down; the full ones between are left out.
  const auto masked_below = [&](int tile) {
    return tile == tiles.full_end ? tiles.full_begin - 1 : tile - 1;
  };
  const int first = masked_below(tiles.end);
  const auto prefetch_k = [&](int tile) {
    if (tile >= tiles.begin) load_k.template load<S::kKeys>(s_k, tile * S::kKeys, s.S);
    ptx::cp_async_commit();
  };
  load_q.template load<S::kRows>(s_q, i0, s.T);
  load_q.template zero_columns<S::kRows>(s_q);
  load_k.template zero_columns<S::kKeys>(s_k);
  load_v.template zero_columns<S::kKeys>(s_v);
  prefetch_k(first >= tiles.begin ? first : tiles.full_end - 1);
  ptx::cp_async_wait<0>();
  __syncthreads();  // Q is there
  if (a.scale < 0) {
    for (int at = threadIdx.x; at < S::kRows * S::kHeadDim / 2; at += S::kThreads)
      reinterpret_cast<uint32_t*>(s_dynamic)[at] ^= 0x80008000u;
    __syncthreads();  // it is -Q
  }
  const int warp_at = threadIdx.x / 32 * S::kWarpRows * S::kHeadDim * 2;
  const BlockAddress<S::kHeadDim, false> q(s_q + warp_at), v(s_v);
  const BlockAddress<S::kHeadDim, true> k(s_k);
  Kept<S> kept;
#pragma unroll
  for (int r = 0; r < S::kRowBlocks; r++)
#pragma unroll
    for (int d = 0; d < S::kKept; d++) ptx::ldmatrix(kept[r][d], q.block(r * 16, d));
  const float c = fmaxf(fabsf(float(a.scale)) * kLog2E, FLT_MIN);  // > 0: c * -inf is -inf

  WarpState<S> w;
  for (int tile = first; tile >= tiles.begin;) {
    const int j0 = tile * S::kKeys, next = masked_below(tile);
    const int last_i = min(warp_i0 + S::kWarpRows, s.T) - 1;
    const bool sees = warp_i0 <= last_i && s.first_key(warp_i0) < j0 + S::kKeys &&
                      s.end_key(last_i) > j0;
    Scores<S> scores;
    ptx::cp_async_wait<0>();
    __syncthreads();  // K is there, and no warp reads V any more
    load_v.template load<S::kKeys>(s_v, j0, s.S);
    ptx::cp_async_commit();
    if (sees) scores_of<S>(scores, kept, q, k);
    ptx::cp_async_wait<0>();
    __syncthreads();  // V is there, and no warp reads K any more
    prefetch_k(next >= tiles.begin ? next : tiles.full_end - 1);
    if (sees) {
      hide<S>(scores, s, warp_i0, j0);
      weights_of<S>(scores, w, c);
      add_values<S>(w, scores, v);
    }
    tile = next;
  }
  for (int tile = tiles.full_end - 1; tile >= tiles.full_begin; tile--) {
    Scores<S> scores;
    ptx::cp_async_wait<0>();
    __syncthreads();  // K is there, and no warp reads V any more
    load_v.template load<S::kKeys>(s_v, tile * S::kKeys);
    ptx::cp_async_commit();
    scores_of<S>(scores, kept, q, k);
    ptx::cp_async_wait<0>();
    __syncthreads();  // V is there, and no warp reads K any more
    if (tile > tiles.full_begin) load_k.template load<S::kKeys>(s_k, (tile - 1) * S::kKeys);
    ptx::cp_async_commit();
    weights_of<S>(scores, w, c);
    add_values<S>(w, scores, v);
  }
  finish<S>(o + ((s.q_row * H) + h) * D, lse + s.lse_at + h * s.lse_stride, w, s, warp_i0,
            s_dynamic + warp_at, int64_t(H) * D, D);
}

template <class S> Status launch(void* o, void* lse, const Attention& a, Stream stream) {
  const int64_t heads = a.cu_q ? a.H : a.B * a.H;
  const int64_t seats = tile_seats(a.cu_q, a.cu_q ? a.B : 1, a.T, S::kRows);
  if (heads * seats >= kMaxBlocks) return kUnsupported;
  // K and V of so many heads are at most half of an A100's L2.
  const int64_t bytes = a.S / (a.cu_q ? a.B : 1) * a.D * 2 * int64_t(sizeof(typename S::T));
  const int64_t at_once = std::clamp<int64_t>(kL2Bytes / 2 * (a.H / a.Hkv) / (bytes + 1), 1, heads);
  static const cudaError_t ready =
      cudaFuncSetAttribute(attention_fwd_kernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           S::kSharedBytes);
  if (ready == cudaSuccess)
    attention_fwd_kernel<S>
        <<<unsigned(heads * seats), S::kThreads, S::kSharedBytes, cudaStream_t(stream)>>>(
            static_cast<typename S::T*>(o), static_cast<float*>(lse), a, int(at_once),
            int(seats));
  return launch_status();
}

}  // namespace

Status attention_fwd(void* o, void* lse, const Attention* attention, Stream stream) {
  const Attention& a = *attention;
  if (a.T > kMaxTokens || a.S > kMaxTokens) return kUnsupported;
  return dispatch(a.dtype, [&](auto t) -> Status {
    using T = decltype(t);
    if constexpr (sizeof(T) == 2) {
      if (a.D <= 64) return launch<Shape<T, 64, 2, 4, 64, 4, 3>>(o, lse, a, stream);
      if (a.D <= 128) return launch<Shape<T, 128, 2, 4, 64, 2, 2>>(o, lse, a, stream);
      if (a.D <= 256) return launch<Shape<T, 256, 1, 4, 32, 0, 2>>(o, lse, a, stream);
    }
    return kUnsupported;
  });
}

}  // namespace lx
