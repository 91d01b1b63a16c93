// The bound operators: each validates, allocates its outputs and calls one kernel. Schemas and what
// they mean are in library.cpp; public functions with gradients in llama_ext/ops.
#pragma once
#include <vector>

#include "binding.h"

namespace lx {

std::tuple<Tensor, Tensor> rmsnorm_fwd(Tensor x, Tensor weight, double eps);
std::tuple<Tensor, Tensor> rmsnorm_bwd(Tensor dy, Tensor x, Tensor weight, Tensor rstd,
                                       bool need_dweight);
std::tuple<Tensor, Tensor, Tensor> rmsnorm_residual_fwd(Tensor x, Tensor residual, Tensor weight,
                                                        double eps);
std::tuple<Tensor, Tensor> rmsnorm_residual_bwd(Tensor dy, Tensor dh, Tensor h, Tensor weight,
                                                Tensor rstd, bool need_dweight);

Tensor swiglu_fwd(Tensor gate, Tensor up);
std::tuple<Tensor, Tensor> swiglu_bwd(Tensor dout, Tensor gate, Tensor up);
Tensor swiglu_halves_bwd(Tensor dout, Tensor gate_up);

Tensor rope(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool inverse);
std::tuple<Tensor, Tensor> rope_qk(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved,
                                   bool inverse);

std::tuple<Tensor, Tensor> attention_fwd(Tensor q, Tensor k, Tensor v, double scale, bool causal,
                                         int64_t window, std::optional<Tensor> cu_q,
                                         std::optional<Tensor> cu_k);
std::tuple<Tensor, Tensor, Tensor> attention_bwd(Tensor dout, std::optional<Tensor> dlse, Tensor q,
                                                 Tensor k, Tensor v, Tensor o, Tensor lse,
                                                 double scale, bool causal, int64_t window,
                                                 std::optional<Tensor> cu_q,
                                                 std::optional<Tensor> cu_k);

std::tuple<Tensor, Tensor> cross_entropy_fwd(Tensor logits, Tensor target, int64_t ignore_index,
                                             double label_smoothing, double z_loss);
std::tuple<Tensor, Tensor> mean_loss(Tensor loss, Tensor target, int64_t ignore_index);
Tensor cross_entropy_bwd(Tensor dloss, Tensor logits, Tensor target, Tensor lse,
                         int64_t ignore_index, double label_smoothing, double z_loss);
void cross_entropy_bwd_(Tensor dloss, Tensor logits, Tensor target, Tensor lse,
                        int64_t ignore_index, double label_smoothing, double z_loss);

Tensor linear(Tensor x, Tensor weight);
Tensor linear_int8(Tensor x, Tensor weight, Tensor scale);

// cos and sin for x (B, T, heads, D), with one pair of strides, and what kernels are told of them.
struct RopeTables {
  Tensor cos, sin;
  DType dtype;
  int64_t stride[2];  // batch (0: one table for all), token

  RopeTables(const char* op, const Tensor& cos, const Tensor& sin, const Tensor& x, int64_t B,
             int64_t T, int64_t D);
};

// Checks attention's offsets of packed sequences: rising, from 0 to `total`. Returns their number.
int64_t check_offsets(const char* op, const char* arg, const Tensor& cu, int64_t total,
                      const Tensor& q);

std::tuple<Tensor, Tensor> blocks_cached(Tensor x, std::optional<Tensor> residual,
                                         std::vector<Tensor> weights, std::vector<double> eps,
                                         int64_t head_dim, int64_t window, bool interleaved,
                                         Tensor cos, Tensor sin, Tensor k_cache, Tensor v_cache,
                                         Tensor slots, Tensor cu_q, Tensor cu_k);

std::string cpu_isa(std::string name);
std::string cpu_isas();
std::string cuda_kernels();

}  // namespace lx
