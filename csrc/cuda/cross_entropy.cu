// Cross-entropy of rows of logits. Formulas in csrc/api.h.
//
// V width of a row. The forward reads a row once: each thread keeps the largest logit it has seen
// and the sum of exponentials relative to it, and the threads' pairs are joined at the end, in a
// fixed order. Rows whose target is ignore_index are not read.
//
// A vector is 16 bytes. With an odd V rows begin anywhere: the elements before a row's first whole
// vector and after its last ("the rest") are moved one by one.
#include <algorithm>

#include "kernels.cuh"
#include "launch.cuh"
#include "reduce.cuh"

namespace lx {
namespace {

constexpr int kThreads = 256;    // per block
// So that ptxas gives each thread at most 64 registers, 128 in fp64.
template <class T> constexpr int kBlocksPerSM = sizeof(T) == 8 ? 2 : 4;

template <class A> constexpr A kInf = A(INFINITY);

__device__ inline float largest(float a, float b) { return fmaxf(a, b); }
__device__ inline double largest(double a, double b) { return fmax(a, b); }

// e^x with a relative error of |x| 2^-24 and a few units in the last place.
__device__ inline float exp_quick(float x) { return ptx::ex2(x * 1.44269504f); }
__device__ inline double exp_quick(double x) { return exp(x); }

// The vectors of kN elements in a row of V at p, and the rest around them.
template <int kN> struct Split {
  int before, vecs, V;
  template <class T> __device__ Split(const T* p, int V) : V(V) {
    const int past = kN == 1 ? 0 : int(reinterpret_cast<uintptr_t>(p) / sizeof(T) % kN);
    before = (kN - past) % kN;  // or more than V: then all is rest
    vecs = V < before ? 0 : (V - before) / kN;
  }
  __device__ int vec(int v) const { return before + v * kN; }  // where vector v begins
  __device__ int rest() const { return V - vecs * kN; }        // fewer than 2 kN
  __device__ int single(int n) const { return n < before ? n : n + vecs * kN; }
};

// log(sum(exp(z))) of numbers as they come: max is the largest, sum that of exp(z - shift()).
template <class A> struct LogSumExp {
  A max = -kInf<A>, sum = 0;

  // inf - inf would be NaN where the result is infinite.
  __device__ A shift() const { return max > -kInf<A> && max < kInf<A> ? max : A(0); }
  __device__ void raise_max(A value) {
    const A before = max, shift_before = shift();
    max = largest(max, value);
    if (before > -kInf<A>) sum *= exp_quick(shift_before - shift());  // else 0, or NaN if one came
  }
  __device__ void add(A value) {
    raise_max(value);
    sum += exp_quick(value - shift());
  }
  __device__ void join(const LogSumExp& other) {
    LogSumExp o = other;
    o.raise_max(max);
    raise_max(o.max);
    sum += o.sum;
  }
  __device__ A log() const { return shift() + ::log(sum); }
};

template <class A> __device__ LogSumExp<A> from_lane(const LogSumExp<A>& l, int other) {
  LogSumExp<A> o;
  o.max = __shfl_xor_sync(kAllLanes, l.max, other);
  o.sum = __shfl_xor_sync(kAllLanes, l.sum, other);
  return o;
}

// lse = log(sum(exp(logits))), loss = lse - (1 - s) logits[target] - s mean(logits) + z_loss lse^2.
//
// Grid: ceil(rows / blockDim.y) blocks. Block: blockDim.x threads for a row; several rows
// (blockDim.y > 1) only where a warp is enough for each. Static shared memory: a pair and a sum per
// warp. kSmooth: whether s, label_smoothing, is not 0: summing the logits costs an addition each.
//
// Loads in flight: 1024 threads an SM (64 registers), each of which asks for kBatch = 4 vectors of
// 16 bytes before it uses the first: 64 KB per SM.
template <class T, bool kSmooth>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM<T>)
    cross_entropy_fwd_kernel(Acc<T>* __restrict__ loss,      // (rows)
                             Acc<T>* __restrict__ lse,       // (rows)
                             const T* __restrict__ logits,   // logits_rows of V
                             Rows logits_rows,
                             const int64_t* __restrict__ target,  // (rows)
                             int V, int64_t ignore_index, Acc<T> label_smoothing, Acc<T> z_loss,
                             int rows) {
  using A = Acc<T>;
  constexpr int kN = kVecSize<T>, kBatch = 4;
  __shared__ LogSumExp<A> s_pairs[kThreads / 32];
  __shared__ A s_sums[kThreads / 32];
  const int i = blockIdx.x * blockDim.y + threadIdx.y;
  if (i >= rows) return;  // a whole warp that shares its row with no other
  const int64_t column = target[i];
  if (column == ignore_index) {  // so for all threads of the row
    if (threadIdx.x == 0) loss[i] = lse[i] = 0;
    return;
  }
  logits = row(logits, logits_rows, i);

  LogSumExp<A> total;
  A sum = 0;  // of the logits, where kSmooth
  const Split<kN> split(logits, V);
  for (int n = threadIdx.x; n < split.rest(); n += blockDim.x) {
    const A value = to_acc(logits[split.single(n)]);
    total.add(value);
    if (kSmooth) sum += value;
  }
  for (int first = threadIdx.x; first < split.vecs; first += kBatch * blockDim.x) {
    Vec<T, kN> r_z[kBatch];
    A top = -kInf<A>;
#pragma unroll
    for (int k = 0; k < kBatch; k++) {
      const int v = first + k * blockDim.x;
      if (v < split.vecs) r_z[k] = load_once<kN>(logits + split.vec(v));
      else
        for (int e = 0; e < kN; e++) r_z[k].at[e] = round_to<T>(-kInf<A>);
    }
    for (int k = 0; k < kBatch; k++)
      for (int e = 0; e < kN; e++) top = largest(top, to_acc(r_z[k].at[e]));
    total.raise_max(top);
    const A shift = total.shift();
    for (int k = 0; k < kBatch; k++) {
      A part = 0;
      for (int e = 0; e < kN; e++) part += exp_quick(to_acc(r_z[k].at[e]) - shift);
      total.sum += part;
      if (kSmooth && first + k * int(blockDim.x) < split.vecs)
        for (int e = 0; e < kN; e++) sum += to_acc(r_z[k].at[e]);
    }
  }

  for (int other = 16; other > 0; other /= 2) total.join(from_lane(total, other));
  if (kSmooth) sum = warp_sum(sum);
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
  if (warps > 1) {
    if (threadIdx.x % 32 == 0) {
      s_pairs[warp] = total;
      s_sums[warp] = sum;
    }
    __syncthreads();  // the first thread reads every warp's
  }
  if (threadIdx.x > 0) return;
  for (int w = 1; w < warps; w++) {
    total.join(s_pairs[w]);
    sum += s_sums[w];
  }
  const A row_lse = total.log();
  lse[i] = row_lse;
  if (column < 0 || column >= V) {
    loss[i] = A(NAN);
    return;
  }
  const A at_target = to_acc(logits[column]);
  A row_loss = row_lse - at_target;
  if (kSmooth) row_loss += label_smoothing * (at_target - sum / V);
  if (z_loss != 0) row_loss += z_loss * row_lse * row_lse;
  loss[i] = row_loss;
}

// dlogits = (exp(logits - lse) * (1 + 2 z_loss lse) - (1 - s) [column is target] - s / V) * dloss.
//
// Block b has chunk b % chunks of the blockDim.y rows from b / chunks * blockDim.y on; a chunk is
// blockDim.x * kKeep vectors, the first has the rest as well. dlogits may be logits: a thread reads
// a vector before it writes it. With kN > 1 rows of both begin equally far past 16 bytes.
//
// Loads in flight: 1024 threads an SM (64 registers), each of which asks for kKeep = 4 vectors of
// 16 bytes before it uses the first: 64 KB per SM.
template <class T, int kN, int kKeep>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM<T>)
    cross_entropy_bwd_kernel(T* dlogits,                          // (rows, V)
                             const T* logits,                     // logits_rows of V
                             Rows logits_rows,
                             const int64_t* __restrict__ target,  // (rows)
                             const Acc<T>* __restrict__ lse,      // (rows)
                             const Acc<T>* __restrict__ dloss,    // (rows), or one
                             int64_t dloss_stride, int V, int64_t ignore_index,
                             Acc<T> smooth_share, Acc<T> on_target, Acc<T> z_loss, int rows,
                             int chunks) {
  using A = Acc<T>;
  const int i = blockIdx.x / chunks * blockDim.y + threadIdx.y;
  const int chunk = blockIdx.x % chunks, first = chunk * blockDim.x * kKeep + threadIdx.x;
  if (i >= rows) return;
  logits = row(logits, logits_rows, i);
  dlogits += int64_t(i) * V;
  const int64_t column = target[i];
  const bool counted = column != ignore_index;
  const Split<kN> split(logits, V);

  Vec<T, kN> r_z[kKeep];
#pragma unroll
  for (int k = 0; k < kKeep; k++) {
    const int v = first + k * blockDim.x;
    if (v < split.vecs && counted) r_z[k] = load<kN>(logits + split.vec(v));
  }
  const A row_lse = lse[i];
  const A dl = column >= 0 && column < V ? dloss[i * dloss_stride] : A(NAN);
  const A of_z_loss = z_loss != 0 ? dl * 2 * z_loss * row_lse : A(0);
  const A scale = dl + of_z_loss, even = dl * smooth_share;
  const auto p = [&](T z) {  // fp32 results show the error of a quick exp
    const A x = to_acc(z) - row_lse;
    return sizeof(T) == 2 ? exp_quick(x) : exp(x);
  };
  const auto gradient = [&](T z) { return round_to<T>(p(z) * scale - even); };
  const auto gradient_on_target = [&](T z) {
    return round_to<T>((p(z) - on_target) * dl + p(z) * of_z_loss);
  };
#pragma unroll
  for (int k = 0; k < kKeep; k++) {
    const int v = first + k * blockDim.x;
    if (v >= split.vecs) break;
    Vec<T, kN> r_dz{};
    if (counted) {
      for (int e = 0; e < kN; e++) r_dz.at[e] = gradient(r_z[k].at[e]);
      const int64_t on = column - split.vec(v);
      if (on >= 0 && on < kN)
        for (int e = 0; e < kN; e++)
          if (e == on) r_dz.at[e] = gradient_on_target(r_z[k].at[e]);
    }
    store(dlogits + split.vec(v), r_dz);
  }
  if (chunk > 0) return;
  for (int n = threadIdx.x; n < split.rest(); n += blockDim.x) {
    const int j = split.single(n);
    T dz = round_to<T>(0);
    if (counted) dz = j == column ? gradient_on_target(logits[j]) : gradient(logits[j]);
    dlogits[j] = dz;
  }
}

constexpr int kMeanThreads = 1024;

// mean = sum(loss) / n, inv_count = 1 / n with n the rows whose target is not ignore_index.
// One block; sums in fp64, in a fixed order.
template <class A>
__global__ void __launch_bounds__(kMeanThreads)
    mean_loss_kernel(A* __restrict__ mean, A* __restrict__ inv_count,
                     const A* __restrict__ loss,          // (rows)
                     const int64_t* __restrict__ target,  // (rows)
                     int64_t rows, int64_t ignore_index) {
  __shared__ double s_warps[2][32];
  double sum = 0, counted = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < rows; i += kMeanThreads)
    if (target[i] != ignore_index) {
      sum += loss[i];
      counted += 1;
    }
  sum = group_sum(sum, s_warps[0]);
  counted = group_sum(counted, s_warps[1]);
  if (threadIdx.x > 0) return;
  *mean = A(sum / counted);
  *inv_count = A(1 / counted);
}

}  // namespace

Status cross_entropy_fwd(void* loss, void* lse, const void* logits, Rows logits_rows,
                         const int64_t* target, int64_t V, int64_t ignore_index,
                         double label_smoothing, double z_loss, DType dtype, Stream stream) {
  const int64_t rows = count(logits_rows);
  if (rows > kMaxRows || V > kMaxWidth) return kUnsupported;
  return dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    using A = Acc<T>;
    const auto launch = [&](auto kernel) {
      const int threads = row_threads(V / kVecSize<T>, 4, kThreads);
      const dim3 block(threads, threads == 32 ? 4 : 1);
      kernel<<<unsigned(ceil_div(rows, block.y)), block, 0, cudaStream_t(stream)>>>(
          static_cast<A*>(loss), static_cast<A*>(lse), static_cast<const T*>(logits), logits_rows,
          target, int(V), ignore_index, A(label_smoothing), A(z_loss), int(rows));
      return launch_status();
    };
    return label_smoothing != 0 ? launch(cross_entropy_fwd_kernel<T, true>)
                                : launch(cross_entropy_fwd_kernel<T, false>);
  });
}

Status cross_entropy_bwd(void* dlogits, const void* logits, Rows logits_rows, const int64_t* target,
                         const void* lse, const void* dloss, int64_t dloss_stride, int64_t V,
                         int64_t ignore_index, double label_smoothing, double z_loss, DType dtype,
                         Stream stream) {
  const int64_t rows = count(logits_rows);
  if (rows > kMaxRows || V > kMaxWidth) return kUnsupported;
  return dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    using A = Acc<T>;
    constexpr int kVec = kVecSize<T>, kKeep = 4;
    const auto launch = [&](auto kernel, int64_t vecs) {
      const int threads = row_threads(vecs, kKeep, kThreads);
      const dim3 block(threads, kThreads / threads);
      const int64_t chunks = std::max<int64_t>(ceil_div(vecs, threads * kKeep), 1);
      kernel<<<unsigned(ceil_div(rows, block.y) * chunks), block, 0, cudaStream_t(stream)>>>(
          static_cast<T*>(dlogits), static_cast<const T*>(logits), logits_rows, target,
          static_cast<const A*>(lse), static_cast<const A*>(dloss), dloss_stride, int(V),
          ignore_index, A(label_smoothing / V), A((1 - label_smoothing) + label_smoothing / V),
          A(z_loss), int(rows), int(chunks));
      return launch_status();
    };
    // Row by row, the distance from logits to dlogits.
    bool alike = (static_cast<char*>(dlogits) - static_cast<const char*>(logits)) % 16 == 0;
    const int64_t dense[3] = {logits_rows.size[1] * logits_rows.size[2] * V,
                              logits_rows.size[2] * V, V};
    for (int d = 0; d < 3; d++)
      alike &= logits_rows.size[d] == 1 || (logits_rows.stride[d] - dense[d]) % kVec == 0;
    if (alike) return launch(cross_entropy_bwd_kernel<T, kVec, kKeep>, V / kVec);
    return launch(cross_entropy_bwd_kernel<T, 1, kKeep>, V);
  });
}

Status mean_loss(void* mean, void* inv_count, const void* loss, const int64_t* target, int64_t rows,
                 int64_t ignore_index, DType dtype, Stream stream) {
  return dispatch(dtype, [&](auto t) {
    using A = Acc<decltype(t)>;
    mean_loss_kernel<<<1, kMeanThreads, 0, cudaStream_t(stream)>>>(
        static_cast<A*>(mean), static_cast<A*>(inv_count), static_cast<const A*>(loss), target,
        rows, ignore_index);
    return launch_status();
  });
}

}  // namespace lx
