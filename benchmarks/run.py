"""Every op, forward and backward, beside its peers: `python -m benchmarks run`.

For each op and shape, dtype and direction: our time, with its spread, and each provider's share of
the limit. The limit is the larger of two times: that of a copy (beyond the caches) of as many bytes
as the op must at least move, and that of a matrix product of as many FLOPs as it must compute; both
rates are measured in the same rounds. "forward" runs without gradients; "backward" is what
torch.autograd.grad takes within "forward+backward" (left out where the forward may have made the
gradients already, in linear_cross_entropy). Each provider's outputs and gradients are first
compared with fp32's: one that is wrong is named and not timed, and the exit code is 1.
"""

import statistics

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from . import cases, providers, result
from .timing import ALLOWED_ERROR, DTYPES, Clock, Limits, interleave

LONGEST = 2.0  # seconds of a case's forward and backward at the rate of a product
OWN_PRODUCTS = ("attention", "linear_int8")  # ops in which ours does not multiply by torch
SIZES = {"cpu": ("small", "7B", "sweep"), "cuda": ("small", "7B", "13B", "65B", "sweep")}
DEFAULTS = {"rounds": 5, "dtypes": ("fp32", "bf16"), "threads": torch.get_num_threads()}
UNITS = {"copy": "B", "matmul": "FLOP"}


def outputs_of(outcome):
    return outcome if isinstance(outcome, tuple) else (outcome,)


class Entrant:
    """A provider's function with its own copies of the inputs and cotangents, since some write into
    theirs. training(): the stages of forward and backward; cotangents: None without a backward."""

    def __init__(self, fn, case, inputs, cotangents):
        self.fn = fn
        wanted = case.differentiable(inputs)
        self.inputs = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
        self.wanted = [self.inputs[i] for i in wanted]
        self.cotangents = [c.clone() for c in cotangents]

    @torch.no_grad()
    def forward(self):
        return self.fn(*self.inputs)

    def training(self):
        def backward(outcome):
            return torch.autograd.grad(outputs_of(outcome), self.wanted, self.cotangents)
        return [lambda: self.fn(*self.inputs), backward]

    def results(self):
        """Outputs, and gradients where there are any, in fp32."""
        if not self.wanted:
            return [t.float() for t in outputs_of(self.forward())]
        forward, backward = self.training()
        outcome = forward()
        found = [t.detach().float().clone() for t in outputs_of(outcome)]
        return found + [t.float() for t in backward(outcome)]


def true_results(case, inputs, cotangents):
    """As Entrant.results(), of torch's own function (or the formula) in fp32."""
    wide = [t.float() if t.is_floating_point() else t for t in inputs]
    fn = (providers.BUILTIN.get(case.op) or providers.EAGER[case.op])(case, torch.float32)
    return Entrant(fn, case, wide, [c.float() for c in cotangents]).results()


def error_of(got, true):
    """The largest relative error of a list of tensors; NaN where there is one, and for shapes that
    differ."""
    if [t.shape for t in got] != [t.shape for t in true]:
        return float("nan")
    return torch.stack([(g - t).norm() / t.norm() for g, t in zip(got, true)]).max().item()


def admit(case, dtype, names, inputs, cotangents):
    """({name: (Entrant, error)} of those that do the case right, {name: why another is left out},
    {name: what is wrong with it})."""
    true = true_results(case, inputs, cotangents)
    right, left_out, wrong = {}, {}, {}
    for name in names:
        make = providers.PROVIDERS[name].ops.get(case.op)
        if make is None:
            continue
        try:
            entrant = Entrant(make(case, dtype), case, inputs, cotangents)
            error = error_of(entrant.results(), true)
        except providers.Unfit as reason:
            left_out[name] = str(reason)
        except torch.OutOfMemoryError:
            left_out[name] = "out of memory"
        except Exception as fault:  # another package's: its fault must not end the run
            wrong[name] = result.sentence(fault)
        else:
            if error <= ALLOWED_ERROR[dtype]:
                right[name] = entrant, error
            else:
                wrong[name] = (f"expected an error of at most {ALLOWED_ERROR[dtype]:g}, "
                               f"got {error:.3g}")
    return right, left_out, wrong


def peak_bytes(call, device):
    """The most bytes that torch's allocator holds during `call` beyond what it held before: on a
    CPU what the profiler records, on a GPU the allocator's own peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        call()
    held = peak = 0
    for event in trace.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def too_slow(case, names, limits):
    """{name: why its products would take too long here}."""
    flops = sum(case.flops)
    reason = limits.too_long(flops, LONGEST)
    alone = case.op in OWN_PRODUCTS and flops / limits.best <= LONGEST
    return {name: reason for name in names if reason and case.op in providers.PROVIDERS[name].ops
            and not (alone and name == result.OURS)}


def rows_of(clock, case, dtype, names, limits, rounds, round_seconds=0.05):
    """The rows of a case: forward; backward and both together where there is one."""
    torch.compiler.reset()
    torch.manual_seed(0)
    label = next(name for name in DTYPES if DTYPES[name] == dtype)
    row = {"op": case.op, "shape": case.shape, "dtype": label, "direction": "forward",
           "options": case.options, "unit": "", "work": 0, "limit": "", "limit_rate": None,
           "providers": {}, "left_out": too_slow(case, names, limits), "wrong": {}}
    names = [name for name in names if name not in row["left_out"]]
    if not names:
        return [row]
    inputs = [t.to(clock.device) for t in case.inputs(dtype)]
    cotangents = []
    if case.differentiable(inputs):
        with torch.no_grad():
            ours = providers.PROVIDERS[result.OURS].ops[case.op](case, dtype)(*inputs)
        cotangents = [torch.randn_like(o) for o in outputs_of(ours)]
    right, left_out, row["wrong"] = admit(case, dtype, names, inputs, cotangents)
    row["left_out"] |= left_out
    entrants, peaks = {}, {}
    for name, (entrant, _) in right.items():
        entrants[name, "forward"] = [entrant.forward]
        if cotangents:
            entrants[name, "training"] = entrant.training()
        last = entrants[name, "training" if cotangents else "forward"]
        peaks[name] = peak_bytes(lambda: clock.seconds(last), clock.device)
    bounds = [what for what in limits.stages if what == "copy" or case.flops[0]]
    times = interleave(clock, entrants | {what: limits.stages[what] for what in bounds}, rounds,
                       round_seconds)
    rates = {what: limits.rate(what, times) for what in bounds}
    samples = {"forward": {name: [s for s, in times[name, "forward"]] for name in right}}
    if cotangents and case.backward_alone:
        samples["backward"] = {name: [b for _, b in times[name, "training"]] for name in right}
    if cotangents:
        samples["forward+backward"] = {name: [a + b for a, b in times[name, "training"]]
                                       for name in right}
    return [_finished(row, case, direction, samples[direction], rates, {
        name: {"error": error, "peak_bytes": peaks[name]} for name, (_, error) in right.items()})
        for direction in samples]


def _finished(row, case, direction, samples, rates, more):
    """The row of a direction, with samples {provider: seconds}."""
    parts = {"forward": slice(0, 1), "backward": slice(1, 2), "forward+backward": slice(2)}
    work = {"copy": sum(case.bytes(DTYPES[row["dtype"]].itemsize)[parts[direction]]),
            "matmul": sum(case.flops[parts[direction]])}
    limit = max(rates, key=lambda what: work[what] / rates[what])
    ideal = work[limit] / rates[limit]
    return row | {"direction": direction, "unit": UNITS[limit], "work": work[limit],
                  "limit": limit, "limit_rate": rates[limit],
                  "providers": {name: result.entry(samples[name], work[limit], ideal, **more[name])
                                for name in samples}}


def geometric_means(rows):
    """[(op, dtype, direction, mean over shapes of the fastest peer's time over ours)]."""
    ratios = {}
    for row in rows:
        ratio, best = result.best_peer(row)
        if best:
            ratios.setdefault((row["op"], row["dtype"], row["direction"]), []).append(ratio)
    return [(*key, statistics.geometric_mean(found)) for key, found in ratios.items()]


def run(args):
    """Exit code of `python -m benchmarks run`."""
    result.prepare(args, DEFAULTS)
    clock, names = Clock(args.backend), providers.chosen(args.peers)
    absent = {name: reason for name in names
              if (reason := providers.PROVIDERS[name].missing(args.backend))}
    report = result.Report(args, names, absent)
    report.about["providers"] = {name: providers.PROVIDERS[name].version()
                                 for name in report.names}
    found = {(case.op, case.shape): case for size in args.sizes or SIZES[args.backend]
             for case in cases.of_size(size, args.backend) if case.op in (args.ops or [case.op])}
    limits = {name: Limits(clock, DTYPES[name]) for name in args.dtypes}
    work = [(case, name) for case in found.values() for name in args.dtypes]
    for case, name in tqdm(work, unit="case", disable=None):
        for row in rows_of(clock, case, DTYPES[name], report.names, limits[name], args.rounds):
            report.add(row)
    print("\nGeometric means over shapes of (fastest peer's time / ours); above 1, ours is faster")
    for op, dtype, direction, mean in geometric_means(report.rows):
        print(f"{op:20} {dtype:5} {direction:16} {mean:6.2f}")
    return report.finish()
