// Attention backward by plain arithmetic: fp32 and fp64, and whatever the tensor-core kernels do
// not take (rows of 16-bit values that are not whole 16-byte vectors, D > 256). Formulas in
// csrc/api.h.
#include "attention_bwd.cuh"

namespace lx {
namespace {

constexpr int kTile = 64;            // queries, and keys, of a tile of scores
constexpr int kSide = 16;            // threads along each side of it
constexpr int kPer = kTile / kSide;  // rows and columns of it that a thread has
constexpr int kThreads = kSide * kSide;

template <class A> struct Sizes {
  static constexpr int kSlice = sizeof(A) == 8 ? 16 : 32;  // columns of D in shared memory at once
  static constexpr int kSlices = 4;                        // whose gradients a block has
  static constexpr int kColumns = kSlice * kSlices;
  static constexpr int kPerSlice = kSlice / kSide;
  static constexpr int kLd = kSlice + 1, kWeightLd = kTile + 1;  // odd: rows in different banks
  static constexpr int kBytes = (2 * kTile * kLd + 2 * kTile * kWeightLd) * int(sizeof(A));
};

// The rows of one head of one sequence.
template <class T> struct Matrix {
  const T* at;     // (rows, D)
  int64_t stride;
  int rows;
};

// A slice of a tile: rows [first, first + kTile), columns [d0, d0 + kSlice), zeros outside.
template <class T, class A = Acc<T>>
__device__ void load_slice(A* s_slice, const Matrix<T>& m, int first, int64_t d0, int64_t D) {
  using Z = Sizes<A>;
  for (int i = threadIdx.x; i < kTile * Z::kSlice; i += kThreads) {
    const int row = i / Z::kSlice, column = i % Z::kSlice;
    const bool exists = first + row < m.rows && d0 + column < D;
    s_slice[row * Z::kLd + column] =
        exists ? to_acc(m.at[(first + row) * m.stride + d0 + column]) : A(0);
  }
}

// sum over D of x[i0 + ty + 16 i] * y[j0 + tx + 16 j], each slice by itself first: shorter chains
// of additions are more exact.
template <class T, class A = Acc<T>>
__device__ void products(A (&r_sum)[kPer][kPer], const Matrix<T>& x, int i0, const Matrix<T>& y,
                         int j0, int64_t D, A* s_x, A* s_y) {
  using Z = Sizes<A>;
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  for (int i = 0; i < kPer; i++)
    for (int j = 0; j < kPer; j++) r_sum[i][j] = 0;
  for (int64_t d0 = 0; d0 < D; d0 += Z::kSlice) {
    __syncthreads();  // the slices of before are read
    load_slice(s_x, x, i0, d0, D);
    load_slice(s_y, y, j0, d0, D);
    __syncthreads();  // the new ones are there
    A r_slice[kPer][kPer] = {};
#pragma unroll 4
    for (int d = 0; d < Z::kSlice; d++) {
      A r_x[kPer], r_y[kPer];
      for (int i = 0; i < kPer; i++) r_x[i] = s_x[(ty + kSide * i) * Z::kLd + d];
      for (int j = 0; j < kPer; j++) r_y[j] = s_y[(tx + kSide * j) * Z::kLd + d];
      for (int i = 0; i < kPer; i++)
        for (int j = 0; j < kPer; j++) r_slice[i][j] += r_x[i] * r_y[j];
    }
    for (int i = 0; i < kPer; i++)
      for (int j = 0; j < kPer; j++) r_sum[i][j] += r_slice[i][j];
  }
}

template <class A> using Gradient = A[Sizes<A>::kSlices][kPer][Sizes<A>::kPerSlice];

// r_grad[row] += sum over the tile of weights[k][row] * m[first + k], in columns from `column` on.
// The tile is summed by itself first.
template <class T, class A = Acc<T>>
__device__ void accumulate(Gradient<A>& r_grad, const A* s_weights, const Matrix<T>& m, int first,
                           int64_t column, int64_t D, A* s_slice) {
  using Z = Sizes<A>;
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
#pragma unroll
  for (int slice = 0; slice < Z::kSlices; slice++) {
    const int64_t d0 = column + slice * Z::kSlice;
    if (d0 >= D) break;
    __syncthreads();  // the slice of before is read, and the weights are there
    load_slice(s_slice, m, first, d0, D);
    __syncthreads();  // the new one is there
    A r_sum[kPer][Z::kPerSlice] = {};
#pragma unroll 4
    for (int k = 0; k < kTile; k++) {
      A r_w[kPer], r_x[Z::kPerSlice];
      for (int i = 0; i < kPer; i++) r_w[i] = s_weights[k * Z::kWeightLd + ty + kSide * i];
      for (int j = 0; j < Z::kPerSlice; j++) r_x[j] = s_slice[k * Z::kLd + tx + kSide * j];
      for (int i = 0; i < kPer; i++)
        for (int j = 0; j < Z::kPerSlice; j++) r_sum[i][j] += r_w[i] * r_x[j];
    }
    for (int i = 0; i < kPer; i++)
      for (int j = 0; j < Z::kPerSlice; j++) r_grad[slice][i][j] += r_sum[i][j];
  }
}

// rows [first, first + kTile) of to (rows, D in `stride`) = r_grad * scale.
template <class T, class A = Acc<T>>
__device__ void store_gradient(T* to, int64_t stride, int rows, int first, int64_t column,
                               int64_t D, const Gradient<A>& r_grad, A scale) {
  using Z = Sizes<A>;
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
#pragma unroll
  for (int slice = 0; slice < Z::kSlices; slice++)
    for (int i = 0; i < kPer; i++)
      for (int j = 0; j < Z::kPerSlice; j++) {
        const int row = first + ty + kSide * i;
        const int64_t d = column + slice * Z::kSlice + tx + kSide * j;
        if (row < rows && d < D) to[row * stride + d] = round_to<T>(r_grad[slice][i][j] * scale);
      }
}

// What a head's tile of scores is made of.
template <class T> struct Head {
  Matrix<T> q, k, v, dout;
  const Acc<T>*lse, *delta;  // (T)

  __device__ Head(const AttentionGrads& g, const Sequence& s, int b, int h, int kv)
      : q{static_cast<const T*>(g.a.q) + s.q_at + h * g.a.q_stride[2], g.a.q_stride[1], s.T},
        k{static_cast<const T*>(g.a.k) + s.k_at + kv * g.a.k_stride[2], g.a.k_stride[1], s.S},
        v{static_cast<const T*>(g.a.v) + s.v_at + kv * g.a.v_stride[2], g.a.v_stride[1], s.S},
        dout{static_cast<const T*>(g.dout) + dout_at(g, s, b) + h * g.dout_stride[2],
             g.dout_stride[1], s.T},
        lse(static_cast<const Acc<T>*>(g.lse) + s.lse_at + h * s.lse_stride),
        delta(static_cast<const Acc<T>*>(g.delta) + s.lse_at + h * s.lse_stride) {}
};

// Of the tile of queries from i0 and keys from j0 on: p and ds, each [query][key], or [key][query]
// when kKeysFirst. s_p may be null.
template <bool kKeysFirst, class T, class A = Acc<T>>
__device__ void weights(A* s_p, A* s_ds, const Head<T>& head, const Sequence& s, int i0, int j0,
                        int64_t D, A scale, A* s_x, A* s_y) {
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  A r_p[kPer][kPer], r_ds[kPer][kPer];
  products(r_p, head.q, i0, head.k, j0, D, s_x, s_y);
  products(r_ds, head.dout, i0, head.v, j0, D, s_x, s_y);
  for (int i = 0; i < kPer; i++) {
    const int row = ty + kSide * i, query = i0 + row;
    const A lse = query < s.T ? head.lse[query] : A(0);
    const A delta = query < s.T ? head.delta[query] : A(0);
    for (int j = 0; j < kPer; j++) {
      const int column = tx + kSide * j, key = j0 + column;
      const bool seen = query < s.T && key < s.S && key - query <= s.ahead &&
                        query - key <= s.behind;
      const A p = seen ? exp(r_p[i][j] * scale - lse) : A(0);
      const A ds = seen ? p * (r_ds[i][j] - delta) : A(0);
      const int at = kKeysFirst ? column * Sizes<A>::kWeightLd + row
                                : row * Sizes<A>::kWeightLd + column;
      if (s_p) s_p[at] = p;
      s_ds[at] = ds;
    }
  }
}

// dk = scale ds^T q and dv = p^T dout of 64 keys (kForKeys), or dq = scale ds k of 64 queries; of
// kColumns columns, for which the whole scores are made.
//
// Grid: seats x heads (key/value heads for kForKeys) x column blocks, the last fastest. Block: 16 x
// 16 threads. Dynamic shared memory: Sizes::kBytes: two slices of 64 rows and two tiles of weights.
template <class T, bool kForKeys>
__global__ void __launch_bounds__(kThreads)
    attention_bwd_scalar_kernel(AttentionGrads g, int column_blocks) {
  using A = Acc<T>;
  using Z = Sizes<A>;
  extern __shared__ __align__(16) char s_dynamic[];
  A* s_x = reinterpret_cast<A*>(s_dynamic);
  A* s_y = s_x + kTile * Z::kLd;
  A* s_p = s_y + kTile * Z::kLd;
  A* s_ds = s_p + kTile * Z::kWeightLd;

  const Attention& a = g.a;
  const int heads = int(kForKeys ? a.Hkv : a.H), group = int(a.H / a.Hkv);
  const int64_t column = int64_t(blockIdx.x % column_blocks) * Z::kColumns;
  const unsigned place = blockIdx.x / column_blocks;
  const int head = int(place % heads);
  const Seat seat = seat_of(kForKeys ? a.cu_k : a.cu_q, int(a.B), int(kForKeys ? a.S : a.T), kTile,
                            int(place / heads), !kForKeys);
  const Sequence s(a, seat.b);
  const int first = seat.tile * kTile;
  if (first < 0 || first >= (kForKeys ? s.S : s.T)) return;
  const int64_t D = a.D;
  const A scale = A(a.scale);

  if constexpr (kForKeys) {
    Gradient<A> r_dk = {}, r_dv = {};
    const TileRange tiles = query_tiles<kTile>(s, first, min(first + kTile, s.S));
    for (int h = head * group; h < (head + 1) * group; h++) {
      const Head<T> of(g, s, seat.b, h, head);
      for (int tile = tiles.begin; tile < tiles.end; tile++) {
        const int i0 = tile * kTile;
        weights<false>(s_p, s_ds, of, s, i0, first, D, scale, s_x, s_y);
        accumulate(r_dv, s_p, of.dout, i0, column, D, s_x);
        accumulate(r_dk, s_ds, of.q, i0, column, D, s_y);
      }
    }
    const int64_t at = (s.k_row * heads + head) * D, stride = heads * D;
    store_gradient(static_cast<T*>(g.dk) + at, stride, s.S, first, column, D, r_dk, scale);
    store_gradient(static_cast<T*>(g.dv) + at, stride, s.S, first, column, D, r_dv, A(1));
  } else {
    Gradient<A> r_dq = {};
    const TileRange tiles = key_tiles<kTile>(s, first, min(first + kTile, s.T));
    const Head<T> of(g, s, seat.b, head, head / group);
    for (int tile = tiles.begin; tile < tiles.end; tile++) {
      const int j0 = tile * kTile;
      weights<true>(static_cast<A*>(nullptr), s_ds, of, s, first, j0, D, scale, s_x, s_y);
      accumulate(r_dq, s_ds, of.k, j0, column, D, s_x);
    }
    const int64_t at = (s.q_row * heads + head) * D, stride = heads * D;
    store_gradient(static_cast<T*>(g.dq) + at, stride, s.T, first, column, D, r_dq, scale);
  }
}

template <class T, bool kForKeys>
Status launch(const AttentionGrads& g, cudaStream_t stream) {
  using Z = Sizes<Acc<T>>;
  const Attention& a = g.a;
  const int64_t column_blocks = ceil_div(a.D, Z::kColumns);
  const int64_t seats = kForKeys ? tile_seats(a.cu_k, a.B, a.S, kTile)
                                 : tile_seats(a.cu_q, a.B, a.T, kTile);
  const int64_t blocks = seats * (kForKeys ? a.Hkv : a.H) * column_blocks;
  if (blocks > kMaxBlocks) return kUnsupported;
  const auto kernel = attention_bwd_scalar_kernel<T, kForKeys>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Z::kBytes);
  kernel<<<unsigned(blocks), kThreads, Z::kBytes, stream>>>(g, int(column_blocks));
  return launch_status();
}

}  // namespace

Status attention_bwd_scalar(const AttentionGrads& g, cudaStream_t stream) {
  return dispatch(g.a.dtype, [&](auto t) {
    using T = decltype(t);
    const Status status = launch<T, true>(g, stream);
    return status == kOk ? launch<T, false>(g, stream) : status;
  });
}

}  // namespace lx
