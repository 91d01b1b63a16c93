// Attention forward of few queries against many keys, for bf16 and fp16: the keys are split over
// blocks, and the parts merged in a fixed order. Formulas in csrc/api.h; letters in attention.cuh.
#include <algorithm>

#include "attention_tile.cuh"
#include "kernels.cuh"

namespace lx {
namespace {

constexpr int kRows = 16;               // of a block: the queries of all heads that share a K and V
constexpr int64_t kBlocksWanted = 216;  // two for each SM of an A100
constexpr int64_t kLeastKeys = 256;     // of a part: many times the bytes that the merge moves
constexpr int64_t kMostParts = 128;

// Blocks that share their keys' parts: for each batch and key/value head as many as 16 rows need.
int64_t row_blocks(const Attention& a) {
  return a.B * a.Hkv * ceil_div(a.T * (a.H / a.Hkv), kRows);
}

// A warp's outputs, sums and shifts in shared memory, for the others; + 8 spreads rows over banks.
template <int kHeadDim> struct WarpPart {
  float out[kRows][kHeadDim + 8], sum[kRows], shift[kRows];
};

// o = softmax(scale * q k^T) v and lse over one part of the keys; into o and lse when it is the
// only part, otherwise into partial.
//
// Grid: x: row_blocks(a); y: parts. Block: S::kWarps warps, which share the 16 rows and take
// S::kKeys keys of each tile in turn; row r is query r / G of head r % G of the group of G heads.
// At the end the warps' outputs are added through shared memory, in the order of the warps. Dynamic
// shared memory: Q, two tiles of K and of V; then the outputs. Preconditions: attention_fwd.cu's.
//
// Loads in flight: the next tile's K and V while one is worked on.
template <class S>
__global__ void __launch_bounds__(S::kThreads)
    attention_decode_kernel(typename S::T* __restrict__ o,   // (B, T, H, D)
                            float* __restrict__ lse,         // (B, H, T)
                            float* __restrict__ partial_o,   // (parts, B, H, T, D), or null
                            float* __restrict__ partial_lse, // (parts, B, H, T), or null
                            const __grid_constant__ Attention a) {
  using T = typename S::T;
  using Layout = typename S::Layout;
  using Part = WarpPart<S::kHeadDim>;
  constexpr int kKeys = S::kWarps * S::kKeys, kStage = S::kWarps * S::kTileBytes;
  static_assert(S::kRowBlocks == 1 && S::kKept == S::kColumns, "Q is read once");
  extern __shared__ __align__(128) char s_dynamic[];
  const int G = int(a.H / a.Hkv), D = int(a.D), rows = int(a.T) * G;
  const int blocks = (rows + kRows - 1) / kRows, kv = blockIdx.x / blocks % int(a.Hkv);
  const int b = blockIdx.x / blocks / int(a.Hkv), row0 = blockIdx.x % blocks * kRows;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Sequence s(a, b);
  const auto query = [&](int row) { return (row0 + row) / G; };
  const auto head = [&](int row) { return kv * G + (row0 + row) % G; };

  const uint32_t s_q = ptx::shared_address(s_dynamic), s_k = s_q + S::kWarpBytes;
  const uint32_t s_v = s_k + 2 * kStage;
  const T* g_q = static_cast<const T*>(a.q) + s.q_at;
  for (int at = threadIdx.x; at < kRows * Layout::kPieces; at += S::kThreads) {
    const int row = at / Layout::kPieces, piece = at % Layout::kPieces;
    const T* from = g_q + query(row) * a.q_stride[1] + head(row) * a.q_stride[2] + piece * 8;
    ptx::cp_async_zero_fill(s_q + Layout::offset(row, piece), from,
                            row0 + row < rows && piece * 8 < D ? 16 : 0);
  }
  using Loader = TileLoader<T, S::kHeadDim, S::kThreads, Layout>;
  const Loader load_k(static_cast<const T*>(a.k) + s.k_at + kv * a.k_stride[2], a.k_stride[1], D,
                      threadIdx.x);
  const Loader load_v(static_cast<const T*>(a.v) + s.v_at + kv * a.v_stride[2], a.v_stride[1], D,
                      threadIdx.x);
  load_k.template zero_columns<4 * kKeys>(s_k);  // of all tiles: they lie in a row

  const int last = (min(row0 + kRows, rows) - 1) / G;
  const TileRange seen = key_tiles<kKeys>(s, query(0), last + 1);
  const int tiles = seen.end - seen.begin;
  const int begin = seen.begin + int(int64_t(tiles) * blockIdx.y / gridDim.y);
  const int end = seen.begin + int(int64_t(tiles) * (blockIdx.y + 1) / gridDim.y);
  const auto prefetch = [&](int tile) {
    if (tile < end) {
      const int stage = (tile - begin) & 1;
      load_k.template load<kKeys>(s_k + stage * kStage, tile * kKeys, s.S);
      load_v.template load<kKeys>(s_v + stage * kStage, tile * kKeys, s.S);
    }
    ptx::cp_async_commit();
  };
  prefetch(begin);
  ptx::cp_async_wait<0>();
  __syncthreads();  // Q is there
  const typename S::BlockOfQ q(s_q);
  const typename S::BlockOfK k(s_k + warp * S::kTileBytes);
  const typename S::BlockOfV v(s_v + warp * S::kTileBytes);
  Kept<S> kept;
#pragma unroll
  for (int d = 0; d < S::kKept; d++) {
    ptx::ldmatrix(kept[0][d], q.block(0, d));
    for (int e = 0; e < 4; e++) kept[0][d][e] ^= a.scale < 0 ? 0x80008000u : 0;
  }
  const float c = fmaxf(fabsf(float(a.scale)) * kLog2E, FLT_MIN);  // > 0: c * -inf is -inf

  WarpState<S> w;
  for (int tile = begin; tile < end; tile++) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // the tile is there, and no warp reads the other stage any more
    prefetch(tile + 1);
    const int at = ((tile - begin) & 1) * kStage, j0 = tile * kKeys + warp * S::kKeys;
    Scores<S> scores;
    scores_of<S>(scores, kept, q, k, at);
    if (tile < seen.full_begin || tile >= seen.full_end) hide<S>(scores, s, query, j0);
    raise_shift<S>(w, scores, c);
    float sums[1][2];
    weights_of<S>(scores, sums, w, c);
    add_sums<S>(w, sums);
    add_values<S>(w, scores, v, at);
  }

  ptx::cp_async_wait<0>();
  __syncthreads();  // no warp reads a tile any more
  Part* s_parts = reinterpret_cast<Part*>(s_dynamic);
  for (int half = 0; half < 2; half++) {
    const int row = half * 8 + lane / 4;
    float sum = w.sum[0][half];
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    s_parts[warp].sum[row] = sum;
    s_parts[warp].shift[row] = w.shift[0][half];
#pragma unroll
    for (int d = 0; d < S::kColumns; d++)
      for (int n = 0; n < 2; n++)
        *reinterpret_cast<float2*>(&s_parts[warp].out[row][d * 16 + n * 8 + lane % 4 * 2]) =
            make_float2(w.out[0][d][n][half * 2], w.out[0][d][n][half * 2 + 1]);
  }
  __syncthreads();  // every warp's part is there
  for (int at = threadIdx.x; at < kRows * D; at += S::kThreads) {
    const int row = at / D, d = at % D;
    if (row0 + row >= rows) break;
    float shift = -FLT_MAX, sum = 0, out = 0;
    for (int n = 0; n < S::kWarps; n++) shift = fmaxf(shift, s_parts[n].shift[row]);
    for (int n = 0; n < S::kWarps; n++) {
      const float factor = ptx::ex2(s_parts[n].shift[row] - shift);
      sum += s_parts[n].sum[row] * factor;
      out += s_parts[n].out[row][d] * factor;
    }
    const int i = query(row), h = head(row);
    const float row_lse = shift == INFINITY ? shift : (shift + log2f(sum)) * kLn2;
    const int64_t at_lse = (int64_t(b) * a.H + h) * a.T + i;
    if (partial_o) {
      const int64_t at_part = int64_t(blockIdx.y) * a.B * a.H * a.T + at_lse;
      partial_o[at_part * D + d] = sum == 0 ? 0 : out / sum;
      if (d == 0) partial_lse[at_part] = row_lse;
    } else {
      const float inverse = s.end_key(i) <= s.first_key(i) ? 0 : 1 / sum;
      o[((s.q_row + i) * a.H + h) * D + d] = round_to<T>(out * inverse);
      if (d == 0) lse[at_lse] = row_lse;
    }
  }
}

// o = sum of exp(lse_p - lse) o_p over the parts p, lse = log(sum of exp(lse_p)), in their order.
//
// Grid: a block for each row (batch, head, query). Block: a thread for each column.
template <class T>
__global__ void __launch_bounds__(256)
    attention_decode_merge_kernel(T* __restrict__ o,                     // (B, T, H, D)
                                  float* __restrict__ lse,               // (B, H, T)
                                  const float* __restrict__ partial_o,   // (parts, B, H, T, D)
                                  const float* __restrict__ partial_lse, // (parts, B, H, T)
                                  const __grid_constant__ Attention a, int parts) {
  const int64_t row = blockIdx.x, rows = gridDim.x;
  const int D = int(a.D), d = threadIdx.x, i = int(row % a.T), h = int(row / a.T % a.H);
  const int b = int(row / a.T / a.H);
  const Sequence s(a, b);
  float top = -INFINITY;
  for (int p = 0; p < parts; p++) top = fmaxf(top, partial_lse[p * rows + row]);
  const float shift = top == -INFINITY ? 0 : top;
  float sum = 0, out = 0;
  for (int p = 0; p < parts; p++) {
    const float weight = ptx::ex2((partial_lse[p * rows + row] - shift) * kLog2E);
    sum += weight;
    if (d < D) out += weight * partial_o[(p * rows + row) * D + d];
  }
  const float inverse = s.end_key(i) <= s.first_key(i) ? 0 : 1 / sum;
  if (d < D) o[((s.q_row + i) * a.H + h) * D + d] = round_to<T>(out * inverse);
  if (d == 0) lse[row] = top == INFINITY ? top : shift + log2f(sum) * kLn2;
}

}  // namespace

Status attention_decode(void* o, void* lse, void* partial, const Attention& a, Stream stream) {
  const int64_t parts = attention_fwd_parts(&a), rows = a.B * a.H * a.T;
  if (rows >= kMaxBlocks) return kUnsupported;
  return dispatch(a.dtype, [&](auto t) -> Status {
    using T = decltype(t);
    float* partial_o = parts > 1 ? static_cast<float*>(partial) : nullptr;
    float* partial_lse = parts > 1 ? partial_o + parts * rows * a.D : nullptr;
    const auto launch = [&](auto shape) {
      using S = decltype(shape);
      constexpr int kTiles = S::kWarpBytes + 4 * S::kWarps * S::kTileBytes;
      constexpr int kBytes = std::max(kTiles, S::kWarps * int(sizeof(WarpPart<S::kHeadDim>)));
      if (allow_shared_memory(attention_decode_kernel<S>, kBytes))
        attention_decode_kernel<S>
            <<<dim3(unsigned(row_blocks(a)), unsigned(parts)), S::kThreads, kBytes,
               cudaStream_t(stream)>>>(static_cast<T*>(o), static_cast<float*>(lse), partial_o,
                                       partial_lse, a);
    };
    if constexpr (sizeof(T) == 2) {
      if (a.D <= 64) launch(Shape<T, 64, 1, 4, 16, 4, 1>{});
      else if (a.D <= 128) launch(Shape<T, 128, 1, 4, 16, 8, 1>{});
      else launch(Shape<T, 256, 1, 2, 16, 16, 1>{});
      if (parts > 1)
        attention_decode_merge_kernel<<<unsigned(rows), 256, 0, cudaStream_t(stream)>>>(
            static_cast<T*>(o), static_cast<float*>(lse), partial_o, partial_lse, a, int(parts));
      return launch_status();
    }
    return kUnsupported;
  });
}

// A function of the sizes alone, so that results are the same on every GPU.
int64_t attention_fwd_parts(const Attention* attention) {
  const Attention& a = *attention;
  if (!attention_decodes(a) || (a.dtype != kBFloat16 && a.dtype != kFloat16) || a.Hkv == 0)
    return 1;
  const int64_t ahead = a.causal ? 0 : a.window;
  const int64_t keys = a.window ? std::min(a.S, a.window + ahead + a.T) : a.S;
  const int64_t most = std::clamp<int64_t>(keys / kLeastKeys, 1, kMostParts);
  return std::clamp<int64_t>(kBlocksWanted / row_blocks(a), 1, most);
}

}  // namespace lx
