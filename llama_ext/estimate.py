"""What a LLaMA costs before it is trained or served: parameters, FLOPs, memory and time.

d dim, L layers, T sequence length, N parameters in matrix products, kv width of keys or values,
F feed-forward width, H heads. A GB has 10^9 bytes.
"""

import dataclasses
from dataclasses import dataclass

from .device import data_sheet_peak
from .ops.linear_cross_entropy import CHUNK_BYTES
from .quantity import count, rate
from .recipe import PRESETS, option, shape

BYTES = {"fp32": 4, "bf16": 2}
OVERHEAD_BYTES = 2 * 10**9  # the CUDA context, cuBLAS's and NCCL's work space
_GPUS = {"A100-40GB": 40, "A100-80GB": 80, "H100-80GB": 80, "H200-141GB": 141}  # GB
_PAPER_TOKENS = {"7B": 10**12, "13B": 10**12, "33B": 14 * 10**11, "65B": 14 * 10**11}


@dataclass
class EstimateConfig:
    """A model and a plan for it; `llama-ext estimate` has one option for each field."""

    preset: str = option("7B", "shape of the model", PRESETS)
    dim: int | None = option(None, "width (default: the preset's)")
    n_layers: int | None = option(None, "layers (default: the preset's)")
    n_heads: int | None = option(None, "attention heads (default: the preset's)")
    n_kv_heads: int | None = option(None, "key/value heads (default: as many as heads)")
    hidden_dim: int | None = option(None, "feed-forward width (default: the paper's rule)")
    vocab_size: int | None = option(None, "tokens in the vocabulary (default: the preset's)")
    seq_len: int | None = option(None, "tokens in a sequence (default: the preset's max_seq_len)")
    batch_size: int = option(1, "sequences in a forward pass of a GPU, or of a tensor-parallel "
                             "group; with --inference, sequences that are in memory at once")
    gpus: int = option(1, "GPUs in all")
    tensor_parallel: int = option(1, "GPUs that divide every layer among them")
    gpu: str = option("A100-80GB", "the card", tuple(_GPUS))
    gpu_memory: float | None = option(None, "memory of a card in GB, for another than those "
                                      "(default: the --gpu's)")
    peak_flops: float | None = option(None, "dense bf16 FLOP/s of a card; k, M, G, T are powers of "
                                      "1000 (default: the --gpu's)", parse=rate)
    mfu: float = option(0.485, "share of the peak that the counted FLOPs reach; the paper's 65B "
                        "reached 0.485, 380 tokens/s/GPU")
    tokens: int | None = option(None, "tokens to train on; k, M, G, T are powers of 1000 (default: "
                                "the paper's, else 20 per parameter)", parse=count)
    recompute: bool = option(False, "keep only every layer's input and repeat its forward pass "
                             "(activation checkpointing)")
    weights: str = option("fp32", "precision that trained weights are kept in", tuple(BYTES))
    gradients: str = option("fp32", "precision that gradients are summed in", tuple(BYTES))
    optimizer_state: str = option("fp32", "precision of Adam's averages", tuple(BYTES))
    inference: bool = option(False, "serve instead of train: bf16 weights and a KV cache")
    int8: bool = option(False, "with --inference, matrices in 8 bits")

    def __post_init__(self):
        for name in ("seq_len", "batch_size", "gpus", "tensor_parallel", "tokens"):
            value = getattr(self, name)
            self._expect(name, value is None or value >= 1, "at least 1")
        for name in ("gpu_memory", "peak_flops"):
            value = getattr(self, name)
            self._expect(name, value is None or 0 < value < float("inf"), "a finite number above 0")
        self._expect("mfu", 0 < self.mfu <= 1, "above 0 and at most 1")
        self._expect("gpu", self.gpu in _GPUS, ", ".join(_GPUS))
        for name in ("weights", "gradients", "optimizer_state"):
            self._expect(name, getattr(self, name) in BYTES, "fp32 or bf16")
        self._expect("gpus", self.gpus % self.tensor_parallel == 0,
                     f"a multiple of tensor_parallel = {self.tensor_parallel}")
        self._expect("int8", self.inference or not self.int8, "inference beside it")
        self._expect("recompute", not (self.inference and self.recompute), "none for inference")
        config = self.model_config()
        self._expect("tensor_parallel", _divides(self.tensor_parallel, config),
                     f"a divisor of n_heads {config.n_heads}, n_kv_heads {config.n_kv_heads} and "
                     f"hidden_dim {config.hidden_dim}")
        if self.seq_len is None:
            self.seq_len = config.max_seq_len

    def _expect(self, name, ok, expected):
        if not ok:
            raise ValueError(f"estimate: {name}: expected {expected}, got {getattr(self, name)!r}")

    def model_config(self):
        """The LlamaConfig that is meant."""
        return shape(self, self.vocab_size)

    def gpu_bytes(self):
        """Memory of a card in bytes."""
        return 1e9 * (_GPUS[self.gpu] if self.gpu_memory is None else self.gpu_memory)

    def peak(self):
        """Dense bf16 FLOP/s of a card."""
        return data_sheet_peak(self.gpu, "bf16") if self.peak_flops is None else self.peak_flops

    def total_tokens(self, config):
        """Tokens to train on: given, the paper's for an unchanged preset, else 20 per parameter
        (arXiv 2203.15556)."""
        if self.tokens is not None:
            return self.tokens
        names = ("dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "vocab_size")
        if self.preset in _PAPER_TOKENS and all(getattr(self, n) is None for n in names):
            return _PAPER_TOKENS[self.preset]
        return 20 * num_parameters(config)


def num_parameters(config):
    """Parameters of a Llama of this LlamaConfig."""
    embeddings = config.vocab_size * config.dim * (1 if config.tie_embeddings else 2)
    return embeddings + config.n_layers * _layer_parameters(config) + config.dim


def _layer_parameters(config):
    return _layer_matrices(config) + 2 * config.dim


def _layer_matrices(config):
    """Entries of one layer's seven matrices."""
    return config.dim * (2 * config.q_dim + 2 * config.kv_dim + 3 * config.hidden_dim)


def flops_per_token(config, seq_len, *, training=True, recompute=False, causal=True):
    """Floating-point operations per token of sequences of seq_len tokens.

    Counted: the matrix products (a multiplication and an addition each). Forward 2 N, where N is
    the seven matrices of every layer and the output layer (the embedding is a lookup), and
    attention's two products of seq_len keys, 4 T q per layer, halved where `causal`; q is the width
    of all heads. The backward is twice the forward, so that training takes 6 N + 6 L T q per token
    (PaLM, arXiv 2204.02311, appendix B, halved for causal attention). recompute: one more forward
    pass of the layers, as activation checkpointing needs; utilization (MFU) leaves it out.
    Not counted: norms, rotations, softmax, SwiGLU's product, the optimizer.
    """
    attention = 4 * config.q_dim * seq_len / (2 if causal else 1)
    layers = config.n_layers * (2 * _layer_matrices(config) + attention)
    output = 2 * config.vocab_size * config.dim
    if not training:
        return layers + output
    return 3 * (layers + output) + (layers if recompute else 0)


def training_memory(config, plan):
    """Bytes on each GPU while training `config` as `plan`, an EstimateConfig, says: a dict.

    Weights, gradients and Adam's two averages are divided among all GPUs (FSDP, arXiv 2304.11277).
    Working copies, what the matrix products read and write in bf16: on one GPU all weights, unless
    they are kept in bf16; with FSDP two gathered layers, the gradients of one, and embedding and
    output layer with theirs. Activations per token and layer, as block.py keeps them, are
    2 (2 d + 2 q + 2 kv + 2 F) + 4 H bytes; with recompute 2 d, and one layer whole. (The residual
    stream is taken as bf16; autocast on one GPU keeps it in fp32, 2 d more.) Loss: a chunk of
    logits, the output layer's gradient in fp32, the hidden state's in bf16. Tensor parallelism
    divides all but the chunk (norms and residuals along the sequence, arXiv 2205.05198).
    """
    parameters, layer = num_parameters(config), _layer_parameters(config)
    tokens, split = plan.batch_size * plan.seq_len, plan.tensor_parallel
    table = config.vocab_size * config.dim
    if plan.gpus > split:
        ends = parameters - config.n_layers * layer
        copies = BYTES["bf16"] * (3 * layer + 2 * ends)
    else:
        copies = BYTES["bf16"] * parameters if plan.weights == "fp32" else 0
    kept = _activation_bytes(config)
    if plan.recompute:
        activations = tokens * (2 * config.dim * config.n_layers + kept)
    else:
        activations = tokens * config.n_layers * kept
    return {
        "weights": parameters * BYTES[plan.weights] / plan.gpus,
        "gradients": parameters * BYTES[plan.gradients] / plan.gpus,
        "optimizer state": 2 * parameters * BYTES[plan.optimizer_state] / plan.gpus,
        "working copies": copies / split,
        "activations": activations / split,
        "loss": CHUNK_BYTES + (4 * table + 2 * tokens * config.dim) / split,
        "CUDA and libraries": OVERHEAD_BYTES}


def inference_memory(config, plan):
    """Bytes on each GPU of a group of plan.tensor_parallel that serves batch_size sequences of
    seq_len tokens: a dict. int8: every matrix but the embedding in one byte an entry, with an fp32
    scale for each row; all else in bf16, keys and values too. Work space: one layer's activations
    for all tokens at once."""
    parameters, tokens = num_parameters(config), plan.batch_size * plan.seq_len
    weights = BYTES["bf16"] * parameters
    if plan.int8:
        entries = config.n_layers * _layer_matrices(config)
        rows = config.n_layers * (config.q_dim + 2 * config.kv_dim + 2 * config.dim
                                  + 2 * config.hidden_dim)
        if not config.tie_embeddings:
            entries += config.vocab_size * config.dim
            rows += config.vocab_size
        weights += 4 * rows - entries
    return {
        "weights": weights / plan.tensor_parallel,
        "KV cache": 4 * config.n_layers * config.kv_dim * tokens / plan.tensor_parallel,
        "work space": tokens * _activation_bytes(config) / plan.tensor_parallel,
        "CUDA and libraries": OVERHEAD_BYTES}


def _activation_bytes(config):
    """Kept per token and layer in bf16, with the fp32 log-sum-exp of every head."""
    return (2 * (2 * config.dim + 2 * config.q_dim + 2 * config.kv_dim + 2 * config.hidden_dim)
            + 4 * config.n_heads)


def memory(config, plan):
    """training_memory() or inference_memory(), as the plan says."""
    return (inference_memory if plan.inference else training_memory)(config, plan)


def fits(config, plan):
    """Whether the plan's memory is at most plan.gpu_bytes()."""
    return sum(memory(config, plan).values()) <= plan.gpu_bytes()


def fitting_plan(config, plan):
    """The first plan that fits with as little changed as can be, or None.

    Tried in this order, each with all before it: a smaller batch; recompute (int8 for inference);
    twice the tensor parallelism up to 8; for training twice the GPUs, up to 65,536.
    """
    gpus = [plan.gpus]
    while not plan.inference and gpus[-1] < 1 << 16:
        gpus.append(2 * gpus[-1])
    cheaper = "int8" if plan.inference else "recompute"
    batches = [plan.batch_size]
    while batches[-1] > 1:
        batches.append(batches[-1] // 2)
    for count in gpus:
        for split in sorted({plan.tensor_parallel, 2, 4, 8}):
            if split < plan.tensor_parallel or not _divides(split, config):
                continue
            if not plan.inference and count % split:
                continue
            for on in sorted({getattr(plan, cheaper), True}):
                for batch in batches:
                    new = dataclasses.replace(
                        plan, gpus=-(-count // split) * split, tensor_parallel=split,
                        batch_size=batch, **{cheaper: on})
                    if fits(config, new):
                        return new
    return None


def _divides(split, config):
    return not (config.n_heads % split or config.n_kv_heads % split or config.hidden_dim % split)


def speed(config, plan):
    """Tokens per second of each GPU in training: plan.mfu of its peak over the FLOPs of a token,
    those of recomputation included."""
    return plan.mfu * plan.peak() / flops_per_token(config, plan.seq_len, recompute=plan.recompute)


def report(plan):
    """(text, sentence): the estimate of `plan`, and what to change, None when it fits."""
    config = plan.model_config()
    parameters, parts = num_parameters(config), memory(config, plan)
    forward = flops_per_token(config, plan.seq_len, training=False)
    step = flops_per_token(config, plan.seq_len)
    lines = [f"parameters           {parameters:,}",
             f"FLOPs per token      {forward:.4g} forward, {step:.4g} with backward, "
             f"{flops_per_token(config, plan.seq_len, recompute=True):.4g} with recomputation"]
    if not plan.inference:
        tokens = plan.total_tokens(config)
        per_second = speed(config, plan)
        hours = tokens / per_second / 3600
        step_tokens = plan.batch_size * plan.seq_len * plan.gpus // plan.tensor_parallel
        lines += [f"a forward pass       {step_tokens:,} tokens on all GPUs",
                  f"tokens/s/GPU         {per_second:,.0f} at {plan.mfu:.1%} of "
                  f"{plan.peak() / 1e12:,.0f} TFLOP/s",
                  f"{_tokens_text(tokens)} tokens take {hours / plan.gpus / 24:,.1f} days on "
                  f"{plan.gpus:,} GPU{'s' * (plan.gpus > 1)}, {hours:,.0f} GPU-hours"]
    total, room = sum(parts.values()), plan.gpu_bytes()
    lines += ["memory per GPU, GB"]
    lines += [f"  {name:<19}{value / 1e9:8.2f}" for name, value in parts.items()]
    lines += [f"  {'total':<19}{total / 1e9:8.2f} of {room / 1e9:,.0f}"]
    if total <= room:
        return "\n".join([*lines, "it fits"]), None
    sentence = (f"estimate: expected at most {room / 1e9:,.0f} GB on each GPU, got "
                f"{total / 1e9:,.1f}; ")
    new = fitting_plan(config, plan)
    if new is None:
        return "\n".join(lines), sentence + "no smaller batch and no more GPUs make it fit"
    names = {"gpus": "--gpus {}", "tensor_parallel": "--tensor-parallel {}", "int8": "--int8",
             "recompute": "--recompute", "batch_size": "--batch-size {}"}
    changes = " ".join(text.format(getattr(new, name)) for name, text in names.items()
                       if getattr(new, name) != getattr(plan, name))
    needs = sum(memory(config, new).values()) / 1e9
    return "\n".join(lines), f"{sentence}it fits, in {needs:,.1f} GB, with {changes}"


def _tokens_text(tokens):
    for suffix, unit in (("T", 10**12), ("G", 10**9), ("M", 10**6)):
        if tokens >= unit:
            return f"{tokens / unit:.4g}{suffix}"
    return f"{tokens:,}"
