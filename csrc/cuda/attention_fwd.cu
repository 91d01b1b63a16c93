// Attention forward on tensor cores, for bf16 and fp16. Formulas in csrc/api.h; letters and what is
// seen in attention.cuh.
#include <algorithm>

#include "attention_tile.cuh"
#include "kernels.cuh"

namespace lx {
namespace {

// What a block works on; in shared memory, so that the loop over full tiles, which doesn't need it,
// has the registers.
struct Work {
  Sequence s;
  TileRange tiles;
  const void *k, *v;  // of the first key
  int64_t k_stride, v_stride;
  int h, i0;         // head, first query
  int full, masked;  // how many tiles are seen whole, and in part
};

// Writes o = out / sum, through the warp's rows of Q in shared memory, and lse.
template <class S>
__device__ void finish(typename S::T* o, float* lse, const WarpState<S>& w, const Work& work,
                       char* s_rows, const Attention& a) {
  using T = typename S::T;
  using Layout = typename S::Layout;
  const Sequence& s = work.s;
  const int lane = threadIdx.x % 32, i0 = work.i0 + threadIdx.x / 32 * S::kWarpRows;
  const int D = int(a.D);
  const int64_t o_stride = a.H * D;
  o += s.q_row * o_stride + work.h * D;
  lse += s.lse_at + work.h * s.lse_stride;
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
        lse[i] = shift == INFINITY ? shift : (shift + log2f(sum)) * kLn2;
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
// Grid: a block for each head and kRows queries, in the order of place_of. Block: kWarps warps,
// each with its own queries and all tiles of keys. Dynamic shared memory: a tile of Q, two of K and
// of V.
// Preconditions: o and the rows of q, k, v are aligned to 16 bytes, D % 8 == 0, D <= kHeadDim.
//
// Tiles that need a mask have a loop of their own, those seen whole know none, those unseen are not
// touched. Loads in flight: the next tile's K and V while a tile is worked on.
template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks)
    attention_fwd_kernel(typename S::T* __restrict__ o,  // (B, T, H, D)
                         float* __restrict__ lse,        // (B, H, T), packed (H, T)
                         const __grid_constant__ Attention a, int at_once, int seats) {
  using T = typename S::T;
  extern __shared__ __align__(128) char s_dynamic[];
  const Place place = place_of(a, S::kRows, at_once, seats);
  const Sequence s(a, place.b);
  const int h = place.h, i0 = place.i0, D = int(a.D);
  if (i0 < 0 || i0 >= s.T) return;

  const TileRange tiles = uniform(key_tiles<S::kKeys>(s, i0, min(i0 + S::kRows, s.T)));
  const int kv = h / int(a.H / a.Hkv), full = tiles.full_end - tiles.full_begin;
  const Work work{s, tiles, static_cast<const T*>(a.k) + s.k_at + kv * a.k_stride[2],
                  static_cast<const T*>(a.v) + s.v_at + kv * a.v_stride[2],
                  a.k_stride[1], a.v_stride[1], h, i0, full, tiles.end - tiles.begin - full};
  __shared__ Work s_work;
  if (threadIdx.x == 0) s_work = work;
  const int warp_at = threadIdx.x / 32 * S::kWarpBytes;
  const uint32_t s_q = ptx::shared_address(s_dynamic), s_k = s_q + S::kWarps * S::kWarpBytes;
  const uint32_t s_v = s_k + 2 * S::kTileBytes;

  // First come the tiles that need a mask, from the last down, the full ones between left out; then
  // those. Two stages of shared memory take turns, so that the first full tile is in stage 0.
  const auto masked_tile = [&](const Work& w, int n) {
    const int tile = w.tiles.end - 1 - n;
    return tile >= w.tiles.full_end ? tile : tile - w.full;
  };
  // Copies K and V of a tile. Where they come from is computed each time: registers are scarce.
  using Loader = TileLoader<T, S::kHeadDim, S::kThreads, typename S::Layout>;
  const auto fetch = [&](const Work& w, int tile, int stage, bool whole) {
    const int thread = ptx::opaque(int(threadIdx.x)), first = tile * S::kKeys;
    const Loader k(static_cast<const T*>(w.k), w.k_stride, D, thread);
    const Loader v(static_cast<const T*>(w.v), w.v_stride, D, thread);
    const uint32_t s_to_k = s_k + stage * S::kTileBytes, s_to_v = s_v + stage * S::kTileBytes;
    if (whole) {
      k.template load<S::kKeys>(s_to_k, first);
      v.template load<S::kKeys>(s_to_v, first);
    } else {
      k.template load<S::kKeys>(s_to_k, first, w.s.S);
      v.template load<S::kKeys>(s_to_v, first, w.s.S);
    }
  };
  const auto prefetch = [&](const Work& w, int n) {  // tile n of all
    const int left = w.masked - n;  // masked ones
    if (left + w.full > 0)
      fetch(w, left > 0 ? masked_tile(w, n) : w.tiles.full_end - 1 + left, left & 1, false);
    ptx::cp_async_commit();
  };
  const Loader load_q(static_cast<const T*>(a.q) + s.q_at + h * a.q_stride[2], a.q_stride[1], D,
                      threadIdx.x);
  load_q.template load<S::kRows>(s_q, i0, s.T);
  load_q.template zero_columns<S::kRows + 4 * S::kKeys>(s_q);  // of all tiles: they lie in a row
  prefetch(work, 0);
  ptx::cp_async_wait<0>();
  __syncthreads();  // Q is there, and s_work
  if (a.scale < 0) {
    for (int at = threadIdx.x; at < S::kRows * S::kHeadDim / 2; at += S::kThreads) {
      const int row = at / (S::kHeadDim / 2), pair = at % (S::kHeadDim / 2);
      *reinterpret_cast<uint32_t*>(s_dynamic + row * S::Layout::kRowBytes + pair * 4) ^=
          0x80008000u;
    }
    __syncthreads();  // it is -Q
  }
  const typename S::BlockOfQ q(s_q + warp_at);
  const typename S::BlockOfK k(s_k);
  const typename S::BlockOfV v(s_v);
  Kept<S> kept;
#pragma unroll
  for (int r = 0; r < S::kRowBlocks; r++)
#pragma unroll
    for (int d = 0; d < S::kKept; d++) ptx::ldmatrix(kept[r][d], q.block(r * 16, d));
  const float c = fmaxf(fabsf(float(a.scale)) * kLog2E, FLT_MIN);  // > 0: c * -inf is -inf

  WarpState<S> w;
  for (int n = 0; n < s_work.masked; n++) {
    const int stage = (s_work.masked - n) & 1;
    ptx::cp_async_wait<0>();
    __syncthreads();  // the tile is there, and no warp reads the other stage any more
    prefetch(s_work, n + 1);
    const Sequence& s = s_work.s;
    const int j0 = masked_tile(s_work, n) * S::kKeys;
    const int first_i = s_work.i0 + threadIdx.x / 32 * S::kWarpRows;
    const int last_i = min(first_i + S::kWarpRows, s.T) - 1;
    if (first_i > last_i || s.first_key(first_i) >= j0 + S::kKeys || s.end_key(last_i) <= j0)
      continue;
    Scores<S> scores;
    scores_of<S>(scores, kept, q, k, stage * S::kTileBytes);
    hide<S>(scores, s, [&](int row) { return first_i + row; }, j0);
    raise_shift<S>(w, scores, c);
    float sums[S::kRowBlocks][2];
    weights_of<S>(scores, sums, w, c);
    add_sums<S>(w, sums);
    add_values<S>(w, scores, v, stage * S::kTileBytes);
  }
  // `left` full tiles are left, this one included.
  const auto full_tile = [&](int left, int stage) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // the tile is there, and no warp reads the other stage any more
    if (left > 1) fetch(s_work, s_work.tiles.full_begin + left - 2, 1 - stage, true);
    ptx::cp_async_commit();
    Scores<S> scores;
    scores_of<S>(scores, kept, q, k, stage * S::kTileBytes);
    float sums[S::kRowBlocks][2];
    weights_of<S>(scores, sums, w, c);
    bool too_large = false;
#pragma unroll
    for (int r = 0; r < S::kRowBlocks; r++)
      for (int half = 0; half < 2; half++) too_large |= sums[r][half] > kTooLarge<T>;
    if (__any_sync(kAllLanes, too_large)) {
      scores_of<S>(scores, kept, q, k, stage * S::kTileBytes);
      raise_shift<S>(w, scores, c);
      weights_of<S>(scores, sums, w, c);
    }
    add_sums<S>(w, sums);
    add_values<S>(w, scores, v, stage * S::kTileBytes);
  };
#pragma unroll 1
  for (int left = s_work.full; left > 0; left -= 2) {
    full_tile(left, 0);
    if (left == 1) break;
    full_tile(left - 1, 1);
  }
  finish<S>(o, lse, w, s_work, s_dynamic + warp_at, a);
}

template <class S> Status launch(void* o, void* lse, const Attention& a, Stream stream) {
  using T = typename S::T;
  const Order order(a, S::kRows, sizeof(T));
  if (order.too_large()) return kUnsupported;
  const unsigned blocks = unsigned(order.heads * order.seats);
  if (allow_shared_memory(attention_fwd_kernel<S>, S::kSharedBytes))
    attention_fwd_kernel<S><<<blocks, S::kThreads, S::kSharedBytes, cudaStream_t(stream)>>>(
        static_cast<T*>(o), static_cast<float*>(lse), a, order.at_once, int(order.seats));
  return launch_status();
}

// Whether the tensor-core kernels can read and write these.
bool fits_tensor_cores(const void* o, const Attention& a) {
  bool fits = a.D % 8 == 0 && a.D <= 256 && aligned(o);
  const auto check = [&](const void* p, const int64_t (&stride)[3], int64_t tokens, int64_t heads) {
    const int64_t size[3] = {a.cu_q ? 1 : a.B, tokens, heads};
    fits &= aligned(p);
    for (int i = 0; i < 3; i++) fits &= size[i] == 1 || stride[i] % 8 == 0;
  };
  check(a.q, a.q_stride, a.T, a.H);
  check(a.k, a.k_stride, a.S, a.Hkv);
  check(a.v, a.v_stride, a.S, a.Hkv);
  return fits;
}

}  // namespace

Status attention_fwd(void* o, void* lse, void* partial, const Attention* attention,
                     Stream stream) {
  const Attention& a = *attention;
  if (a.T > kMaxTokens || a.S > kMaxTokens || a.B > kMaxTokens) return kUnsupported;
  return dispatch(a.dtype, [&](auto t) -> Status {
    using T = decltype(t);
    if constexpr (sizeof(T) == 2) {
      if (fits_tensor_cores(o, a)) {
        if (attention_decodes(a)) return attention_decode(o, lse, partial, a, stream);
        if (a.D <= 64) return launch<Shape<T, 64, 2, 4, 64, 4, 2>>(o, lse, a, stream);
        if (a.D <= 128) return launch<Shape<T, 128, 2, 4, 32, 5, 2>>(o, lse, a, stream);
        return launch<Shape<T, 256, 1, 4, 16, 16, 2>>(o, lse, a, stream);
      }
    }
    return attention_scalar(o, lse, a, stream);
  });
}

}  // namespace lx
