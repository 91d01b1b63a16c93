// A kernel of the everyday kind for test_vgpu_speed.py: a row of 4096 bf16 per block, normalised by
// its root mean square. 16-byte accesses, fp32 arithmetic, shuffles, shared memory.
#include <cuda_bf16.h>
#include <stdint.h>

constexpr int kThreads = 256, kVectors = 2;

__device__ float2 pair(uint4 v, int j) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162*>(&v)[j]);
}

extern "C" __global__ void normalise(uint4* y, const uint4* x, const uint4* weight, float eps) {
  __shared__ float s_part[kThreads / 32];
  x += static_cast<int64_t>(blockIdx.x) * kThreads * kVectors;
  y += static_cast<int64_t>(blockIdx.x) * kThreads * kVectors;
  uint4 row[kVectors];
  float sum = 0;
  for (int k = 0; k < kVectors; k++) {
    row[k] = x[threadIdx.x + k * kThreads];
    for (int j = 0; j < 4; j++) {
      const float2 v = pair(row[k], j);
      sum += v.x * v.x + v.y * v.y;
    }
  }
  for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  if (threadIdx.x % 32 == 0) s_part[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0;
  for (int k = 0; k < kThreads / 32; k++) sum += s_part[k];
  const float rstd = rsqrtf(sum / (8 * kThreads * kVectors) + eps);
  for (int k = 0; k < kVectors; k++) {
    const uint4 w = weight[threadIdx.x + k * kThreads];
    uint4 out;
    for (int j = 0; j < 4; j++)
      reinterpret_cast<__nv_bfloat162*>(&out)[j] = __floats2bfloat162_rn(
          pair(row[k], j).x * rstd * pair(w, j).x, pair(row[k], j).y * rstd * pair(w, j).y);
    y[threadIdx.x + k * kThreads] = out;
  }
}
