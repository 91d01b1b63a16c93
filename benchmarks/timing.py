"""Clocks, interleaved rounds, and the two limits that times are held against.

A limit is measured in the same rounds as what it is a limit of, so that a share of it is not one of
what the machine could do at some other time.
"""

import statistics
import time

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ALLOWED_ERROR = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # of the norm

COPY_BYTES = 256 << 20  # of the tensor that is copied
# Rows of the square matrices in a first, short measurement; of those of the limit, and how many
# products make a sample.
MATMUL = {"cpu": (512, 1024, 4), "cuda": (4096, 8192, 1)}


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
    repeats the call for about round_seconds. Short calls are made twice before, long ones once;
    with round_seconds 0 nothing is called before, and each turn is one call.
    """
    repeats, times = dict.fromkeys(entrants, 1), {name: [] for name in entrants}
    for name, stages in entrants.items() if round_seconds else ():
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
    """What the device reaches at best: "copy", bytes per second read and written together by a copy
    beyond the caches; "matmul", FLOP/s of a product of square matrices, in the dtype or in fp32,
    whichever is faster (a CPU without bf16 instructions multiplies bf16 slowly, but can widen it).

    stages[what]: what to time, for interleave(); work[what]: bytes or FLOPs in it. native, best:
    FLOP/s of a product in the dtype itself and in the faster one, of a first measurement.
    """

    def __init__(self, clock, dtype):
        source = torch.ones(COPY_BYTES, dtype=torch.int8, device=clock.device)
        target = torch.empty_like(source)
        probe, n, products = MATMUL[clock.device.type]
        times = interleave(clock, {kind: self._products(clock, kind, probe, 1)
                                   for kind in (dtype, torch.float32)}, 3)
        found = {kind: 2 * probe ** 3 / min(seconds for seconds, in times[kind]) for kind in times}
        best = max(found, key=found.get)
        self.native, self.best = found[dtype], found[best]
        self.stages = {"copy": [lambda: target.copy_(source)],
                       "matmul": self._products(clock, best, n, products)}
        self.work = {"copy": 2 * COPY_BYTES, "matmul": products * 2 * n ** 3}

    def _products(self, clock, dtype, n, count):
        a, b = (torch.randn(n, n, device=clock.device).to(dtype) for _ in range(2))

        def multiply():
            for _ in range(count):
                a @ b
        return [multiply]

    def too_long(self, flops, seconds):
        """Why products of `flops` in the dtype would take longer than `seconds`, or None."""
        if flops / self.native > seconds:
            return (f"torch multiplies at {self.native / 1e9:.2g} GFLOP/s in this dtype here, so "
                    f"that it would take longer than {seconds:g} s")
        return None

    def rate(self, what, times):
        """Bytes or FLOPs per second, of interleave()'s rounds."""
        return self.work[what] / statistics.median(seconds for seconds, in times[what])


