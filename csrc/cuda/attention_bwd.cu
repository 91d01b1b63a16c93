// Attention backward: its first pass, delta, and who does the rest. Formulas in csrc/api.h.
//
// Two sweeps over the tiles of scores, which both recompute from lse: one keeps dk and dv of its
// keys in registers (attention_bwd_dkdv.cu), one dq of its queries (attention_bwd_dq.cu). Every
// gradient has one writer and one order of sums, so that results are the same in any schedule, and
// no scratch memory is needed beyond delta. It costs seven products of matrices where one sweep
// that adds up dq in global memory has five.
#include "attention_bwd.cuh"

namespace lx {
namespace {

constexpr int kThreads = 256;

// delta = sum(dout * o) - dlse of every query.
//
// Grid: B * H * ceil(T / queries of a block) blocks, where `lanes` (a power of two) threads share a
// query and neighbouring groups have neighbouring queries of one head. T counts all tokens when
// packed. Nothing in shared memory.
//
// Loads in flight: an SM holds 2048 threads; each asks for one vector of 16 bytes of dout and of o
// before it uses the first: 64 KB per SM.
template <class T, int kN>
__global__ void __launch_bounds__(kThreads)
    attention_bwd_delta_kernel(AttentionGrads g, int lanes, int blocks) {
  using A = Acc<T>;
  const int64_t bh = blockIdx.x / blocks;
  const int64_t b = bh / g.a.H, h = bh % g.a.H;
  const int t = (blockIdx.x % blocks * kThreads + threadIdx.x) / lanes;
  const bool exists = t < g.a.T;
  A dot = 0;
  if (exists) {
    const T* dout = static_cast<const T*>(g.dout) + b * g.dout_stride[0] + t * g.dout_stride[1] +
                    h * g.dout_stride[2];
    const T* o = static_cast<const T*>(g.o) + ((b * g.a.T + t) * g.a.H + h) * g.a.D;
    for (int d = threadIdx.x % lanes * kN; d < g.a.D; d += lanes * kN) {
      const Vec<T, kN> r_dout = load<kN>(dout + d), r_o = load_once<kN>(o + d);
      for (int e = 0; e < kN; e++) dot += to_acc(r_dout.at[e]) * to_acc(r_o.at[e]);
    }
  }
  for (int other = lanes / 2; other > 0; other /= 2)
    dot += __shfl_xor_sync(kAllLanes, dot, other);
  if (!exists || threadIdx.x % lanes) return;
  const int64_t at = bh * g.a.T + t;
  static_cast<A*>(g.delta)[at] = dot - (g.dlse ? static_cast<const A*>(g.dlse)[at] : A(0));
}

// Whether rows at p with the strides (b, t, h) all begin at multiples of 16 bytes.
template <class T>
bool aligned_rows(const void* p, const int64_t* stride, const int64_t* sizes) {
  Rows rows{};
  for (int i = 0; i < 3; i++) rows.size[i] = sizes[i], rows.stride[i] = stride[i];
  return aligned<T>(p, rows);
}

template <class T> bool all_aligned(const AttentionGrads& g) {
  const Attention& a = g.a;
  const int64_t B = a.cu_q ? 1 : a.B;  // packed: strides [0] are unused
  const int64_t queries[3] = {B, a.T, a.H}, keys[3] = {B, a.S, a.Hkv};
  return a.D % kVecSize<T> == 0 && aligned(g.dq) && aligned(g.dk) && aligned(g.dv) &&
         aligned(g.o) && aligned_rows<T>(g.dout, g.dout_stride, queries) &&
         aligned_rows<T>(a.q, a.q_stride, queries) && aligned_rows<T>(a.k, a.k_stride, keys) &&
         aligned_rows<T>(a.v, a.v_stride, keys);
}

template <class T> Status launch_delta(const AttentionGrads& g, bool whole, cudaStream_t stream) {
  constexpr int kVec = kVecSize<T>;
  const int64_t vecs = whole ? g.a.D / kVec : g.a.D;
  int lanes = 1;
  while (lanes < 32 && lanes < vecs) lanes *= 2;
  const int64_t blocks = ceil_div(g.a.T, kThreads / lanes);
  const int64_t grid = blocks * (g.a.cu_q ? 1 : g.a.B) * g.a.H;
  if (grid > kMaxBlocks) return kUnsupported;
  const auto kernel =
      whole ? attention_bwd_delta_kernel<T, kVec> : attention_bwd_delta_kernel<T, 1>;
  kernel<<<unsigned(grid), kThreads, 0, stream>>>(g, lanes, int(blocks));
  return launch_status();
}

}  // namespace

Status attention_bwd(void* dq, void* dk, void* dv, void* delta, const void* dout,
                     const int64_t dout_stride[3], const void* o, const void* lse,
                     const void* dlse, const Attention* a, Stream stream) {
  if (a->T > kMaxTokens || a->S > kMaxTokens || a->D > kMaxWidth) return kUnsupported;
  const AttentionGrads g{*a,   dq,   dk,
                         dv,   delta, dout,
                         {dout_stride[0], dout_stride[1], dout_stride[2]},
                         o,    lse,  dlse};
  const cudaStream_t on = cudaStream_t(stream);
  return dispatch(a->dtype, [&](auto t) {
    using T = decltype(t);
    const bool whole = all_aligned<T>(g);
    Status status = launch_delta<T>(g, whole, on);
    if (status != kOk) return status;
    if (sizeof(T) != 2 || !whole || a->D > 256) return attention_bwd_scalar(g, on);
    status = attention_bwd_dkdv(g, on);
    return status == kOk ? attention_bwd_dq(g, on) : status;
  });
}

}  // namespace lx
