#include "ops.h"

namespace lx {
namespace {

void check_inputs(const Tensor& gate, const Tensor& up) {
  check(gate.dim() >= 1, "swiglu: gate: expected shape (..., F), got ()");
  check_like("swiglu", "up", up, "gate", gate);
}

}  // namespace

Tensor swiglu_fwd(Tensor gate, Tensor up) {
  const Backend backend = kernels_for("swiglu", "gate", gate);
  const DType dtype = dtype_of("swiglu", "gate", gate);
  check_inputs(gate, up);
  const RowView g(gate), u(up);
  Tensor out = new_like(gate);
  if (out.numel())
    backend.run(&Kernels::swiglu_fwd, out.mutable_data_ptr(), g.data(), g.rows,
                u.data(), u.rows, g.width, dtype);
  return out;
}

std::tuple<Tensor, Tensor> swiglu_bwd(Tensor dout, Tensor gate, Tensor up) {
  const Backend backend = kernels_for("swiglu", "gate", gate);
  const DType dtype = dtype_of("swiglu", "gate", gate);
  check_inputs(gate, up);
  check_like("swiglu", "dout", dout, "gate", gate);
  const RowView d(dout), g(gate), u(up);
  Tensor dgate = new_like(gate), dup = new_like(gate);
  if (dgate.numel())
    backend.run(&Kernels::swiglu_bwd, dgate.mutable_data_ptr(), dup.mutable_data_ptr(),
                d.data(), d.rows, g.data(), g.rows, u.data(), u.rows, g.width, dtype);
  return {dgate, dup};
}

}  // namespace lx
