// Attention forward without tensor cores: fp32 and fp64, and bf16 and fp16 that are not aligned as
// these need. Formulas in csrc/api.h; letters and what is seen in attention.cuh.
#include <cmath>

#include "attention.cuh"
#include "kernels.cuh"

namespace lx {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * 32;
constexpr int kWarpRows = 4, kRows = kWarps * kWarpRows;  // queries
constexpr int kKeys = 32;                                 // of a tile, one for each lane
constexpr int kPiece = 32;                                // columns of K in shared memory at once
constexpr int kLaneColumns = 4, kColumns = kLaneColumns * 32;  // of V and o
constexpr int64_t kMaxSharedBytes = 96 << 10;             // what GPUs from sm_80 on have

// o = softmax(scale * q k^T) v and lse, by online softmax over tiles of keys.
//
// Grid: x: a block for each head and kRows queries, in the order of place_of; y: a block for each
// kColumns columns of v, all of which compute the scores. Block: kWarps warps, each with kWarpRows
// queries; for scores a lane has a key, for o it has every 32nd column. Static shared memory: a
// piece of the tile of K; dynamic: kRows rows of Q, in fp32 (fp64), as long as kPieces pieces.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    attention_scalar_kernel(T* __restrict__ o,         // (B, T, H, D)
                            Acc<T>* __restrict__ lse,  // (B, H, T), packed (H, T)
                            const __grid_constant__ Attention a, int at_once, int seats) {
  using A = Acc<T>;
  extern __shared__ __align__(16) char s_dynamic[];
  __shared__ A s_k[kKeys][kPiece + 1];  // + 1: a column's rows are in different banks
  A* s_q = reinterpret_cast<A*>(s_dynamic);
  const Place place = place_of(a, kRows, at_once, seats);
  const Sequence s(a, place.b);
  const int h = place.h, i0 = place.i0, D = int(a.D), width = (D + kPiece - 1) / kPiece * kPiece;
  if (i0 < 0 || i0 >= s.T) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, kv = h / int(a.H / a.Hkv);
  const int column = blockIdx.y * kColumns + lane, warp_i0 = i0 + warp * kWarpRows;
  const T* q = static_cast<const T*>(a.q) + s.q_at + h * a.q_stride[2];
  const T* k = static_cast<const T*>(a.k) + s.k_at + kv * a.k_stride[2];
  const T* v = static_cast<const T*>(a.v) + s.v_at + kv * a.v_stride[2];
  for (int row = warp; row < kRows; row += kWarps)
    for (int d = lane; d < width; d += 32)
      s_q[row * width + d] =
          i0 + row < s.T && d < D ? to_acc(q[(i0 + row) * a.q_stride[1] + d]) : A(0);
  const A* s_rows = s_q + warp * kWarpRows * width;

  const A scale = A(a.scale), none = -A(INFINITY);
  A out[kWarpRows][kLaneColumns] = {}, top[kWarpRows];
  double sum[kWarpRows] = {};  // the backward makes every weight anew from lse: it is to be exact
  for (int r = 0; r < kWarpRows; r++) top[r] = none;

  const TileRange tiles = key_tiles<kKeys>(s, i0, min(i0 + kRows, s.T));
  for (int tile = tiles.begin; tile < tiles.end; tile++) {
    const int j0 = tile * kKeys, j = j0 + lane, keys = min(kKeys, s.S - j0);
    A score[kWarpRows] = {};
    for (int d0 = 0; d0 < width; d0 += kPiece) {
      __syncthreads();  // no warp reads the piece before any more
      for (int key = warp; key < kKeys; key += kWarps)
        s_k[key][lane] = key < keys && d0 + lane < D
                             ? to_acc(k[(j0 + key) * a.k_stride[1] + d0 + lane]) : A(0);
      __syncthreads();  // the piece is there, and Q
#pragma unroll 8
      for (int d = 0; d < kPiece; d++) {
        const A r_k = s_k[lane][d];
        for (int r = 0; r < kWarpRows; r++) score[r] += s_rows[r * width + d0 + d] * r_k;
      }
    }
    A weight[kWarpRows];
    for (int r = 0; r < kWarpRows; r++) {
      const int i = warp_i0 + r;
      const bool seen = j >= s.first_key(i) && j < s.end_key(i);
      score[r] = seen ? score[r] * scale : none;
      const A before = top[r];
      A most = score[r];
      for (int other = 16; other > 0; other /= 2)
        most = fmax(most, __shfl_xor_sync(kAllLanes, most, other));
      top[r] = fmax(before, most);
      const A shift = top[r] == none ? A(0) : top[r], factor = exp(before - shift);
      weight[r] = exp(score[r] - shift);
      sum[r] = sum[r] * factor + weight[r];
      for (int n = 0; n < kLaneColumns; n++) out[r][n] *= factor;
    }
    for (int key = 0; key < keys; key++) {
      A r_v[kLaneColumns];
      for (int n = 0; n < kLaneColumns; n++)
        r_v[n] = column + n * 32 < D ? to_acc(v[(j0 + key) * a.v_stride[1] + column + n * 32])
                                     : A(0);
      for (int r = 0; r < kWarpRows; r++) {
        const A p = __shfl_sync(kAllLanes, weight[r], key);
        for (int n = 0; n < kLaneColumns; n++) out[r][n] += p * r_v[n];
      }
    }
  }

  for (int r = 0; r < kWarpRows; r++) {
    const int i = warp_i0 + r;
    const double total = warp_sum(sum[r]);
    if (i >= s.T) continue;
    const A inverse = s.end_key(i) <= s.first_key(i) ? A(0) : A(1 / total);
    T* row = o + ((s.q_row + i) * a.H + h) * D;
    for (int n = 0; n < kLaneColumns; n++)
      if (column + n * 32 < D) row[column + n * 32] = round_to<T>(out[r][n] * inverse);
    if (lane == 0 && blockIdx.y == 0)
      lse[s.lse_at + h * s.lse_stride + i] =
          fabs(top[r]) == A(INFINITY) ? top[r] : A(top[r] + log(total));
  }
}

}  // namespace

Status attention_scalar(void* o, void* lse, const Attention& a, Stream stream) {
  return dispatch(a.dtype, [&](auto t) -> Status {
    using T = decltype(t);
    const Order order(a, kRows, sizeof(T));
    const int64_t bytes = kRows * ceil_div(a.D, kPiece) * kPiece * int64_t(sizeof(Acc<T>));
    if (order.too_large() || bytes > kMaxSharedBytes || a.D == 0) return kUnsupported;
    const dim3 grid(unsigned(order.heads * order.seats), unsigned(ceil_div(a.D, kColumns)));
    if (allow_shared_memory(attention_scalar_kernel<T>, int(bytes)))
      attention_scalar_kernel<T><<<grid, kThreads, size_t(bytes), cudaStream_t(stream)>>>(
          static_cast<T*>(o), static_cast<Acc<T>*>(lse), a, order.at_once, int(order.seats));
    return launch_status();
  });
}

}  // namespace lx
