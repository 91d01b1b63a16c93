"""The layers as drop-ins: right results, and at home in any nn.Module."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compare import check
from llama_ext import ref
from llama_ext.layers import CausalSelfAttention, FeedForward, RMSNorm, RotaryEmbedding, SwiGLU

B, T, C = 2, 11, 32


class Gated(nn.Module):
    """SwiGLU with the two projections that its arguments need."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.swiglu = nn.Linear(C, C), nn.Linear(C, C), SwiGLU()

    def forward(self, x):
        return self.swiglu(self.gate(x), self.up(x))


class Rotated(nn.Module):
    """RotaryEmbedding applied to a projection seen as four heads."""

    def __init__(self):
        super().__init__()
        self.linear, self.rotary = nn.Linear(C, C), RotaryEmbedding(C // 4, max_seq_len=16)

    def forward(self, x):
        q = self.linear(x).unflatten(-1, (4, -1))
        return torch.cat(self.rotary(q, q[:, :, :2]), 2).flatten(-2)


class Residual(nn.Module):
    """RMSNorm fused with the residual addition before it."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(C, C), RMSNorm(C)

    def forward(self, x):
        return torch.cat(self.norm(self.linear(x), x), -1)


MAKERS = {
    "RMSNorm": lambda: RMSNorm(C),
    "RMSNorm, residual": Residual,
    "SwiGLU": Gated,
    "FeedForward": lambda: FeedForward(C, 48),
    "RotaryEmbedding": Rotated,
    "CausalSelfAttention": lambda: CausalSelfAttention(C, 4, 2, window=5),
}
every_layer = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


class Host(nn.Module):
    """A plain module around the layer under test."""

    def __init__(self, make):
        super().__init__()
        self.before, self.layer = nn.Linear(C, C), make()

    def forward(self, x):
        return self.layer(self.before(x))


def host(make, seed=0):
    torch.manual_seed(seed)
    return Host(make), torch.randn(B, T, C) + 0.1


@every_layer
def test_trains(make):
    model, x = host(make)
    target = torch.randn_like(model(x))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = F.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.count_nonzero() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


@every_layer
def test_copies_give_equal_results(make):
    model, x = host(make)
    expected = model(x)
    loaded, _ = host(make, seed=1)
    assert not torch.equal(loaded(x), expected)
    loaded.load_state_dict(model.state_dict())
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    for twin in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
    assert all("cos" not in name and "sin" not in name for name in model.state_dict())


@every_layer
def test_built_on_meta_then_materialised(make):
    with torch.device("meta"):
        model = Host(make)
    assert all(t.is_meta for t in [*model.parameters(), *model.buffers()])
    model.to_empty(device="cpu")
    twin, x = host(make)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert model(x).isfinite().all()
    model.load_state_dict(twin.state_dict())
    assert torch.equal(model(x), twin(x))


@every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_follows_the_module_to_a_dtype(make, dtype):
    model, x = host(make)
    out = model.to(dtype)(x.to(dtype))
    assert out.dtype == dtype and out.isfinite().all()


@every_layer
def test_compiles_whole_with_dynamic_length(make):
    model, x = host(make)
    model = model.eval()
    twin = copy.deepcopy(model).double()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(x)
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (5, 16):
            y = torch.randn(B, length, C)
            check(compiled(y), twin(y.double()), model(y))


def test_rmsnorm_and_feed_forward_compute_their_formulas():
    torch.manual_seed(0)
    x, residual = torch.randn(2, B, T, C)
    norm, ff = RMSNorm(C, eps=1e-3), FeedForward(C, 48)
    nn.init.normal_(norm.weight, 1)
    weight = norm.weight
    check(norm(x), ref.rmsnorm(x.double(), weight.double(), 1e-3), ref.rmsnorm(x, weight, 1e-3))
    y, h = norm(x, residual)
    assert torch.equal(h, x + residual)
    check(y, ref.rmsnorm(h.double(), weight.double(), 1e-3), ref.rmsnorm(h, weight, 1e-3))

    def formula(x, w1, w2, w3):
        return F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2)

    w = ff.w1.weight, ff.w2.weight, ff.w3.weight
    check(ff(x), formula(x.double(), *(t.double() for t in w)), formula(x, *w))


# --- RotaryEmbedding ---

def complex_rotation(x, theta, start=0):
    """Meta's formulation on interleaved pairs, in fp64: x (B, T, H, D) times e^(i * angle)."""
    frequency = theta ** (-torch.arange(0, x.shape[-1], 2, dtype=torch.float64) / x.shape[-1])
    angle = torch.outer(torch.arange(start, start + x.shape[1], dtype=torch.float64), frequency)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    turns = torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.view_as_real(pairs * turns).flatten(-2)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_equals_complex_rotation(interleaved):
    torch.manual_seed(0)
    rotary = RotaryEmbedding(8, theta=500.0, max_seq_len=64, interleaved=interleaved)
    q, k = torch.randn(B, T, 4, 8), torch.randn(B, T, 2, 8)
    # Channel j of the interleaved layout is channel order[j] of the half-split one.
    order = torch.arange(8) if interleaved else torch.arange(8).view(2, 4).t().flatten()
    for x, got in zip((q, k), rotary(q, k, start_pos=40)):
        expected = complex_rotation(x[..., order], 500.0, start=40)
        check(got[..., order], expected, expected.float())


def test_rotary_tables_stay_fp32_and_right_through_every_cast():
    rotary = RotaryEmbedding(16, max_seq_len=300)
    cos = rotary.cos.clone()
    angle = torch.outer(torch.arange(300).double(), 10000.0 ** (-torch.arange(8).double() / 8))
    assert torch.equal(cos, angle.cos().float())
    for cast in (rotary.half(), rotary.bfloat16(), rotary.double(), rotary.to_empty(device="cpu")):
        assert cast.cos.dtype == torch.float32 and torch.equal(cast.cos, cos)
    assert rotary.to("meta").sin.is_meta


def test_rotary_grows_and_takes_positions():
    torch.manual_seed(0)
    rotary, wide = RotaryEmbedding(8, max_seq_len=4), RotaryEmbedding(8, max_seq_len=64)
    x = torch.randn(B, T, 2, 8)
    assert torch.equal(rotary(x, x, 3)[0], wide(x, x, 3)[0])
    assert T + 3 <= rotary.cos.shape[0]
    starts = torch.tensor([[7], [0]])
    by_position, _ = wide(x, x, positions=starts + torch.arange(T))
    for b, start in enumerate(starts[:, 0].tolist()):
        assert torch.equal(by_position[b], wide(x, x, start)[0][b])


def test_rotary_grown_while_generating_still_trains():
    rotary, x = RotaryEmbedding(8, max_seq_len=4), torch.randn(B, T, 2, 8)
    with torch.inference_mode():
        rotary(x, x)
    x.requires_grad_()
    rotary(x, x)[0].sum().backward()
    assert x.grad.isfinite().all()


def test_rotary_refuses_bad_positions():
    x = torch.zeros(1, 3, 2, 8)
    with pytest.raises(ValueError, match="head_dim: expected an even number, got 7"):
        RotaryEmbedding(7)
    with pytest.raises(ValueError, match="start_pos: expected >= 0, got -1"):
        RotaryEmbedding(8)(x, x, -1)
    for outside in (-1, 16):
        with pytest.raises(RuntimeError, match=r"positions: expected 0 to 15"):
            RotaryEmbedding(8, max_seq_len=16)(x, x, positions=torch.tensor([[0, 1, outside]]))


# --- CausalSelfAttention ---

def plain_attention(layer, x):
    """The layer's formula with torch's own operations, in x's dtype."""
    weights = {name: p.to(x.dtype) for name, p in layer.named_parameters()}
    q, k, v = (F.linear(x, weights[f"w{n}.weight"]).unflatten(-1, (-1, layer.head_dim))
               for n in "qkv")
    q, k = (complex_rotation(t, layer.rotary.theta).to(x.dtype) for t in (q, k))
    i = torch.arange(x.shape[1])
    mask = (i[:, None] >= i) & (i[:, None] < i + (layer.window or len(i)))
    o = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask,
                                       enable_gqa=True)
    return F.linear(o.transpose(1, 2).flatten(-2), weights["wo.weight"])


@pytest.mark.parametrize("n_kv_heads, window", [(None, None), (2, None), (1, 4)])
def test_attention_equals_sdpa_and_its_own_cached_steps(n_kv_heads, window):
    torch.manual_seed(0)
    layer, x = CausalSelfAttention(C, 4, n_kv_heads, window), torch.randn(B, T, C)
    expected, base = plain_attention(layer, x.double()), plain_attention(layer, x)
    check(layer(x), expected, base)
    cache = tuple(torch.full((B, 16, layer.n_kv_heads, 8), torch.nan) for _ in "kv")
    cuts = [0, 6, 7, 8, T]
    with torch.no_grad():
        steps = [layer(x[:, a:b], start_pos=a, cache=cache) for a, b in zip(cuts, cuts[1:])]
    check(torch.cat(steps, 1), expected, base)


def test_attention_shares_a_rotary_embedding():
    rotary = RotaryEmbedding(8, theta=100.0)
    layers = nn.Sequential(*(CausalSelfAttention(C, 4, rotary=rotary) for _ in range(2)))
    assert layers[0].rotary is layers[1].rotary is rotary
    twin = copy.deepcopy(layers)
    assert twin[0].rotary is twin[1].rotary is not rotary


def test_attention_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="dim: expected a multiple of n_heads 5, got 32"):
        CausalSelfAttention(32, 5)
    with pytest.raises(ValueError, match="n_kv_heads: expected a divisor of n_heads 4, got 3"):
        CausalSelfAttention(32, 4, 3)
    with pytest.raises(ValueError, match="window: expected >= 1 or None, got 0"):
        CausalSelfAttention(32, 4, window=0)
    for head_dim in (7, 0):
        with pytest.raises(ValueError, match=f"head_dim: expected an even .*, got {head_dim}"):
            CausalSelfAttention(30, 4, head_dim=head_dim)
    layer = CausalSelfAttention(30, 4, 2, head_dim=12)
    assert [tuple(w.weight.shape) for w in (layer.wq, layer.wk, layer.wo)] == [
        (48, 30), (24, 30), (30, 48)]
    assert layer(torch.randn(B, T, 30)).shape == (B, T, 30)
    layer, x = CausalSelfAttention(C, 4), torch.randn(B, T, C)
    with pytest.raises(ValueError, match=r"x: expected \(B, T, 32\), got shape \(2, 32\)"):
        layer(x[:, 0])
    for batch, room in ((B, T), (1, 16)):
        cache = tuple(torch.zeros(batch, room, 4, 8) for _ in "kv")
        with pytest.raises(ValueError, match=f"expected batch 2 and room for 12 positions, got "
                                             f"batch {batch} and {room} positions"):
            layer(x, start_pos=1, cache=cache)


def test_layers_describe_themselves():
    text = repr(nn.ModuleList(make() for make in MAKERS.values()))
    for part in ("RMSNorm(32, eps=1e-06)", "RotaryEmbedding(8, theta=10000.0, max_seq_len=16, "
                 "interleaved=True)", "dim=32, n_heads=4, n_kv_heads=2, window=5"):
        assert part in text
