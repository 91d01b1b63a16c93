#include <vector>

#include "ops.h"

namespace lx {

Tensor linear_int8(Tensor x, Tensor weight, Tensor scale) {
  const char* op = "linear_int8";
  const Backend backend = kernels_for(op, "x", x);
  check(x.dim() >= 1, op, ": x: expected shape (..., K), got ()");
  const int64_t K = x.size(x.dim() - 1);
  check(weight.dim() == 2 && weight.size(1) == K, op, ": weight: expected shape (N, ", K,
        "), K the last of x, got ", shape_text(weight));
  const int64_t N = weight.size(0);
  check(weight.scalar_type() == ScalarType::Char, op, ": weight: expected int8, got ",
        dtype_text(weight.scalar_type()));
  check(scale.dim() == 1 && scale.size(0) == N, op, ": scale: expected shape (", N,
        ",), the first of weight, got ", shape_text(scale));
  check(scale.scalar_type() == ScalarType::Float, op, ": scale: expected float32, got ",
        dtype_text(scale.scalar_type()));
  check_same_device(op, "weight", weight, "x", x);
  check_same_device(op, "scale", scale, "x", x);
  const DType dtype = dtype_of(op, "x", x);

  const RowView in(x);
  const Tensor w = with_contiguous_last(weight, 1), s = with_contiguous_last(scale, 1);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = N;
  Tensor y = new_tensor(shape, x.scalar_type(), x);
  if (in.count && N)
    backend.run(&Kernels::linear_int8, y.mutable_data_ptr(), in.data(), in.rows,
                static_cast<const int8_t*>(w.const_data_ptr()), w.stride(0),
                static_cast<const float*>(s.const_data_ptr()), N, K, dtype);
  return y;
}

}  // namespace lx
