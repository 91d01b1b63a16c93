// Vectors of a storage type, moved 16 bytes at a time and computed on in fp32 (fp64 for fp64).
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "ptx.cuh"

namespace lx {

using bf16 = __nv_bfloat16;
using f16 = __half;

// What values of type T are computed in.
template <class T> using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// How many values of type T a 16-byte access moves.
template <class T> constexpr int kVecSize = 16 / sizeof(T);

__device__ inline float to_acc(float v) { return v; }
__device__ inline double to_acc(double v) { return v; }
__device__ inline float to_acc(bf16 v) { return ptx::upper_half(__bfloat16_as_ushort(v)); }
__device__ inline float to_acc(f16 v) { return __half2float(v); }

template <class T> __device__ T round_to(Acc<T> v) {
  if constexpr (std::is_same_v<T, bf16>) return __float2bfloat16_rn(v);
  else if constexpr (std::is_same_v<T, f16>) return __float2half_rn(v);
  else return v;
}

// kN values as they are stored, aligned so that they are moved in accesses of up to 16 bytes.
template <class T, int kN> struct alignas(kN * sizeof(T) < 16 ? kN * sizeof(T) : 16) Vec {
  T at[kN];
};

// From memory that is read again, by this block or a later one: through L1.
template <int kN, class T> __device__ Vec<T, kN> load(const T* p) {
  return *reinterpret_cast<const Vec<T, kN>*>(p);
}

// From memory that is read once and not written during the kernel.
template <int kN, class T> __device__ Vec<T, kN> load_once(const T* p) {
  if constexpr (kN * sizeof(T) == 16) {
    const uint4 bits = ptx::ld_global_nc_no_allocate(p);
    return reinterpret_cast<const Vec<T, kN>&>(bits);
  } else {
    return load<kN>(p);
  }
}

template <class T, int kN> __device__ void store(T* p, const Vec<T, kN>& v) {
  *reinterpret_cast<Vec<T, kN>*>(p) = v;
}

}  // namespace lx
