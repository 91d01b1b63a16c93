#include "ops.h"

namespace lx {

Tensor rope(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool inverse) {
  const Backend backend = kernels_for("rope", "x", x);
  const DType dtype = dtype_of("rope", "x", x);
  check(x.dim() == 4, "rope: x: expected shape (B, T, H, D), got ", shape_text(x));
  const int64_t B = x.size(0), T = x.size(1), H = x.size(2), D = x.size(3);
  check(D % 2 == 0, "rope: x: expected an even last dimension, got ", D);
  const bool shared = cos.dim() == 2;
  check((shared || (cos.dim() == 3 && cos.size(0) == B)) && cos.size(cos.dim() - 2) == T &&
            cos.size(cos.dim() - 1) == D / 2,
        "rope: cos: expected shape (", T, ", ", D / 2, ") or (", B, ", ", T, ", ", D / 2, "), got ",
        shape_text(cos));
  const DType table_dtype = second_dtype("rope", "cos", cos, x);
  check_same_device("rope", "cos", cos, "x", x);
  check_like("rope", "sin", sin, "cos", cos);
  const Tensor in = with_contiguous_last(x, 1);
  const Tensor c = with_contiguous_last(cos, 1);
  bool same_strides = true;
  for (int64_t i = 0; i < c.dim(); i++) same_strides &= sin.stride(i) == c.stride(i);
  const Tensor c2 = same_strides ? c : torch::stable::contiguous(c);
  const Tensor s = same_strides ? sin : torch::stable::contiguous(sin);
  const int64_t table_stride[2] = {shared ? 0 : c2.stride(0), c2.stride(c2.dim() - 2)};
  const Rows rows = {{B, T, H}, {in.stride(0), in.stride(1), in.stride(2)}};
  Tensor y = new_like(x);
  if (y.numel())
    backend.run(&Kernels::rope, y.mutable_data_ptr(), in.const_data_ptr(), rows,
                c2.const_data_ptr(), s.const_data_ptr(), table_stride, D, interleaved, inverse,
                dtype, table_dtype);
  return y;
}

}  // namespace lx
