// The bound operators: each validates, allocates its outputs and calls one kernel. Schemas and what
// they mean are in library.cpp; public functions with gradients in llama_ext/ops.
#pragma once
#include "binding.h"

namespace lx {

std::tuple<Tensor, Tensor> rmsnorm_fwd(Tensor x, Tensor weight, double eps);
std::tuple<Tensor, Tensor> rmsnorm_bwd(Tensor dy, Tensor x, Tensor weight, Tensor rstd,
                                       bool need_dweight);
std::tuple<Tensor, Tensor, Tensor> rmsnorm_residual_fwd(Tensor x, Tensor residual, Tensor weight,
                                                        double eps);
std::tuple<Tensor, Tensor> rmsnorm_residual_bwd(Tensor dy, Tensor dh, Tensor h, Tensor weight,
                                                Tensor rstd, bool need_dweight);

std::string cpu_isa(std::string name);
std::string cpu_isas();

}  // namespace lx
