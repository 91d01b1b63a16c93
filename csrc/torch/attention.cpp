#include "ops.h"

namespace lx {
namespace {

constexpr const char* kOp = "attention";
using MaybeTensor = std::optional<Tensor>;

// The checked inputs, and what the kernels are told of them.
struct Inputs {
  Tensor q, k, v;  // with unit last stride
  Attention a;

  Inputs(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, double scale, bool causal,
         int64_t window, const MaybeTensor& cu_q, const MaybeTensor& cu_k) {
    const DType dtype = dtype_of(kOp, "q", q_in);
    const bool packed = cu_q.has_value();
    check(packed == cu_k.has_value(), kOp, ": cu_seqlens: expected offsets of queries and of keys, "
          "got only one of them");
    const int64_t dims = packed ? 3 : 4;
    check(q_in.dim() == dims, kOp, ": q: expected shape ", packed ? "(N, H, D)" : "(B, T, H, D)",
          packed ? " with" : " without", " cu_seqlens, got ", ShapeOf{q_in});
    const int64_t heads = dims - 2, token = dims - 3;
    const int64_t B = packed ? cu_q->size(0) - 1 : q_in.size(0), D = q_in.size(dims - 1);
    const bool fits =
        k_in.dim() == dims && (packed || k_in.size(0) == B) && k_in.size(dims - 1) == D;
    if (!fits && packed)
      fail(kOp, ": k: expected shape (N, Hkv, ", D, "), got ", ShapeOf{k_in});
    check(fits, kOp, ": k: expected shape (", B, ", S, Hkv, ", D, "), got ", ShapeOf{k_in});
    const int64_t H = q_in.size(heads), Hkv = k_in.size(heads);
    check(Hkv > 0 ? H % Hkv == 0 : H == 0, kOp, ": k: expected a number of heads that divides the ",
          H, " of q, got ", Hkv);
    check_same_dtype(kOp, "k", k_in, "q", q_in);
    check_same_device(kOp, "k", k_in, "q", q_in);
    check_like(kOp, "v", v_in, "k", k_in);
    check(window >= 0, kOp, ": window: expected at least 1, got ", window);
    const int64_t T = q_in.size(token), S = k_in.size(token);
    if (packed) {
      check_offsets(kOp, "cu_seqlens", *cu_q, T, q_in);
      check_offsets(kOp, "cu_seqlens", *cu_k, S, q_in);
      check(cu_k->size(0) == B + 1, kOp, ": cu_seqlens: expected as many offsets of keys as of "
            "queries, ", B + 1, ", got ", cu_k->size(0));
    }
    q = with_contiguous_last(q_in, 1);
    k = with_contiguous_last(k_in, 1);
    v = with_contiguous_last(v_in, 1);
    a = {.q = q.const_data_ptr(), .k = k.const_data_ptr(), .v = v.const_data_ptr(),
         .q_stride = {}, .k_stride = {}, .v_stride = {},
         .cu_q = packed ? static_cast<const int32_t*>(cu_q->const_data_ptr()) : nullptr,
         .cu_k = packed ? static_cast<const int32_t*>(cu_k->const_data_ptr()) : nullptr,
         .B = B, .T = T, .S = S, .H = H, .Hkv = Hkv, .D = D, .scale = scale, .window = window,
         .causal = causal, .dtype = dtype};
    for (int64_t i = packed ? 1 : 0; i < 3; i++) {
      const int64_t dim = packed ? i - 1 : i;
      a.q_stride[i] = q.stride(dim);
      a.k_stride[i] = k.stride(dim);
      a.v_stride[i] = v.stride(dim);
    }
  }

  // The shape of lse.
  Tensor new_lse() const {
    const ScalarType acc = acc_dtype(q);
    return a.cu_q ? new_tensor({a.H, a.T}, acc, q) : new_tensor({a.B, a.H, a.T}, acc, q);
  }
};

void check_lse(const char* arg, const Tensor& lse, const Tensor& like) {
  check_like(kOp, arg, lse, "what the forward returned", like);
  check(lse.is_contiguous(), kOp, ": ", arg, ": expected a contiguous tensor");
}

}  // namespace

int64_t check_offsets(const char* op, const char* arg, const Tensor& cu, int64_t total,
                      const Tensor& q) {
  check(cu.dim() == 1 && cu.size(0) >= 1, op, ": ", arg, ": expected shape (sequences + 1,), got ",
        ShapeOf{cu});
  check(cu.scalar_type() == ScalarType::Int && cu.is_contiguous(), op, ": ", arg,
        ": expected contiguous int32, got ", dtype_text(cu.scalar_type()));
  check_same_device(op, arg, cu, "q", q);
  const int64_t last = cu.size(0) - 1;
  if (!cu.is_cpu()) return last;
  const auto* at = static_cast<const int32_t*>(cu.const_data_ptr());
  check(at[0] == 0 && at[last] == total, op, ": ", arg, ": expected offsets from 0 to ", total,
        ", the tokens, got ", at[0], " to ", at[last]);
  for (int64_t i = 0; i < last; i++)
    check(at[i] <= at[i + 1], op, ": ", arg, ": expected rising offsets, got ", at[i], " before ",
          at[i + 1]);
  return last;
}

std::tuple<Tensor, Tensor> attention_fwd(Tensor q, Tensor k, Tensor v, double scale, bool causal,
                                         int64_t window, MaybeTensor cu_q, MaybeTensor cu_k) {
  const Backend backend = kernels_for(kOp, "q", q);
  const Inputs in(q, k, v, scale, causal, window, cu_q, cu_k);
  Tensor o = new_like(q), lse = in.new_lse();
  if (lse.numel() == 0) return {o, lse};
  const int64_t parts = backend.get(&Kernels::attention_fwd_parts)(&in.a);
  MaybeTensor partial;
  if (parts > 1) partial = new_tensor({parts, lse.numel(), in.a.D + 1}, acc_dtype(q), q);
  backend.run(&Kernels::attention_fwd, o.mutable_data_ptr(), lse.mutable_data_ptr(),
              partial ? partial->mutable_data_ptr() : nullptr, &in.a);
  return {o, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd(Tensor dout, MaybeTensor dlse, Tensor q, Tensor k,
                                                 Tensor v, Tensor o, Tensor lse, double scale,
                                                 bool causal, int64_t window, MaybeTensor cu_q,
                                                 MaybeTensor cu_k) {
  const Backend backend = kernels_for(kOp, "q", q);
  const Inputs in(q, k, v, scale, causal, window, cu_q, cu_k);
  check_like(kOp, "dout", dout, "q", q);
  check_like(kOp, "o", o, "q", q);
  Tensor delta = in.new_lse();
  check_lse("lse", lse, delta);
  if (dlse) check_lse("dlse", *dlse, delta);
  const Tensor grad = with_contiguous_last(dout, 1), out = with_contiguous_last(o, o.dim());
  int64_t stride[3] = {};
  for (int64_t i = 0; i < grad.dim() - 1; i++) stride[i + 4 - grad.dim()] = grad.stride(i);
  Tensor dq = new_like(q), dk = new_like(k), dv = new_like(v);
  if (dq.numel() && dk.numel()) {
    backend.run(&Kernels::attention_bwd, dq.mutable_data_ptr(), dk.mutable_data_ptr(),
                dv.mutable_data_ptr(), delta.mutable_data_ptr(), grad.const_data_ptr(), stride,
                out.const_data_ptr(), lse.const_data_ptr(), dlse ? dlse->const_data_ptr() : nullptr,
                &in.a);
  } else {
    for (Tensor* t : {&dq, &dk, &dv})
      if (t->numel()) torch::stable::zero_(*t);
  }
  return {dq, dk, dv};
}

}  // namespace lx
