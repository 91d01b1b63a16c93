"""The engine from C++ alone, as a stand-in for the CUDA runtime uses it: without Python."""

import subprocess

from vgpu import build

MAIN = r"""
#include "engine.h"
#include <cstdio>
#include <vector>

const char* kPtx = R"(.version 8.8
.target sm_80
.address_size 64
.const .align 4 .f32 scale = 0f40000000;
.visible .entry twice(.param .u64 y, .param .u64 x, .param .u32 n) {
  .reg .b64 %rd<5>; .reg .f32 %f<3>; .reg .b32 %r<4>; .reg .pred %p;
  ld.param.u64 %rd1, [y]; ld.param.u64 %rd2, [x]; ld.param.u32 %r1, [n];
  mov.u32 %r2, %ctaid.x; mov.u32 %r3, %tid.x; mad.lo.u32 %r2, %r2, 64, %r3;
  setp.ge.u32 %p, %r2, %r1; @%p ret;
  mad.wide.u32 %rd3, %r2, 4, %rd1; mad.wide.u32 %rd4, %r2, 4, %rd2;
  ld.global.f32 %f1, [%rd4]; ld.const.f32 %f2, [scale]; mul.f32 %f1, %f1, %f2;
  st.global.f32 [%rd3], %f1;
  ret;
})";

int main() {
  std::shared_ptr<vgpu::Module> outlives;
  vgpu::Device gpu({.seed = 3});
  auto module = outlives = gpu.load(kPtx);
  std::vector<float> x(100), y(100);
  for (int i = 0; i < 100; i++) x[i] = i;
  gpu.add_memory(x.data(), 400, true);
  gpu.add_memory(y.data(), 400, false);
  float *px = x.data(), *py = y.data();
  int n = 100;
  const void* args[] = {&py, &px, &n};
  vgpu::Stats stats = gpu.launch(*module, "twice", {2}, {64}, 0, args);
  if (y[99] != 198 || stats.counts["global_unique_bytes_written"] != 400) return 1;
  *static_cast<float*>(module->variable("scale").first) = 3;  // as cudaMemcpyToSymbol does
  gpu.launch(*module, "twice", {2}, {64}, 0, args);
  if (y[99] != 297 || module->variable("none").first) return 2;
  gpu.mark_memory(x.data() + 50, 4, false);
  try {
    gpu.launch(*module, "twice", {2}, {64}, 0, args);
    return 3;
  } catch (const vgpu::Fault& f) {
    if (f.kernel != "twice" || f.block.x != 0 || f.thread.x != 50 || f.line != 11) return 4;
    std::puts(f.what());
  }
  gpu.mark_memory(x.data() + 50, 4, true);
  gpu.launch(*module, "twice", {2}, {64}, 0, args);
  gpu.remove_memory(x.data());
  try {
    gpu.launch(*module, "twice", {2}, {64}, 0, args);
    return 5;
  } catch (const vgpu::Fault& f) {
    std::puts(f.what());
  }
  return 0;
}
"""


def test_without_python(tmp_path):
    main, program = tmp_path / "main.cpp", tmp_path / "main"
    main.write_text(MAIN)
    subprocess.run([*build.compiler(), "-std=c++20", "-pthread", f"-I{build.HERE / 'csrc'}",
                    str(main), str(build.library()), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.returncode
    first, second = done.stdout.splitlines()
    assert "reads uninitialised global memory" in first and "ld.global.f32" in first
    assert "out of bounds" in second
