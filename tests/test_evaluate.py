"""Evaluation: what lm-eval asks is what the model says, on tasks that need no network."""

import json
import os
import random
import re
import subprocess
import sys

import pytest
import torch
from lm_eval.api.instance import Instance

from compare import check
from corpus import WORDS
from llama_ext import checkpoint, cli, evaltasks
from llama_ext.errors import LlamaExtError
from llama_ext.evaluate import LanguageModel, evaluate
from llama_ext.generate import generate_text
from llama_ext.model import Llama, LlamaConfig
from llama_ext.tokenizer import Tokenizer

CONTEXT = 40
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    words = " ".join(random.Random(0).choices(WORDS, k=4000))
    return Tokenizer.train([words], tmp_path_factory.mktemp("t") / "tokenizer.model", 330)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Llama(LlamaConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=330,
                              max_seq_len=CONTEXT))
    with torch.no_grad():
        model.output.weight.mul_(20)
    return model


@pytest.fixture
def lm(model, tokenizer):
    return LanguageModel(model, tokenizer)


def requests(kind, *args):
    return [Instance(request_type=kind, doc={}, arguments=one, idx=0) for one in args]


def direct(model, ids, count):
    """Logits and log-probabilities of the last `count` of the ids, in one pass of the model."""
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]]))[0, -count:]
    return logits, torch.log_softmax(logits.double(), -1)[range(count), ids[-count:]]


PAIRS = [("return self x", " y"), ("", "naïve café"),
         ("print value 123 in range", " def x y if else"), ("a", " the"), ("x y", " print"), ("if", " 1")]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_loglikelihoods_are_the_models(model, tokenizer, batch_size):
    lm = LanguageModel(model, tokenizer, batch_size)
    found = lm.loglikelihood(requests("loglikelihood", *PAIRS))
    for (context, continuation), (logprob, greedy) in zip(PAIRS, found):
        ids = tokenizer.encode(context + continuation, bos=True)
        count = len(ids) - len(tokenizer.encode(context, bos=True))
        logits, expected = direct(model, ids, count)
        base = torch.log_softmax(logits, -1)[range(count), ids[-count:]].sum()
        check(torch.tensor(logprob), expected.sum(), base)
        assert greedy == (logits.argmax(-1).tolist() == ids[-count:])
    assert lm.cut == 0


def test_greedy_continuations_are_known_as_such(lm, model, tokenizer):
    ids, prompt = [], tokenizer.encode("x y", bos=True)
    for _ in range(3):
        ids.append(int(model(torch.tensor([prompt + ids]))[0, -1].argmax()))
    pairs = [(prompt, ids), (prompt, ids[:2] + [(ids[2] + 1) % 330])]
    assert [greedy for _, greedy in lm._score(pairs)] == [True, False]


def test_a_piece_that_spans_the_split_counts_neither_twice_nor_not_at_all(lm, tokenizer):
    spans = 0
    for text in ("return self", "print value", "a def the", "range 123 else"):
        for at in range(1, len(text)):
            context, new = lm._split(text[:at], text[at:])
            assert context[0] == tokenizer.bos_id
            assert (tokenizer.decode(context), tokenizer.decode(new)) == (text[:at], text[at:])
            spans += context + new != tokenizer.encode(text, bos=True)
    assert spans > 5


def test_long_contexts_lose_their_beginning(lm, model, tokenizer):
    context = " ".join(["x y print"] * 40)
    [(logprob, _)] = lm.loglikelihood(requests("loglikelihood", (context, " value")))
    ids = tokenizer.encode(context + " value")
    count = len(ids) - len(tokenizer.encode(context))
    _, expected = direct(model, ids[-CONTEXT - 1:], count)
    check(torch.tensor(logprob), expected.sum(), expected.float().sum())
    assert lm.cut == 1


def test_continuations_that_cannot_be_scored(lm):
    with pytest.raises(LlamaExtError, match="continuation: expected .* at least one character"):
        lm.loglikelihood(requests("loglikelihood", ("x", "")))
    with pytest.raises(LlamaExtError, match=r"at most max_seq_len = 40 tokens, got \d+"):
        lm.loglikelihood(requests("loglikelihood", ("x", "x y" * 40)))


@pytest.mark.parametrize("length", [1, CONTEXT - 1, CONTEXT, CONTEXT + 1, 2 * CONTEXT,
                                    3 * CONTEXT + 7])
def test_rolling_windows_count_every_token_once(lm, model, tokenizer, length):
    rng = random.Random(length)
    ids = [rng.choice(range(3, 330)) for _ in range(length)]
    text = tokenizer.decode(ids)
    ids = tokenizer.encode(text)
    [got], expected, base = lm.loglikelihood_rolling(requests("rolling", (text,))), 0, 0
    for start in range(0, len(ids), CONTEXT):
        end = min(start + CONTEXT, len(ids))
        window = ([tokenizer.bos_id] + ids)[max(0, end - CONTEXT) if start else 0:end + 1]
        logits, logprob = direct(model, window, end - start)
        expected += logprob.sum()
        base += torch.log_softmax(logits, -1)[range(end - start), ids[start:end]].sum()
    check(torch.tensor(got), expected, base)


def test_generation_is_that_of_generate(lm, model, tokenizer):
    options = {"until": ["e"], "max_gen_toks": 9}
    contexts = ["return self x", "a", "print value 123"]
    asked = [*[(c, options) for c in contexts], ("a", {"until": "\n", "max_gen_toks": 5}),
             ("x", {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 0.9,
                    "top_k": 30, "top_p": 0.9}),
             (" ".join(["x y print"] * 40), {"until": [], "max_gen_toks": 15})]
    got = lm.generate_until(requests("generate_until", *asked))
    assert got[:3] == generate_text(model, tokenizer, contexts, 9, stop=["e"], temperature=0)
    assert got[:3] != generate_text(model, tokenizer, contexts, 9, temperature=0)
    assert got[3:4] == generate_text(model, tokenizer, ["a"], 5, stop=["\n"], temperature=0)
    assert got[4:5] == generate_text(model, tokenizer, ["x"], 6, temperature=0.9, top_k=30,
                                     top_p=0.9, seed=0)
    last = tokenizer.encode(asked[5][0])[-(CONTEXT - 15):]
    assert got[5:] == generate_text(model, tokenizer, [last], 15, temperature=0)
    assert lm.cut == 1
    with pytest.raises(LlamaExtError, match="generation options: expected until, .*got num_beams"):
        lm.generate_until(requests("generate_until", ("x", {"num_beams": 4})))


# --- tasks ---

def test_builtin_questions():
    rng = random.Random(5)
    for _ in range(200):
        question = evaltasks.brackets(rng)
        depth = []
        for c in question["text"]:
            if c in "([{":
                depth.append(c)
            elif c in ")]}":
                assert "([{".index(depth.pop()) == ")]}".index(c)
        assert question["choices"][question["answer"]] == ")]}"["([{".index(depth[-1])]
        question = evaltasks.recall(rng)
        names = {}
        *lines, last = question["text"].split("\n")
        exec("\n".join(lines), names)
        right = int(question["choices"][question["answer"]])
        assert names[last.removesuffix(" =")] == right and len(set(question["choices"])) == 4
        question = evaltasks.addition(rng)
        assert eval(question["text"][:-1]) == int(question["sum"])
    for name in ("builtin_brackets", "builtin_recall", "builtin_addition"):
        splits, again = (evaltasks.TASKS[name]["custom_dataset"]() for _ in range(2))
        test, train = (splits[split]["text"] for split in ("test", "train"))
        assert test == again["test"]["text"]
        assert len(set(test) | set(train)) == len(test) + len(train)
        assert len(test) >= 175 and len(train) >= 64


def test_more_examples_make_longer_contexts(model, tokenizer):
    """0, 1, 5 and 64 of them, as in the LLaMA paper."""
    model = Llama(LlamaConfig(dim=16, n_layers=1, n_heads=2, vocab_size=330, max_seq_len=4096))
    lengths = {}
    for shots in (0, 1, 5, 64):
        widths = lengths[shots] = []
        hook = model.tok_embeddings.register_forward_hook(
            lambda _, x, y: widths.append(y.shape[1]))
        results = evaluate(model, tokenizer, ["builtin_addition"], num_fewshot=shots, limit=1)
        hook.remove()
        assert results["n-shot"] == {"builtin_addition": shots} and results["cut"] == 0
    example = lengths[1][0] - lengths[0][0]
    assert example > 5 and 3 * example < lengths[5][0] - lengths[0][0] < 7 * example
    assert 50 * example < lengths[64][0] - lengths[0][0] < 80 * example


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a checkpoint of a model that was trained on brackets for a moment."""
    folder, rng = tmp_path_factory.mktemp("trained"), random.Random("training")
    questions = [evaltasks.brackets(rng) for _ in range(1500)]
    texts = [question["text"] + question["choices"][question["answer"]] for question in questions]
    tokenizer = Tokenizer.train(texts, folder / "t.model", 400)
    ids = [torch.tensor(tokenizer.encode(text, bos=True)) for text in texts]
    torch.manual_seed(0)
    model = Llama(LlamaConfig(dim=32, n_layers=2, n_heads=2, vocab_size=400, multiple_of=16,
                              max_seq_len=64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95))
    for _ in range(160):
        tokens = torch.nn.utils.rnn.pad_sequence(rng.sample(ids, 16), True, -100)
        loss = model(tokens[:, :-1].clamp(min=0), tokens[:, 1:].contiguous())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return checkpoint.save(folder / "run", 1, model, tokenizer=(folder / "t.model").read_bytes())


def test_a_trained_model_beats_chance(trained, tmp_path, capsys):
    out = tmp_path / "results.json"
    argv = ["eval", "--run", str(trained), "--tasks", "builtin_brackets,builtin_addition",
            "--limit=120", "--out", str(out), "--device=cpu"]
    assert cli.main(argv) == 0
    results = json.loads(out.read_text())
    table = capsys.readouterr().out
    accuracy = results["results"]["builtin_brackets"]["acc,none"]
    assert accuracy > 0.5  # chance: 1/3, its deviation 0.043
    assert f"{accuracy:.4f}" in table and "builtin_addition" in table
    assert results["n-samples"]["builtin_brackets"]["effective"] == 120
    model, tokenizer = checkpoint.load_model(trained)
    model.reset_parameters()
    chance = evaluate(model, tokenizer, ["builtin_brackets"], limit=120)
    assert chance["results"]["builtin_brackets"]["acc,none"] < 0.5
    rounded = [*argv[:3], "--tasks=builtin_brackets", "--limit=120", "--dtype=bf16"]
    assert cli.main(rounded) == 0
    table = capsys.readouterr().out
    assert abs(float(re.search(r"acc *\|↑ *\| *([\d.]+)", table)[1]) - accuracy) < 0.1
    assert cli.main(argv) == 1  # results are not overwritten
    assert "results.json: expected a new file in a folder that exists" in capsys.readouterr().err
    assert json.loads(out.read_text()) == results


def test_perplexity_task_is_bits_of_the_text(model, tokenizer):
    lm = LanguageModel(model, tokenizer)
    text = evaltasks.TASKS["builtin_stdlib"]["custom_dataset"]()["test"]["text"][0]
    [logprob] = lm.loglikelihood_rolling(requests("rolling", (text,)))
    results = evaluate(model, tokenizer, ["builtin_stdlib"], limit=1)["results"]["builtin_stdlib"]
    bits = -logprob / len(text.encode()) / torch.tensor(2.0).double().log().item()
    assert results["bits_per_byte,none"] == pytest.approx(bits, rel=1e-12)


@pytest.mark.parametrize("options, code, expected", [
    (["--tasks=hellaswag"], 1, "the data of task hellaswag cannot be loaded: they come from the "
                               "Hugging Face hub"),
    (["--tasks=no_such_task"], 1, "tasks: expected builtin, .*got 'no_such_task'"),
    (["--num-fewshot=-1"], 2, "num_fewshot: expected >= 0, got -1"),
    (["--limit=0"], 2, "limit: expected >= 1, got 0"),
    (["--batch-size=0"], 2, "batch_size: expected >= 1, got 0"),
    (["--out=none/r.json"], 1, "none/r.json: expected a new file in a folder that exists"),
    (["--run=none"], 1, "none: expected a folder with")])
def test_wrong_options_are_one_sentence(trained, capsys, options, code, expected):
    assert cli.main(["eval", "--run", str(trained), *options]) == code
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and re.search(expected, err), err


def test_without_lm_eval_is_one_sentence(trained, tmp_path):
    (tmp_path / "lm_eval.py").write_text("raise ModuleNotFoundError(name='lm_eval')")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, "-m", "llama_ext", "eval", "--run", str(trained)],
                          env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == ("llama-ext: eval: needs the Python package lm_eval: "
                           "pip install 'llama_ext[train,eval]'\n")
