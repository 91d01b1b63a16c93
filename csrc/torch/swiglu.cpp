#include "ops.h"

namespace lx {
namespace {

void check_inputs(const Tensor& gate, const Tensor& up) {
  check(gate.dim() >= 1, "swiglu: gate: expected shape (..., F), got ()");
  check_like("swiglu", "up", up, "gate", gate);
}

// dgate and dup have rows grad_widths * F elements apart.
void backward(void* dgate, void* dup, int64_t grad_widths, const Tensor& dout, const Tensor& gate,
              const Tensor& up) {
  const Backend backend = kernels_for("swiglu", "gate", gate);
  const DType dtype = dtype_of("swiglu", "gate", gate);
  check_inputs(gate, up);
  check_like("swiglu", "dout", dout, "gate", gate);
  const RowView d(dout), g(gate), u(up);
  if (g.count && g.width)
    backend.run(&Kernels::swiglu_bwd, dgate, dup, grad_widths * g.width, d.data(), d.rows, g.data(),
                g.rows, u.data(), u.rows, g.width, dtype);
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
  Tensor dgate = new_like(gate), dup = new_like(gate);
  backward(dgate.mutable_data_ptr(), dup.mutable_data_ptr(), 1, dout, gate, up);
  return {dgate, dup};
}

Tensor swiglu_halves_bwd(Tensor dout, Tensor gate_up) {
  const int64_t dim = gate_up.dim() - 1;
  check(dim >= 0 && gate_up.size(dim) % 2 == 0,
        "swiglu: gate: expected shape (..., 2F) where up is not given, got ", ShapeOf{gate_up});
  const int64_t F = gate_up.size(dim) / 2;
  Tensor grad = new_like(gate_up);
  auto* dgate = static_cast<char*>(grad.mutable_data_ptr());
  backward(dgate, dgate + F * grad.element_size(), 2, dout,
           torch::stable::narrow(gate_up, dim, 0, F), torch::stable::narrow(gate_up, dim, F, F));
  return grad;
}

}  // namespace lx
