// Rotary position embedding of queries and keys in one launch. Formulas in csrc/api.h.
//
// B batch, T tokens, H heads (of q, then those of k), D head dim. A warp has one token, or one of
// `splits` equal parts of its heads where tokens are too few to fill a GPU. A lane has one unit of
// a head: the pairs that one 16-byte access of x moves (interleaved) or two, D/2 elements apart
// (halves); single elements where alignment or D forbids more. It keeps the unit's cos and sin and
// goes over the heads, so that a token's tables are read once.
#include <algorithm>

#include "kernels.cuh"
#include "launch.cuh"

namespace lx {
namespace {

constexpr int kLanes = 32, kWarps = 4;  // of a block
constexpr int kBlocksPerSM = 6;         // so that ptxas gives each thread at most 80 registers

// The pairs (a, b) of one unit, moved kN elements at a time.
template <class T, int kN, bool kInterleaved> struct Unit {
  static constexpr bool kOneAccess = kInterleaved && kN > 1;
  static constexpr int kPairs = kOneAccess ? kN / 2 : kN;
  Vec<T, kN> part[kOneAccess ? 1 : 2];

  // Where part p of unit u of a head begins.
  __device__ static int offset(int u, int p, int D) {
    return kInterleaved ? u * 2 * kPairs + p : u * kN + p * (D / 2);
  }
  __device__ T& a(int i) { return part[0].at[kOneAccess ? 2 * i : i]; }
  __device__ T& b(int i) { return kOneAccess ? part[0].at[2 * i + 1] : part[1].at[i]; }
  __device__ void load_from(const T* head, int u, int D) {
    for (int p = 0; p < (kOneAccess ? 1 : 2); p++)
      part[p] = load_once<kN>(head + offset(u, p, D));
  }
  __device__ void store_to(T* head, int u, int D) const {
    for (int p = 0; p < (kOneAccess ? 1 : 2); p++) store(head + offset(u, p, D), part[p]);
  }
};

// Pairs (a, b) become (a cos - b sin, a sin + b cos), with sin * sign for sin.
//
// Grid: a warp for each token and split, kWarps to a block. Block: kLanes x kWarps threads.
//
// Loads in flight: 768 threads an SM (80 registers), each of which asks for 4 vectors of 16 bytes
// (of 4 heads, or of 2 where pairs are halves) before it uses the first: 48 KB per SM.
template <class T, class W, int kN, bool kInterleaved>
__global__ void __launch_bounds__(kLanes* kWarps, kBlocksPerSM)
    rope_kernel(T* __restrict__ q_out,      // (B, T, H, D)
                T* __restrict__ k_out,      // (B, T, Hkv, D), or null
                const T* __restrict__ q,    // q_rows of D
                Rows q_rows,
                const T* __restrict__ k,    // k_rows of D, or null
                Rows k_rows,
                const W* __restrict__ cos,  // (B or 1, T, D/2), batch and token strides as given
                const W* __restrict__ sin,
                int64_t table_batch, int64_t table_token, int D, Acc<T> sign, int tokens,
                int splits) {
  using A = Acc<T>;
  using U = Unit<T, kN, kInterleaved>;
  constexpr int kPairs = U::kPairs, kBatch = U::kOneAccess ? 4 : 2;  // heads asked for at once
  const int warp = blockIdx.x * kWarps + threadIdx.y, token = warp / splits, split = warp % splits;
  if (token >= tokens) return;
  const int units = D / 2 / kPairs, length = int(q_rows.size[1]);
  const int b = token / length, t = token % length;
  const int H = int(q_rows.size[2]), Hkv = int(k_rows.size[2]);
  q += b * q_rows.stride[0] + t * q_rows.stride[1];
  k += b * k_rows.stride[0] + t * k_rows.stride[1];
  q_out += int64_t(token) * H * D;
  k_out += int64_t(token) * Hkv * D;
  cos += b * table_batch + t * table_token;
  sin += b * table_batch + t * table_token;

  const int heads_at_once = max(kLanes / units, 1);  // that the warp's lanes cover side by side
  const int head = threadIdx.x / units;              // of those, this lane's
  if (units <= kLanes && head >= heads_at_once) return;
  for (int u = units <= kLanes ? threadIdx.x % units : threadIdx.x; u < units; u += kLanes) {
    A r_cos[kPairs], r_sin[kPairs];
    const auto r_c = load<kPairs>(cos + u * kPairs), r_s = load<kPairs>(sin + u * kPairs);
    for (int i = 0; i < kPairs; i++) {
      r_cos[i] = to_acc(r_c.at[i]);
      r_sin[i] = to_acc(r_s.at[i]) * sign;
    }
    const int step = heads_at_once * splits;
    for (int first = split * heads_at_once + (units <= kLanes ? head : 0); first < H + Hkv;
         first += kBatch * step) {
      U r_x[kBatch];
#pragma unroll
      for (int n = 0; n < kBatch; n++) {
        const int h = first + n * step;
        if (h < H + Hkv)
          r_x[n].load_from(h < H ? q + h * q_rows.stride[2] : k + (h - H) * k_rows.stride[2], u, D);
      }
#pragma unroll
      for (int n = 0; n < kBatch; n++) {
        const int h = first + n * step;
        if (h >= H + Hkv) break;
        U r_y;
        for (int i = 0; i < kPairs; i++) {
          const A a = to_acc(r_x[n].a(i)), b = to_acc(r_x[n].b(i));
          r_y.a(i) = round_to<T>(a * r_cos[i] - b * r_sin[i]);
          r_y.b(i) = round_to<T>(a * r_sin[i] + b * r_cos[i]);
        }
        r_y.store_to(h < H ? q_out + h * D : k_out + (h - H) * D, u, D);
      }
    }
  }
}

// Fewer warps than these leave an A100's 108 SMs idle.
constexpr int64_t kEnoughWarps = 108 * 16;

}  // namespace

Status rope(void* q_out, void* k_out, const void* q, Rows q_rows, const void* k, Rows k_rows,
            const void* cos, const void* sin, const int64_t table_stride[2], int64_t D,
            int interleaved, int inverse, DType dtype, DType table_dtype, Stream stream) {
  const int64_t tokens = q_rows.size[0] * q_rows.size[1];
  const int64_t heads = q_rows.size[2] + k_rows.size[2];
  if (tokens > kMaxRows || heads * D > kMaxWidth) return kUnsupported;
  return dispatch(dtype, table_dtype, [&](auto t, auto w) {
    using T = decltype(t);
    using W = decltype(w);
    constexpr int kVec = kVecSize<T>;
    const auto launch = [&](auto kernel, int pairs) {
      const int64_t heads_at_once = std::max<int64_t>(kLanes / (D / 2 / pairs), 1);
      const int64_t splits =
          std::clamp<int64_t>(kEnoughWarps / tokens, 1, ceil_div(heads, heads_at_once));
      kernel<<<unsigned(ceil_div(tokens * splits, kWarps)), dim3(kLanes, kWarps), 0,
               cudaStream_t(stream)>>>(
          static_cast<T*>(q_out), static_cast<T*>(k_out), static_cast<const T*>(q), q_rows,
          static_cast<const T*>(k), k_rows, static_cast<const W*>(cos),
          static_cast<const W*>(sin), table_stride[0], table_stride[1], int(D),
          Acc<T>(inverse ? -1 : 1), int(tokens), int(splits));
      return launch_status();
    };
    const auto run = [&](auto kind) {
      constexpr bool kInterleaved = kind.value;
      using U = Unit<T, kVec, kInterleaved>;
      constexpr int kTableVec = sizeof(W) * U::kPairs < 16 ? U::kPairs : 16 / sizeof(W);
      const bool tables_fit = aligned(cos) && aligned(sin) && table_stride[0] % kTableVec == 0 &&
                              table_stride[1] % kTableVec == 0;
      if (tables_fit && D / 2 % U::kPairs == 0 && D % kVec == 0 && aligned(q_out) &&
          aligned(k_out) && aligned<T>(q, q_rows) && aligned<T>(k, k_rows))
        return launch(rope_kernel<T, W, kVec, kInterleaved>, U::kPairs);
      return launch(rope_kernel<T, W, 1, kInterleaved>, 1);
    };
    return interleaved ? run(std::true_type{}) : run(std::false_type{});
  });
}

}  // namespace lx
