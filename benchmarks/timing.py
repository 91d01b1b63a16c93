"""Clocks, interleaved rounds, and the two limits that times are held against.

A limit is measured in the same rounds as what it is a limit of, so that a share of it is not one of
what the machine could do at some other time.
"""

import functools
import statistics
import time

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ALLOWED_ERROR = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # of the norm

COPY_BYTES = 256 << 20                  # of the tensor that is copied: beyond any cache
MATMUL = {"cpu": 1024, "cuda": 8192}    # rows and columns of the matrices multiplied


class Clock:
    """Seconds that calls take on a device, "cpu" or "cuda".

    On a GPU they lie between two events, and before each call a buffer larger than the L2 cache is
    written, so that no call finds its inputs there. On a CPU small inputs stay in the caches.
    """

    def __init__(self, device):
        self.device = torch.device(device)
        if self.device.type == "cuda":
            cache = torch.cuda.get_device_properties(self.device).L2_cache_size
            self._flush = torch.empty(2 * cache, dtype=torch.int8, device=self.device)

    def seconds(self, stages, repeats=1):
        """Mean seconds of each of `stages`, functions that run one after another; each but the
        first is given the result of the one before."""
        laps = [self._laps(stages) for _ in range(repeats)]
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            laps = [[a.elapsed_time(b) / 1e3 for a, b in zip(marks, marks[1:])] for marks in laps]
        else:
            laps = [[b - a for a, b in zip(marks, marks[1:])] for marks in laps]
        return [statistics.fmean(lap) for lap in zip(*laps)]

    def _laps(self, stages):
        if self.device.type == "cuda":
            self._flush.zero_()
        first, *rest = stages
        marks = [self._mark()]
        result = first()
        marks.append(self._mark())
        for stage in rest:
            result = stage(result)
            marks.append(self._mark())
        return marks

    def _mark(self):
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def interleave(clock, entrants, rounds, round_seconds=0.05):
    """{name: [[seconds of each stage] per round]} of {name: stages}, as for Clock.seconds.

    All take turns within each round, so that drift of the machine meets all alike; each turn
    repeats the call for about round_seconds. Short calls are made twice before, long ones once.
    """
    repeats, times = {}, {name: [] for name in entrants}
    for name, stages in entrants.items():
        if (took := sum(clock.seconds(stages))) < round_seconds:
            took = sum(clock.seconds(stages))
        repeats[name] = max(1, min(1000, int(round_seconds / took)))
    for _ in range(rounds):
        for name, stages in entrants.items():
            times[name].append(clock.seconds(stages, repeats[name]))
    return times


def spread(samples):
    """{"seconds": median, "p20", "p80"} of a list of seconds."""
    if len(samples) == 1:
        samples = samples * 2
    p20, *_, p80 = statistics.quantiles(samples, n=5, method="inclusive")
    return {"seconds": statistics.median(samples), "p20": p20, "p80": p80}


class Limits:
    """What the device reaches at best: `copy`, bytes per second read and written together by a copy
    beyond the cache; `matmul`, FLOP/s of a product of square matrices, in a dtype or in fp32,
    whichever is faster (a CPU without bf16 instructions multiplies bf16 slowly, but can widen it).

    stages[what]: what to time; work[what]: bytes or FLOPs in it; rate[what]: of a first
    measurement. native: FLOP/s of a product in the dtype itself.
    """

    def __init__(self, clock, dtype, rounds=5):
        device, n = clock.device, MATMUL[clock.device.type]
        source = torch.ones(COPY_BYTES, dtype=torch.int8, device=device)
        target = torch.empty_like(source)
        products = {}
        for kind in dict.fromkeys((dtype, torch.float32)):
            a, b = (torch.randn(n, n, device=device).to(kind) for _ in range(2))
            products[kind] = [functools.partial(torch.matmul, a, b)]
        times = interleave(clock, {"copy": [lambda: target.copy_(source)], **products}, rounds)
        best = min(products, key=lambda kind: min(times[kind]))
        self.native = 2 * n ** 3 / statistics.median(s for s, in times[dtype])
        self.stages = {"copy": [lambda: target.copy_(source)], "matmul": products[best]}
        self.work = {"copy": 2 * COPY_BYTES, "matmul": 2 * n ** 3}
        self.rate = {"copy": self.rate_of("copy", times["copy"]),
                     "matmul": self.rate_of("matmul", times[best])}

    def rate_of(self, what, times):
        """Bytes or FLOPs per second, of interleave()'s rounds."""
        return self.work[what] / statistics.median(seconds for seconds, in times)
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
