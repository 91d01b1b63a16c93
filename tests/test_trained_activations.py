"""The ops on what they meet in training, batch > 1: activations and gradients of a trained model.

Random inputs have no outliers, no near-duplicates and no structure between batch entries; faults
have hidden behind that.
"""

import pytest
import torch

import llama_ext as lx
from harness import check_op
from llama_ext import layers, model

OPS = {"rmsnorm": 0, "rmsnorm_residual": 0, "swiglu": 0, "rope_qk": 0, "attention": 25,
       "linear_cross_entropy": 0}  # op -> further fp32 roundings: its largest scores


@pytest.fixture(scope="module")
def calls():
    """op -> the arguments and keywords of its last call in a model trained for 60 steps."""
    torch.manual_seed(0)
    config = model.LlamaConfig(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=128,
                            multiple_of=32, max_seq_len=96)
    llama = model.Llama(config)
    optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-2)
    text = torch.tensor(list((__doc__ + lx.ref.__doc__).encode()))
    losses = []
    for _ in range(60):
        starts = torch.randint(len(text) - 97, (4,))
        batch = torch.stack([text[s:s + 97] for s in starts])
        loss = llama(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]

    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "why_composed", lambda block: "its ops are recorded")
        for op in OPS:
            def record(*args, op=op, **kwargs):
                seen[op] = args, kwargs
                return getattr(lx, op)(*args, **kwargs)
            for place in (layers, model):
                if hasattr(place, op):
                    patch.setattr(place, op, record)
        llama.loss = model.linear_cross_entropy
        llama(batch[:, :-1], batch[:, 1:])
    return seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("op", OPS)
def test_op(calls, op, dtype):
    args, kwargs = calls[op]
    args = [a.detach().to(dtype) if torch.is_tensor(a) and a.is_floating_point() else a
            for a in args]
    if op == "linear_cross_entropy":
        kwargs = {**kwargs, "cotangent_layout": torch.ones_like}  # see test_linear_cross_entropy
    if op == "rope_qk":
        args, (cos, sin, *options) = args[:2], args[2:]
        fns = [lambda q, k, fn=fn: fn(q, k, cos, sin, *options)
               for fn in (lx.rope_qk, lx.ref.rope_qk)]
    else:
        fns = [getattr(lx, op), getattr(lx.ref, op)]
    check_op(*fns, *args, dtype=dtype, fp32_roundings=3 + OPS[op], **kwargs)
