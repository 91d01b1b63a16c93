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

}  // namespace lx
