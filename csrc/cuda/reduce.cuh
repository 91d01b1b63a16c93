// Sums over a warp and over a row's threads. The order of the additions is fixed.
#pragma once
#include "ptx.cuh"

namespace lx {

constexpr unsigned kAllLanes = 0xffffffffu;

// The sum over the 32 lanes, in every lane.
template <class A> __device__ A warp_sum(A v) {
  for (int other = 16; other > 0; other /= 2) v += __shfl_xor_sync(kAllLanes, v, other);
  return v;
}

// The sum over the blockDim.x threads of one threadIdx.y, in each of them; blockDim.x is a multiple
// of 32. s_warps [32] in shared memory is theirs alone; they may use it again after another barrier
// of the group (alternate two of them in a loop). No group may use barrier 0 but by __syncthreads.
template <class A> __device__ A group_sum(A v, A* s_warps) {
  v = warp_sum(v);
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warps == 1) return v;
  if (lane == 0) s_warps[warp] = v;
  ptx::bar_sync(1 + threadIdx.y, blockDim.x);  // every warp's sum is in s_warps
  return warp_sum(lane < warps ? s_warps[lane] : A(0));
}

constexpr int kMaxGroups = 15;  // barriers 1 to 15

}  // namespace lx
