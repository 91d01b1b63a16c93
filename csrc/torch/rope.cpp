#include "ops.h"

namespace lx {
namespace {

void check_heads(const char* op, const char* arg, const Tensor& x) {
  check(x.dim() == 4, op, ": ", arg, ": expected shape (B, T, H, D), got ", ShapeOf{x});
  check(x.size(3) % 2 == 0, op, ": ", arg, ": expected an even last dimension, got ", x.size(3));
}

Rows rows_of(const Tensor& x) {
  return {{x.size(0), x.size(1), x.size(2)}, {x.stride(0), x.stride(1), x.stride(2)}};
}

}  // namespace

RopeTables::RopeTables(const char* op, const Tensor& cos_in, const Tensor& sin_in, const Tensor& x,
                       int64_t B, int64_t T, int64_t D)
    : cos(cos_in), sin(sin_in), dtype(second_dtype(op, "cos", cos_in, x)) {
  const int64_t pairs = D / 2;
  const bool shared = cos.dim() == 2;
  check((shared || (cos.dim() == 3 && cos.size(0) == B)) && cos.size(cos.dim() - 2) == T &&
            cos.size(cos.dim() - 1) == pairs,
        op, ": cos: expected shape (", T, ", ", pairs, ") or (", B, ", ", T, ", ", pairs,
        "), got ", ShapeOf{cos});
  check_same_device(op, "cos", cos, "x", x);
  check_like(op, "sin", sin, "cos", cos);
  cos = with_contiguous_last(cos, 1);
  bool same_strides = true;
  for (int64_t i = 0; i < cos.dim(); i++) same_strides &= sin.stride(i) == cos.stride(i);
  if (!same_strides) {
    cos = torch::stable::contiguous(cos);
    sin = torch::stable::contiguous(sin);
  }
  stride[0] = shared ? 0 : cos.stride(0);
  stride[1] = cos.stride(cos.dim() - 2);
}

Tensor rope(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool inverse) {
  const Backend backend = kernels_for("rope", "x", x);
  const DType dtype = dtype_of("rope", "x", x);
  check_heads("rope", "x", x);
  const RopeTables tables("rope", cos, sin, x, x.size(0), x.size(1), x.size(3));
  const Tensor in = with_contiguous_last(x, 1);
  Tensor y = new_like(x);
  if (y.numel())
    backend.run(&Kernels::rope, y.mutable_data_ptr(), nullptr, in.const_data_ptr(), rows_of(in),
                nullptr, Rows{}, tables.cos.const_data_ptr(), tables.sin.const_data_ptr(),
                tables.stride, x.size(3), interleaved, inverse, dtype, tables.dtype);
  return y;
}

std::tuple<Tensor, Tensor> rope_qk(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved,
                                   bool inverse) {
  const Backend backend = kernels_for("rope_qk", "q", q);
  const DType dtype = dtype_of("rope_qk", "q", q);
  check_heads("rope_qk", "q", q);
  check_heads("rope_qk", "k", k);
  const bool fits = k.size(0) == q.size(0) && k.size(1) == q.size(1) && k.size(3) == q.size(3);
  check(fits, "rope_qk: k: expected shape (", q.size(0), ", ", q.size(1), ", Hkv, ", q.size(3),
        "), got ", ShapeOf{k});
  check_same_dtype("rope_qk", "k", k, "q", q);
  check_same_device("rope_qk", "k", k, "q", q);
  const RopeTables tables("rope_qk", cos, sin, q, q.size(0), q.size(1), q.size(3));
  const Tensor q_in = with_contiguous_last(q, 1), k_in = with_contiguous_last(k, 1);
  Tensor q_out = new_like(q), k_out = new_like(k);
  if (q_out.numel() + k_out.numel())
    backend.run(&Kernels::rope, q_out.mutable_data_ptr(), k_out.mutable_data_ptr(),
                q_in.const_data_ptr(), rows_of(q_in), k_in.const_data_ptr(), rows_of(k_in),
                tables.cos.const_data_ptr(), tables.sin.const_data_ptr(), tables.stride, q.size(3),
                interleaved, inverse, dtype, tables.dtype);
  return {q_out, k_out};
}

}  // namespace lx
