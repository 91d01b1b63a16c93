"""What a run leaves to look at: metrics.jsonl, one row an event, the loss curve as a PNG, and
events for TensorBoard."""

import importlib.util
import io
import json
import math
import os
from pathlib import Path

from .errors import LlamaExtError
from .files import write_atomically

_SMOOTHING = 0.95  # of the plotted training loss, an exponential moving average


class RunLog:
    """The rows of RUN/metrics.jsonl, kept in step with the checkpoints; their scalars also under
    RUN/tensorboard where `tensorboard` is true.

    A training row has step, loss (nats per token), grad_norm, lr, tokens_per_second, memory_bytes
    (peak so far: the process's resident set on a CPU, the tensors' on a GPU) and, where the
    device's peak is known, mfu (share of it, see estimate.flops_per_token). Where the update was
    skipped it has skipped, how many were so far, and null for what was not finite. A validation
    row has step, val_loss (nats per token), val_bits_per_byte.
    """

    def __init__(self, run, last_step, tensorboard=False, write=True):
        """Open the log under the folder `run`, without rows later than `last_step`.

        Those are of steps that are going to run again, because their checkpoint was not written.
        write=False: the rows are kept in memory only, as another process writes them.
        """
        self.path = Path(run) / "metrics.jsonl"
        self.rows = [row for row in _read(self.path) if row["step"] <= last_step]
        self._file = self._events = None
        if not write:
            return
        write_atomically(self.path, "".join(map(_line, self.rows)).encode())
        self._file = open(self.path, "ab", buffering=0)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(Path(run) / "tensorboard", purge_step=last_step + 1)

    def add(self, **row):
        """Append a row; it is with the operating system, safe from a kill, when this returns.

        Raises LlamaExtError when it does not fit on the disk.
        """
        self.rows.append(row)
        if self._file is None:
            return
        line = _line(row).encode()
        try:
            written = self._file.write(line)
        except OSError as error:
            raise LlamaExtError(f"{self.path} cannot be written: {error.strerror}") from error
        if written < len(line):
            raise LlamaExtError(f"{self.path} cannot be written: the disk is full")
        if self._events:
            for name, value in row.items():
                if name != "step" and value is not None:
                    self._events.add_scalar(name, value, row["step"])

    def sync(self):
        """Make the rows durable, before a checkpoint that follows them."""
        if self._file:
            os.fsync(self._file.fileno())
        if self._events:
            self._events.flush()

    def close(self):
        if self._file:
            self._file.close()
        if self._events:
            self._events.close()

    def validation(self):
        """The newest validation row, or None."""
        return next((row for row in reversed(self.rows) if "val_loss" in row), None)


def require_tensorboard():
    """Raise LlamaExtError unless the package that RunLog(tensorboard=True) needs is there."""
    if importlib.util.find_spec("tensorboard") is None:
        raise LlamaExtError("train: tensorboard: expected the Python package tensorboard, which is "
                            "not installed: pip install tensorboard")


def _line(row):
    return json.dumps(row) + "\n"


def _read(path):
    """The rows of the file up to the first line that is not whole (a kill can leave a part)."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            return
        if not isinstance(row, dict) or "step" not in row:
            raise LlamaExtError(f"{path}: expected rows with an entry 'step', got {line[:60]!r}")
        yield row


def plot_losses(path, rows, bytes_per_token):
    """Draw the training and validation losses of `rows` into the PNG file `path`, atomically.

    bytes_per_token: of the validation text, for the right-hand axis in bits per byte.
    """
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    train = [(row["step"], row["loss"]) for row in rows
             if row.get("loss") is not None]
    val = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]
    if train:
        steps, losses = zip(*train)
        axes.plot(steps, losses, color="C0", alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smooth(losses), color="C0", label="train (moving average)")
    if val:
        axes.plot(*zip(*val), color="C1", marker="o", markersize=4, label="validation")
    factor = bytes_per_token * math.log(2)
    right = axes.secondary_yaxis("right", functions=(lambda y: y / factor, lambda y: y * factor))
    right.set_ylabel("bits per byte of validation text")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    write_atomically(path, png.getvalue())


def _smooth(values):
    """Exponential moving average, corrected for its start at zero."""
    out, mean = [], 0.0
    for i, value in enumerate(values, 1):
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * value
        out.append(mean / (1 - _SMOOTHING ** i))
    return out
