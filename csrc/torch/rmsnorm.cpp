#include "ops.h"

namespace lx {
namespace {

void check_inputs(const char* op, const Tensor& x, const Tensor& weight) {
  check(x.dim() >= 1, op, ": x: expected shape (..., D), got ()");
  const int64_t D = x.size(x.dim() - 1);
  check(weight.dim() == 1 && weight.size(0) == D, op, ": weight: expected shape (", D,
        ",), the last of x, got ", ShapeOf{weight});
  check_same_device(op, "weight", weight, "x", x);
}

// residual null: without.
std::tuple<Tensor, Tensor, Tensor> forward(const char* op, const Tensor& x, const Tensor* residual,
                                           const Tensor& weight, double eps) {
  const Backend backend = kernels_for(op, "x", x);
  check_inputs(op, x, weight);
  if (residual) check_like(op, "residual", *residual, "x", x);
  check(eps >= 0, op, ": eps: expected a number >= 0, got ", eps);
  const DType dtype = dtype_of(op, "x", x), weight_dtype = second_dtype(op, "weight", weight, x);
  const RowView in(x), added(residual ? *residual : x);
  const Tensor w = with_contiguous_last(weight, 1);
  Tensor y = new_like(x), rstd = new_tensor(leading(x), acc_dtype(x), x);
  Tensor h = residual ? new_like(x) : none(x);
  if (in.count)
    backend.run(&Kernels::rmsnorm_fwd, y.mutable_data_ptr(),
                residual ? h.mutable_data_ptr() : nullptr, rstd.mutable_data_ptr(), in.data(),
                in.rows, residual ? added.data() : nullptr, added.rows, w.const_data_ptr(),
                in.width, eps, dtype, weight_dtype);
  return {y, h, rstd};
}

std::tuple<Tensor, Tensor> backward(const char* op, const Tensor& dy, const Tensor* dh,
                                    const Tensor& h, const Tensor& weight, const Tensor& rstd,
                                    bool need_dweight) {
  const Backend backend = kernels_for(op, "x", h);
  check_inputs(op, h, weight);
  check_like(op, "dy", dy, "x", h);
  if (dh) check_like(op, "dh", *dh, "x", h);
  const RowView grad(dy), grad_h(dh ? *dh : dy), in(h);
  check(rstd.numel() == in.count && rstd.scalar_type() == acc_dtype(h) && rstd.is_contiguous(), op,
        ": rstd: expected what the forward returned, got ", ShapeOf{rstd}, " ",
        dtype_text(rstd.scalar_type()));
  const DType dtype = dtype_of(op, "x", h), weight_dtype = second_dtype(op, "weight", weight, h);
  const Tensor w = with_contiguous_last(weight, 1);
  Tensor dx = new_like(h), dweight = need_dweight ? new_like(weight) : none(weight);
  if (in.count == 0) {
    if (need_dweight) torch::stable::zero_(dweight);
    return {dx, dweight};
  }
  Tensor partial = none(rstd);
  if (need_dweight)
    partial = new_tensor({backend.get(&Kernels::rmsnorm_bwd_parts)(in.count), in.width},
                         acc_dtype(h), h);
  backend.run(&Kernels::rmsnorm_bwd, dx.mutable_data_ptr(),
              need_dweight ? dweight.mutable_data_ptr() : nullptr,
              need_dweight ? partial.mutable_data_ptr() : nullptr, grad.data(), grad.rows,
              dh ? grad_h.data() : nullptr, grad_h.rows, in.data(), in.rows, w.const_data_ptr(),
              rstd.const_data_ptr(), in.width, dtype, weight_dtype);
  return {dx, dweight};
}

}  // namespace

std::tuple<Tensor, Tensor> rmsnorm_fwd(Tensor x, Tensor weight, double eps) {
  auto [y, h, rstd] = forward("rmsnorm", x, nullptr, weight, eps);
  return {y, rstd};
}

std::tuple<Tensor, Tensor> rmsnorm_bwd(Tensor dy, Tensor x, Tensor weight, Tensor rstd,
                                       bool need_dweight) {
  return backward("rmsnorm", dy, nullptr, x, weight, rstd, need_dweight);
}

std::tuple<Tensor, Tensor, Tensor> rmsnorm_residual_fwd(Tensor x, Tensor residual, Tensor weight,
                                                        double eps) {
  return forward("rmsnorm_residual", x, &residual, weight, eps);
}

std::tuple<Tensor, Tensor> rmsnorm_residual_bwd(Tensor dy, Tensor dh, Tensor h, Tensor weight,
                                                Tensor rstd, bool need_dweight) {
  return backward("rmsnorm_residual", dy, &dh, h, weight, rstd, need_dweight);
}

}  // namespace lx
