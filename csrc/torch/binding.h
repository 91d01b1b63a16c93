// What every op's binding needs: checks that end in one sentence, the table that serves a tensor,
// strided rows, and allocation.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
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

// The shape of t as a part of a sentence: "(2, 3)".
struct ShapeOf { const Tensor& t; };
std::ostream& operator<<(std::ostream& sentence, ShapeOf shape);
const char* dtype_text(ScalarType dtype);  // "bfloat16"

// The kernels that serve a tensor, and where their work goes. While it lives, the tensor's GPU is
// the current one.
struct Backend {
  const char* op;
  const Kernels* kernels;
  Stream stream;
  bool on_host;  // CPU kernels: a binding may look at values, nothing is under way
  std::optional<torch::stable::accelerator::DeviceGuard> on_device;

  // An entry of the table. Fails if this backend has no such kernel yet.
  template <class Kernel> Kernel get(Kernel Kernels::*entry) const {
    check(kernels->*entry != nullptr, op, ": ", kernels->name, " has no kernel for this op yet");
    return kernels->*entry;
  }
  // Calls a kernel with the arguments and the stream. Fails unless it returns kOk.
  template <class... Formals, class... Args>
  void run(Status (*Kernels::*kernel)(Formals...), const Args&... args) const {
    check_status(get(kernel)(args..., stream));
  }
  void check_status(Status status) const;
};

Backend kernels_for(const char* op, const char* arg, const Tensor& t);

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
