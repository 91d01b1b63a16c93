"""The only tolerance rule of the tests.

`ref` is fp64 on the already rounded inputs and never rounded back; `base` is the same plain formula
(llama_ext.ref) in PyTorch at the tested dtype. With u = eps/2 of that dtype, e = got - ref and
e_b = base - ref, a result passes when its non-finite entries are where ref's are and

1. max|e| <= 2 * max(max|e_b|, k * u * max|ref|): no entry is worse than twice PyTorch's worst, or
   than k roundings: 1 for bf16 and fp16, which are computed in fp32 and rounded once; 3 for fp32,
   where every step rounds, and PyTorch's own worst entry may be luckier than a formula of three
   steps deserves; more where a test says why (exp turns a rounding of a score s, |s| u, into a
   relative error);
2. |<e, ref>| / <ref, ref> <= 0.08 * u + max(1, k / 3) * 2^-23
       + (3 * ||e_b * ref|| + |<e_b, ref>|) / <ref, ref>: the errors do not lean one way, which
   catches a scale or a term that is off by less than a rounding step.

fp64 has no finer reference: there max|e| <= 1e-11 * max|ref|.
"""

import torch


def _flat(x):
    return x.detach().to(torch.float64).reshape(-1)


def mismatch(got, ref, base=None, dtype=None, fp32_roundings=3):
    """None when `got` agrees with `ref` by the rule above, else a sentence that says how it fails.

    dtype: the precision the computation was made in; by default that of `got`. (A loss in fp32
    computed from bf16 logits is judged as fp32 on those logits.) fp32_roundings: k above.
    """
    if got.shape != ref.shape:
        return f"shape: expected {tuple(ref.shape)}, got {tuple(got.shape)}"
    dtype = dtype or got.dtype
    g, r = _flat(got), _flat(ref)
    if g.numel() == 0:
        return None
    finite = torch.isfinite(r)
    same = torch.where(finite, torch.isfinite(g), (g == r) | (g.isnan() & r.isnan()))
    if not same.all():
        at = int((~same).nonzero()[0])
        return f"non-finite entries differ: at flat index {at} expected {r[at]}, got {g[at]}"
    g, r = g[finite], r[finite]
    if g.numel() == 0:
        return None
    e, top = g - r, r.abs().max()
    if dtype == torch.float64:
        worst = e.abs().max()
        return None if worst <= 1e-11 * top else f"fp64: max|e| {worst:.3g} of max|ref| {top:.3g}"
    u = torch.finfo(dtype).eps / 2
    roundings = fp32_roundings if dtype == torch.float32 else 1
    e_b = torch.nan_to_num(_flat(base)[finite] - r)
    limit = 2 * torch.maximum(e_b.abs().max(), roundings * u * top)
    if e.abs().max() > limit:
        at = int(e.abs().argmax())
        return (f"max|e| {e.abs().max():.3g} > {limit:.3g} (PyTorch: {e_b.abs().max():.3g}); "
                f"at finite entry {at} expected {r[at]:.6g}, got {g[at]:.6g}")
    rr = (r @ r).clamp_min(torch.finfo(torch.float64).tiny)
    bias = (e @ r).abs() / rr
    floor = 0.08 * u + max(1, roundings / 3) * 2 ** -23
    limit = floor + (3 * (e_b * r).norm() + (e_b @ r).abs()) / rr
    if bias > limit:
        return f"bias |<e, ref>| / <ref, ref> {bias:.3g} > {limit:.3g}"
    return None


def check(got, ref, base=None, dtype=None, what="result", fp32_roundings=3):
    """Raise AssertionError unless `got` agrees with `ref` by the rule."""
    problem = mismatch(got, ref, base, dtype, fp32_roundings)
    assert problem is None, f"{what}: {problem}"
