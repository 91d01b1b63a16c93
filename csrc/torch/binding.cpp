#include "binding.h"

#include <vector>

namespace lx {

std::ostream& operator<<(std::ostream& sentence, ShapeOf shape) {
  const Tensor& t = shape.t;
  sentence << '(';
  for (int64_t i = 0; i < t.dim(); i++) sentence << (i ? ", " : "") << t.size(i);
  return sentence << (t.dim() == 1 ? ",)" : ")");
}

const char* dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Char: return "int8";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

void Backend::check_status(Status status) const {
  check(status != kUnsupported, op, ": ", kernels->name,
        " has no kernel for these dtypes and sizes");
  check(status != kOutOfMemory, op, ": ", kernels->name,
        " can't allocate memory for its intermediate results");
  if (status != kOk)
    fail(op, ": ", kernels->name, " failed to launch", kernels->last_error ? ": " : "",
         kernels->last_error ? kernels->last_error() : "");
}

DType dtype_of(const char* op, const char* arg, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::BFloat16: return kBFloat16;
    case ScalarType::Half: return kFloat16;
    case ScalarType::Double: return kFloat64;
    default:
      fail(op, ": ", arg, ": expected float32, bfloat16, float16 or float64, got ",
           dtype_text(t.scalar_type()));
  }
}

DType second_dtype(const char* op, const char* arg, const Tensor& t, const Tensor& x) {
  const bool fits = t.scalar_type() == x.scalar_type() ||
                    (t.scalar_type() == ScalarType::Float && x.scalar_type() != ScalarType::Double);
  const bool half = x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half;
  check(fits, op, ": ", arg, ": expected ", dtype_text(x.scalar_type()), half ? " or float32" : "",
        ", got ", dtype_text(t.scalar_type()));
  return dtype_of(op, arg, t);
}

void check_same_shape(const char* op, const char* arg, const Tensor& t, const char* like_arg,
                      const Tensor& like) {
  bool same = t.dim() == like.dim();
  for (int64_t i = 0; same && i < t.dim(); i++) same = t.size(i) == like.size(i);
  check(same, op, ": ", arg, ": expected the shape of ", like_arg, ", ", ShapeOf{like}, ", got ",
        ShapeOf{t});
}

void check_same_dtype(const char* op, const char* arg, const Tensor& t, const char* like_arg,
                      const Tensor& like) {
  check(t.scalar_type() == like.scalar_type(), op, ": ", arg, ": expected the dtype of ", like_arg,
        ", ", dtype_text(like.scalar_type()), ", got ", dtype_text(t.scalar_type()));
}

void check_same_device(const char* op, const char* arg, const Tensor& t, const char* like_arg,
                       const Tensor& like) {
  check(t.is_cpu() == like.is_cpu() && t.get_device_index() == like.get_device_index(), op, ": ",
        arg, ": expected the device of ", like_arg, ", got another");
}

void check_like(const char* op, const char* arg, const Tensor& t, const char* like_arg,
                const Tensor& like) {
  check_same_shape(op, arg, t, like_arg, like);
  check_same_dtype(op, arg, t, like_arg, like);
  check_same_device(op, arg, t, like_arg, like);
}

namespace {

// Folds the leading dimensions of t into three; false when they do not fit or the last one is not
// contiguous.
bool fold_rows(const Tensor& t, Rows* rows) {
  *rows = {{1, 1, 1}, {0, 0, 0}};
  const int64_t last = t.dim() - 1;
  if (t.size(last) > 1 && t.stride(last) != 1) return false;
  int at = 3;  // rows->size[at..2] are in use
  for (int64_t i = last - 1; i >= 0; i--) {
    const int64_t size = t.size(i), stride = t.stride(i);
    if (size == 1) continue;
    if (at < 3 && stride == rows->stride[at] * rows->size[at]) {
      rows->size[at] *= size;
      continue;
    }
    if (at == 0) return false;
    at--;
    rows->size[at] = size;
    rows->stride[at] = stride;
  }
  // Innermost folded dimension last: with one or two in use they already end at index 2.
  return true;
}

}  // namespace

Tensor with_contiguous_last(const Tensor& t, int64_t dims) {
  int64_t expected = 1;
  for (int64_t i = t.dim() - 1; i >= t.dim() - dims; i--) {
    if (t.size(i) > 1 && t.stride(i) != expected) return torch::stable::contiguous(t);
    expected *= t.size(i);
  }
  return t;
}

RowView::RowView(const Tensor& t) : tensor(t) {
  width = t.size(t.dim() - 1);
  count = 1;
  for (int64_t i = 0; i + 1 < t.dim(); i++) count *= t.size(i);
  if (count == 0) {
    rows = {{1, 1, 0}, {0, 0, 0}};
  } else if (!fold_rows(t, &rows)) {
    tensor = torch::stable::contiguous(t);
    fold_rows(tensor, &rows);
  }
}

Tensor new_tensor(Shape shape, ScalarType dtype, const Tensor& device_of) {
  return torch::stable::empty(shape, dtype, std::nullopt, device_of.device());
}

}  // namespace lx
