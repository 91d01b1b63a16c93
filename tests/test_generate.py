"""Generation: what it draws, when it stops, and that batches and caches change nothing."""

import random

import pytest
import torch

from corpus import WORDS
from llama_ext.generate import generate, generate_text, sample, stream, stream_text
from llama_ext.model import Llama, LlamaConfig
from llama_ext.tokenizer import Tokenizer

CONTEXT = 24
PROMPTS = [[5, 1, 8], [2], [7, 7, 7], [3, 9, 4, 1, 5, 2]]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Llama(LlamaConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=61,
                              hidden_dim=48, max_seq_len=CONTEXT))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(12)  # far from uniform, so that greedy continuations vary
    return model


@torch.no_grad()
def greedy_without_cache(model, prompt, steps):
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt):]


def test_greedy_equals_argmax_without_cache(model):
    expected = [greedy_without_cache(model, p, 12) for p in PROMPTS]
    assert len(set(map(tuple, expected))) == len(PROMPTS) and len(set(expected[0])) > 3
    for prompt, ids in zip(PROMPTS, expected):
        assert generate(model, prompt, 12, temperature=0) == ids
        assert list(stream(model, prompt, 12, temperature=0)) == ids
    assert generate(model, PROMPTS, 12, temperature=0) == expected


def test_head_dim_of_its_own():
    torch.manual_seed(0)
    model = Llama(LlamaConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=20,
                              vocab_size=61, hidden_dim=48, max_seq_len=CONTEXT))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(12)
    expected = [greedy_without_cache(model, p, 12) for p in PROMPTS]
    assert generate(model, PROMPTS, 12, temperature=0) == expected


def test_batch_of_unequal_prompts_equals_each_alone(model):
    together = generate(model, PROMPTS, 12, seed=40)
    alone = [generate(model, p, 12, seed=40 + i) for i, p in enumerate(PROMPTS)]
    assert together == alone
    same = generate(model, [PROMPTS[0]] * 3, 12, seed=1)
    assert len(set(map(tuple, same))) == 3


def test_seed_reproduces(model):
    ids = generate(model, PROMPTS[0], 16, seed=7)
    assert ids == generate(model, PROMPTS[0], 16, seed=7)
    assert ids == list(stream(model, PROMPTS[0], 16, seed=7))
    assert ids[:5] == generate(model, PROMPTS[0], 5, seed=7)
    assert ids != generate(model, PROMPTS[0], 16, seed=8)
    state = torch.get_rng_state()
    generate(model, PROMPTS[0], 4, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    first, second = generate(model, PROMPTS[0], 16), generate(model, PROMPTS[0], 16)
    torch.manual_seed(3)
    assert first == generate(model, PROMPTS[0], 16) != second


def test_limits_of_sampling_are_greedy(model):
    expected = generate(model, PROMPTS, 12, temperature=0)
    assert generate(model, PROMPTS, 12, top_p=1e-9, seed=0) == expected
    assert generate(model, PROMPTS, 12, temperature=1e-30, seed=0) == expected


@pytest.mark.parametrize("temperature, top_p, expected", [
    (1.0, 1.0, [0.1, 0.4, 0.05, 0.3, 0.15]),
    (0.5, 1.0, [0.01, 0.16, 0.0025, 0.09, 0.0225]),  # p^(1 / temperature)
    (1.0, 0.71, [0, 0.4, 0, 0.3, 0.15]),             # 0.4 + 0.3 do not reach it: one more
    (1.0, 0.69, [0, 0.4, 0, 0.3, 0]),
    (1.0, 0.39, [0, 1, 0, 0, 0])])
def test_distribution(temperature, top_p, expected):
    n = 40_000
    logits = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]).log() + 50
    draws = torch.rand(n, generator=torch.Generator().manual_seed(0))
    ids = sample(logits.expand(n, 5), draws, temperature, top_p)
    counts = torch.bincount(ids, minlength=5).double()
    expected = torch.tensor(expected, dtype=torch.float64)
    expected = n * expected / expected.sum()
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected)[possible].square() / expected[possible]).sum()
    assert chi_square < 18.5  # 0.1 % point at 4 degrees of freedom


def test_sample_at_the_ends_of_the_interval():
    logits = torch.tensor([[float("-inf"), 2.0, 1.0, float("-inf")]])
    below_one = 1 - 2 ** -24
    for top_p in (0.5, 0.9, 1.0):
        assert sample(logits, torch.tensor([0.0]), top_p=top_p).item() == 1
        last = 1 if top_p == 0.5 else 2
        assert sample(logits, torch.tensor([below_one]), top_p=top_p).item() == last
    bad = torch.tensor([[0.0, torch.nan], [0.0, torch.inf], [-torch.inf, -torch.inf], [1.0, 0.0]])
    for temperature in (0, 1):
        assert sample(bad, torch.zeros(4), temperature).tolist() == [-1, -1, -1, 0]


def test_stops_before_eos(model):
    free = generate(model, PROMPTS, 12, temperature=0)
    eos = free[0][6]
    expected = [ids[:ids.index(eos)] if eos in ids else ids for ids in free]
    assert 0 < len(expected[0]) < 12 and any(len(ids) == 12 for ids in expected)
    assert generate(model, PROMPTS, 12, temperature=0, eos_id=eos) == expected
    for prompt, ids in zip(PROMPTS, expected):
        assert generate(model, prompt, 12, temperature=0, eos_id=eos) == ids
        assert list(stream(model, prompt, 12, temperature=0, eos_id=eos)) == ids


def test_batch_stops_computing_once_every_prompt_ended(model):
    [first] = generate(model, PROMPTS[0], 1, temperature=0)
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    assert generate(model, [PROMPTS[0]] * 2, 12, temperature=0, eos_id=first) == [[], []]
    hook.remove()
    assert len(calls) == 1


def test_one_pass_for_the_prompt_then_single_tokens(model):
    lengths = []
    hook = model.tok_embeddings.register_forward_hook(lambda _, x, y: lengths.append(y.shape[1]))
    generate(model, PROMPTS[3], 4, temperature=0)
    hook.remove()
    assert lengths == [6, 1, 1, 1]


def test_stops_when_the_context_is_full(model):
    assert len(generate(model, PROMPTS[0], 100, seed=0)) == CONTEXT - 3
    assert [len(ids) for ids in generate(model, PROMPTS, 100, seed=0)] == [21, 23, 21, 18]
    assert len(list(stream(model, [1] * (CONTEXT - 1), 100, seed=0))) == 1
    assert generate(model, [1] * CONTEXT, 100) == []
    assert generate(model, PROMPTS[0], 0) == []


def test_model_still_trains_after_generating(model):
    ids = stream(model, PROMPTS[0], 4, seed=0)
    next(ids)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    tokens = torch.tensor(PROMPTS[:1])
    model(tokens, tokens).backward()
    assert model.norm.weight.grad.isfinite().all()
    model.zero_grad()


@pytest.mark.parametrize("prompt, steps, options, message", [
    ([], 4, {}, "prompt_ids: expected 1 to max_seq_len = 24 ids, got 0"),
    ([[1], []], 4, {}, "prompt_ids: expected 1 to max_seq_len = 24 ids, got 0"),
    ([1] * 25, 4, {}, "prompt_ids: expected 1 to max_seq_len = 24 ids, got 25"),
    ([1], -1, {}, "max_new_tokens: expected >= 0, got -1"),
    ([1], 4, {"temperature": -0.5}, "temperature: expected a number >= 0, got -0.5"),
    ([1], 4, {"temperature": float("nan")}, "temperature: expected a number >= 0, got nan"),
    ([1], 4, {"top_p": 0.0}, "top_p: expected above 0 and at most 1, got 0.0"),
    ([1], 4, {"top_p": 1.5}, "top_p: expected above 0 and at most 1, got 1.5"),
    ([1], 4, {"top_k": 0}, "top_k: expected >= 1 or None, got 0"),
    ([[1]], 4, {"batch_size": 0}, "batch_size: expected >= 1, got 0"),
    ([1, 61], 4, {}, "expected ids from 0 to 60, got 1 to 61")])
def test_refuses(model, prompt, steps, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompt, steps, **options)


def test_model_with_nan_weights_is_reported():
    model = Llama(LlamaConfig(dim=16, n_layers=1, n_heads=2, vocab_size=8, max_seq_len=16))
    with torch.no_grad():
        model.norm.weight[3] = torch.nan
    with pytest.raises(ValueError, match="expected finite logits, got others at token 2"):
        generate(model, [1, 2], 4)


# --- many prompts ---

def test_a_row_that_ends_goes_to_the_next_prompt(model):
    """Five prompts on two rows: the passes hold the new tokens of each row and no others."""
    prompts = [*PROMPTS, [4]]
    alone = [generate(model, p, 6, seed=3 + i) for i, p in enumerate(prompts)]
    widths = []
    hook = model.tok_embeddings.register_forward_hook(lambda _, x, y: widths.append(y.shape[1]))
    got = list(stream(model, prompts, 6, seed=3, batch_size=2))
    hook.remove()
    assert widths[:8] == [3 + 1, 2, 2, 2, 2, 2, 3 + 6, 2]
    assert widths[8:] == [2, 2, 2, 2, 1, 1, 1, 1, 1, 1]
    for i, ids in enumerate(alone):
        assert [token for j, token in got if j == i] == [*ids, None]
    assert generate(model, prompts, 6, seed=3, batch_size=1) == alone


def test_prompts_join_up_to_a_number_of_tokens(model, monkeypatch):
    widths = []
    hook = model.tok_embeddings.register_forward_hook(lambda _, x, y: widths.append(y.shape[1]))
    monkeypatch.setattr("llama_ext.generate.PROMPT_TOKENS", 5)
    together = generate(model, [PROMPTS[3], *PROMPTS], 3, temperature=0)
    hook.remove()
    assert widths == [6, 1 + 3 + 1, 2 + 1 + 3, 1 + 2 + 6, 2, 1]
    assert together == [generate(model, p, 3, temperature=0) for p in [PROMPTS[3], *PROMPTS]]


def test_the_reader_ends_a_prompt(model):
    free, ended, got = generate(model, PROMPTS, 8, seed=5), set(), [[] for _ in PROMPTS]
    for i, token in stream(model, PROMPTS, 8, seed=5, ended=ended):
        got[i].append(token)
        if len(got[i]) == i + 1:
            ended.add(i)
    assert got == [[*ids[:i + 1], None] for i, ids in enumerate(free)]


@pytest.mark.parametrize("temperature", [0, 2.0])
def test_draws_come_from_the_vocabulary(model, temperature):
    """Of a model that is wider than its tokenizer."""
    options = {"temperature": temperature, "seed": 3}
    assert max(map(max, generate(model, PROMPTS, 12, **options))) >= 20
    assert max(map(max, generate(model, PROMPTS, 12, vocab_size=20, **options))) < 20


def test_draws_come_from_the_top_k():
    logits = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]).log()
    draws = torch.linspace(0, 1 - 2 ** -24, 1001)

    def shares(**options):
        ids = sample(logits.expand(1001, 5), draws, **options)
        return torch.bincount(ids, minlength=5) / 1001

    torch.testing.assert_close(shares(top_k=2), torch.tensor([0, 4 / 7, 0, 3 / 7, 0]),
                               atol=2e-3, rtol=0)
    assert shares(top_k=1)[1] == 1
    assert shares(top_k=2, top_p=0.56)[1] == 1  # of the two kept, the first has 4/7
    assert shares(top_k=2, top_p=0.58)[3] > 0
    for enough in (5, 99):
        assert torch.equal(shares(top_k=enough), shares())


# --- text ---

@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    words = " ".join(random.Random(0).choices(WORDS, k=4000))
    return Tokenizer.train([words], path, 320)


@pytest.fixture
def writes(monkeypatch, tokenizer):
    """Lets `stream` give the tokens of chosen texts, one a step; returns stream_text's pieces."""
    def pieces(texts, **options):
        def tokens(model, prompts, count, *, ended, eos_id, vocab_size):
            ids = [tokenizer.encode(text) for text in texts]
            for step in range(max(map(len, ids)) + 1):
                for i, left in enumerate(ids):
                    if left is not None and (i in ended or step == len(left)):
                        ids[i] = None
                        yield i, None
                    elif left is not None:
                        yield i, left[step]
        monkeypatch.setattr("llama_ext.generate.stream", tokens)
        return list(stream_text(None, tokenizer, texts, 0, **options))
    return pieces


@pytest.mark.parametrize("text, stop, expected", [
    ("print x y value", ["x y"], "print "),
    ("print x x y value", ["x y"], "print x "),       # a beginning that leads nowhere
    ("abababac done", ["ababac"], "ab"),              # one inside another
    ("naïve \U0001f600\U0001f600 café", ["\U0001f600 "], "naïve \U0001f600"),
    ("x y value", ["value", "x y", "y v"], ""),       # the first that is complete
    ("x y value", [" y", "y", "x y"], ""),            # the longest of those complete at once
    ("print x", ["x y"], "print x"),                  # held back, then shown
    ("print x", ["print x"], ""), ("print x", [], "print x")])
def test_text_ends_before_a_stop_text(writes, tokenizer, text, stop, expected):
    pieces = writes([text], stop=stop)
    assert pieces[-1] == (0, None) and None not in [piece for _, piece in pieces[:-1]]
    assert "".join(piece for _, piece in pieces[:-1]) == expected
    shown = ""
    for _, piece in pieces[:-1]:  # and nothing was ever shown that had to be taken back
        shown += piece
        assert expected.startswith(shown)


def test_texts_of_a_batch_come_as_they_are_written(writes):
    pieces = writes(["print x y value", "a def return if else", "x"], stop=["return"])
    joined = ["".join(piece for j, piece in pieces if i == j and piece) for i in range(3)]
    assert joined == ["print x y value", "a def ", "x"]
    order = [i for i, _ in pieces]
    assert order != sorted(order) and sorted(i for i, piece in pieces if piece is None) == [0, 1, 2]
    assert pieces.index((2, None)) < pieces.index((0, None))


def test_generated_text_stops(tokenizer):
    torch.manual_seed(0)
    model = Llama(LlamaConfig(dim=32, n_layers=1, n_heads=2, vocab_size=320, max_seq_len=48))
    with torch.no_grad():
        model.output.weight.mul_(20)
    prompts, options = ["x", "return self", "", "print"], {"seed": 1, "top_k": 40}
    free = generate_text(model, tokenizer, prompts, 30, **options)
    ids = generate(model, [tokenizer.encode(p, bos=True) for p in prompts], 30, eos_id=2, **options)
    assert free == [tokenizer.decode(i) for i in ids]
    stop = free[0][len(free[0]) // 2:][:3]
    got = generate_text(model, tokenizer, prompts, 30, stop=[stop], **options)
    assert got == [text.split(stop)[0] for text in free] and got[0] != free[0]
    widths = []
    hook = model.tok_embeddings.register_forward_hook(lambda _, x, y: widths.append(y.shape[1]))
    assert generate_text(model, tokenizer, ["x"], 30, stop=[stop], **options) == got[:1]
    hook.remove()
    assert len(widths) < 30  # what has stopped costs nothing more
    with pytest.raises(ValueError, match="stop: expected texts of at least one character, got ''"):
        stream_text(model, tokenizer, ["x"], 4, stop=["a", ""])
