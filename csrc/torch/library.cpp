// Every operator torch sees. "need" flags say which gradients are wanted; an unwanted one comes
// back empty. rstd, lse and other saved values are fp32, fp64 for fp64 data.
#include "ops.h"

STABLE_TORCH_LIBRARY(llama_ext, m) {
  m.def("rmsnorm_fwd(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)");
  m.def("rmsnorm_bwd(Tensor dy, Tensor x, Tensor weight, Tensor rstd, bool need_dweight)"
        " -> (Tensor dx, Tensor dweight)");
  m.def("rmsnorm_residual_fwd(Tensor x, Tensor residual, Tensor weight, float eps)"
        " -> (Tensor y, Tensor h, Tensor rstd)");
  m.def("rmsnorm_residual_bwd(Tensor dy, Tensor dh, Tensor h, Tensor weight, Tensor rstd,"
        " bool need_dweight) -> (Tensor dx, Tensor dweight)");

  m.def("swiglu_fwd(Tensor gate, Tensor up) -> Tensor");
  m.def("swiglu_bwd(Tensor dout, Tensor gate, Tensor up) -> (Tensor dgate, Tensor dup)");
  m.def("swiglu_halves_bwd(Tensor dout, Tensor gate_up) -> Tensor");  // of (..., 2F)

  m.def("rope(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> Tensor");
  m.def("rope_qk(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool inverse)"
        " -> (Tensor, Tensor)");

  // window 0: none. cu_q, cu_k: both for packed sequences, or neither. dlse: none when it is zero.
  m.def("attention_fwd(Tensor q, Tensor k, Tensor v, float scale, bool causal, int window,"
        " Tensor? cu_q, Tensor? cu_k) -> (Tensor o, Tensor lse)");
  m.def("attention_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o,"
        " Tensor lse, float scale, bool causal, int window, Tensor? cu_q, Tensor? cu_k)"
        " -> (Tensor dq, Tensor dk, Tensor dv)");

  // Per row; dloss is one number per row, or one for all. The second backward overwrites logits.
  m.def("cross_entropy_fwd(Tensor logits, Tensor target, int ignore_index, float label_smoothing,"
        " float z_loss) -> (Tensor loss, Tensor lse)");
  m.def("mean_loss(Tensor loss, Tensor target, int ignore_index)"
        " -> (Tensor mean, Tensor inv_count)");
  m.def("cross_entropy_bwd(Tensor dloss, Tensor logits, Tensor target, Tensor lse,"
        " int ignore_index, float label_smoothing, float z_loss) -> Tensor");
  m.def("cross_entropy_bwd_(Tensor dloss, Tensor(a!) logits, Tensor target, Tensor lse,"
        " int ignore_index, float label_smoothing, float z_loss) -> ()");

  m.def("linear(Tensor x, Tensor weight) -> Tensor");
  m.def("linear_int8(Tensor x, Tensor weight, Tensor scale) -> Tensor");

  // x (1, N, C): the newest tokens of rows of a cache, keys and values of all rows in one
  // (blocks, S, Hkv, D), where theirs go to slots (N). weights, eps: block by block, as block.py
  // has them.
  m.def("blocks_cached(Tensor x, Tensor? residual, Tensor[] weights, float[] eps,"
        " int head_dim, int window, bool interleaved, Tensor cos, Tensor sin,"
        " Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, Tensor cu_q, Tensor cu_k)"
        " -> (Tensor output, Tensor stream)");

  m.def("cpu_isa(str name) -> str");  // the instruction set in use, after a switch; see backend.cpp
  m.def("cpu_isas() -> str");
  m.def("cuda_kernels() -> str");  // the CUDA table's name, or why there is none
}

STABLE_TORCH_LIBRARY_IMPL(llama_ext, CompositeExplicitAutograd, m) {
  m.impl("rmsnorm_fwd", TORCH_BOX(&lx::rmsnorm_fwd));
  m.impl("rmsnorm_bwd", TORCH_BOX(&lx::rmsnorm_bwd));
  m.impl("rmsnorm_residual_fwd", TORCH_BOX(&lx::rmsnorm_residual_fwd));
  m.impl("rmsnorm_residual_bwd", TORCH_BOX(&lx::rmsnorm_residual_bwd));

  m.impl("swiglu_fwd", TORCH_BOX(&lx::swiglu_fwd));
  m.impl("swiglu_bwd", TORCH_BOX(&lx::swiglu_bwd));
  m.impl("swiglu_halves_bwd", TORCH_BOX(&lx::swiglu_halves_bwd));

  m.impl("rope", TORCH_BOX(&lx::rope));
  m.impl("rope_qk", TORCH_BOX(&lx::rope_qk));

  m.impl("attention_fwd", TORCH_BOX(&lx::attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&lx::attention_bwd));

  m.impl("cross_entropy_fwd", TORCH_BOX(&lx::cross_entropy_fwd));
  m.impl("mean_loss", TORCH_BOX(&lx::mean_loss));
  m.impl("cross_entropy_bwd", TORCH_BOX(&lx::cross_entropy_bwd));
  m.impl("cross_entropy_bwd_", TORCH_BOX(&lx::cross_entropy_bwd_));

  m.impl("linear", TORCH_BOX(&lx::linear));
  m.impl("linear_int8", TORCH_BOX(&lx::linear_int8));

  m.impl("blocks_cached", TORCH_BOX(&lx::blocks_cached));

  m.impl("cpu_isa", TORCH_BOX(&lx::cpu_isa));
  m.impl("cpu_isas", TORCH_BOX(&lx::cpu_isas));
  m.impl("cuda_kernels", TORCH_BOX(&lx::cuda_kernels));
}
