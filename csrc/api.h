/* The C API of the kernels: the one table that every backend (CPU, CUDA, virtual) fills.
 *
 * Plain C: raw pointers, sizes, strides in elements. Outputs come first and are overwritten, never
 * accumulated into. Nothing is allocated or kept between calls; scratch memory that outlives a
 * kernel is passed in. Accumulation is in fp32 (fp64 for fp64 data), with one rounding at the
 * store. Every result is bitwise the same from run to run and for any number of threads.
 *
 * B batch, T queries, S keys, H heads, Hkv key/value heads, D width or head dim, F feed-forward
 * width, V vocabulary. "acc" is fp32, or fp64 when dtype is fp64.
 */
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { kApiVersion = 5 };

typedef enum DType { kFloat32, kBFloat16, kFloat16, kFloat64 } DType;

typedef enum Status {
  kOk = 0,
  kUnsupported = 1,  /* a dtype or size this backend has no kernel for */
  kLaunchFailed = 2, /* the device refused; see last_error */
  kOutOfMemory = 3,  /* no room for a kernel's scratch memory */
} Status;

/* Where the rows of a tensor (n0, n1, n2, width) with unit last stride lie: row (i, j, k) begins at
 * element i * stride[0] + j * stride[1] + k * stride[2]. Unused leading sizes are 1. */
typedef struct Rows {
  int64_t size[3];
  int64_t stride[3];
} Rows;

/* A CPU backend runs on its caller's threads. */
typedef struct ThreadPool {
  int (*num_threads)(void);
  void (*parallel_for)(int64_t begin, int64_t end, int64_t grain,
                       void (*body)(int64_t begin, int64_t end, void* arg), void* arg);
} ThreadPool;

/* Where a kernel runs: a cudaStream_t for CUDA, a const ThreadPool* for the CPU. */
typedef void* Stream;

/* What attention works on. Elements of q lie at b * q_stride[0] + t * q_stride[1] + h * q_stride[2]
 * + d, likewise k and v. Head h reads key/value head h / (H / Hkv). Query i of T sees key j of S
 * when  j <= i + S - T  (causal)  and  |i + S - T - j| < window  (window > 0).
 * Packed: cu_q and cu_k hold B + 1 rising offsets, sequence b is tokens cu_q[b]..cu_q[b+1] of q and
 * cu_k[b]..cu_k[b+1] of k and v, strides [0] are unused, T and S are the totals. */
typedef struct Attention {
  const void* q; /* (B, T, H, D) */
  const void* k; /* (B, S, Hkv, D) */
  const void* v; /* (B, S, Hkv, D) */
  int64_t q_stride[3], k_stride[3], v_stride[3];
  const int32_t* cu_q; /* (B + 1), or null */
  const int32_t* cu_k; /* (B + 1), or null */
  int64_t B, T, S, H, Hkv, D;
  double scale;
  int64_t window; /* 0: none */
  int causal;
  DType dtype;
} Attention;

typedef struct Kernels {
  int version;      /* kApiVersion */
  const char* name; /* for people: "CPU avx512", "CUDA" */

  /* What the latest kLaunchFailed of this thread was, as a clause; null where nothing can fail so.
   * A null kernel below is one that this backend does not have yet. */
  const char* (*last_error)(void);

  /* h = x + residual (x itself when residual is null); rstd = 1 / sqrt(mean(h^2) + eps);
   * y = h * rstd * weight. y, h (rows, D) contiguous; h null when residual is; rstd (rows) acc;
   * weight (D) in weight_dtype, which is dtype or fp32. */
  Status (*rmsnorm_fwd)(void* y, void* h, void* rstd, const void* x, Rows x_rows,
                        const void* residual, Rows residual_rows, const void* weight, int64_t D,
                        double eps, DType dtype, DType weight_dtype, Stream stream);

  /* dx = rstd * (dy * weight - h * rstd^2 * mean(dy * weight * h)) + dh;
   * dweight = sum over rows of dy * h * rstd. dx (rows, D) contiguous; dweight (D) in weight_dtype,
   * null when not wanted; partial (rmsnorm_bwd_parts(rows), D) acc scratch, null with dweight;
   * dh the gradient that reaches h from elsewhere, or null. */
  Status (*rmsnorm_bwd)(void* dx, void* dweight, void* partial, const void* dy, Rows dy_rows,
                        const void* dh, Rows dh_rows, const void* h, Rows h_rows,
                        const void* weight, const void* rstd, int64_t D, DType dtype,
                        DType weight_dtype, Stream stream);
  int64_t (*rmsnorm_bwd_parts)(int64_t rows);

  /* out = silu(gate) * up, all (rows, F), out contiguous. */
  Status (*swiglu_fwd)(void* out, const void* gate, Rows gate_rows, const void* up, Rows up_rows,
                       int64_t F, DType dtype, Stream stream);

  /* With s = sigmoid(gate): dgate = dout * up * s * (1 + gate * (1 - s)), dup = dout * gate * s.
   * Rows of dgate and of dup begin grad_stride apart: F when each is contiguous, 2F when they are
   * the halves of one (rows, 2F). */
  Status (*swiglu_bwd)(void* dgate, void* dup, int64_t grad_stride, const void* dout,
                       Rows dout_rows, const void* gate, Rows gate_rows, const void* up,
                       Rows up_rows, int64_t F, DType dtype, Stream stream);

  /* Pairs (a, b) of q (B, T, H, D) and k (B, T, Hkv, D) become (a cos - b sin, a sin + b cos);
   * inverse turns the sign of sin. Pairs are (2i, 2i+1) when interleaved, else (i, i + D/2). q and
   * k have unit last stride, q_rows = (B, T, H), k_rows = (B, T, Hkv); k and k_out are null, Hkv 0,
   * where there is only q. q_out, k_out are contiguous. cos and sin (B or 1, T, D/2) in
   * table_dtype, which is dtype or fp32, share table_stride (batch, token), batch 0 for one table
   * of all. */
  Status (*rope)(void* q_out, void* k_out, const void* q, Rows q_rows, const void* k, Rows k_rows,
                 const void* cos, const void* sin, const int64_t table_stride[2], int64_t D,
                 int interleaved, int inverse, DType dtype, DType table_dtype, Stream stream);

  /* lse = log(sum(exp(logits))); with s = label_smoothing, 0 <= s <= 1,
   * loss = lse - (1 - s) * logits[target] - s * mean(logits) + z_loss * lse^2.
   * loss, lse (rows) acc; logits (rows, V); target (rows), 0 <= target < V or ignore_index: such a
   * row is not read, loss = lse = 0. Any other target gives loss = NaN. */
  Status (*cross_entropy_fwd)(void* loss, void* lse, const void* logits, Rows logits_rows,
                              const int64_t* target, int64_t V, int64_t ignore_index,
                              double label_smoothing, double z_loss, DType dtype, Stream stream);

  /* mean = sum(loss) / n, inv_count = 1 / n, where n counts the rows whose target is not
   * ignore_index; single numbers, acc. loss (rows) acc. */
  Status (*mean_loss)(void* mean, void* inv_count, const void* loss, const int64_t* target,
                      int64_t rows, int64_t ignore_index, DType dtype, Stream stream);

  /* dlogits = (exp(logits - lse) * (1 + 2 * z_loss * lse) - (1 - s) * [column is target] - s / V)
   * * dloss; 0 where target is ignore_index, NaN where it is not one of the V columns either.
   * dlogits (rows, V) contiguous, may be logits itself; dloss is acc and lies dloss_stride apart
   * (0: one value for all rows). */
  Status (*cross_entropy_bwd)(void* dlogits, const void* logits, Rows logits_rows,
                              const int64_t* target, const void* lse, const void* dloss,
                              int64_t dloss_stride, int64_t V, int64_t ignore_index,
                              double label_smoothing, double z_loss, DType dtype, Stream stream);

  /* o = softmax(scale * q k^T) v over the keys each query sees; lse = log(sum(exp(scores))).
   * o (B, T, H, D) contiguous; lse (B, H, T), packed (H, T), acc. A query that sees nothing gets
   * o = 0 and lse = -inf. partial ((D + 1) B T H attention_fwd_parts(a)) acc scratch, null where
   * there is one part. */
  Status (*attention_fwd)(void* o, void* lse, void* partial, const Attention* a, Stream stream);
  int64_t (*attention_fwd_parts)(const Attention* a);

  /* p = exp(scores - lse), delta = sum(dout * o) - dlse per query, ds = p * (dout v^T - delta);
   * dq = scale ds k, dk = scale ds^T q, dv = p^T dout, summed over the heads of a group.
   * dq (B, T, H, D), dk, dv (B, S, Hkv, D) contiguous; delta, lse and its gradient dlse as lse of
   * attention_fwd, delta scratch, dlse null when there is none; o contiguous; dout has strides
   * (b, t, h) and unit last stride. */
  Status (*attention_bwd)(void* dq, void* dk, void* dv, void* delta, const void* dout,
                          const int64_t dout_stride[3], const void* o, const void* lse,
                          const void* dlse, const Attention* a, Stream stream);

  /* y = x w^T for each of `count` weights: y[m][n] = sum over k of x[m][k] * w[n][k]. y (rows, N)
   * contiguous; x (rows, K); w (N, K), its rows w_stride apart. For few rows; on the CPU alone. */
  Status (*linear)(void* const* y, const void* x, Rows x_rows, const void* const* w,
                   const int64_t* w_stride, const int64_t* N, int count, int64_t K, DType dtype,
                   Stream stream);

  /* y = x (scale w)^T: y[m][n] = scale[n] * sum over k of x[m][k] * w[n][k]. y (rows, N) contiguous;
   * x (rows, K); w (N, K), its rows w_stride apart; scale (N). */
  Status (*linear_int8)(void* y, const void* x, Rows x_rows, const int8_t* w, int64_t w_stride,
                        const float* scale, int64_t N, int64_t K, DType dtype, Stream stream);
} Kernels;

#ifdef __cplusplus
}
#endif
