"""patch_hf: our kernels in transformers' own models give what the models gave before."""

import copy
import importlib.util
import inspect
import logging

import pytest
import torch
import transformers
from transformers.modeling_outputs import CausalLMOutputWithPast

import llama_ext as lx
from compare import check
from llama_ext import patch

V, B, T = 103, 3, 14
SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": V, "intermediate_size": 96,
         "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
MODELS = {
    "Llama": (transformers.LlamaConfig, {}),
    "Mistral, window": (transformers.MistralConfig, {"sliding_window": 5}),
    "Qwen2": (transformers.Qwen2Config, {}),
    "Qwen2, window": (transformers.Qwen2Config, {
        "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
}
CACHE = ("cache" if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters
         else "past_key_values")  # its name in older versions
every_model = pytest.mark.parametrize("name", MODELS)


def make(name="Llama", dtype=torch.float32, **more):
    config, options = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config(**SHAPE, **options, **more), attn_implementation="sdpa")
    with torch.no_grad():
        for p in model.parameters():  # biases and norms matter too
            p.normal_(float(p.dim() == 1), 0.3 if p.dim() == 1 else p.shape[-1] ** -0.5)
    return model.to(dtype).eval()


def tokens():
    return torch.randint(2, V, (B, T), generator=torch.Generator().manual_seed(1))


def padded(side):
    mask = torch.ones(B, T, dtype=torch.int64)
    for row, pad in enumerate((0, 3, 8)):
        if pad:
            mask[row, slice(0, pad) if side == "left" else slice(T - pad, T)] = 0
    return mask


def run(model, mask=None):
    """Logits, loss, gradients of a forward with labels; what is masked out counts for nothing."""
    ids = tokens()
    mask = torch.ones_like(ids) if mask is None else mask
    labels = ids.masked_fill(mask == 0, -100)
    model.zero_grad()
    extra = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    with torch.no_grad():
        logits = model.eval()(ids, **extra).logits[mask.bool()]
    loss = model.train()(ids, labels=labels, **extra).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return {"logits": logits, "loss": loss.detach(), **grads}


def exact_angles(model):
    """The fp64 `model` with angles in fp64 too, which transformers has in fp32 alone."""
    frequency = 10000.0 ** (-torch.arange(0, 16, 2).double() / 16)

    def angles(x, position_ids):
        angle = position_ids[..., None].double() * frequency
        angle = torch.cat((angle, angle), -1)
        return angle.cos(), angle.sin()

    rotary, = (m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding"))
    rotary.forward = angles
    return model


def exact(model):
    """An fp64 copy of an unpatched model with nothing in fp32: angles and norms replaced."""
    model = exact_angles(copy.deepcopy(model).double())
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, m=module: torch.nn.functional.rms_norm(
                x, m.weight.shape, m.weight, m.variance_epsilon)
    return model


def compare(model, patched, mask=None):
    """In fp64 to 1e-11, then in fp32, where the roundings of ten ops in a row add up."""
    reference_model = exact(model)
    causal_model, = (m for m in reference_model.modules()
                     if isinstance(m, transformers.PreTrainedModel) and hasattr(m, "lm_head"))
    causal_model.loss_function = lambda logits, labels, **_: torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())  # theirs is in fp32
    reference, base = run(reference_model, mask), run(model, mask)
    got64 = run(exact_angles(copy.deepcopy(patched).double()), mask)
    got = run(patched, mask)
    assert got.keys() == base.keys() == got64.keys()
    for what in got:
        check(got64[what], reference[what], what=what)
        check(got[what], reference[what], base[what], what=what, fp32_roundings=20)


# --- parity ---

@every_model
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_logits_loss_and_gradients(name, side):
    model, mask = make(name), None if side == "none" else padded(side)
    patched = copy.deepcopy(model)
    patch.fallbacks.clear()
    report = lx.patch_hf(patched)
    assert report == {"rmsnorm": 5, "rope": 2, "attention": 2, "swiglu": 2,
                      "linear_cross_entropy": 1, "kept": []}
    compare(model, patched, mask)
    assert not patch.fallbacks


def test_kernels_are_what_runs(monkeypatch):
    calls = []
    for name in ("rmsnorm", "rope_qk", "attention", "swiglu", "linear_cross_entropy"):
        op = getattr(patch, name)
        monkeypatch.setattr(patch, name, lambda *a, _op=op, _name=name, **k: (
            calls.append(_name), _op(*a, **k))[1])
    model = make()
    lx.patch_hf(model)
    model.train()(tokens(), labels=tokens())
    assert {name: calls.count(name) for name in calls} == {
        "rmsnorm": 5, "rope_qk": 2, "attention": 2, "swiglu": 2, "linear_cross_entropy": 1}


def test_bf16():
    model = make(dtype=torch.bfloat16)
    patched = copy.deepcopy(model)
    lx.patch_hf(patched)
    reference = exact(model)
    with torch.no_grad():
        check(patched(tokens()).logits, reference(tokens()).logits, model(tokens()).logits)


def test_autocast():
    model, ids = make(), tokens()
    patched = copy.deepcopy(model)
    lx.patch_hf(patched)
    with torch.autocast("cpu", torch.bfloat16):
        base, out = (m.train()(ids, labels=ids, attention_mask=padded("left"))
                     for m in (model, patched))
    reference = exact(model)(ids, labels=ids, attention_mask=padded("left"))
    check(out.loss, reference.loss, base.loss, dtype=torch.bfloat16)
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in patched.parameters())


def test_logits_are_skipped_in_training_alone():
    model = make()
    lx.patch_hf(model)
    ids = tokens()
    out = model.train()(ids, labels=ids)
    assert isinstance(out, CausalLMOutputWithPast) and out.logits is None
    assert model(ids).logits.shape == (B, T, V)
    assert model(ids, labels=ids, logits_to_keep=T).logits.shape == (B, T, V)
    assert torch.equal(model(ids, labels=ids, return_dict=False)[0], out.loss)
    assert torch.equal(model(ids, None, labels=ids).loss, out.loss)  # positional arguments
    out = model.eval()(ids, labels=ids)
    assert out.logits.shape == (B, T, V) and out.loss.isfinite()
    hidden = model.train()(ids, labels=ids, output_hidden_states=True).hidden_states
    assert len(hidden) == 3


@pytest.mark.parametrize("count", [17, torch.tensor(17)])
def test_losses_options(count):
    model = make()
    patched = copy.deepcopy(model)
    lx.patch_hf(patched)
    ids = tokens()
    shifted = ids.roll(-1, 1)
    for options in ({"num_items_in_batch": count}, {"shift_labels": shifted},
                    {"ignore_index": int(ids[0, 3])}):
        theirs, ours = (m.train()(ids, labels=ids, **options).loss for m in (model, patched))
        reference = exact(model)(ids, labels=ids, **options).loss
        check(ours, reference, theirs)


# --- in use ---

@every_model
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_gives_the_same_tokens(name, cache):
    model, ids, mask = make(name), tokens(), padded("left")
    patched = copy.deepcopy(model)
    lx.patch_hf(patched)
    for options in ({}, {"attention_mask": mask}):
        theirs, ours = (m.generate(ids, max_new_tokens=9, do_sample=False, use_cache=True,
                                   cache_implementation=cache, **options) for m in
                        (model, patched))
        assert ours.shape == (B, T + 9) and torch.equal(ours, theirs)


def test_chunked_prefill():
    model, ids = make(), tokens()
    patched = copy.deepcopy(model)
    lx.patch_hf(patched)
    with torch.no_grad():
        whole = exact(model)(ids).logits[:, 6:]
        parts = []
        for m in (model, patched):
            cache = transformers.DynamicCache(config=m.config)
            m(ids[:, :6], **{CACHE: cache}, use_cache=True)
            parts.append(m(ids[:, 6:], **{CACHE: cache}, use_cache=True).logits)
    check(parts[1], whole, parts[0])


@pytest.mark.skipif(not importlib.util.find_spec("accelerate"), reason="Trainer needs accelerate")
def test_trainer(tmp_path):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, i):
            ids = torch.randint(2, V, (T,), generator=torch.Generator().manual_seed(i))
            return {"input_ids": ids, "labels": ids}

    def losses(model):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=3, logging_steps=1,
            report_to=[], use_cpu=True, save_strategy="no", learning_rate=1e-2,
            gradient_checkpointing=True, eval_strategy="no", disable_tqdm=True, seed=1)
        trainer = transformers.Trainer(model, arguments, train_dataset=Rows(),
                                       eval_dataset=Rows())
        trainer.train()
        steps = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        return steps + [trainer.evaluate()["eval_loss"]]

    model = make()
    patched = copy.deepcopy(model)
    lx.patch_hf(patched)
    theirs, ours = losses(model), losses(patched)
    assert len(ours) == 4 and ours == pytest.approx(theirs, rel=1e-4)
    assert ours[-1] < ours[0]


def test_gradient_checkpointing():
    model = make()
    patched = copy.deepcopy(model)
    lx.patch_hf(patched)
    before = run(patched, padded("left"))
    patched.gradient_checkpointing_enable()
    assert all(torch.equal(value, before[what])
               for what, value in run(patched, padded("left")).items())


@pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="needs peft")
@pytest.mark.parametrize("first", ["peft", "patch"])
def test_lora(first):
    import peft

    def lora(model):
        torch.manual_seed(2)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(
            r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False))
        return wrapped

    model, ids = make(), tokens()
    theirs, ours = lora(copy.deepcopy(model)), copy.deepcopy(model)
    if first == "patch":
        lx.patch_hf(ours)
    ours = lora(ours)
    if first == "peft":
        lx.patch_hf(ours)
    trained = [n for n, p in ours.named_parameters() if p.requires_grad]
    assert trained and all("lora" in n for n in trained)
    compare(theirs, ours)
    assert ours.train()(ids, labels=ids).logits is None
    lx.unpatch_hf(ours)
    assert torch.equal(ours.eval()(ids).logits, theirs.eval()(ids).logits)


def test_other_masks_go_to_sdpa_and_say_so(caplog):
    model, ids = make(), tokens()
    patched = copy.deepcopy(model)
    lx.patch_hf(patched)
    patch.fallbacks.clear()
    # Two documents in a row, known from their positions.
    positions = torch.cat((torch.arange(6), torch.arange(T - 6))).expand(B, T)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        for _ in range(2):
            got = patched(ids, position_ids=positions, use_cache=False).logits
        base = model(ids, position_ids=positions, use_cache=False).logits
        check(got, exact(model)(ids, position_ids=positions, use_cache=False).logits, base)
    reason = "a mask other than causal with padding"
    assert patch.fallbacks == {reason: 4}
    assert [r.getMessage() for r in caplog.records if reason in r.getMessage()] == [
        f"patch_hf: attention by torch's sdpa: {reason}"]


def test_gap_in_a_window():
    model, ids = make("Mistral, window"), tokens()
    patched = copy.deepcopy(model)
    lx.patch_hf(patched)
    mask = torch.ones_like(ids)
    mask[1, 4:7] = 0
    patch.fallbacks.clear()
    compare(model, patched, mask)
    assert patch.fallbacks


def test_compile():
    model = make()
    patched = copy.deepcopy(model)
    lx.patch_hf(patched)
    ids = tokens()
    compiled = torch.compile(patched.train(), backend="eager", fullgraph=False)
    out = compiled(ids, labels=ids)
    check(out.loss, exact(model).train()(ids, labels=ids).loss,
          model.train()(ids, labels=ids).loss)


# --- the report, and back ---

@every_model
def test_unpatch_restores_every_bit(name):
    model = make(name)
    before, attributes = run(model), {n: set(vars(m)) for n, m in model.named_modules()}
    classes = {n: type(m) for n, m in model.named_modules()}
    lx.patch_hf(model)
    assert all(isinstance(m, classes[n]) for n, m in model.named_modules())
    lx.unpatch_hf(model)
    assert all(torch.equal(value, before[what]) for what, value in run(model).items())
    assert model.config._attn_implementation == "sdpa"
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes


def test_saved_model_knows_nothing_of_it(tmp_path):
    model = make()
    lx.patch_hf(model)
    model.save_pretrained(tmp_path)
    assert "llama_ext" not in (tmp_path / "config.json").read_text()
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(plain) is transformers.LlamaForCausalLM
    lx.unpatch_hf(model)
    assert torch.equal(plain(tokens()).logits, model(tokens()).logits)


def test_what_does_not_fit_is_kept_and_reported():
    model = make(attention_dropout=0.1, hidden_act="gelu")
    report = lx.patch_hf(model)
    assert report["attention"] == report["swiglu"] == 0 and report["rope"] == 2
    assert report["kept"] == ["attention: it has dropout", "MLP: its activation is gelu"]
    assert model.config._attn_implementation == "sdpa"
    model.train()(tokens(), labels=tokens()).loss.backward()
    lx.unpatch_hf(model)


def test_headless_model():
    model = make().model
    base = model(tokens()).last_hidden_state
    assert lx.patch_hf(model)["linear_cross_entropy"] == 0
    torch.testing.assert_close(model(tokens()).last_hidden_state, base, rtol=1e-4, atol=1e-5)


def test_errors():
    with pytest.raises(ValueError, match="expected a transformers Llama, Mistral, Qwen2, "
                                         "got Linear"):
        lx.patch_hf(torch.nn.Linear(1, 1))
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_layer=1, n_embd=8, n_head=1, vocab_size=5))
    with pytest.raises(ValueError, match="got GPT2LMHeadModel"):
        lx.patch_hf(gpt2)
    model = make()
    with pytest.raises(ValueError, match="expected a patched one"):
        lx.unpatch_hf(model)
    lx.patch_hf(model)
    with pytest.raises(ValueError, match="expected one that is not patched"):
        lx.patch_hf(model)
