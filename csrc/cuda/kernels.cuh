// The launchers, as the table in kernels.cu lists them. What each does is told in api.h.
#pragma once
#include "../api.h"

namespace lx {

Status rmsnorm_fwd(void* y, void* h, void* rstd, const void* x, Rows x_rows, const void* residual,
                   Rows residual_rows, const void* weight, int64_t D, double eps, DType dtype,
                   DType weight_dtype, Stream stream);
Status rmsnorm_bwd(void* dx, void* dweight, void* partial, const void* dy, Rows dy_rows,
                   const void* dh, Rows dh_rows, const void* h, Rows h_rows, const void* weight,
                   const void* rstd, int64_t D, DType dtype, DType weight_dtype, Stream stream);
int64_t rmsnorm_bwd_parts(int64_t rows);
Status attention_bwd(void* dq, void* dk, void* dv, void* delta, const void* dout,
                     const int64_t dout_stride[3], const void* o, const void* lse,
                     const void* dlse, const Attention* a, Stream stream);
Status attention_fwd(void* o, void* lse, void* partial, const Attention* a, Stream stream);
int64_t attention_fwd_parts(const Attention* a);

Status swiglu_fwd(void* out, const void* gate, Rows gate_rows, const void* up, Rows up_rows,
                  int64_t F, DType dtype, Stream stream);
Status swiglu_bwd(void* dgate, void* dup, int64_t grad_stride, const void* dout, Rows dout_rows,
                  const void* gate, Rows gate_rows, const void* up, Rows up_rows, int64_t F,
                  DType dtype, Stream stream);

Status rope(void* q_out, void* k_out, const void* q, Rows q_rows, const void* k, Rows k_rows,
            const void* cos, const void* sin, const int64_t table_stride[2], int64_t D,
            int interleaved, int inverse, DType dtype, DType table_dtype, Stream stream);

Status cross_entropy_fwd(void* loss, void* lse, const void* logits, Rows logits_rows,
                         const int64_t* target, int64_t V, int64_t ignore_index,
                         double label_smoothing, double z_loss, DType dtype, Stream stream);
Status mean_loss(void* mean, void* inv_count, const void* loss, const int64_t* target, int64_t rows,
                 int64_t ignore_index, DType dtype, Stream stream);
Status cross_entropy_bwd(void* dlogits, const void* logits, Rows logits_rows, const int64_t* target,
                         const void* lse, const void* dloss, int64_t dloss_stride, int64_t V,
                         int64_t ignore_index, double label_smoothing, double z_loss, DType dtype,
                         Stream stream);

Status linear_int8(void* y, const void* x, Rows x_rows, const int8_t* w, int64_t w_stride,
                   const float* scale, int64_t N, int64_t K, DType dtype, Stream stream);

}  // namespace lx
