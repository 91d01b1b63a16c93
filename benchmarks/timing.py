"""Interleaved timing of providers, and the check that each computes the right thing."""

import statistics
import time

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ALLOWED_ERROR = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # of the norm


def _leaves(case, inputs):
    return [t.detach().requires_grad_(t.is_floating_point() and i not in case.frozen)
            for i, t in enumerate(inputs)]


def _outputs(result):
    return result if isinstance(result, tuple) else (result,)


def forward_backward(fn, leaves, cotangents):
    """One forward and backward pass; the gradients of the leaves."""
    outputs = _outputs(fn(*leaves))
    wanted = [t for t in leaves if t.requires_grad]
    return outputs, torch.autograd.grad(outputs, wanted, cotangents)


def check(case, inputs, cotangents):
    """{provider: relative error of its worst output or gradient} against fp32 on the same inputs.

    Raises RuntimeError naming the provider whose error is above ALLOWED_ERROR.
    """
    wide = [t.float() if t.is_floating_point() else t for t in inputs]
    reference = case.providers.get("built-in") or case.providers["eager"]
    outputs, grads = forward_backward(reference, _leaves(case, wide),
                                      [c.float() for c in cotangents])
    true = [t.detach() for t in [*outputs, *grads]]
    errors = {}
    for name, fn in case.providers.items():
        outputs, grads = forward_backward(fn, _leaves(case, inputs), cotangents)
        errors[name] = max(((g.detach().float() - t).norm() / t.norm()).item()
                           for g, t in zip([*outputs, *grads], true))
        allowed = ALLOWED_ERROR[inputs[0].dtype]
        if not errors[name] <= allowed:
            raise RuntimeError(f"{case.op} {case.shape}: {name}: expected an error of at most "
                               f"{allowed:g}, got {errors[name]:.3g}")
    return errors


def measure(case, dtype, rounds=9, round_seconds=0.05):
    """Median seconds of each provider, forward under no_grad and forward + backward.

    The providers take turns within each round, so that drift of the machine meets all alike; each
    turn repeats the call for about round_seconds.
    """
    torch.compiler.reset()
    torch.manual_seed(0)
    inputs = case.inputs(dtype)
    with torch.no_grad():
        example = _outputs(case.providers["llama_ext"](*inputs))
    cotangents = [torch.randn_like(o) for o in example]
    errors = check(case, inputs, cotangents)
    leaves = _leaves(case, inputs)

    def forward(fn):
        with torch.no_grad():
            fn(*inputs)

    def both(fn):
        forward_backward(fn, leaves, cotangents)

    results = {name: {"error": errors[name]} for name in case.providers}
    for direction, call in (("forward", forward), ("forward+backward", both)):
        times = {name: [] for name in case.providers}
        repeats = {}
        for name, fn in case.providers.items():
            call(fn)
            start = time.perf_counter()
            call(fn)
            repeats[name] = max(1, int(round_seconds / (time.perf_counter() - start)))
        for _ in range(rounds):
            for name, fn in case.providers.items():
                start = time.perf_counter()
                for _ in range(repeats[name]):
                    call(fn)
                times[name].append((time.perf_counter() - start) / repeats[name])
        for name in case.providers:
            results[name][direction] = statistics.median(times[name])
    return results
