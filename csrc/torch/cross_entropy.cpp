#include "ops.h"

namespace lx {
namespace {

constexpr const char* kOp = "cross_entropy";

// The targets, contiguous, each a column of the V logits or ignore_index.
Tensor checked_target(const Tensor& logits, const Tensor& target) {
  check(logits.dim() >= 1, kOp, ": logits: expected shape (..., V), got ()");
  check(target.scalar_type() == ScalarType::Long, kOp, ": target: expected int64, got ",
        dtype_text(target.scalar_type()));
  bool same = target.dim() == logits.dim() - 1;
  for (int64_t i = 0; same && i < target.dim(); i++) same = target.size(i) == logits.size(i);
  check(same, kOp, ": target: expected the shape of logits, ", ShapeOf{logits},
        ", without the last, got ", ShapeOf{target});
  check_same_device(kOp, "target", target, "logits", logits);
  return with_contiguous_last(target, target.dim());
}

// Only on the CPU: elsewhere it would wait for the device, and the kernels make the row NaN.
void check_range(const Tensor& target, int64_t V, int64_t ignore_index) {
  const auto* t = static_cast<const int64_t*>(target.const_data_ptr());
  for (int64_t i = 0, rows = target.numel(); i < rows; i++)
    check((t[i] >= 0 && t[i] < V) || t[i] == ignore_index, kOp, ": target: expected 0 to ", V - 1,
          " or ignore_index ", ignore_index, ", got ", t[i], " in row ", i);
}

const int64_t* target_data(const Tensor& target) {
  return static_cast<const int64_t*>(target.const_data_ptr());
}

void backward(Tensor& dlogits, const Tensor& dloss, const Tensor& logits, const Tensor& target,
              const Tensor& lse, int64_t ignore_index, double label_smoothing, double z_loss) {
  const Backend backend = kernels_for(kOp, "logits", logits);
  const DType dtype = dtype_of(kOp, "logits", logits);
  const Tensor t = checked_target(logits, target);
  const RowView z(logits);
  check(dloss.scalar_type() == acc_dtype(logits) && (dloss.numel() == 1 || dloss.is_contiguous()) &&
            (dloss.numel() == 1 || dloss.numel() == z.count),
        kOp, ": dloss: expected one ", dtype_text(acc_dtype(logits)), " for all rows or each of ",
        z.count, ", got ", ShapeOf{dloss}, " ", dtype_text(dloss.scalar_type()));
  check(lse.scalar_type() == acc_dtype(logits) && lse.numel() == z.count && lse.is_contiguous(),
        kOp, ": lse: expected what the forward returned, got ", ShapeOf{lse}, " ",
        dtype_text(lse.scalar_type()));
  if (dlogits.numel())
    backend.run(&Kernels::cross_entropy_bwd, dlogits.mutable_data_ptr(), z.data(),
                z.rows, target_data(t), lse.const_data_ptr(), dloss.const_data_ptr(),
                dloss.numel() == 1 ? 0 : 1, z.width, ignore_index, label_smoothing, z_loss, dtype);
}

}  // namespace

std::tuple<Tensor, Tensor> cross_entropy_fwd(Tensor logits, Tensor target, int64_t ignore_index,
                                             double label_smoothing, double z_loss) {
  const Backend backend = kernels_for(kOp, "logits", logits);
  const DType dtype = dtype_of(kOp, "logits", logits);
  check(label_smoothing >= 0 && label_smoothing <= 1, kOp,
        ": label_smoothing: expected a number from 0 to 1, got ", label_smoothing);
  const Tensor t = checked_target(logits, target);
  const RowView z(logits);
  if (backend.on_host) check_range(t, z.width, ignore_index);
  Tensor loss = new_tensor(target.sizes(), acc_dtype(logits), logits);
  Tensor lse = new_like(loss);
  if (z.count)
    backend.run(&Kernels::cross_entropy_fwd, loss.mutable_data_ptr(),
                lse.mutable_data_ptr(), z.data(), z.rows, target_data(t), z.width, ignore_index,
                label_smoothing, z_loss, dtype);
  return {loss, lse};
}

std::tuple<Tensor, Tensor> mean_loss(Tensor loss, Tensor target, int64_t ignore_index) {
  const Backend backend = kernels_for(kOp, "loss", loss);
  check_same_shape(kOp, "target", target, "loss", loss);
  const Tensor l = with_contiguous_last(loss, loss.dim());
  const Tensor t = with_contiguous_last(target, target.dim());
  Tensor mean = new_tensor({}, loss.scalar_type(), loss);
  Tensor inv_count = new_tensor({}, loss.scalar_type(), loss);
  backend.run(&Kernels::mean_loss, mean.mutable_data_ptr(),
              inv_count.mutable_data_ptr(), l.const_data_ptr(), target_data(t), l.numel(),
              ignore_index, dtype_of(kOp, "loss", loss));
  return {mean, inv_count};
}

Tensor cross_entropy_bwd(Tensor dloss, Tensor logits, Tensor target, Tensor lse,
                         int64_t ignore_index, double label_smoothing, double z_loss) {
  Tensor dlogits = new_like(logits);
  backward(dlogits, dloss, logits, target, lse, ignore_index, label_smoothing, z_loss);
  return dlogits;
}

void cross_entropy_bwd_(Tensor dloss, Tensor logits, Tensor target, Tensor lse,
                        int64_t ignore_index, double label_smoothing, double z_loss) {
  check(logits.is_contiguous(), kOp, ": logits: expected a contiguous tensor to overwrite");
  backward(logits, dloss, logits, target, lse, ignore_index, label_smoothing, z_loss);
}

}  // namespace lx
