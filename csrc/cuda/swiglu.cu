// SwiGLU's elementwise part. Formulas in csrc/api.h; s = sigmoid(gate).
//
// F width of a row, v a vector's place in it (16 bytes, or one element where alignment or an odd F
// forbids more). A row is cut into chunks of blockDim.x * kKeep vectors: thread t of a chunk's
// threads has every blockDim.x-th of it, from t on. Rows that follow each other without a gap in
// every tensor are taken as one long row.
#include "kernels.cuh"
#include "launch.cuh"

namespace lx {
namespace {

constexpr int kThreads = 256;      // per block
constexpr int kBlocksPerSM = 4;    // so that ptxas gives each thread at most 64 registers

template <class A> struct Sigmoid {
  A gate, s;
  __device__ explicit Sigmoid(A g) : gate(g) {
    if constexpr (std::is_same_v<A, double>) s = 1 / (1 + exp(-g));
    else s = __fdividef(1, 1 + expf(-g));
  }
  __device__ A silu() const { return gate * s; }
  __device__ A dsilu() const { return s * (1 + gate * (1 - s)); }
};

// Which vectors a thread has: `first`, and every blockDim.x-th after it, of `row`. Block b has
// chunk b % chunks of the blockDim.y rows from b / chunks * blockDim.y on.
struct Place {
  int row, first;
  template <int kKeep> __device__ static Place here(int chunks) {
    return {int(blockIdx.x / chunks * blockDim.y + threadIdx.y),
            int(blockIdx.x % chunks * blockDim.x * kKeep + threadIdx.x)};
  }
};

// out = silu(gate) * up.
//
// Loads in flight: 1024 threads an SM (64 registers), each of which asks for kKeep = 4 vectors of
// 16 bytes of gate and of up before it uses the first: 128 KB per SM.
template <class T, int kN, int kKeep>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    swiglu_fwd_kernel(T* __restrict__ out,         // (rows, F)
                      const T* __restrict__ gate,  // gate_rows of F
                      Rows gate_rows,
                      const T* __restrict__ up,    // up_rows of F
                      Rows up_rows,
                      int F, int rows, int chunks) {
  const Place at = Place::here<kKeep>(chunks);
  if (at.row >= rows) return;
  gate = row(gate, gate_rows, at.row);
  up = row(up, up_rows, at.row);
  out += int64_t(at.row) * F;

  Vec<T, kN> r_gate[kKeep], r_up[kKeep];
#pragma unroll
  for (int k = 0; k < kKeep; k++) {
    const int v = at.first + k * blockDim.x;
    if (v * kN >= F) break;
    r_gate[k] = load_once<kN>(gate + v * kN);
    r_up[k] = load_once<kN>(up + v * kN);
  }
#pragma unroll
  for (int k = 0; k < kKeep; k++) {
    const int v = at.first + k * blockDim.x;
    if (v * kN >= F) break;
    for (int e = 0; e < kN; e++)
      r_gate[k].at[e] =
          round_to<T>(Sigmoid(to_acc(r_gate[k].at[e])).silu() * to_acc(r_up[k].at[e]));
    store(out + v * kN, r_gate[k]);
  }
}

// dgate = dout * up * s * (1 + gate * (1 - s)), dup = dout * gate * s; their rows begin grad_stride
// apart.
//
// Loads in flight: 1024 threads an SM (64 registers), each of which asks for kKeep = 2 vectors of
// 16 bytes of dout, gate and up before it uses the first: 96 KB per SM.
template <class T, int kN, int kKeep>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    swiglu_bwd_kernel(T* __restrict__ dgate,       // (rows, F)
                      T* __restrict__ dup,         // (rows, F)
                      int64_t grad_stride,
                      const T* __restrict__ dout,  // dout_rows of F
                      Rows dout_rows,
                      const T* __restrict__ gate,  // gate_rows of F
                      Rows gate_rows,
                      const T* __restrict__ up,    // up_rows of F
                      Rows up_rows,
                      int F, int rows, int chunks) {
  const Place at = Place::here<kKeep>(chunks);
  if (at.row >= rows) return;
  dout = row(dout, dout_rows, at.row);
  gate = row(gate, gate_rows, at.row);
  up = row(up, up_rows, at.row);
  dgate += at.row * grad_stride;
  dup += at.row * grad_stride;

  Vec<T, kN> r_dout[kKeep], r_gate[kKeep], r_up[kKeep];
#pragma unroll
  for (int k = 0; k < kKeep; k++) {
    const int v = at.first + k * blockDim.x;
    if (v * kN >= F) break;
    r_dout[k] = load_once<kN>(dout + v * kN);
    r_gate[k] = load_once<kN>(gate + v * kN);
    r_up[k] = load_once<kN>(up + v * kN);
  }
#pragma unroll
  for (int k = 0; k < kKeep; k++) {
    const int v = at.first + k * blockDim.x;
    if (v * kN >= F) break;
    Vec<T, kN> r_dgate, r_dup;
    for (int e = 0; e < kN; e++) {
      const Sigmoid s(to_acc(r_gate[k].at[e]));
      const Acc<T> d = to_acc(r_dout[k].at[e]);
      r_dgate.at[e] = round_to<T>(d * to_acc(r_up[k].at[e]) * s.dsilu());
      r_dup.at[e] = round_to<T>(d * s.silu());
    }
    store(dgate + v * kN, r_dgate);
    store(dup + v * kN, r_dup);
  }
}

// Grid and block for `rows` rows of `vecs` vectors.
struct Shape {
  int64_t chunks;
  dim3 grid, block;
  Shape(int64_t rows, int64_t vecs, int keep) {
    const int threads = row_threads(vecs, keep, kThreads);
    block = dim3(threads, kThreads / threads);
    chunks = ceil_div(vecs, threads * keep);
    grid = dim3(unsigned(ceil_div(rows, block.y) * chunks));  // each is 1024 elements or more
  }
};

// Whether rows of F follow each other without a gap.
bool gapless(const Rows& r, int64_t F) {
  return r.size[0] == 1 && r.size[1] == 1 && (r.size[2] == 1 || r.stride[2] == F);
}

constexpr Rows kOneRow = {{1, 1, 1}, {0, 0, 0}};

}  // namespace

Status swiglu_fwd(void* out, const void* gate, Rows gate_rows, const void* up, Rows up_rows,
                  int64_t F, DType dtype, Stream stream) {
  int64_t rows = count(gate_rows);
  if (rows > kMaxRows || F > kMaxWidth) return kUnsupported;
  if (gapless(gate_rows, F) && gapless(up_rows, F) && rows * F <= kMaxWidth) {
    F *= rows;
    rows = 1;
    gate_rows = up_rows = kOneRow;
  }
  return dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int kVec = kVecSize<T>, kKeep = 4;
    const auto launch = [&](auto kernel, int64_t vecs) {
      const Shape shape(rows, vecs, kKeep);
      kernel<<<shape.grid, shape.block, 0, cudaStream_t(stream)>>>(
          static_cast<T*>(out), static_cast<const T*>(gate), gate_rows,
          static_cast<const T*>(up), up_rows, int(F), int(rows), int(shape.chunks));
      return launch_status();
    };
    if (F % kVec || !aligned(out) || !aligned<T>(gate, gate_rows) || !aligned<T>(up, up_rows))
      return launch(swiglu_fwd_kernel<T, 1, kKeep>, F);
    return launch(swiglu_fwd_kernel<T, kVec, kKeep>, F / kVec);
  });
}

Status swiglu_bwd(void* dgate, void* dup, int64_t grad_stride, const void* dout, Rows dout_rows,
                  const void* gate, Rows gate_rows, const void* up, Rows up_rows, int64_t F,
                  DType dtype, Stream stream) {
  int64_t rows = count(gate_rows);
  if (rows > kMaxRows || F > kMaxWidth) return kUnsupported;
  if (gapless(dout_rows, F) && gapless(gate_rows, F) && gapless(up_rows, F) && grad_stride == F &&
      rows * F <= kMaxWidth) {
    grad_stride = F *= rows;
    rows = 1;
    dout_rows = gate_rows = up_rows = kOneRow;
  }
  return dispatch(dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int kVec = kVecSize<T>, kKeep = 2;
    const auto launch = [&](auto kernel, int64_t vecs) {
      const Shape shape(rows, vecs, kKeep);
      kernel<<<shape.grid, shape.block, 0, cudaStream_t(stream)>>>(
          static_cast<T*>(dgate), static_cast<T*>(dup), grad_stride,
          static_cast<const T*>(dout), dout_rows, static_cast<const T*>(gate), gate_rows,
          static_cast<const T*>(up), up_rows, int(F), int(rows), int(shape.chunks));
      return launch_status();
    };
    if (F % kVec || !aligned(dgate) || !aligned(dup) ||
        !aligned<T>(dout, dout_rows) || !aligned<T>(gate, gate_rows) || !aligned<T>(up, up_rows))
      return launch(swiglu_bwd_kernel<T, 1, kKeep>, F);
    return launch(swiglu_bwd_kernel<T, kVec, kKeep>, F / kVec);
  });
}

}  // namespace lx
