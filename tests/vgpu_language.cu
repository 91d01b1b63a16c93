// What nvcc makes of the CUDA language, for test_vgpu_language.py: the math library, structs by
// value, switch, local arrays, constants, assert and printf, cooperative groups, half intrinsics.
#include <assert.h>
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
#include <stdio.h>

#define KERNEL extern "C" __global__ void
namespace cg = cooperative_groups;

KERNEL functions(float* y, const float* x, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const float v = x[i], a = fabsf(v);
  const float results[] = {
      expf(v), logf(a), sinf(v * 100000), cosf(v), tanhf(v), powf(a, 1.7f), erff(v), rsqrtf(a),
      sqrtf(a), __expf(v), __logf(a), __fdividef(v, 3), v / (1 + expf(-v)), fmodf(v, 0.7f),
      roundf(v * 10), rintf(v * 10), cbrtf(v), log1pf(a), expm1f(v), atan2f(v, 2), __frcp_rn(v),
      __fsqrt_rz(a), exp2f(v), log2f(a), ldexpf(v, 3), fminf(v, 0.5f) + fmaxf(v, -0.25f),
      copysignf(2, v), hypotf(v, 1), erfcf(v)};
  for (int k = 0; k < sizeof results / sizeof results[0]; k++) y[k * n + i] = results[k];
}

KERNEL double_functions(double* y, const double* x, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const double v = x[i], a = fabs(v);
  const double results[] = {exp(v), log(a), sqrt(a), v / 3.3, rsqrt(a), tanh(v), 1 / v};
  for (int k = 0; k < sizeof results / sizeof results[0]; k++) y[k * n + i] = results[k];
}

KERNEL integers(uint64_t* y, const uint64_t* x) {
  const uint64_t v = x[threadIdx.x];
  const uint32_t low = v, high = v >> 32;
  y[threadIdx.x] = v / 12345 + v % 77 + __umul64hi(v, v) + low / 7 + __popcll(v) + __clzll(v) +
                   __brev(low) + __byte_perm(low, high, 0x2143) + __ffs(low) +
                   __funnelshift_l(low, high, 5) + static_cast<int64_t>(v) / -17;
}

struct Arguments {
  int64_t stride[3];
  float scale;
  int table[5];
};

KERNEL struct_by_value(float* y, const float* x, Arguments p, int j) {
  y[threadIdx.x] = x[threadIdx.x] * p.scale + p.stride[j % 3] + p.table[threadIdx.x % 5];
}

KERNEL switch_statement(int* y, const int* x) {
  const int i = threadIdx.x, v = x[i];
  int r;
  switch (v) {
    case 0: r = 5; break;
    case 1: r = v * 7; break;
    case 2: r = i; break;
    case 3: r = -1; break;
    case 4: r = i * i; break;
    case 5: r = 1 << i % 31; break;
    default: r = 99;
  }
  y[i] = r;
}

KERNEL local_array(int* y, const int* x) {
  int a[16];
  for (int k = 0; k < 16; k++) a[k] = 3 * k;
  a[x[threadIdx.x] & 15] = 1000;
  int sum = 0;
  for (int k = 0; k < 16; k++) sum += a[(k + threadIdx.x) & 15] * (k + 1);
  y[threadIdx.x] = sum;
}

KERNEL local_array_too_far(int* y, const int* x) {
  int a[16];
  for (int k = 0; k < 16; k++) a[k] = x[k];
  y[threadIdx.x] = a[x[threadIdx.x] + 17];
}

__constant__ float kTable[4] = {1, 2, 3, 4};
__device__ int d_count;

KERNEL constants(float* y, float least) {
  y[threadIdx.x] = kTable[threadIdx.x % 4];
  assert(y[threadIdx.x] >= least);
  if (threadIdx.x > 1000) printf("thread %d\n", threadIdx.x);
  if (atomicAdd(&d_count, 1) < 0) y[threadIdx.x] = 0;
}

KERNEL groups(int* y) {
  const auto block = cg::this_thread_block();
  const auto warp = cg::tiled_partition<32>(block);
  const auto tile = cg::tiled_partition<8>(block);
  const int lane = warp.thread_rank();
  const int sum = cg::reduce(warp, lane, cg::plus<int>());
  const int other = tile.shfl_xor(lane, 1);
  block.sync();
  y[block.thread_rank()] = sum * 100 + other + (tile.any(lane == 3) ? 1 : 0);
}

struct Pair {
  int64_t first;
  float second;
};

__noinline__ __device__ float power(float x, int n) {
  float result = 1;
  for (int k = 0; k < n; k++) result *= x;
  return result;
}

__noinline__ __device__ Pair both(Pair p, const int* table, int i) {
  switch (table[i] & 7) {
    case 0: p.first += 5; break;
    case 1: p.second = power(p.second, 2); break;
    case 2: p.first *= 7; break;
    case 3: return {i, 0.5f};
    case 4: p.second += 1; break;
    case 5: p.first -= 3; break;
    default: p.second = -power(p.second, 3);
  }
  return p;
}

KERNEL calls(int64_t* first, float* second, const int* table) {  // from divergent code as well
  const int i = threadIdx.x;
  Pair p = {i, i * 0.25f};
  if (i % 3) p = both(p, table, i);
  p = both(p, table, 63 - i);
  first[i] = p.first;
  second[i] = p.second;
}

KERNEL double_power(double* y, const double* x) {
  y[threadIdx.x] = pow(fabs(x[threadIdx.x]), 1.3);
}

KERNEL __launch_bounds__(64) bounded(int* y) { y[threadIdx.x] = 1; }

KERNEL halves(__half2* y, __nv_bfloat162* z, const __half2* x, const __nv_bfloat162* w) {
  const int i = threadIdx.x;
  y[i] = __hfma2(x[i], x[i], __float2half2_rn(0.5f));
  y[i + 32] = h2exp(x[i]);
  y[i + 64] = __hmax2(x[i], __hneg2(x[i]));
  y[i + 96] = __h2div(x[i], __float2half2_rn(3));
  z[i] = __hmul2(w[i], w[i]);
  z[i + 32] = __hadd2(w[i], w[i]);
  z[i + 64] = __hsub2(w[i], __floats2bfloat162_rn(1, 2));
  z[i + 96] = h2rcp(w[i]);
}
