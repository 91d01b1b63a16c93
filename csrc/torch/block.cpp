// Transformer blocks, one after the other, for the newest tokens of rows of a cache: what
// TransformerBlock composes, without a visit to Python in between, which takes longer than a kernel
// for few tokens. CPU only.
#include <cmath>
#include <cstring>
#include <vector>

#include "ops.h"

namespace lx {
namespace {

constexpr const char* kOp = "blocks_cached";
constexpr int64_t kWeights = 9, kEps = 2;  // of a block

// All blocks' keys or values, whose heads together are `width` wide.
void check_cache(const char* arg, const Tensor& cache, const Tensor& x, int64_t blocks,
                 int64_t width, int64_t head_dim) {
  const bool fits = cache.dim() == 4 && cache.size(0) == blocks && cache.size(3) == head_dim &&
                    cache.size(2) * head_dim == width && cache.is_cpu() && cache.is_contiguous();
  check(fits, kOp, ": ", arg, ": expected a contiguous CPU tensor of shape (", blocks, ", S, ",
        width / head_dim, ", ", head_dim, "), got ", ShapeOf{cache});
  check_same_dtype(kOp, arg, cache, "x", x);
}

// Where among S positions N tokens go.
void check_slots(const Tensor& slots, int64_t N, int64_t S) {
  check(slots.dim() == 1 && slots.size(0) == N && slots.scalar_type() == ScalarType::Long &&
            slots.is_cpu() && slots.is_contiguous(),
        kOp, ": slots: expected int64 of shape (", N, ",), got ", ShapeOf{slots});
  const auto* at = static_cast<const int64_t*>(slots.const_data_ptr());
  for (int64_t i = 0; i < N; i++)
    check(at[i] >= 0 && at[i] < S, kOp, ": slots: expected 0 to ", S - 1, ", got ", at[i]);
}

// Row i of `from` (N, ...) to row slots[i] of `to` (S, ...), both contiguous.
void write_rows(Tensor& to, const Tensor& from, const Tensor& slots) {
  const auto* at = static_cast<const int64_t*>(slots.const_data_ptr());
  const int64_t bytes = from.numel() / slots.numel() * to.element_size();
  for (int64_t i = 0; i < slots.numel(); i++)
    std::memcpy(static_cast<char*>(to.mutable_data_ptr()) + at[i] * bytes,
                static_cast<const char*>(from.const_data_ptr()) + i * bytes, bytes);
}

// One block: its weights, eps and caches (S, Hkv, D).
std::tuple<Tensor, Tensor> block_cached(const Tensor& x, const std::optional<Tensor>& residual,
                                        const Tensor* weights, const double* eps, int64_t head_dim,
                                        int64_t window, bool interleaved, const Tensor& cos,
                                        const Tensor& sin, Tensor k_cache, Tensor v_cache,
                                        const Tensor& slots, const Tensor& cu_q,
                                        const Tensor& cu_k) {
  const Tensor &attention_norm = weights[0], &wq = weights[1], &wk = weights[2], &wv = weights[3],
               &wo = weights[4], &ffn_norm = weights[5], &w1 = weights[6], &w3 = weights[7],
               &w2 = weights[8];
  const int64_t N = x.size(1);
  const auto heads = [&](const Tensor& t) {
    return torch::stable::view(t, {1, N, t.size(2) / head_dim, head_dim});
  };

  Tensor y, stream = x;
  if (residual)
    std::tie(y, stream, std::ignore) = rmsnorm_residual_fwd(x, *residual, attention_norm, eps[0]);
  else
    y = std::get<0>(rmsnorm_fwd(x, attention_norm, eps[0]));
  const std::vector<Tensor> qkv = linear_each(y, {wq, wk, wv});
  const auto [q, k] = rope_qk(heads(qkv[0]), heads(qkv[1]), cos, sin, interleaved, false);
  write_rows(k_cache, k, slots);
  write_rows(v_cache, qkv[2], slots);
  const Tensor o = std::get<0>(
      attention_fwd(torch::stable::view(q, {N, q.size(2), head_dim}), k_cache, v_cache,
                    std::pow(head_dim, -0.5), true, window, cu_q, cu_k));
  const Tensor a = linear(torch::stable::view(o, {1, N, o.numel() / N}), wo);
  std::tie(y, stream, std::ignore) = rmsnorm_residual_fwd(a, stream, ffn_norm, eps[1]);
  const std::vector<Tensor> gate_up = linear_each(y, {w1, w3});
  return {linear(swiglu_fwd(gate_up[0], gate_up[1]), w2), stream};
}

}  // namespace

std::tuple<Tensor, Tensor> blocks_cached(Tensor x, std::optional<Tensor> residual,
                                         std::vector<Tensor> weights, std::vector<double> eps,
                                         int64_t head_dim, int64_t window, bool interleaved,
                                         Tensor cos, Tensor sin, Tensor k_cache, Tensor v_cache,
                                         Tensor slots, Tensor cu_q, Tensor cu_k) {
  check(x.is_cpu() && x.dim() == 3 && x.size(0) == 1 && x.numel() > 0, kOp,
        ": x: expected a CPU tensor of shape (1, N, C), got ", ShapeOf{x});
  const int64_t blocks = weights.size() / kWeights;
  check(blocks > 0 && int64_t(weights.size()) == blocks * kWeights, kOp,
        ": weights: expected ", kWeights, " for each block, got ", weights.size());
  check(int64_t(eps.size()) == blocks * kEps, kOp, ": eps: expected ", kEps,
        " for each block, got ", eps.size(), " for ", blocks);
  const auto whole_heads = [&](const Tensor& w) {
    return head_dim > 0 && w.dim() == 2 && w.size(0) > 0 && w.size(0) % head_dim == 0;
  };
  for (int64_t i = 0; i < blocks; i++) {
    const Tensor *own = &weights[i * kWeights], &wq = own[1], &wk = own[2], &wv = own[3];
    check(whole_heads(wq) && whole_heads(wk), kOp, ": weights: expected heads of ", head_dim,
          ", got weights of queries ", ShapeOf{wq}, " and of keys ", ShapeOf{wk});
    check_same_shape(kOp, "weights of keys", wk, "those of the first block", weights[2]);
    check_same_shape(kOp, "weights of values", wv, "weights of keys", wk);
  }
  check_cache("k_cache", k_cache, x, blocks, weights[2].size(0), head_dim);
  check_cache("v_cache", v_cache, x, blocks, weights[2].size(0), head_dim);
  check_same_shape(kOp, "v_cache", v_cache, "k_cache", k_cache);
  check_slots(slots, x.size(1), k_cache.size(1));
  for (int64_t i = 0; i < blocks; i++)
    std::tie(x, residual) = block_cached(
        x, residual, &weights[i * kWeights], &eps[i * kEps], head_dim, window, interleaved, cos,
        sin, torch::stable::select(k_cache, 0, i), torch::stable::select(v_cache, 0, i), slots,
        cu_q, cu_k);
  return {x, *residual};
}

}  // namespace lx
