// One function per PTX instruction; the only file with asm.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace lx::ptx {

// 16 bytes of memory that nothing writes during the kernel, read once: not kept in L1, so that what
// is read again (weights) stays there.
__device__ inline uint4 ld_global_nc_no_allocate(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(__cvta_generic_to_global(p)));
  return v;
}

// Waits until `threads` threads, a multiple of 32, have come to barrier `id`, and orders their
// memory accesses. Barrier 0 is __syncthreads().
__device__ inline void bar_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Announces at barrier `id` that this warp's accesses of memory are done; does not wait.
__device__ inline void bar_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// threadIdx.x, read anew at every call, so that nothing derived from it stays in registers between.
__device__ inline int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// p itself, of which the compiler forgets how it was made. For pointers that advance in a loop: it
// would keep one register pair for every constant distance from them instead of adding.
__device__ inline const char* opaque(const char* p) {
  asm volatile("" : "+l"(p));
  return p;
}

// v itself, likewise: what a loop makes of it is made anew each time, not kept in registers.
__device__ inline int opaque(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

// The address of shared memory as the instructions below take it.
__device__ inline uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory, past L1. They are there after this thread's
// cp_async_wait, for other threads after a barrier that follows it.
__device__ inline void cp_async(uint32_t to_shared, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to_shared),
               "l"(__cvta_generic_to_global(from))
               : "memory");
}

// The same of the first `bytes` (0 to 16), followed by zeros; with 0 nothing is read.
__device__ inline void cp_async_zero_fill(uint32_t to_shared, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to_shared),
               "l"(__cvta_generic_to_global(from)), "r"(bytes)
               : "memory");
}

// Makes a group of this thread's copies since the last call.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the kPending latest groups of this thread are done.
template <int kPending> __device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit values. Lane l gives the address of row l % 8 of matrix l / 8 and
// gets, of each matrix, the values (row l / 4, columns 2 (l % 4) and the next).
__device__ inline void ldmatrix(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// The same, each matrix transposed: rows 2 (l % 4) and the next, column l / 4.
__device__ inline void ldmatrix_trans(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// d = a (16 x 16) b (16 x 8) + c, d may be c. With g = l / 4 and k = 2 (l % 4), lane l has of c and
// d rows g (d[0], d[1]) and g + 8 (d[2], d[3]), columns k and k + 1; of a the pairs from (g, k),
// (g + 8, k), (g, k + 8), (g + 8, k + 8); of b the pairs down from (k, g) and (k + 8, g).
__device__ inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1, const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
}
__device__ inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                        uint32_t b1, const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
}

// 2^x to within 2 units in the last place; subnormal results are 0.
__device__ inline float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The float whose upper half is these bits, as bf16 becomes fp32. The conversion that sm_90 has for it
// takes more registers, and a shift is moved by the compiler to where it takes more too.
__device__ inline float upper_half(uint16_t bits) {
  float y;
  asm("mov.b32 %0, {0, %1};" : "=f"(y) : "h"(bits));
  return y;
}

}  // namespace lx::ptx
