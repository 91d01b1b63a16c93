// The CUDA table of kernels, and the library's only exported symbol.
#include "kernels.cuh"

#include <cuda_runtime_api.h>

#include "launch.cuh"

#define LX_STRING_(...) #__VA_ARGS__
#define LX_STRING(...) LX_STRING_(__VA_ARGS__)

namespace lx {
namespace {

thread_local cudaError_t latest_error = cudaSuccess;

const char* last_error() { return cudaGetErrorString(latest_error); }

}  // namespace

Status launch_status() {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return kOk;
  latest_error = error;
  return kLaunchFailed;
}

}  // namespace lx

extern "C" __attribute__((visibility("default"))) const Kernels* lx_cuda_kernels() {
  static const Kernels table = [] {
    Kernels k{};  // a kernel that is not listed is null: not written yet
    k.version = kApiVersion;
    k.name = "CUDA " LX_STRING(__CUDA_ARCH_LIST__);  // 800,900 for sm_80 and sm_90
    k.last_error = lx::last_error;
    k.rmsnorm_fwd = lx::rmsnorm_fwd;
    k.rmsnorm_bwd = lx::rmsnorm_bwd;
    k.rmsnorm_bwd_parts = lx::rmsnorm_bwd_parts;
    k.swiglu_fwd = lx::swiglu_fwd;
    k.swiglu_bwd = lx::swiglu_bwd;
    k.rope = lx::rope;
    k.cross_entropy_fwd = lx::cross_entropy_fwd;
    k.mean_loss = lx::mean_loss;
    k.cross_entropy_bwd = lx::cross_entropy_bwd;
    k.attention_fwd = lx::attention_fwd;
    k.attention_fwd_parts = lx::attention_fwd_parts;
    k.attention_bwd = lx::attention_bwd;
    k.linear_int8 = lx::linear_int8;
    return k;
  }();
  return &table;
}
