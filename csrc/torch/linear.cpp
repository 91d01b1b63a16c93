#include <vector>

#include "ops.h"

namespace lx {
namespace {

// x (..., K) as rows.
RowView rows_of(const char* op, const Tensor& x) {
  check(x.dim() >= 1, op, ": x: expected shape (..., K), got ()");
  return RowView(x);
}

// The checked weight (N, K) for x (..., K), and a new y (..., N).
struct Linear {
  int64_t N, K;
  Tensor w, y;

  Linear(const char* op, const Tensor& x, const Tensor& weight, ScalarType weight_dtype) {
    K = x.size(x.dim() - 1);
    check(weight.dim() == 2 && weight.size(1) == K, op, ": weight: expected shape (N, ", K,
          "), K the last of x, got ", ShapeOf{weight});
    check(weight.scalar_type() == weight_dtype, op, ": weight: expected ", dtype_text(weight_dtype),
          ", got ", dtype_text(weight.scalar_type()));
    check_same_device(op, "weight", weight, "x", x);
    N = weight.size(0);
    w = with_contiguous_last(weight, 1);
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    shape.back() = N;
    y = new_tensor(shape, x.scalar_type(), x);
  }
};

}  // namespace

Tensor linear(Tensor x, Tensor weight) {
  const char* op = "linear";
  const Backend backend = kernels_for(op, "x", x);
  const DType dtype = dtype_of(op, "x", x);
  const RowView in = rows_of(op, x);
  const Linear l(op, x, weight, x.scalar_type());
  void* y = l.y.mutable_data_ptr();
  const void* w = l.w.const_data_ptr();
  const int64_t stride = l.w.stride(0);
  if (in.count)
    backend.run(&Kernels::linear, &y, in.data(), in.rows, &w, &stride, &l.N, 1, in.width, dtype);
  return l.y;
}

Tensor linear_int8(Tensor x, Tensor weight, Tensor scale) {
  const char* op = "linear_int8";
  const Backend backend = kernels_for(op, "x", x);
  const DType dtype = dtype_of(op, "x", x);
  const RowView in = rows_of(op, x);
  const Linear l(op, x, weight, ScalarType::Char);
  check(scale.dim() == 1 && scale.size(0) == l.N, op, ": scale: expected shape (", l.N,
        ",), the first of weight, got ", ShapeOf{scale});
  check(scale.scalar_type() == ScalarType::Float, op, ": scale: expected float32, got ",
        dtype_text(scale.scalar_type()));
  check_same_device(op, "scale", scale, "x", x);
  const Tensor s = with_contiguous_last(scale, 1);
  if (in.count && l.N)
    backend.run(&Kernels::linear_int8, l.y.mutable_data_ptr(), in.data(), in.rows,
                static_cast<const int8_t*>(l.w.const_data_ptr()), l.w.stride(0),
                static_cast<const float*>(s.const_data_ptr()), l.N, l.K, dtype);
  return l.y;
}

}  // namespace lx
