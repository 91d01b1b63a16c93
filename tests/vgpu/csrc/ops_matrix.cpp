// mma and ldmatrix.
//
// A fragment of 16-bit elements is 8x8 tiles: tile register r of lane 4g+t holds row g, columns 2t
// and 2t+1, so that the register, seen as 64 halves, is the tile row by row. Products are exact in
// f32; sums are rounded to nearest in the order of k.
#include <algorithm>
#include <cstring>

#include "access.h"
#include "decode.h"

namespace vgpu {
namespace {

template <class T> struct Tiles {
  T a[16][16];  // rows of A
  T b[16][8];   // rows of B: k by n
  T c[128];     // 16 rows of 8
};

// fp-contract: the multiplications and additions of rows fuse.
template <class T, int kRows, int kDepth>
__attribute__((optimize("fp-contract=fast"))) void multiply(Tiles<T>& t) {
  typedef T Row __attribute__((vector_size(8 * sizeof(T))));
  constexpr int kAtOnce = 4;  // chains of additions that overlap
  for (int first = 0; first < kRows; first += kAtOnce) {
    Row row[kAtOnce];
    std::memcpy(row, t.c + 8 * first, sizeof row);
    for (int k = 0; k < kDepth; k++) {
      Row b;
      std::memcpy(&b, t.b[k], sizeof b);
      for (int i = 0; i < kAtOnce; i++) row[i] += t.a[first + i][k] * b;
    }
    std::memcpy(t.c + 8 * first, row, sizeof row);
  }
}

void need_whole_warp(Warp& w, const Instr& in) {
  if (w.alive != kAllLanes)
    fault(w, in, std::countr_zero(w.exec), "needs all 32 lanes of the warp, but some have exited");
}

// Registers of the instruction: d, a, b, c one after the other in the list.
template <class T> const T* source(const Warp& w, const Instr& in, int k) {
  return w.src<T>(w.block->kernel->lists[in.list + k]);
}

template <class H> float half_value(uint16_t x);
struct F16;
struct BF16;
template <> float half_value<F16>(uint16_t x) { return f16_to_float(x); }
template <> float half_value<BF16>(uint16_t x) { return bf16_to_float(x); }

template <bool kF32> void load_c(const Warp& w, const Instr& in, int first, Tiles<float>& t) {
  for (int half = 0; half < 2; half++) {
    if constexpr (kF32) {
      const float* even = source<float>(w, in, first + 2 * half);
      const float* odd = source<float>(w, in, first + 2 * half + 1);
      float* c = t.c + 64 * half;  // lane i holds elements 2i and 2i + 1 of eight rows
      for (int i = 0; i < kLanes; i++) {
        c[2 * i] = even[i];
        c[2 * i + 1] = odd[i];
      }
    } else {
      const uint16_t* pair = source<uint16_t>(w, in, first + half);
      for (int i = 0; i < 2 * kLanes; i++) t.c[64 * half + i] = f16_to_float(pair[i]);
    }
  }
}

template <bool kF32> void store_d(Warp& w, const Instr& in, const Tiles<float>& t) {
  const uint32_t* d = w.block->kernel->lists.data() + in.list;
  for (int half = 0; half < 2; half++) {
    if constexpr (kF32) {
      float *even = w.reg<float>(d[2 * half]), *odd = w.reg<float>(d[2 * half + 1]);
      const float* c = t.c + 64 * half;
#pragma GCC ivdep
      for (int i = 0; i < kLanes; i++) {
        even[i] = canonical(c[2 * i]);
        odd[i] = canonical(c[2 * i + 1]);
      }
    } else {
      uint16_t* pair = w.reg<uint16_t>(d[half]);
      for (int i = 0; i < 2 * kLanes; i++) pair[i] = float_to_f16(t.c[64 * half + i]);
    }
  }
}

// m16n8k16 and m16n8k8 of f16 or bf16, with f32 or f16 sums.
template <class H, int kDepth, bool kF32> void mma_half(Warp& w, const Instr& in) {
  if (!converge(w, in, w.lanes)) return;
  need_whole_warp(w, in);
  constexpr int kTilesK = kDepth / 8, kA = kF32 ? 4 : 2, kB = kA + 2 * kTilesK;
  alignas(64) Tiles<float> t;
  for (int k = 0; k < kTilesK; k++) {
    for (int half = 0; half < 2; half++) {
      const uint16_t* a = source<uint16_t>(w, in, kA + 2 * k + half);
      for (int r = 0; r < 8; r++)
        for (int j = 0; j < 8; j++) t.a[8 * half + r][8 * k + j] = half_value<H>(a[8 * r + j]);
    }
    const uint16_t* b = source<uint16_t>(w, in, kB + k);
    alignas(64) float value[64];
    for (int i = 0; i < 64; i++) value[i] = half_value<H>(b[i]);
    for (int n = 0; n < 8; n++)
      for (int j = 0; j < 8; j++) t.b[8 * k + j][n] = value[8 * n + j];
  }
  load_c<kF32>(w, in, kB + kTilesK, t);
  multiply<float, 16, kDepth>(t);
  store_d<kF32>(w, in, t);
}

// tf32 looks at the upper 19 bits of its sources.
template <int kDepth> void mma_tf32(Warp& w, const Instr& in) {
  if (!converge(w, in, w.lanes)) return;
  need_whole_warp(w, in);
  constexpr int kSteps = kDepth / 4;
  alignas(64) Tiles<float> t;
  for (int k = 0; k < kSteps; k++) {
    for (int half = 0; half < 2; half++) {
      const uint32_t* a = source<uint32_t>(w, in, 4 + 2 * k + half);
      for (int r = 0; r < 8; r++)
        for (int j = 0; j < 4; j++)
          t.a[8 * half + r][4 * k + j] = as_float(a[4 * r + j] & ~0x1fffu);
    }
    const uint32_t* b = source<uint32_t>(w, in, 4 + 2 * kSteps + k);
    for (int n = 0; n < 8; n++)
      for (int j = 0; j < 4; j++) t.b[4 * k + j][n] = as_float(b[4 * n + j] & ~0x1fffu);
  }
  load_c<true>(w, in, 4 + 3 * kSteps, t);
  multiply<float, 16, kDepth>(t);
  store_d<true>(w, in, t);
}

void mma_f64(Warp& w, const Instr& in) {  // m8n8k4
  if (!converge(w, in, w.lanes)) return;
  need_whole_warp(w, in);
  Tiles<double> t;
  const double *a = source<double>(w, in, 2), *b = source<double>(w, in, 3);
  for (int i = 0; i < kLanes; i++) {
    t.a[i / 4][i % 4] = a[i];
    t.b[i % 4][i / 4] = b[i];
    for (int j = 0; j < 2; j++) t.c[2 * i + j] = source<double>(w, in, 4 + j)[i];
  }
  multiply<double, 8, 4>(t);
  for (int j = 0; j < 2; j++) {
    double* d = w.reg<double>(w.block->kernel->lists[in.list + j]);
    for (int i = 0; i < kLanes; i++) d[i] = t.c[2 * i + j];
  }
}

struct Shape {
  const char* size;
  Type d, a, c;
  uint8_t counts[4];  // registers of d, a, b, c
  Run run;
};
constexpr Shape kShapes[] = {
    {"m16n8k16", Type::kF32, Type::kBF16, Type::kF32, {4, 4, 2, 4}, mma_half<BF16, 16, true>},
    {"m16n8k16", Type::kF32, Type::kF16, Type::kF32, {4, 4, 2, 4}, mma_half<F16, 16, true>},
    {"m16n8k16", Type::kF16, Type::kF16, Type::kF16, {2, 4, 2, 2}, mma_half<F16, 16, false>},
    {"m16n8k8", Type::kF32, Type::kBF16, Type::kF32, {4, 2, 1, 4}, mma_half<BF16, 8, true>},
    {"m16n8k8", Type::kF32, Type::kF16, Type::kF32, {4, 2, 1, 4}, mma_half<F16, 8, true>},
    {"m16n8k8", Type::kF16, Type::kF16, Type::kF16, {2, 2, 1, 2}, mma_half<F16, 8, false>},
    {"m16n8k8", Type::kF32, Type::kTF32, Type::kF32, {4, 4, 2, 4}, mma_tf32<8>},
    {"m16n8k4", Type::kF32, Type::kTF32, Type::kF32, {4, 2, 1, 4}, mma_tf32<4>},
    {"m8n8k4", Type::kF64, Type::kF64, Type::kF64, {2, 1, 1, 2}, mma_f64},
};

bool decode_mma(Decode& d) {
  if (!d.take("sync") || !d.take("aligned")) d.fail("expected .sync.aligned");
  if (!d.take("row") || !d.take("col")) d.fail("expected .row.col");
  for (const Shape& shape : kShapes) {
    if (!d.has(shape.size)) continue;
    const std::vector<bool> before = d.taken;
    const Type types[] = {d.type(), d.type(), d.type(), d.type()};
    if (types[0] != shape.d || types[1] != shape.a || types[2] != shape.a || types[3] != shape.c) {
      d.taken = before;
      continue;
    }
    d.take(shape.size);
    d.expect_operands(4);
    const Type element[] = {shape.d == Type::kF16 ? Type::kB32 : shape.d,
                            shape.a == Type::kF64 ? Type::kF64 : Type::kB32};
    std::vector<uint32_t> registers;
    for (int k = 0; k < 4; k++) {
      ptx::Operand o = d.s.operands[size_t(k)];
      if (o.kind != ptx::Operand::kVector) o.items = {d.s.operands[size_t(k)]};
      if (o.items.size() != shape.counts[k]) d.fail("a fragment of the wrong size");
      const Type t = element[k == 1 || k == 2];
      for (const ptx::Operand& item : o.items)
        registers.push_back(k == 0 ? d.dst(item, t) : d.src(item, t));
    }
    d.in.list = d.list(registers);
    d.in.run = shape.run;
    d.in.pipe = Pipe::kTensor;
    std::string name = shape.size;
    for (const auto& m : d.s.modifiers)
      if (type_of(m) != Type::kNone) name += "." + m;
    std::vector<std::string>& names = d.builder.kernel.mma_names;
    auto found = std::find(names.begin(), names.end(), name);
    if (found == names.end()) found = names.insert(names.end(), name);
    d.in.mma = uint8_t(found - names.begin() + 1);
    return true;
  }
  d.fail("unknown shape or types");
}

// Lane 8m+r gives the address of row r of matrix m.
template <bool kTransposed> void ldmatrix(Warp& w, const Instr& in) {
  if (!converge(w, in, w.lanes)) return;
  need_whole_warp(w, in);
  Addresses a = addresses(w, in);
  w.exec = in.count == 4 ? kAllLanes : (1u << (8 * in.count)) - 1;
  access(w, in, in.space, a, 16, Access::kRead);
  w.exec = kAllLanes;
  alignas(64) uint16_t tile[64];
  for (int m = 0; m < in.count; m++) {
    for (int r = 0; r < 8; r++)
      std::memcpy(tile + 8 * r, reinterpret_cast<const void*>(a.at[8 * m + r]), 16);
    uint16_t* d = w.reg<uint16_t>(w.block->kernel->lists[in.list + m]);
    for (int r = 0; r < 8; r++)
      for (int c = 0; c < 8; c++) d[8 * r + c] = kTransposed ? tile[8 * c + r] : tile[8 * r + c];
  }
}

bool decode_ldmatrix(Decode& d) {
  if (!d.take("sync") || !d.take("aligned") || !d.take("m8n8"))
    d.fail("expected .sync.aligned.m8n8");
  const size_t count = d.take("x4") ? 4 : d.take("x2") ? 2 : d.take("x1") ? 1 : 0;
  const bool transposed = d.take("trans");
  if (d.take("shared") || d.take("shared::cta")) d.in.space = Space::kShared;
  if (d.type() != Type::kB16) d.fail("expected .b16");
  d.expect_operands(2);
  d.address(1, d.in.space);
  ptx::Operand target = d.s.operands[0];
  if (target.kind != ptx::Operand::kVector) target.items = {d.s.operands[0]};
  if (count == 0 || target.items.size() != count) d.fail("a vector of the wrong size");
  std::vector<uint32_t> registers;
  for (const ptx::Operand& o : target.items) registers.push_back(d.dst(o, Type::kB32));
  d.in.list = d.list(registers);
  d.in.bytes = 16;
  d.in.run = transposed ? ldmatrix<true> : ldmatrix<false>;
  d.in.pipe = Pipe::kLsu;
  d.covers(d.in.space, 16);
  return true;
}

}  // namespace

bool decode_matrix(Decode& d) {
  if (d.is("mma")) return decode_mma(d);
  if (d.is("ldmatrix")) return decode_ldmatrix(d);
  return false;
}

}  // namespace vgpu
