// What every op's binding needs: checks that end in one sentence, the table that serves a tensor,
// strided rows, and allocation.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include "../api.h"

namespace lx {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = torch::headeronly::IntHeaderOnlyArrayRef;

template <class... Parts> [[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw std::runtime_error(sentence.str());
}

// Unless ok, fails with the sentence that the parts make, written only then.
template <class... Parts> void check(bool ok, const Parts&... parts) {
  if (!ok) [[unlikely]] fail(parts...);
}

std::string shape_text(const Tensor& t);  // "(2, 3)"
const char* dtype_text(ScalarType dtype);  // "bfloat16"

struct Backend {
  const Kernels* kernels;
  Stream stream;
};

// The table that serves this tensor's device, and where its work goes.
Backend kernels_for(const char* op, const char* arg, const Tensor& t);

// Fails unless the kernel's status is kOk.
void check_status(const char* op, Status status, const Kernels* kernels);

// The DType of a tensor of floats.
DType dtype_of(const char* op, const char* arg, const Tensor& t);
inline ScalarType acc_dtype(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The DType of a second operand (weight, table): that of x, or fp32.
DType second_dtype(const char* op, const char* arg, const Tensor& t, const Tensor& x);

void check_same_shape(const char* op, const char* arg, const Tensor& t, const char* like_arg,
                      const Tensor& like);
void check_same_dtype(const char* op, const char* arg, const Tensor& t, const char* like_arg,
                      const Tensor& like);
void check_same_device(const char* op, const char* arg, const Tensor& t, const char* like_arg,
                       const Tensor& like);
// All three.
void check_like(const char* op, const char* arg, const Tensor& t, const char* like_arg,
                const Tensor& like);

// t itself when its last `dims` dimensions are contiguous, else a contiguous copy.
Tensor with_contiguous_last(const Tensor& t, int64_t dims);

// A tensor (..., width) as rows, in place where its leading dimensions fold into three strides and
// its last is contiguous; otherwise a contiguous copy, which `tensor` keeps alive.
struct RowView {
  explicit RowView(const Tensor& t);
  const void* data() const { return tensor.const_data_ptr(); }
  Tensor tensor;
  Rows rows;
  int64_t count, width;
};

Tensor new_tensor(Shape shape, ScalarType dtype, const Tensor& device_of);
inline Tensor new_like(const Tensor& t) { return new_tensor(t.sizes(), t.scalar_type(), t); }
inline Tensor none(const Tensor& like) { return new_tensor({0}, like.scalar_type(), like); }

// The sizes of t with the last one left out.
inline Shape leading(const Tensor& t) { return Shape(t.sizes().data(), t.dim() - 1); }

}  // namespace lx
