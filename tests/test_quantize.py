"""int8 weights: what quantising does to numbers, a model's bytes, its loss and checkpoints."""

import copy
import json
import weakref

import pytest
import torch
from torch import nn

import llama_ext as lx
from corpus import write_tokenizer
from harness import DTYPES, check_op, randn
from llama_ext import checkpoint, cli
from llama_ext.generate import generate
from llama_ext.quantize import Int8Linear, quantize, quantize_

SHAPE = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 310,
         "multiple_of": 32, "max_seq_len": 64}


@pytest.fixture(scope="module")
def trained():
    """A model after 60 steps on text, and a batch of that text it has not seen."""
    torch.manual_seed(0)
    model = lx.Llama(lx.LlamaConfig(**SHAPE))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    text = torch.tensor(list((lx.ref.__doc__ + cli.__doc__ + __doc__).encode() * 4))
    held_out = text[-130:].view(2, 65)
    losses = []
    for _ in range(60):
        starts = torch.randint(len(text) - 65 - 130, (4,))
        batch = torch.stack([text[s:s + 65] for s in starts])
        loss = model(batch[:, :-1], batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    return model.requires_grad_(False), held_out


def size(model):
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 7), (1030, 16), (3, 1)])
def test_every_weight_is_within_half_a_step(dtype, shape):
    weight = randn(*shape, dtype=dtype)
    values, scale = quantize(weight)
    w = weight.double()
    assert values.dtype == torch.int8 and scale.dtype == torch.float32
    assert torch.equal(values.abs().amax(1), torch.full(shape[:1], 127, dtype=torch.int8))
    torch.testing.assert_close(scale.double(), w.abs().amax(1) / 127, rtol=1e-6, atol=0)
    error = (values.double() * scale.double()[:, None] - w).abs() / scale.double()[:, None]
    assert error.max() <= 0.5 + 1e-4


def test_rows_of_zeros_and_tiny_weights():
    weight = torch.zeros(3, 8)
    weight[1, 2] = -3e-44
    weight[2] = -2.0
    values, scale = quantize(weight)
    assert not values[0].any() and scale[0] == 0 and scale.isfinite().all()
    assert (values[2] == -127).all() and scale[2] == torch.tensor(2.0) / 127
    y = lx.linear_int8(torch.ones(1, 8), values, scale)
    assert y[0, 0] == 0 and abs(y[0, 2] + 16) < 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_refuses_weights_that_are_not_finite(bad):
    weight = randn(3, 8)
    weight[1, 1] = bad
    with pytest.raises(ValueError, match="^quantize: weight: expected finite numbers, got others$"):
        quantize(weight)


@pytest.mark.parametrize("model, sentence", [
    (nn.Sequential(nn.ReLU()), "expected nn.Linear modules in it, got none"),
    (nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2)),
     "expected linear layers without bias, got one at 1 of Sequential")])
def test_refuses_models(model, sentence):
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=f"^quantize_: model: {sentence}$"):
        quantize_(model)
    assert [type(m) for m in model.modules()] == before


def test_memory_of_a_bf16_model_halves():
    config = lx.LlamaConfig(dim=256, n_layers=4, n_heads=4, vocab_size=500)
    model = lx.Llama(config, dtype=torch.bfloat16)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    outputs = sum(m.out_features for m in model.modules() if isinstance(m, nn.Linear))
    before = size(model)
    assert quantize_(model) is model
    assert before - size(model) == linear - 4 * outputs
    assert size(model) < 0.54 * before
    assert not any(isinstance(m, nn.Linear) for m in model.modules())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_model_equals_one_with_the_same_weights_in_full(tied, dtype):
    torch.manual_seed(0)
    model = lx.Llama(lx.LlamaConfig(**SHAPE, tie_embeddings=tied), dtype=dtype)
    quantized = quantize_(copy.deepcopy(model))
    with torch.no_grad():
        for name, module in quantized.named_modules():
            if isinstance(module, Int8Linear):
                model.get_submodule(name).weight.copy_(module.dequantize(dtype))
    tokens = torch.randint(310, (2, 20))
    with torch.no_grad():
        logits, expected = quantized(tokens), model(tokens)
        loss, expected_loss = quantized(tokens, tokens), model(tokens, tokens)
    assert logits.dtype == dtype
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    assert (logits - expected).norm() <= tolerance * expected.norm()
    assert abs(loss - expected_loss) <= tolerance * 0.1
    assert quantized.output is None or isinstance(quantized.output, Int8Linear)


def test_loss_of_a_trained_model_stays_within_half_a_percent(trained, summary):
    model, batch = trained
    inputs, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
    before = model(inputs, targets).item()
    after = quantize_(copy.deepcopy(model))(inputs, targets).item()
    summary.append(f"int8 weights: loss {before:.4f} -> {after:.4f} ({after / before - 1:+.3%})")
    assert before != after and abs(after / before - 1) < 0.005


@pytest.mark.parametrize("dtype", DTYPES)
def test_op_on_a_trained_models_activations(trained, dtype):
    model, batch = trained
    seen = []
    hook = model.layers[1].feed_forward.w2.register_forward_pre_hook(
        lambda _, args: seen.append(args[0]))
    model(batch[:, :64])
    hook.remove()
    weight, scale = quantize(model.layers[1].feed_forward.w2.weight)
    check_op(lambda x: lx.linear_int8(x, weight, scale),
             lambda x: lx.ref.linear_int8(x, weight, scale), seen[0].to(dtype), dtype=dtype)


def test_greedy_generation_follows_the_full_model(trained):
    model, batch = trained
    prompt = batch[0, :16].tolist()
    expected = generate(model, prompt, 12, temperature=0)
    got = generate(quantize_(copy.deepcopy(model)), prompt, 12, temperature=0)
    assert len(got) == 12 and got[:4] == expected[:4]


def test_scale_stays_fp32_and_gradients_reach_adapters():
    layer = quantize_(nn.Sequential(nn.Linear(8, 5, bias=False)))[0]
    scale = layer.scale.clone()
    layer.to(torch.bfloat16).double().half()
    assert layer.weight.dtype == torch.int8 and torch.equal(layer.scale, scale)
    assert not list(layer.parameters())
    assert repr(layer) == "Int8Linear(in_features=8, out_features=5)"
    x = randn(3, 8).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize(torch.float32).sum(0).expand(3, 8))


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    """A run's folder with the trained model."""
    folder = tmp_path_factory.mktemp("run")
    checkpoint.save(folder, 1, trained[0], tokenizer=write_tokenizer(folder).read_bytes())
    return folder


def equal_states(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def test_loading_as_int8_equals_quantising_what_was_loaded(run, trained):
    expected = quantize_(copy.deepcopy(trained[0]))
    model, _ = checkpoint.load_model(checkpoint.latest(run), int8=True)
    assert equal_states(model, expected)
    batch = trained[1][:, :64]
    with torch.no_grad():
        assert torch.equal(model(batch), expected(batch))
    model, _ = checkpoint.load_model(checkpoint.latest(run), dtype=torch.bfloat16, int8=True)
    assert model(batch).dtype == torch.bfloat16
    layer = expected.layers[0].attention.wq
    assert torch.equal(model.layers[0].attention.wq.scale, layer.scale)  # not rounded before


@pytest.mark.parametrize("int8", [False, True])
def test_a_quantised_model_is_saved_and_loaded_as_it_is(run, trained, tmp_path, int8):
    model = quantize_(copy.deepcopy(trained[0]))
    path = checkpoint.save(tmp_path, 2, model, tokenizer=(run / "tokenizer.model").read_bytes())
    assert equal_states(checkpoint.load_model(path, int8=int8)[0], model)


def test_no_more_than_one_layer_is_held_in_full_while_loading(run, monkeypatch):
    """Every floating weight that the loader reads is freed before it reads the next."""
    held, most = [], 0
    real = checkpoint.safe_open

    class Spy:
        def __init__(self, *args):
            self.file = real(*args)

        def __enter__(self):
            self.open = self.file.__enter__()
            return self

        def __exit__(self, *args):
            return self.file.__exit__(*args)

        def __getattr__(self, name):
            return getattr(self.open, name)

        def get_tensor(self, name):
            nonlocal most
            tensor = self.open.get_tensor(name)
            held.append(weakref.ref(tensor))
            most = max(most, sum(t() is not None for t in held))
            return tensor

    monkeypatch.setattr(checkpoint, "safe_open", Spy)
    checkpoint.load_model(checkpoint.latest(run), int8=True)
    assert len(held) > 10 and most <= 1


def test_weights_that_are_not_finite(run, trained, tmp_path):
    model = copy.deepcopy(trained[0])
    model.output.weight[3, 4] = torch.nan
    path = checkpoint.save(tmp_path, 1, model, tokenizer=(run / "tokenizer.model").read_bytes())
    with pytest.raises(lx.LlamaExtError, match=f"^{path}: output.weight: quantize: weight: "
                                               "expected finite numbers, got others$"):
        checkpoint.load_model(path, int8=True)


def test_training_does_not_go_on_from_a_quantised_checkpoint(run, trained, tmp_path):
    path = checkpoint.save(tmp_path, 1, quantize_(copy.deepcopy(trained[0])))
    model = lx.Llama(trained[0].config)
    with pytest.raises(lx.LlamaExtError, match=r"layers.0.attention.wk.scale: expected nothing"):
        checkpoint.load(path, model, torch.optim.AdamW(model.parameters()))


def test_generate_command(run, capsys):
    command = ["generate", "--run", str(run), "--prompt", "a b", "--temperature", "0",
               "--max-new-tokens", "8"]
    assert cli.main(command) == 0
    full = capsys.readouterr().out
    assert cli.main([*command, "--int8"]) == 0
    assert capsys.readouterr().out[:4] == full[:4]
    plans = []
    for more in ([], ["--int8"]):
        with pytest.raises(SystemExit, match="0"):
            cli.main([*command, "--plan", *more])
        plans.append(json.loads(capsys.readouterr().out))
    saved = plans[0]["weights"] - plans[1]["weights"]
    assert saved > 0.6 * plans[0]["weights"] and plans[0]["cache"] == plans[1]["cache"]
