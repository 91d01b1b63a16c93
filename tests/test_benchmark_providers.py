"""Adapters of other packages, on stand-ins for those: what is called, and that a wrong result is
caught."""

import sys
import types

import pytest
import torch

import llama_ext as lx
from benchmarks import cases, providers, run

BF16 = torch.bfloat16
CASES = {"rmsnorm": cases.rmsnorm(4, 32), "rmsnorm_residual": cases.rmsnorm_residual(4, 32),
         "swiglu": cases.swiglu(4, 32), "rope": cases.rope(2, 4, 2, 8, False),
         "attention": cases.attention(2, 16, 4, 8), "cross_entropy": cases.cross_entropy(4, 32),
         "linear_cross_entropy": cases.linear_cross_entropy(4, 16, 32)}


def rotated(x, cos, sin, interleaved=False):
    return lx.ref.rope(x, cos.float(), sin.float(), interleaved)


def flash_attn(call):
    def norm(x, weight, bias, residual=None, eps=1e-5, prenorm=False):
        assert bias is None and prenorm == (residual is not None)
        if residual is None:
            return call(lx.ref.rmsnorm)(x, weight, eps)
        return call(lx.ref.rmsnorm_residual)(x, residual, weight, eps)

    def attention(q, k, v, causal=False):
        assert causal and q.shape == k.shape == (2, 16, 4, 8)  # (B, T, H, D)
        return call(lx.ref.attention)(q, k, v)

    def loss(logits, labels):  # each row's, and its z-loss
        return call(lambda z, t: torch.nn.functional.cross_entropy(
            z.float(), t, reduction="none"))(logits, labels), None
    return {"flash_attn": {"flash_attn_func": attention},
            "flash_attn.ops.triton.layer_norm": {"rms_norm_fn": norm},
            "flash_attn.ops.activations": {"swiglu": call(lx.ref.swiglu)},
            "flash_attn.layers.rotary": {"apply_rotary_emb": call(rotated)},
            "flash_attn.ops.triton.cross_entropy": {"cross_entropy_loss": loss}}


def liger(call):
    def rope(q, k, cos, sin):  # (B, H, T, D), (1, T, D) with both halves the same
        assert q.shape == (2, 2, 4, 8) and cos.shape == (1, 4, 8)
        half = cos[0, :, :4], sin[0, :, :4]
        return tuple(call(rotated)(t.transpose(1, 2), *half).transpose(1, 2) for t in (q, k))

    return {"liger_kernel": {}, "liger_kernel.transformers.functional": {
        "liger_rms_norm": call(lx.ref.rmsnorm),
        "liger_fused_add_rms_norm": call(lx.ref.rmsnorm_residual),
        "liger_swiglu": call(lx.ref.swiglu),
        "liger_rope": rope, "liger_cross_entropy": call(lx.ref.cross_entropy),
        "liger_fused_linear_cross_entropy": call(lx.ref.linear_cross_entropy)}}


def xformers(call):
    class LowerTriangularMask:
        pass

    def attention(q, k, v, attn_bias=None):
        assert isinstance(attn_bias, LowerTriangularMask)
        return call(lx.ref.attention)(q, k, v)
    return {"xformers": {}, "xformers.ops": {"memory_efficient_attention": attention,
                                             "LowerTriangularMask": LowerTriangularMask}}


def apex(call):
    def norm(x, weight, normalized_shape, eps):
        assert tuple(normalized_shape) == (32,)
        return call(lx.ref.rmsnorm)(x, weight, eps)
    return {"apex": {}, "apex.normalization.fused_layer_norm": {"fused_rms_norm_affine": norm}}


def transformer_engine(call):
    class RMSNorm(torch.nn.Module):
        def __init__(self, width, eps, device, dtype):
            super().__init__()
            assert (width, device, dtype) == (32, "cuda", BF16)
            self.weight, self.eps = torch.nn.Parameter(torch.zeros(width, dtype=dtype)), eps

        def forward(self, x):
            return call(lx.ref.rmsnorm)(x, self.weight, self.eps)

    class DotProductAttention:
        def __init__(self, heads, channels, num_gqa_groups, attention_dropout, qkv_format,
                     attn_mask_type):
            assert (heads, channels, num_gqa_groups, attention_dropout) == (4, 8, 4, 0.0)
            assert (qkv_format, attn_mask_type) == ("bshd", "causal")

        def __call__(self, q, k, v):
            return call(lx.ref.attention)(q, k, v).flatten(2)  # (B, T, H D)
    return {"transformer_engine": {}, "transformer_engine.pytorch": {
        "RMSNorm": RMSNorm, "DotProductAttention": DotProductAttention}}


PACKAGES = {"flash-attn": flash_attn, "liger": liger, "xformers": xformers, "apex": apex,
            "transformer-engine": transformer_engine}


def install(monkeypatch, name, call=lambda fn: fn):
    for path, content in PACKAGES[name](call).items():
        for i in range(path.count(".") + 1):  # and the packages around it
            part = path.rsplit(".", path.count(".") - i)[0]
            if part not in sys.modules:
                module = types.ModuleType(part)
                module.__path__ = []
                monkeypatch.setitem(sys.modules, part, module)
        vars(sys.modules[path]).update(content)


def admit(case, names, dtype=BF16):
    inputs = case.inputs(dtype)
    with torch.no_grad():
        ours = providers.OURS[case.op](case, dtype)(*inputs)
    cotangents = [torch.randn_like(o) for o in run.outputs_of(ours)]
    return run.admit(case, dtype, names, inputs, cotangents)


@pytest.mark.parametrize("name, op", [(name, op) for name in PACKAGES
                                      for op in providers.PROVIDERS[name].ops])
def test_adapter(name, op, monkeypatch):
    install(monkeypatch, name)
    right, left_out, wrong = admit(CASES[op], [name, "llama_ext"])
    assert set(right) == {name, "llama_ext"} and not left_out and not wrong


@pytest.mark.parametrize("name, op", [("flash-attn", "attention"), ("liger", "rope"),
                                      ("apex", "rmsnorm"), ("transformer-engine", "rmsnorm")])
def test_wrong_result_is_caught(name, op, monkeypatch):
    def off(fn):
        return lambda *args: fn(*args) * 1.05
    install(monkeypatch, name, off)
    right, left_out, wrong = admit(CASES[op], [name, "llama_ext"])
    assert set(right) == {"llama_ext"} and not left_out
    assert wrong[name].startswith("expected an error of at most 0.02, got 0.05")


def test_wrong_gradient_is_caught(monkeypatch):
    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dout):
            return dout / 2
    install(monkeypatch, "apex", lambda fn: lambda x, *rest: fn(Half.apply(x), *rest))
    assert "apex" in admit(CASES["rmsnorm"], ["apex"])[2]


def test_nan_in_the_last_gradient_is_caught(monkeypatch):
    """Of the weight, behind an output and a gradient that are right."""
    def nan(fn):
        def run(x, weight, eps):
            weight.register_hook(lambda dw: dw * float("nan")) if weight.requires_grad else None
            return fn(x, weight, eps)
        return run
    install(monkeypatch, "apex", nan)
    assert admit(CASES["rmsnorm"], ["apex"])[2]["apex"].endswith("got nan")


def test_fault_of_a_package_is_named(monkeypatch):
    def broken(fn):
        def run(*args):
            raise RuntimeError("no kernel image is available\nfor this device")
        return run
    install(monkeypatch, "apex", broken)
    right, _, wrong = admit(CASES["rmsnorm"], ["apex", "llama_ext"])
    assert set(right) == {"llama_ext"}
    assert wrong == {"apex": "RuntimeError: no kernel image is available"}


def test_unfit_cases_are_named(monkeypatch):
    for name in PACKAGES:
        install(monkeypatch, name)
    grouped, fp32 = cases.attention(2, 16, 4, 8, 2), torch.float32
    assert admit(grouped, ["xformers"])[1] == {"xformers": "no grouped heads"}
    names = ["flash-attn", "sdpa-flash", "transformer-engine"]
    assert admit(CASES["attention"], names, fp32)[1] == dict.fromkeys(names, "bf16 and fp16 only")
    assert admit(cases.rope(2, 4, 2, 8, True), ["liger"])[1] == {
        "liger": "Hugging Face's layout only"}
    monkeypatch.setattr(providers, "SCORES", 1)
    assert admit(CASES["attention"], ["eager"])[1] == {"eager": "holds the whole score matrix"}
    del sys.modules["liger_kernel.transformers.functional"].liger_fused_add_rms_norm
    assert admit(CASES["rmsnorm_residual"], ["liger"])[1] == {
        "liger": "this version has no liger_fused_add_rms_norm"}


def test_what_a_provider_overwrites_is_its_own():
    def overwrites(x, w):
        out = lx.ref.rmsnorm(x, w)
        x.data.zero_(), w.data.zero_()
        return out
    case = CASES["rmsnorm"]
    inputs, cotangents = case.inputs(BF16), [torch.randn(4, 32).to(BF16)]
    before = [t.clone() for t in inputs]
    first = run.Entrant(overwrites, case, inputs, cotangents)
    first.forward()
    assert all(torch.equal(a, b) for a, b in zip(before, inputs))
    assert not first.inputs[0].any()


def test_why_a_provider_is_missing(monkeypatch):
    apex = providers.PROVIDERS["apex"]
    assert apex.missing("cuda") == apex.missing("cpu") == "not installed"
    install(monkeypatch, "apex")
    assert apex.missing("cpu") == "needs CUDA" and apex.missing("cuda") is None
    assert providers.PROVIDERS["eager"].missing("cpu") is None
    assert providers.PROVIDERS["sdpa-flash"].missing("cpu") == "needs CUDA"


def test_fault_while_importing_is_named(monkeypatch, tmp_path):
    (tmp_path / "xformers.py").write_text("import a_package_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    assert providers.PROVIDERS["xformers"].missing("cuda") == (
        "its import fails: ModuleNotFoundError: No module named 'a_package_that_is_not_there'")
    monkeypatch.delitem(sys.modules, "xformers", raising=False)


def test_peers_are_chosen_by_name():
    assert providers.chosen(["compile", "eager"]) == ["llama_ext", "eager", "compile"]
    assert providers.chosen(None) == list(providers.PROVIDERS)
