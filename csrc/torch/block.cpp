// Transformer blocks, one after the other, for the newest tokens of rows of a cache: what
// TransformerBlock composes, kernel after kernel. Everything is checked and allocated beforehand:
// for few tokens an operator's checks and allocations, or a visit to Python, take longer than its
// kernel. CPU only.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "ops.h"

namespace lx {
namespace {

constexpr const char* kOp = "blocks_cached";
// A block's weights and eps, as block.py has them.
enum { kAttentionNorm, kWq, kWk, kWv, kWo, kFfnNorm, kW1, kW3, kW2, kWeights };
constexpr int64_t kEps = 2;

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
const int64_t* check_slots(const Tensor& slots, int64_t N, int64_t S) {
  check(slots.dim() == 1 && slots.size(0) == N && slots.scalar_type() == ScalarType::Long &&
            slots.is_cpu() && slots.is_contiguous(),
        kOp, ": slots: expected int64 of shape (", N, ",), got ", ShapeOf{slots});
  const auto* at = static_cast<const int64_t*>(slots.const_data_ptr());
  for (int64_t i = 0; i < N; i++)
    check(at[i] >= 0 && at[i] < S, kOp, ": slots: expected 0 to ", S - 1, ", got ", at[i]);
  return at;
}

// The checked weights of a block for x (1, N, C), with contiguous rows.
struct Block {
  Tensor attention_norm, wq, wk, wv, wo, ffn_norm, w1, w3, w2;
  DType attention_norm_dtype, ffn_norm_dtype;
  int64_t width, hidden;  // of all query heads together, of the feed-forward

  Block(const Tensor* weights, const Tensor& x, int64_t head_dim, const Tensor& first_wk) {
    const int64_t C = x.size(2);
    const auto norm = [&](const Tensor& w) {
      check(w.dim() == 1 && w.size(0) == C, kOp, ": weights: expected a norm's of shape (", C,
            ",), got ", ShapeOf{w});
      check_same_device(kOp, "weights", w, "x", x);
      return with_contiguous_last(w, 1);
    };
    const auto whole_heads = [&](const Tensor& w) {
      return head_dim > 0 && w.dim() == 2 && w.size(0) > 0 && w.size(0) % head_dim == 0;
    };
    check(whole_heads(weights[kWq]) && whole_heads(weights[kWk]), kOp,
          ": weights: expected heads of ", head_dim, ", got weights of queries ",
          ShapeOf{weights[kWq]}, " and of keys ", ShapeOf{weights[kWk]});
    check_same_shape(kOp, "weights of keys", weights[kWk], "those of the first block", first_wk);
    check_same_shape(kOp, "weights of values", weights[kWv], "weights of keys", weights[kWk]);
    check(weights[kW1].dim() == 2, kOp, ": weights: expected w1 of shape (F, ", C, "), got ",
          ShapeOf{weights[kW1]});
    width = weights[kWq].size(0), hidden = weights[kW1].size(0);
    const auto matrix = [&](const char* name, const Tensor& w, int64_t N, int64_t K) {
      check(w.dim() == 2 && w.size(0) == N && w.size(1) == K, kOp, ": weights: expected ", name,
            " of shape (", N, ", ", K, "), got ", ShapeOf{w});
      check_same_dtype(kOp, "weights", w, "x", x);
      check_same_device(kOp, "weights", w, "x", x);
      return with_contiguous_last(w, 1);
    };
    attention_norm = norm(weights[kAttentionNorm]), ffn_norm = norm(weights[kFfnNorm]);
    attention_norm_dtype = second_dtype(kOp, "weights", attention_norm, x);
    ffn_norm_dtype = second_dtype(kOp, "weights", ffn_norm, x);
    wq = matrix("wq", weights[kWq], width, C);
    wk = matrix("wk", weights[kWk], weights[kWk].size(0), C);
    wv = matrix("wv", weights[kWv], weights[kWk].size(0), C);
    wo = matrix("wo", weights[kWo], C, width);
    w1 = matrix("w1", weights[kW1], hidden, C);
    w3 = matrix("w3", weights[kW3], hidden, C);
    w2 = matrix("w2", weights[kW2], C, hidden);
  }
};

// What all blocks share: sizes, tables, positions, and intermediate results.
struct Work {
  const Backend& backend;
  DType dtype;
  int64_t N, C, head_dim;
  bool interleaved;
  const RopeTables& tables;
  Attention attention;  // of a block, but for its pointers and number of query heads
  const int64_t* slots;
  // (N, C); (N); (N, heads together); (heads, N); (N, hidden)
  Tensor y, h, a, rstd, q, k, v, q_turned, k_turned, o, lse, gate, up, product;

  Rows rows(int64_t width) const { return {{1, 1, N}, {0, 0, width}}; }
  Rows heads(int64_t n) const { return {{1, N, n}, {0, n * head_dim, head_dim}}; }

  // y = x w^T, x (N, K), for each of up to three weights.
  void linear(std::initializer_list<void*> y, const Tensor& x, int64_t K,
              std::initializer_list<const Tensor*> weights) const {
    const void* w[3];
    int64_t stride[3], sizes[3];
    int n = 0;
    for (const Tensor* weight : weights) {
      w[n] = weight->const_data_ptr(), stride[n] = weight->stride(0), sizes[n] = weight->size(0);
      n++;
    }
    backend.run(&Kernels::linear, y.begin(), x.const_data_ptr(), rows(K), w, stride, sizes, n, K,
                dtype);
  }

  // Row i of `from` (N, width) to row slots[i] of `to`.
  void write_rows(char* to, const Tensor& from, int64_t width) const {
    const auto* row = static_cast<const char*>(from.const_data_ptr());
    const int64_t bytes = width * from.element_size();
    for (int64_t i = 0; i < N; i++) std::memcpy(to + slots[i] * bytes, row + i * bytes, bytes);
  }

  // One block with its caches (S, Hkv, D): out and stream (N, C), of x and a residual stream, null
  // in the first block of a model, which is x alone. out may be x, stream may be residual.
  void run(const Block& block, const double* eps, const void* x, Rows x_rows, const void* residual,
           Rows residual_rows, char* keys, char* values, void* out, void* stream) {
    const int64_t H = block.width / head_dim, kv_width = attention.Hkv * head_dim;
    backend.run(&Kernels::rmsnorm_fwd, y.mutable_data_ptr(),
                residual ? h.mutable_data_ptr() : nullptr, rstd.mutable_data_ptr(), x, x_rows,
                residual, residual_rows, block.attention_norm.const_data_ptr(), C, eps[0], dtype,
                block.attention_norm_dtype);
    linear({q.mutable_data_ptr(), k.mutable_data_ptr(), v.mutable_data_ptr()}, y, C,
           {&block.wq, &block.wk, &block.wv});
    backend.run(&Kernels::rope, q_turned.mutable_data_ptr(), k_turned.mutable_data_ptr(),
                q.const_data_ptr(), heads(H), k.const_data_ptr(), heads(attention.Hkv),
                tables.cos.const_data_ptr(), tables.sin.const_data_ptr(), tables.stride, head_dim,
                interleaved, 0, dtype, tables.dtype);
    write_rows(keys, k_turned, kv_width);
    write_rows(values, v, kv_width);
    attention.q = q_turned.const_data_ptr(), attention.k = keys, attention.v = values;
    attention.H = H, attention.q_stride[1] = block.width;
    backend.run(&Kernels::attention_fwd, o.mutable_data_ptr(), lse.mutable_data_ptr(), nullptr,
                &attention);
    linear({a.mutable_data_ptr()}, o, block.width, {&block.wo});
    backend.run(&Kernels::rmsnorm_fwd, y.mutable_data_ptr(), stream, rstd.mutable_data_ptr(),
                a.const_data_ptr(), rows(C), residual ? h.const_data_ptr() : x,
                residual ? rows(C) : x_rows, block.ffn_norm.const_data_ptr(), C, eps[1], dtype,
                block.ffn_norm_dtype);
    linear({gate.mutable_data_ptr(), up.mutable_data_ptr()}, y, C, {&block.w1, &block.w3});
    backend.run(&Kernels::swiglu_fwd, product.mutable_data_ptr(), gate.const_data_ptr(),
                rows(block.hidden), up.const_data_ptr(), rows(block.hidden), block.hidden, dtype);
    linear({out}, product, block.hidden, {&block.w2});
  }
};

}  // namespace

std::tuple<Tensor, Tensor> blocks_cached(Tensor x, std::optional<Tensor> residual,
                                         std::vector<Tensor> weights, std::vector<double> eps,
                                         int64_t head_dim, int64_t window, bool interleaved,
                                         Tensor cos, Tensor sin, Tensor k_cache, Tensor v_cache,
                                         Tensor slots, Tensor cu_q, Tensor cu_k) {
  check(x.is_cpu() && x.dim() == 3 && x.size(0) == 1 && x.numel() > 0, kOp,
        ": x: expected a CPU tensor of shape (1, N, C), got ", ShapeOf{x});
  const Backend backend = kernels_for(kOp, "x", x);
  const DType dtype = dtype_of(kOp, "x", x);
  const int64_t N = x.size(1), C = x.size(2), count = weights.size() / kWeights;
  if (residual) check_like(kOp, "residual", *residual, "x", x);
  check(count > 0 && int64_t(weights.size()) == count * kWeights, kOp, ": weights: expected ",
        kWeights, " for each block, got ", weights.size());
  check(int64_t(eps.size()) == count * kEps, kOp, ": eps: expected ", kEps,
        " for each block, got ", eps.size(), " for ", count);
  for (double e : eps) check(e >= 0, kOp, ": eps: expected numbers >= 0, got ", e);
  std::vector<Block> blocks;
  int64_t width = 0, hidden = 0;  // the widest block's
  for (int64_t i = 0; i < count; i++) {
    blocks.emplace_back(&weights[i * kWeights], x, head_dim, weights[kWk]);
    width = std::max(width, blocks[i].width), hidden = std::max(hidden, blocks[i].hidden);
  }
  const int64_t kv_width = weights[kWk].size(0);
  check_cache("k_cache", k_cache, x, count, kv_width, head_dim);
  check_cache("v_cache", v_cache, x, count, kv_width, head_dim);
  check_same_shape(kOp, "v_cache", v_cache, "k_cache", k_cache);
  const int64_t S = k_cache.size(1), *at = check_slots(slots, N, S);
  const int64_t sequences = check_offsets(kOp, "cu_q", cu_q, N, x);
  check(check_offsets(kOp, "cu_k", cu_k, S, x) == sequences, kOp,
        ": cu_k: expected as many offsets as of cu_q, ", sequences + 1, ", got ", cu_k.size(0));
  check(window >= 0, kOp, ": window: expected at least 1, got ", window);
  const RopeTables tables(kOp, cos, sin, x, 1, N, head_dim);
  const RowView in(x), added(residual ? *residual : x);
  const Attention attention = {
      .q = nullptr, .k = nullptr, .v = nullptr, .q_stride = {0, 0, head_dim},
      .k_stride = {0, kv_width, head_dim}, .v_stride = {0, kv_width, head_dim},
      .cu_q = static_cast<const int32_t*>(cu_q.const_data_ptr()),
      .cu_k = static_cast<const int32_t*>(cu_k.const_data_ptr()), .B = sequences, .T = N, .S = S,
      .H = 0, .Hkv = kv_width / head_dim, .D = head_dim, .scale = std::pow(head_dim, -0.5),
      .window = window, .causal = true, .dtype = dtype};
  const auto make = [&](int64_t width) { return new_tensor({N, width}, x.scalar_type(), x); };
  const auto make_acc = [&](int64_t n) { return new_tensor({n, N}, acc_dtype(x), x); };
  Work work = {backend, dtype, N, C, head_dim, interleaved, tables, attention, at,
               make(C), make(C), make(C), make_acc(1), make(width), make(kv_width), make(kv_width),
               make(width), make(kv_width), make(width), make_acc(width / head_dim), make(hidden),
               make(hidden), make(hidden)};
  Tensor output = new_like(x), stream = new_like(x);
  void *const out = output.mutable_data_ptr(), *const sum = stream.mutable_data_ptr();
  const int64_t cache_bytes = S * kv_width * x.element_size();
  for (int64_t i = 0; i < count; i++)
    work.run(blocks[i], &eps[i * kEps], i ? out : in.data(), i ? work.rows(C) : in.rows,
             i ? sum : residual ? added.data() : nullptr, i ? work.rows(C) : added.rows,
             static_cast<char*>(k_cache.mutable_data_ptr()) + i * cache_bytes,
             static_cast<char*>(v_cache.mutable_data_ptr()) + i * cache_bytes, out, sum);
  return {output, stream};
}

}  // namespace lx
