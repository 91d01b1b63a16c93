// The CPU's table of kernels for one instruction set; compiled once for each (see setup.py).
#include "attention_bwd.h"
#include "attention_fwd.h"
#include "cross_entropy.h"
#include "linear.h"
#include "rmsnorm.h"
#include "rope.h"
#include "swiglu.h"

#define LX_STRING_(s) #s
#define LX_STRING(s) LX_STRING_(s)
#define LX_CONCAT_(a, b) a##b
#define LX_CONCAT(a, b) LX_CONCAT_(a, b)

extern "C" const Kernels* LX_CONCAT(lx_cpu_kernels_, LX_ISA)() {
  using namespace lx::LX_ISA;
  static const Kernels table = {
      .version = kApiVersion,
      .name = "CPU " LX_STRING(LX_ISA),
      .rmsnorm_fwd = rmsnorm_fwd,
      .rmsnorm_bwd = rmsnorm_bwd,
      .rmsnorm_bwd_parts = rmsnorm_bwd_parts,
      .swiglu_fwd = swiglu_fwd,
      .swiglu_bwd = swiglu_bwd,
      .rope = rope,
      .cross_entropy_fwd = cross_entropy_fwd,
      .mean_loss = mean_loss,
      .cross_entropy_bwd = cross_entropy_bwd,
      .attention_fwd = attention_fwd,
      .attention_fwd_parts = attention_fwd_parts,
      .attention_bwd = attention_bwd,
      .linear = linear,
      .linear_int8 = linear_int8,
  };
  return &table;
}
