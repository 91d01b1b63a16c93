// RMSNorm, with and without a residual added first. Formulas in csrc/api.h.
//
// D width of a row. v counts a row's vectors (16 bytes of x, or one element where alignment or an
// odd D forbids more), k the kKeep vectors a thread keeps in registers: thread t of the blockDim.x
// that share a row has the vectors t + k * blockDim.x. Rows too long for that (more than 64 KB
// forward, 32 KB backward; moved by single elements, more than 8192 and 4096) are not kept
// (kKeep = 0): they are read a second time, from L2.
#include <algorithm>

#include "kernels.cuh"
#include "launch.cuh"
#include "reduce.cuh"

namespace lx {
namespace {

constexpr int kMaxThreads = 1024;  // per block, so that ptxas gives each at most 64 registers

// Calls f(v, k) for the thread's vectors; k is 0 where they are not kept.
template <int kN, int kKeep, class F> __device__ void for_each_vec(int D, const F& f) {
  if constexpr (kKeep > 0) {
#pragma unroll
    for (int k = 0; k < kKeep; k++) {
      const int v = threadIdx.x + k * blockDim.x;
      if (v * kN < D) f(v, k);
    }
  } else {
    for (int v = threadIdx.x; v * kN < D; v += blockDim.x) f(v, 0);
  }
}

// h = x + residual; rstd = 1 / sqrt(mean(h^2) + eps); y = h * rstd * weight.
//
// Grid: ceil(rows / blockDim.y) blocks. Block: blockDim.x threads for a row; several rows
// (blockDim.y > 1) only where a warp is enough for each. Static shared memory: one number per warp.
// The backward needs h (x without a residual) and rstd.
//
// Loads in flight: at 64 registers an SM holds 1024 threads; each asks for kKeep = 4 vectors of 16
// bytes before it uses the first: 64 KB per SM of x, and as much of the residual (32 KB are needed
// to cover A100's memory latency). Of single elements kKeep = 8: 16 KB of bf16.
template <class T, class W, int kN, int kKeep>
__global__ void __launch_bounds__(kMaxThreads, 1)
    rmsnorm_fwd_kernel(T* __restrict__ y,               // (rows, D)
                       T* __restrict__ h,               // (rows, D), or null
                       Acc<T>* __restrict__ rstd,       // (rows)
                       const T* __restrict__ x,         // x_rows of D
                       Rows x_rows,
                       const T* __restrict__ residual,  // residual_rows of D, or null
                       Rows residual_rows,
                       const W* __restrict__ weight,    // (D)
                       int D, Acc<T> eps, int rows) {
  using A = Acc<T>;
  __shared__ A s_warps[32];
  const int i = blockIdx.x * blockDim.y + threadIdx.y;
  if (i >= rows) return;  // a whole warp that shares its row, and so its barrier, with no other
  x = row(x, x_rows, i);
  residual = residual ? row(residual, residual_rows, i) : nullptr;
  y += int64_t(i) * D;
  h += int64_t(i) * D;

  const auto add = [](Vec<T, kN>& a, const Vec<T, kN>& b) {
    for (int e = 0; e < kN; e++) a.at[e] = round_to<T>(to_acc(a.at[e]) + to_acc(b.at[e]));
  };
  A squares = 0;
  const auto add_squares = [&](const Vec<T, kN>& a) {
    for (int e = 0; e < kN; e++) squares += to_acc(a.at[e]) * to_acc(a.at[e]);
  };
  Vec<T, kN> r_h[kKeep + 1];
  if constexpr (kKeep > 0) {
    for_each_vec<kN, kKeep>(D, [&](int v, int k) { r_h[k] = load_once<kN>(x + v * kN); });
    if (residual) {
      Vec<T, kN> r_residual[kKeep];
      for_each_vec<kN, kKeep>(
          D, [&](int v, int k) { r_residual[k] = load_once<kN>(residual + v * kN); });
      for_each_vec<kN, kKeep>(D, [&](int v, int k) {
        add(r_h[k], r_residual[k]);
        store(h + v * kN, r_h[k]);
      });
    }
    for_each_vec<kN, kKeep>(D, [&](int, int k) { add_squares(r_h[k]); });
  } else {
    for_each_vec<kN, kKeep>(D, [&](int v, int k) {
      r_h[k] = load<kN>(x + v * kN);
      if (residual) {
        add(r_h[k], load<kN>(residual + v * kN));
        store(h + v * kN, r_h[k]);
      }
      add_squares(r_h[k]);
    });
  }

  const A scale = 1 / sqrt(group_sum(squares, s_warps) / D + eps);
  if (threadIdx.x == 0) rstd[i] = scale;
  for_each_vec<kN, kKeep>(D, [&](int v, int k) {
    if constexpr (kKeep == 0) {
      r_h[k] = load<kN>(x + v * kN);
      if (residual) add(r_h[k], load<kN>(residual + v * kN));
    }
    const Vec<W, kN> w = load<kN>(weight + v * kN);
    for (int e = 0; e < kN; e++)
      r_h[k].at[e] = round_to<T>(to_acc(r_h[k].at[e]) * scale * to_acc(w.at[e]));
    store(y + v * kN, r_h[k]);
  });
}

// A vector of kN values has its sums in kQuads pieces of up to 16 bytes. Sums lie as
// [kQuads][D / kN] pieces, in shared memory and in `partial`: neighbouring threads touch
// neighbouring pieces.
template <class T, int kN>
constexpr int kQuadsOf = kN * sizeof(Acc<T>) > 16 ? kN * sizeof(Acc<T>) / 16 : 1;

// Piece q of vector v's sums, of `vecs` vectors.
template <int kPiece, class A> __device__ Vec<A, kPiece>& piece(A* sums, int q, int v, int vecs) {
  return reinterpret_cast<Vec<A, kPiece>*>(sums)[q * vecs + v];
}

// dx = rstd * (dy * weight - h * rstd^2 * mean(dy * weight * h)) + dh, and this block's part of
// dweight = sum over rows of dy * h * rstd.
//
// Grid: rmsnorm_bwd_parts(rows) persistent blocks; block p has a contiguous share of the rows and
// writes partial[p]. Block: blockDim.y groups of blockDim.x threads; a group has every
// blockDim.y-th row of the block's and sums dweight in registers, in the order of its rows; at the
// end the groups' sums are added in the order of the groups. One group where rows are not kept:
// then partial[p] itself is the sum. Dynamic shared memory: D sums where there are several groups.
//
// Loads in flight: one block of up to 1024 threads per SM (64 registers); each asks for kKeep = 2
// vectors of dy and of h before it uses the first: 64 KB per SM at D = 4096 bf16. Groups wait for
// each other only at the end, so that some load while others compute. Of single elements kKeep = 4:
// 16 KB of bf16.
template <class T, class W, int kN, int kKeep>
__global__ void __launch_bounds__(kMaxThreads, 1)
    rmsnorm_bwd_kernel(T* __restrict__ dx,              // (rows, D)
                       Acc<T>* __restrict__ partial,    // (parts, D), or null
                       const T* __restrict__ dy,        // dy_rows of D
                       Rows dy_rows,
                       const T* __restrict__ dh,        // dh_rows of D, or null
                       Rows dh_rows,
                       const T* __restrict__ h,         // h_rows of D
                       Rows h_rows,
                       const W* __restrict__ weight,    // (D)
                       const Acc<T>* __restrict__ rstd, // (rows)
                       int D, int rows) {
  using A = Acc<T>;
  __shared__ A s_warps[2][kMaxGroups][32];
  extern __shared__ __align__(16) char s_dynamic[];
  const int begin = int64_t(rows) * blockIdx.x / gridDim.x;
  const int end = int64_t(rows) * (blockIdx.x + 1) / gridDim.x;
  constexpr int kQuads = kQuadsOf<T, kN>, kPiece = kN / kQuads;
  A* sums = partial + int64_t(blockIdx.x) * D;  // this block's
  const int vecs = D / kN;

  Vec<A, kN> r_dw[kKeep + 1] = {};
  int turn = 0;
  for (int i = begin + threadIdx.y; i < end; i += blockDim.y, turn ^= 1) {
    const T* dy_row = row(dy, dy_rows, i);
    const T* h_row = row(h, h_rows, i);
    const T* dh_row = dh ? row(dh, dh_rows, i) : nullptr;
    const A r = rstd[i];

    Vec<T, kN> r_dy[kKeep + 1], r_h[kKeep + 1];
    if constexpr (kKeep > 0)
      for_each_vec<kN, kKeep>(D, [&](int v, int k) {
        r_dy[k] = load_once<kN>(dy_row + v * kN);
        r_h[k] = load_once<kN>(h_row + v * kN);
      });
    A dot = 0;
    for_each_vec<kN, kKeep>(D, [&](int v, int k) {
      if constexpr (kKeep == 0) {
        r_dy[k] = load<kN>(dy_row + v * kN);
        r_h[k] = load<kN>(h_row + v * kN);
      }
      const Vec<W, kN> w = load<kN>(weight + v * kN);
      for (int e = 0; e < kN; e++)
        dot += to_acc(r_dy[k].at[e]) * to_acc(w.at[e]) * to_acc(r_h[k].at[e]);
    });
    const A scale = group_sum(dot, s_warps[turn][threadIdx.y]) / D * r * r;

    for_each_vec<kN, kKeep>(D, [&](int v, int k) {
      if constexpr (kKeep == 0) {
        r_dy[k] = load<kN>(dy_row + v * kN);
        r_h[k] = load<kN>(h_row + v * kN);
        r_dw[k] = {};
        if (partial && i > begin)
#pragma unroll
          for (int q = 0; q < kQuads; q++)
            reinterpret_cast<Vec<A, kPiece>*>(&r_dw[k])[q] = piece<kPiece>(sums, q, v, vecs);
      }
      const Vec<W, kN> w = load<kN>(weight + v * kN);
      Vec<T, kN> r_dh{};
      if (dh_row) r_dh = load_once<kN>(dh_row + v * kN);
      Vec<T, kN> r_dx;
      for (int e = 0; e < kN; e++) {
        const A g = to_acc(r_dy[k].at[e]), value = to_acc(r_h[k].at[e]);
        const A d = r * (g * to_acc(w.at[e]) - value * scale);
        r_dx.at[e] = round_to<T>(dh_row ? d + to_acc(r_dh.at[e]) : d);
        r_dw[k].at[e] += g * (value * r);
      }
      store(dx + int64_t(i) * D + v * kN, r_dx);
      if (kKeep == 0 && partial)
#pragma unroll
        for (int q = 0; q < kQuads; q++)
          piece<kPiece>(sums, q, v, vecs) = reinterpret_cast<Vec<A, kPiece>*>(&r_dw[k])[q];
    });
  }

  if constexpr (kKeep > 0) {
    if (!partial) return;
    auto* s_dw = reinterpret_cast<A*>(s_dynamic);
    const int last = int(blockDim.y) - 1;
    for (int group = 0; group <= last; group++) {
      if (threadIdx.y == group)
        for_each_vec<kN, kKeep>(D, [&](int v, int k) {
#pragma unroll
          for (int q = 0; q < kQuads; q++) {
            Vec<A, kPiece> sum = group ? piece<kPiece>(s_dw, q, v, vecs) : Vec<A, kPiece>{};
            for (int e = 0; e < kPiece; e++) sum.at[e] += r_dw[k].at[q * kPiece + e];
            if (group < last) piece<kPiece>(s_dw, q, v, vecs) = sum;
            else piece<kPiece>(sums, q, v, vecs) = sum;
          }
        });
      __syncthreads();  // the next group adds to what this one has stored
    }
  }
}

constexpr int kColumns = 32, kSlices = 8;

// dweight = sum over the parts of partial, in a fixed order: slice s has every kSlices-th part, and
// the slices are added in order. `quads` tells the element to which column j of partial belongs.
//
// Grid: ceil(D / kColumns) blocks. Block: kColumns x kSlices threads. Shared: one sum per thread.
template <class W, class A>
__global__ void __launch_bounds__(kColumns * kSlices)
    rmsnorm_bwd_dweight_kernel(W* __restrict__ dweight,        // (D)
                               const A* __restrict__ partial,  // (parts, D)
                               int parts, int D, int quads) {
  __shared__ A s_sums[kSlices][kColumns];
  const int j = blockIdx.x * kColumns + threadIdx.x;
  A sum = 0;
  if (j < D) {
#pragma unroll 4
    for (int p = threadIdx.y; p < parts; p += kSlices) sum += partial[int64_t(p) * D + j];
  }
  s_sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();  // the first slice reads the sums of all
  if (threadIdx.y > 0 || j >= D) return;
  for (int slice = 1; slice < kSlices; slice++) sum += s_sums[slice][threadIdx.x];
  constexpr int kPiece = 16 / sizeof(A);
  const int vecs = D / (quads * kPiece), piece = j / kPiece;
  const int element =
      quads == 1 ? j : (piece % vecs * quads + piece / vecs) * kPiece + j % kPiece;
  dweight[element] = round_to<W>(sum);
}

}  // namespace

Status rmsnorm_fwd(void* y, void* h, void* rstd, const void* x, Rows x_rows, const void* residual,
                   Rows residual_rows, const void* weight, int64_t D, double eps, DType dtype,
                   DType weight_dtype, Stream stream) {
  const int64_t rows = count(x_rows);
  if (rows > kMaxRows || D > kMaxWidth) return kUnsupported;
  return dispatch(dtype, weight_dtype, [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    constexpr int kVec = kVecSize<T>, kKeep = 4, kKeepSingles = 8;
    const auto launch = [&](auto kernel, int64_t vecs, int keep) {
      const int threads = row_threads(vecs, keep, kMaxThreads);
      const dim3 block(threads, threads == 32 ? 4 : 1);
      kernel<<<unsigned(ceil_div(rows, block.y)), block, 0, cudaStream_t(stream)>>>(
          static_cast<T*>(y), static_cast<T*>(h), static_cast<Acc<T>*>(rstd),
          static_cast<const T*>(x), x_rows, static_cast<const T*>(residual), residual_rows,
          static_cast<const W*>(weight), int(D), Acc<T>(eps), int(rows));
      return launch_status();
    };
    if (D % kVec || !aligned(y) || !aligned(h) || !aligned(weight) || !aligned<T>(x, x_rows) ||
        !aligned<T>(residual, residual_rows)) {
      if (D > kKeepSingles * kMaxThreads) return launch(rmsnorm_fwd_kernel<T, W, 1, 0>, D, 1);
      return launch(rmsnorm_fwd_kernel<T, W, 1, kKeepSingles>, D, kKeepSingles);
    }
    const int64_t vecs = D / kVec;
    if (vecs > kKeep * kMaxThreads) return launch(rmsnorm_fwd_kernel<T, W, kVec, 0>, vecs, 1);
    return launch(rmsnorm_fwd_kernel<T, W, kVec, kKeep>, vecs, kKeep);
  });
}

// One block for each SM of an A100, fewer when that leaves a block less than 4 rows. A function of
// the rows alone, so that sums come out the same on every GPU.
int64_t rmsnorm_bwd_parts(int64_t rows) { return std::min<int64_t>(ceil_div(rows, 4), 108); }

Status rmsnorm_bwd(void* dx, void* dweight, void* partial, const void* dy, Rows dy_rows,
                   const void* dh, Rows dh_rows, const void* h, Rows h_rows, const void* weight,
                   const void* rstd, int64_t D, DType dtype, DType weight_dtype, Stream stream) {
  const int64_t rows = count(h_rows), parts = rmsnorm_bwd_parts(rows);
  if (rows > kMaxRows || D > kMaxWidth) return kUnsupported;
  if (D == 0) return kOk;
  return dispatch(dtype, weight_dtype, [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    using A = Acc<T>;
    constexpr int kVec = kVecSize<T>, kKeep = 2, kKeepSingles = 4;
    const auto launch = [&](auto kernel, int64_t vecs, int keep) {  // keep 0: not kept
      const int threads = row_threads(vecs, std::max(keep, 1), kMaxThreads);
      const int groups = keep ? std::min(kMaxThreads / threads, kMaxGroups) : 1;
      const dim3 block(threads, groups);
      const size_t shared_bytes = groups > 1 ? D * sizeof(A) : 0;
      kernel<<<unsigned(parts), block, shared_bytes, cudaStream_t(stream)>>>(
          static_cast<T*>(dx), static_cast<A*>(dweight ? partial : nullptr),
          static_cast<const T*>(dy), dy_rows, static_cast<const T*>(dh), dh_rows,
          static_cast<const T*>(h), h_rows, static_cast<const W*>(weight),
          static_cast<const A*>(rstd), int(D), int(rows));
    };
    const int64_t vecs = D / kVec;
    int quads = kQuadsOf<T, kVec>;
    if (D % kVec || !aligned(dx) || !aligned(partial) || !aligned(weight) ||
        !aligned<T>(dy, dy_rows) || !aligned<T>(dh, dh_rows) || !aligned<T>(h, h_rows)) {
      quads = 1;
      if (D > kKeepSingles * kMaxThreads) launch(rmsnorm_bwd_kernel<T, W, 1, 0>, D, 0);
      else launch(rmsnorm_bwd_kernel<T, W, 1, kKeepSingles>, D, kKeepSingles);
    } else if (vecs > kKeep * kMaxThreads) {
      launch(rmsnorm_bwd_kernel<T, W, kVec, 0>, vecs, 0);
    } else {
      launch(rmsnorm_bwd_kernel<T, W, kVec, kKeep>, vecs, kKeep);
    }
    if (dweight)
      rmsnorm_bwd_dweight_kernel<W, A>
          <<<unsigned(ceil_div(D, kColumns)), dim3(kColumns, kSlices), 0, cudaStream_t(stream)>>>(
              static_cast<W*>(dweight), static_cast<const A*>(partial), int(parts), int(D),
              quads);
    return launch_status();
  });
}

}  // namespace lx
