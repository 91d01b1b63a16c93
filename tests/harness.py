"""How an op is held against its definition, forward and backward."""

import torch

import compare

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def randn(*shape, dtype=torch.float32, mean=0.25, scale=1.0):
    """Random numbers with a non-zero mean."""
    return (torch.randn(shape, dtype=torch.float64) * scale + mean).to(dtype)


def strided(x):
    """x with the same values in rows of a wider buffer: unit last stride, gaps between."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 3), float("nan"), dtype=x.dtype)
    view = wide[..., 1:1 + x.shape[-1]]
    view.copy_(x)
    return view


def transposed(x):
    """x with the same values and its first two dimensions swapped in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def scattered(x):
    """x with the same values and a last stride of 2."""
    return torch.stack((x, torch.full_like(x, float("nan"))), -1)[..., 0]


def shifted(x):
    """x with the same values, one element past an aligned address."""
    flat = torch.empty(x.numel() + 1, dtype=x.dtype)
    flat[1:].copy_(x.flatten())
    return flat[1:].view(x.shape)


def cut(x):
    """x with the same values in the corner of a larger tensor: three strides that do not fold."""
    padded = torch.nn.functional.pad(x, (0, 8, 0, 2, 0, 1), value=float("nan"))
    return padded[:, :x.shape[1], :x.shape[2], :x.shape[3]]


def far_apart(x):
    """x (rows, width) with rows 2^31 + 64 elements apart, in memory of which only the touched pages
    exist."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # until the test's end; conftest.py
    gap = 2 ** 31 + 64
    wide = torch.empty((len(x) - 1) * gap + x.shape[1], dtype=x.dtype)
    wide = wide.as_strided(x.shape, (gap, 1))
    wide.copy_(x)
    return wide


def expanded(x):
    """The first row of x for all rows of its first dimension: stride 0."""
    return x[:1].expand_as(x)


LAYOUTS = {"contiguous": lambda x: x, "strided": strided, "transposed": transposed,
           "scattered": scattered, "expanded": expanded}


def run(fn, args, kwargs, cotangents, to=lambda t: t):
    """fn's outputs and the gradients of its floating tensor arguments (None for the others)."""
    args = [to(a.detach()).requires_grad_() if torch.is_tensor(a) and a.is_floating_point() else a
            for a in args]
    outputs = fn(*args, **kwargs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [(o, to(c)) for o, c in zip(outputs, cotangents) if o.requires_grad]
    torch.autograd.backward([o for o, _ in wanted], [c.to(o.dtype) for o, c in wanted])
    return outputs, [a.grad if torch.is_tensor(a) else None for a in args]


def check_op(fn, ref, *args, dtype, cotangent_layout=lambda x: x, fp32_roundings=3, **kwargs):
    """Compares outputs and gradients of fn with those of its definition by compare.py's rule.

    args are at the tested dtype already; cotangents are random with a non-zero mean.
    """
    with torch.no_grad():
        shapes = ref(*args, **kwargs)
    shapes = shapes if isinstance(shapes, tuple) else (shapes,)
    cotangents = [cotangent_layout(randn(*o.shape, dtype=o.dtype)) for o in shapes]
    def double(t):
        return t.double()
    got, got_grads = run(fn, args, kwargs, cotangents)
    base, base_grads = run(ref, args, kwargs, cotangents)
    true, true_grads = run(ref, args, kwargs, cotangents, to=double)
    for i in range(len(true)):
        assert got[i].dtype == base[i].dtype
        compare.check(got[i], true[i], base[i], dtype, f"output {i}", fp32_roundings)
    for i in range(len(args)):
        if true_grads[i] is None:
            continue
        assert got_grads[i].dtype == args[i].dtype
        compare.check(got_grads[i], true_grads[i], base_grads[i], dtype, f"gradient {i}",
                      fp32_roundings)
