// One function per PTX instruction; the only file with asm.
#pragma once
#include <cuda_runtime_api.h>

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

}  // namespace lx::ptx
