"""Everything a training run is made of, with the paper's values where the user gives none.

LLaMA, arXiv 2302.13971, table 2 and section 2.3.
"""

import dataclasses
import math
from dataclasses import dataclass

from .model import LlamaConfig
from .optim import BETA2
from .quantity import rate, tokens

PRESETS = ("tiny", "7B", "13B", "33B", "65B")
_SMALL_LR = ("33B", "65B")  # trained with 1.5e-4, the others with 3e-4


def option(default, text, choices=None, parse=None):
    """parse: turns the command line's text into the value, where its type does not."""
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices,
                                                        "parse": parse})


def shape(options, vocab_size=None):
    """The LlamaConfig of options that have preset, seq_len and a LlamaConfig's sizes; None in them
    leaves the preset's."""
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim")
    sizes = {name: getattr(options, name) for name in names}
    sizes |= {"max_seq_len": options.seq_len, "vocab_size": vocab_size}
    return LlamaConfig.preset(options.preset,
                              **{name: size for name, size in sizes.items() if size is not None})


@dataclass
class TrainConfig:
    """Everything a run is made of; `llama-ext train` has one option for each field."""

    data: str = option(dataclasses.MISSING, "folder written by `llama-ext prepare`, or a mixture "
                       "of some (*.json; see `llama-ext mixture`)")
    run: str = option(dataclasses.MISSING, "folder for checkpoints, metrics and the loss curve; "
                      "one that has checkpoints is resumed")
    preset: str = option("tiny", "shape of the model", PRESETS)
    dim: int | None = option(None, "width (default: the preset's)")
    n_layers: int | None = option(None, "layers (default: the preset's)")
    n_heads: int | None = option(None, "attention heads (default: the preset's)")
    n_kv_heads: int | None = option(None, "key/value heads (default: as many as heads)")
    hidden_dim: int | None = option(None, "feed-forward width (default: the paper's rule)")
    seq_len: int | None = option(None, "tokens in a sequence (default: the preset's max_seq_len)")
    batch_size: int = option(8, "sequences in a forward pass; of each of several processes that "
                             "do not share layers")
    grad_accum: int | None = option(None, "forward passes in a step (default: 1, or what "
                                    "--batch-tokens takes)")
    batch_tokens: int | None = option(
        None, "tokens in a step, in place of --grad-accum; k and M are 1024 and 1024^2, so 4M is "
        "the paper's 2048 sequences of 2048 (default: as --grad-accum says)", parse=tokens)
    steps: int = option(1000, "optimizer steps, resumed ones included")
    lr: float | None = option(None, "peak learning rate (default: the paper's, 1.5e-4 for 33B and "
                              "65B, else 3e-4)")
    warmup: int | None = option(None, "warm-up steps (default: the paper's 2000, at most a tenth "
                                "of --steps)")
    optimizer: str = option("adamw", "update rule; weight decay is decoupled in both",
                            tuple(BETA2))
    beta1: float = option(0.9, "decay of the gradient's average")
    beta2: float | None = option(None, "decay of the second average (default: 0.95 for adamw, "
                                 "0.999 for adamax)")
    weight_decay: float = option(0.1, "decoupled weight decay of matrices")
    grad_clip: float = option(1.0, "largest norm of the whole gradient")
    max_skipped: int = option(5, "steps in a row without a finite loss and gradient that end the "
                              "run; a single one is skipped")
    device: str = option("auto", "where to train; auto: on a GPU where there is one",
                         ("auto", "cpu", "cuda"))
    tensor_parallel: int = option(1, "processes that share each layer, of those that torchrun "
                                  "starts; the others divide the batches")
    keep_gathered: bool = option(False, "with several processes: keep each layer's gathered "
                                 "weights from forward to backward, which is faster and takes "
                                 "more memory")
    compile: bool = option(False, "torch.compile each layer; with --tensor-parallel on GPUs its "
                           "collectives then run under its matrix products")
    dtype: str = option("auto", "precision of the operations; auto: bf16 where the device has "
                        "instructions for it, else fp32", ("auto", "bf16", "fp32"))
    peak_flops: float | None = option(
        None, "FLOP/s of the device, for the utilization (MFU); k, M, G, T are powers of 1000 "
        "(default: an A100's, H100's or H200's data sheet, a CPU's measured matmul)", parse=rate)
    seed: int = option(0, "of the initial weights and the order of the data")
    val_every: int = option(100, "steps between validations (the last step has one too)")
    save_every: int = option(100, "steps between checkpoints (the last step has one too)")
    keep: int = option(3, "checkpoints to keep")
    log_every: int = option(10, "steps between printed lines where there is no terminal")
    tensorboard: bool = option(False, "also write the metrics to RUN/tensorboard")

    def __post_init__(self):
        for name in ("batch_size", "grad_accum", "batch_tokens", "steps", "max_skipped", "seq_len",
                     "tensor_parallel", "val_every", "save_every", "keep", "log_every"):
            value = getattr(self, name)
            self._expect(name, value is None or value >= 1, "at least 1")
        self._expect("grad_accum", self.grad_accum is None or self.batch_tokens is None,
                     "none beside batch_tokens, which determines it")
        self._expect("seed", 0 <= self.seed < 1 << 63, "0 to 2^63 - 1")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            self._expect(name, value is None or 0 <= value < 1, "at least 0 and below 1")
        for name in ("lr", "grad_clip", "peak_flops"):
            value = getattr(self, name)
            self._expect(name, value is None or 0 < value < math.inf, "a finite number above 0")
        self._expect("weight_decay", 0 <= self.weight_decay < math.inf, "a finite number >= 0")
        self._expect("device", self.device in ("auto", "cpu", "cuda"), "auto, cpu or cuda")
        self._expect("dtype", self.dtype in ("auto", "bf16", "fp32"), "auto, bf16 or fp32")
        self._expect("warmup", self.warmup is None or 0 <= self.warmup < self.steps,
                     f"0 to steps - 1 = {self.steps - 1}")

    def _expect(self, name, ok, expected):
        if not ok:
            raise ValueError(f"train: {name}: expected {expected}, got {getattr(self, name)!r}")

    def model_config(self, vocab_size):
        """The LlamaConfig: the preset, what overrides it, and room for seq_len positions."""
        return shape(self, vocab_size)

    def peak_lr(self):
        """The peak learning rate: the given one or the paper's for the preset."""
        if self.lr is not None:
            return self.lr
        return 1.5e-4 if self.preset in _SMALL_LR else 3e-4

    def warmup_steps(self):
        """Warm-up steps: the given ones, or the paper's 2,000, at most a tenth of the run."""
        return min(2000, self.steps // 10) if self.warmup is None else self.warmup

    def forward_passes(self, seq_len, ranks=1):
        """Forward passes in a step of every one of `ranks` data-parallel processes.

        Raises ValueError when batch_tokens is not a multiple of what one pass of them takes.
        """
        if self.batch_tokens is None:
            return 1 if self.grad_accum is None else self.grad_accum
        one = self.batch_size * seq_len * ranks
        passes, rest = divmod(self.batch_tokens, one)
        if rest:
            nearest = " or ".join(f"{n * one}" for n in (passes, passes + 1) if n)
            processes = f" * {ranks} processes" if ranks > 1 else ""
            raise ValueError(f"train: batch_tokens: expected a multiple of batch_size * seq_len"
                             f"{processes} = {one}, such as {nearest}, got {self.batch_tokens}")
        return passes
