// The catalogue of planted faults of test_vgpu_faults.py. Compiled twice: with PLANT=1 every kernel
// has its fault, with PLANT=0 it is the correct twin.
#include <cuda_pipeline.h>
#include <stdint.h>

#define KERNEL extern "C" __global__ void
constexpr bool kPlant = PLANT;

__device__ void barrier_unless_planted() {
  if (!kPlant) __syncthreads();
}

KERNEL out_of_bounds(float* y, const float* x, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (kPlant ? i <= n : i < n) y[i] = 2 * x[i];
}

KERNEL before_the_beginning(float* y, const float* x, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[kPlant ? i - 1 : i];
}

KERNEL missing_syncthreads(float* y, const float* x) {
  __shared__ float s[128];
  s[threadIdx.x] = x[threadIdx.x];
  barrier_unless_planted();
  y[threadIdx.x] = s[127 - threadIdx.x];
}

KERNEL missing_second_syncthreads(float* y, const float* x, int rounds) {  // write after read
  __shared__ float s[128];
  float total = 0;
  for (int r = 0; r < rounds; r++) {
    s[threadIdx.x] = x[r * 128 + threadIdx.x];
    __syncthreads();
    total += s[127 - threadIdx.x];
    barrier_unless_planted();
  }
  y[threadIdx.x] = total;
}

KERNEL shared_write_write(int* y) {
  __shared__ int s[64];
  s[kPlant ? threadIdx.x % 32 : threadIdx.x] = threadIdx.x;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x % 32];
}

KERNEL lanes_write_write(int* y) {  // lanes of one warp, different values, one address
  __shared__ int s[32];
  s[kPlant ? threadIdx.x / 2 : threadIdx.x] = threadIdx.x;
  __syncwarp();
  y[threadIdx.x] = s[threadIdx.x / 2];
}

KERNEL global_write_write_warps(int* y) {
  y[kPlant ? threadIdx.x % 32 : threadIdx.x] = threadIdx.x;
}

KERNEL global_read_write_warps(int* y, int* scratch) {
  scratch[threadIdx.x] = threadIdx.x;
  barrier_unless_planted();
  y[threadIdx.x] = scratch[127 - threadIdx.x];
}

KERNEL global_write_write_blocks(int* y) {
  y[kPlant ? threadIdx.x : blockIdx.x * blockDim.x + threadIdx.x] = blockIdx.x;
}

KERNEL global_read_write_blocks(int* y, const int* x) {  // y is x, moved by a block if planted
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const int next = (i + blockDim.x) % (gridDim.x * blockDim.x);
  y[i] = x[kPlant ? next : i] + 1;
}

KERNEL plain_instead_of_atomic(int* count) {
  if (threadIdx.x % 32) return;
  if (kPlant) *count += 1;
  else atomicAdd(count, 1);
}

KERNEL last_block_without_fence(float* out, float* partial, unsigned* count, const float* x) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = x[blockIdx.x];
    if (!kPlant) __threadfence();
    last = atomicAdd(count, 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    float total = 0;
    for (unsigned b = 0; b < gridDim.x; b++) total += partial[b];
    *out = total;
    *count = 0;
  }
}

KERNEL uninitialised_shared(float* y, const float* x) {
  __shared__ float s[128];
  if (threadIdx.x < (kPlant ? 127 : 128)) s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x ^ 1];
}

KERNEL uninitialised_global(float* y, float* scratch, const float* x) {  // scratch is fresh
  if (threadIdx.x != 70 || !kPlant) scratch[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = scratch[threadIdx.x];
}

KERNEL misaligned_vector(float4* y, const float* x) {
  y[threadIdx.x] = *reinterpret_cast<const float4*>(x + 4 * threadIdx.x + kPlant);
}

KERNEL divergent_barrier(int* y) {  // within a warp
  if (!kPlant || threadIdx.x < 48) __syncthreads();
  y[threadIdx.x] = threadIdx.x;
}

KERNEL barrier_in_both_branches(int* y) {
  if (!kPlant) __syncthreads();
  if (threadIdx.x % 2) {
    if (kPlant) __syncthreads();
    y[threadIdx.x] = 1;
  } else {
    if (kPlant) __syncthreads();
    y[threadIdx.x] = 0;
  }
}

KERNEL barrier_of_one_warp(int* y) {
  if (!kPlant || threadIdx.x < 32) __syncthreads();
  y[threadIdx.x] = threadIdx.x;
}

KERNEL barrier_after_exit(int* y, int n) {
  const bool mine = threadIdx.x < n;
  if (kPlant && !mine) return;
  __syncthreads();
  if (mine) y[threadIdx.x] = threadIdx.x;
}

KERNEL shuffle_outside_mask(int* y) {
  y[threadIdx.x] = __shfl_xor_sync(kPlant ? 0x0000ffff : 0xffffffff, threadIdx.x, 1);
}

KERNEL shuffle_names_absent_lanes(int* y) {
  int v = threadIdx.x;
  if (threadIdx.x < 16) v = __shfl_xor_sync(kPlant ? 0xffffffff : 0x0000ffff, v, 1);
  y[threadIdx.x] = v;
}

KERNEL shuffle_reads_absent_lane(int* y) {
  int v = threadIdx.x;
  if (threadIdx.x < 16) v = __shfl_xor_sync(0x0000ffff, v, kPlant ? 16 : 1);
  y[threadIdx.x] = v;
}

KERNEL cp_async_without_wait(float4* y, const float4* x) {
  __shared__ float4 s[64];
  __pipeline_memcpy_async(&s[threadIdx.x], &x[threadIdx.x], 16);
  __pipeline_commit();
  if (!kPlant) __pipeline_wait_prior(0);
  y[threadIdx.x] = s[threadIdx.x];
}

KERNEL cp_async_waits_one_group_short(float4* y, const float4* x) {
  __shared__ float4 s[2][64];
  for (int k = 0; k < 2; k++) {
    __pipeline_memcpy_async(&s[k][threadIdx.x], &x[64 * k + threadIdx.x], 16);
    __pipeline_commit();
  }
  __pipeline_wait_prior(1);
  const float4 first = s[0][threadIdx.x];
  if (!kPlant) __pipeline_wait_prior(0);
  const float4 second = s[1][threadIdx.x];
  y[threadIdx.x] = make_float4(first.x + second.x, first.y, second.z, first.w);
}

KERNEL cp_async_without_barrier(float4* y, const float4* x) {  // another warp's copy
  __shared__ float4 s[64];
  __pipeline_memcpy_async(&s[threadIdx.x], &x[threadIdx.x], 16);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  barrier_unless_planted();
  y[threadIdx.x] = s[63 - threadIdx.x];
}

KERNEL cp_async_into_a_stage_in_use(float4* y, const float4* x, int rounds) {
  __shared__ float4 s[64];
  float total = 0;
  for (int r = 0; r < rounds; r++) {
    __pipeline_memcpy_async(&s[threadIdx.x], &x[64 * r + threadIdx.x], 16);
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
    total += s[63 - threadIdx.x].x;
    barrier_unless_planted();
  }
  y[threadIdx.x].x = total;
}

KERNEL beyond_dynamic_shared(float* y, const float* x, int n) {  // n floats were asked for
  extern __shared__ float dynamic[];
  for (int i = threadIdx.x; kPlant ? i <= n : i < n; i += blockDim.x) dynamic[i] = x[i];
  __syncthreads();
  if (threadIdx.x < n) y[threadIdx.x] = dynamic[n - 1 - threadIdx.x];
}

KERNEL row_offset_overflow(uint16_t* x, int row, int columns) {  // row * columns > 2^31
  const int64_t offset = kPlant ? row * columns : static_cast<int64_t>(row) * columns;
  x[offset + threadIdx.x] = threadIdx.x;
}

KERNEL missing_syncwarp(int* y) {
  __shared__ int s[32];
  s[threadIdx.x] = threadIdx.x;
  if (!kPlant) __syncwarp();
  y[threadIdx.x] = s[31 - threadIdx.x];
}

KERNEL last_reader_writes(int* y) {  // what all lanes have read in one instruction
  __shared__ int s[32];
  s[threadIdx.x] = threadIdx.x;
  __syncwarp();
  const int first = s[0];
  if (!kPlant) __syncwarp();
  if (threadIdx.x == 31) s[0] = 5;
  __syncwarp();
  y[threadIdx.x] = first + s[0];
}

KERNEL never_ends(volatile int* flag, int* y) {
  while (kPlant && *flag == 0) {
  }
  y[threadIdx.x] = 1;
}

KERNEL wrong_order_of_named_barriers(int* y) {  // each half of the block waits for the other
  if (threadIdx.x < 32) {
    asm volatile("bar.sync 1, 64;" ::: "memory");
    asm volatile("bar.sync 2, 64;" ::: "memory");
  } else if (kPlant) {
    asm volatile("bar.sync 2, 64;" ::: "memory");
    asm volatile("bar.sync 1, 64;" ::: "memory");
  } else {
    asm volatile("bar.sync 1, 64;" ::: "memory");
    asm volatile("bar.sync 2, 64;" ::: "memory");
  }
  y[threadIdx.x] = threadIdx.x;
}
