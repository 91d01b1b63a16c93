"""What one transformer block keeps for its backward, recomputes, and costs, in each of the ways to
write it:

  llama_ext, block   its one autograd function (llama_ext.block)
  llama_ext, ops     the same layer composed of llama_ext's modules
  torch, eager       the formulas of llama_ext.ref, as one writes them by hand
  torch, SDPA        F.scaled_dot_product_attention, F.rms_norm, F.silu
  ... checkpointed   that under torch.utils.checkpoint, which runs the forward again

Bytes are those of the tensors that autograd keeps, each memory once, parameters and tables not, per
token. Products are the floating-point operations of the linear layers, forward and backward, over
those of one forward: 3 is the least. Times are medians of interleaved rounds on the CPU.
"""

import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import llama_ext as lx
from llama_ext.block import why_composed
from llama_ext.memory import reuse_freed_memory
from llama_ext.model import LlamaConfig

from .providers import complex_rope
from .run import error_of
from .timing import ALLOWED_ERROR, DTYPES

SDPA = "torch, SDPA"


def block_function(block, x, residual):
    if reason := why_composed(block):
        raise RuntimeError(f"benchmarks: expected the block's autograd function, but {reason}")
    return block(x, residual)


def block_of_ops(block, x, residual):
    y, h = block.attention_norm(x, residual)
    y, h = block.ffn_norm(block.attention(y), h)
    return block.feed_forward(y), h


def _by_hand(block, x, residual, norm, rope, attend, gated):
    attention, ffn = block.attention, block.feed_forward
    h = x + residual
    y = norm(h, block.attention_norm.weight, block.attention_norm.eps)
    q, k, v = (linear(y).unflatten(-1, (-1, attention.head_dim))  # (B, T, H or Hkv, D)
               for linear in (attention.wq, attention.wk, attention.wv))
    cos, sin = attention.rotary.tables(x.shape[1])
    h = h + attention.wo(attend(rope(q, cos, sin), rope(k, cos, sin), v).flatten(2))
    y = norm(h, block.ffn_norm.weight, block.ffn_norm.eps)
    return ffn.w2(gated(ffn.w1(y), ffn.w3(y))), h


def eager(block, x, residual):
    return _by_hand(block, x, residual, lx.ref.rmsnorm, lx.ref.rope, lx.ref.attention,
                    lx.ref.swiglu)


def sdpa(block, x, residual):
    def attend(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True,
                                              enable_gqa=grouped).transpose(1, 2)
    return _by_hand(block, x, residual, lambda x, w, eps: F.rms_norm(x, w.shape, w, eps),
                    complex_rope, attend, lambda gate, up: F.silu(gate) * up)


def checkpointed(block, x, residual):
    return checkpoint(sdpa, block, x, residual, use_reentrant=True)


VARIANTS = {"llama_ext, block": block_function, "llama_ext, ops": block_of_ops,
            "torch, eager": eager, SDPA: sdpa, "... checkpointed": checkpointed}


def kept_bytes(fn, block, inputs):
    """Bytes of the tensors that autograd keeps of a forward."""
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = fn(block, *inputs)  # held until the end, so that no address serves twice
    for t in (*block.parameters(), *block.buffers()):
        kept.pop(t.untyped_storage().data_ptr(), None)
    del outputs
    return sum(kept.values())


def step(fn, block, inputs, cotangents):
    """Forward and backward; outputs, and gradients of the inputs and parameters."""
    leaves = [*inputs, *block.parameters()]
    for t in leaves:
        t.grad = None
    outputs = fn(block, *inputs)
    torch.autograd.backward(outputs, cotangents)
    return [o.detach() for o in outputs], [t.grad for t in leaves]


def products(fn, *args):
    """Floating-point operations of the linear layers in a step."""
    with FlopCounterMode(display=False) as counter:
        step(fn, *args)
    counts = counter.get_flop_counts()["Global"]
    return sum(n for op, n in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))


def measure(config, batch, tokens, dtype, rounds):
    """{variant: (bytes per token, products over one forward's, median seconds of a step)}.

    Raises RuntimeError when a variant's result is not that of the SDPA one in fp32.
    """
    torch.manual_seed(0)
    block = lx.Llama(config).layers[0]
    shape = batch, tokens, config.dim
    data = [torch.randn(shape) for _ in range(4)]
    inputs, cotangents = [t.requires_grad_() for t in data[:2]], data[2:]
    outputs, grads = step(sdpa, block, inputs, cotangents)
    exact = [t.clone() for t in (*outputs, *grads)]
    block.to(dtype)
    inputs = [t.detach().to(dtype).requires_grad_() for t in inputs]
    args = block, inputs, [t.to(dtype) for t in cotangents]
    forward = 2 * batch * tokens * sum(p.numel() for p in block.parameters() if p.dim() == 2)
    rows, times = {}, {name: [] for name in VARIANTS}
    for name, fn in VARIANTS.items():
        outputs, grads = step(fn, *args)
        error = error_of([g.float() for g in (*outputs, *grads)], exact)
        if not error <= ALLOWED_ERROR[dtype]:
            raise RuntimeError(f"memory: {name}: expected an error of at most "
                               f"{ALLOWED_ERROR[dtype]:g}, got {error:.3g}")
        rows[name] = (kept_bytes(fn, block, inputs) / (batch * tokens),
                      products(fn, *args) / forward)
    for _ in range(rounds):
        for name, fn in VARIANTS.items():
            start = time.perf_counter()
            step(fn, *args)
            times[name].append(time.perf_counter() - start)
    return {name: (*rows[name], statistics.median(times[name])) for name in VARIANTS}


def run(args):
    for name in ("batch", "rounds", "threads"):
        if getattr(args, name) < 1:
            sys.exit(f"benchmarks: --{name}: expected 1 or more, got {getattr(args, name)}")
    try:
        config = LlamaConfig(dim=args.dim, n_layers=1, n_heads=args.heads, vocab_size=1,
                             n_kv_heads=args.kv_heads, max_seq_len=args.tokens)
    except ValueError as error:
        sys.exit(f"benchmarks: {error}")
    reuse_freed_memory()
    torch.set_num_threads(args.threads)
    print(f"One block, {config.dim} wide, {config.n_heads} heads, {config.n_kv_heads} of keys and "
          f"values, feed-forward {config.hidden_dim}; {args.batch} x {args.tokens} tokens; torch "
          f"{torch.__version__}, {args.threads} threads, {args.rounds} rounds")
    for name in args.dtypes:
        results = measure(config, args.batch, args.tokens, DTYPES[name], args.rounds)
        base_bytes, _, base = results[SDPA]
        print(f"\n{name:20} {'bytes per token':>16} {'of SDPA':>8} {'products':>9} "
              f"{'ms per step':>12} {'of SDPA':>8}")
        for variant, (kept, ratio, seconds) in results.items():
            print(f"{variant:20} {kept:16,.0f} {kept / base_bytes:8.2f} {ratio:9.2f} "
                  f"{seconds * 1e3:12.1f} {seconds / base:8.2f}")
