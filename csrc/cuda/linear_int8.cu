// Products with int8 weights. Formula in csrc/api.h.
//
// M rows of x, N outputs (rows of w), K the sum's length. bf16 and fp16 whose rows and weights lie
// at multiples of 16 bytes go through the tensor cores, 16 weight rows by 8 rows of x at a time:
// weights become T in registers, exactly. Everything else goes element by element.
#include <algorithm>

#include "attention.cuh"
#include "kernels.cuh"
#include "reduce.cuh"

namespace lx {
namespace {

// int8 at byte `at` of the word whose signs are flipped: the byte b + 128 in the low bits of
// 2^23 is the number 2^23 + 128 + b.
template <int at> __device__ float number(uint32_t flipped) {
  return __uint_as_float(__byte_perm(flipped, 0x4b000000, 0x7440 + at)) - 8388736.f;
}

// Four int8 as two packed pairs of T.
template <class T> __device__ void widen(uint32_t& low, uint32_t& high, uint32_t word) {
  const uint32_t flipped = word ^ 0x80808080u;
  low = pack<T>(number<0>(flipped), number<1>(flipped));
  high = pack<T>(number<2>(flipped), number<3>(flipped));
}

constexpr int kDepth = 64;  // of K that a warp works on at once: 16 for each of 4 lanes

// y[m][n] = scale[n] * sum over k of x[m][k] * w[n][k].
//
// An mma multiplies A (16 rows of w) and B (8 rows of x). Along K it takes any order as long as
// both have the same: lane l has the 16 neighbouring k from 16 (l % 4) of every 64, so that a load
// brings 16 bytes of w for four mma, and two of x as many.
//
// Grid: for each 8 kColumns rows of x a block for each kRows rows of w. Block: kSplit warps that
// share the rows, each with every kSplit-th stretch of 64 k, times kBeside warps with rows of w of
// their own, kTall blocks of 16 each. The warps' sums are added through shared memory, in the order
// of the warps. Static shared memory: the sums of 8 rows of x.
// Preconditions: K, w_stride and w multiples of 16; x and its rows at multiples of 16 bytes.
//
// Loads in flight: kUnroll stretches of w.
template <int kTall, int kColumns, int kSplit, int kBeside, class T>
__global__ void __launch_bounds__(32 * kSplit * kBeside)
    linear_int8_mma_kernel(T* __restrict__ y,                // (M, N)
                           const T* __restrict__ x,          // x_rows of K
                           Rows x_rows,
                           const int8_t* __restrict__ w,     // (N, K), its rows w_stride apart
                           int64_t w_stride,
                           const float* __restrict__ scale,  // (N)
                           int M, int N, int K) {
  constexpr int kWarpRows = 16 * kTall, kRows = kWarpRows * kBeside;
  constexpr int kThreads = 32 * kSplit * kBeside;
  constexpr int kUnroll = kColumns == 1 ? 4 : kColumns == 4 ? 2 : 1;
  __shared__ float s_sums[kSplit][8][kRows + 4];  // + 4 spreads rows over banks
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int split = threadIdx.x / 32 % kSplit, beside = threadIdx.x / 32 / kSplit;
  const int across = (N + kRows - 1) / kRows;
  const int n0 = blockIdx.x % across * kRows, m0 = blockIdx.x / across * 8 * kColumns;

  const int8_t* g_w[kTall][2];  // rows g and g + 8 of each 16; the last where there are fewer
  for (int i = 0; i < kTall; i++)
    for (int half = 0; half < 2; half++) {
      const int n = min(n0 + beside * kWarpRows + i * 16 + half * 8 + g, N - 1);
      g_w[i][half] = w + n * w_stride;
    }
  const T* g_x[kColumns];
  bool wanted[kColumns];
  for (int c = 0; c < kColumns; c++) {
    wanted[c] = m0 + c * 8 + g < M;
    g_x[c] = row(x, x_rows, wanted[c] ? m0 + c * 8 + g : 0);
  }

  float sums[kTall][kColumns][4] = {};
  for (int k0 = split * kDepth; k0 < K; k0 += kSplit * kDepth * kUnroll) {
    uint4 r_w[kUnroll][kTall][2];
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      const int k = k0 + u * kSplit * kDepth + 16 * t, from = k < K ? k : 0;  // x is 0 beyond K
#pragma unroll
      for (int i = 0; i < kTall; i++)
#pragma unroll
        for (int half = 0; half < 2; half++)
          r_w[u][i][half] = ptx::ld_global_nc_no_allocate(g_w[i][half] + from);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; u++) {
      const int k = k0 + u * kSplit * kDepth + 16 * t;
      uint32_t a[4][kTall][4];  // of the four mma
#pragma unroll
      for (int i = 0; i < kTall; i++) {
        const uint32_t top[4] = {r_w[u][i][0].x, r_w[u][i][0].y, r_w[u][i][0].z, r_w[u][i][0].w};
        const uint32_t low[4] = {r_w[u][i][1].x, r_w[u][i][1].y, r_w[u][i][1].z, r_w[u][i][1].w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
          widen<T>(a[j][i][0], a[j][i][2], top[j]);
          widen<T>(a[j][i][1], a[j][i][3], low[j]);
        }
      }
#pragma unroll
      for (int c = 0; c < kColumns; c++) {
        uint4 b[2] = {};
        if (wanted[c] && k < K) {
          b[0] = *reinterpret_cast<const uint4*>(g_x[c] + k);
          b[1] = *reinterpret_cast<const uint4*>(g_x[c] + k + 8);
        }
#pragma unroll
        for (int i = 0; i < kTall; i++) {
          mma<T>(sums[i][c], a[0][i], b[0].x, b[0].y);
          mma<T>(sums[i][c], a[1][i], b[0].z, b[0].w);
          mma<T>(sums[i][c], a[2][i], b[1].x, b[1].y);
          mma<T>(sums[i][c], a[3][i], b[1].z, b[1].w);
        }
      }
    }
  }

#pragma unroll
  for (int c = 0; c < kColumns; c++) {
    if (c > 0) __syncthreads();  // the sums of the columns before are stored
#pragma unroll
    for (int i = 0; i < kTall; i++)
      for (int e = 0; e < 4; e++)
        s_sums[split][2 * t + e % 2][beside * kWarpRows + i * 16 + e / 2 * 8 + g] = sums[i][c][e];
    __syncthreads();  // every warp's sums are there
    for (int at = threadIdx.x; at < 8 * kRows; at += kThreads) {
      const int m = m0 + c * 8 + at / kRows, n = n0 + at % kRows;
      if (m >= M || n >= N) continue;
      float sum = 0;
      for (int s = 0; s < kSplit; s++) sum += s_sums[s][at / kRows][at % kRows];
      y[int64_t(m) * N + n] = round_to<T>(sum * scale[n]);
    }
  }
}

constexpr int kWarps = 8, kScalarRows = 4;

// The same, of any dtype and layout: a warp for each output and kScalarRows rows of x, its lanes
// along K, kN weights at a time.
//
// Grid: for each kScalarRows rows of x a block for each kWarps outputs. Block: 32 x kWarps threads.
// Preconditions of kN > 1: K, w_stride and w multiples of kN, x and its rows at multiples of 16
// bytes.
template <int kN, class T>
__global__ void __launch_bounds__(32 * kWarps)
    linear_int8_scalar_kernel(T* __restrict__ y,                // (M, N)
                              const T* __restrict__ x,          // x_rows of K
                              Rows x_rows,
                              const int8_t* __restrict__ w,     // (N, K), its rows w_stride apart
                              int64_t w_stride,
                              const float* __restrict__ scale,  // (N)
                              int M, int N, int K) {
  using A = Acc<T>;
  const int across = (N + kWarps - 1) / kWarps;
  const int n = blockIdx.x % across * kWarps + threadIdx.y, m0 = blockIdx.x / across * kScalarRows;
  if (n >= N) return;  // a whole warp
  w += n * w_stride;
  const T* g_x[kScalarRows];  // the last where there are fewer
  for (int r = 0; r < kScalarRows; r++) g_x[r] = row(x, x_rows, min(m0 + r, M - 1));
  A sums[kScalarRows] = {};
#pragma unroll 2
  for (int k = threadIdx.x * kN; k < K; k += 32 * kN) {
    const Vec<int8_t, kN> r_w = load_once<kN>(w + k);
    for (int r = 0; r < kScalarRows; r++) {
      const Vec<T, kN> r_x = load<kN>(g_x[r] + k);
      for (int e = 0; e < kN; e++) sums[r] += A(r_w.at[e]) * to_acc(r_x.at[e]);
    }
  }
  for (int r = 0; r < kScalarRows; r++) {
    const A sum = warp_sum(sums[r]);
    if (threadIdx.x == 0 && m0 + r < M) y[int64_t(m0 + r) * N + n] = round_to<T>(sum * A(scale[n]));
  }
}

}  // namespace

Status linear_int8(void* y, const void* x, Rows x_rows, const int8_t* w, int64_t w_stride,
                   const float* scale, int64_t N, int64_t K, DType dtype, Stream stream) {
  const int64_t M = count(x_rows);
  if (M > kMaxRows || N > kMaxWidth || K > kMaxWidth) return kUnsupported;
  return dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    const auto launch = [&](auto kernel, dim3 block, int rows, int columns) {
      const int64_t blocks = ceil_div(M, columns) * ceil_div(N, rows);
      if (blocks > INT32_MAX) return kUnsupported;
      kernel<<<unsigned(blocks), block, 0, cudaStream_t(stream)>>>(
          static_cast<T*>(y), static_cast<const T*>(x), x_rows, w, w_stride, scale, int(M), int(N),
          int(K));
      return launch_status();
    };
    const bool vectors = K % 16 == 0 && w_stride % 16 == 0 && aligned(w) && aligned<T>(x, x_rows);
    if constexpr (sizeof(T) == 2) {
      if (vectors && M <= 8) return launch(linear_int8_mma_kernel<1, 1, 8, 1, T>, 256, 16, 8);
      if (vectors && M <= 32) return launch(linear_int8_mma_kernel<1, 4, 4, 1, T>, 128, 16, 32);
      if (vectors) return launch(linear_int8_mma_kernel<2, 8, 1, 4, T>, 128, 128, 64);
    } else if (vectors) {
      return launch(linear_int8_scalar_kernel<16 / sizeof(T), T>, dim3(32, kWarps), kWarps,
                    kScalarRows);
    }
    return launch(linear_int8_scalar_kernel<1, T>, dim3(32, kWarps), kWarps, kScalarRows);
  });
}

}  // namespace lx
