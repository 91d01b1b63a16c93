"""Small tasks for lm-eval whose data are made here: they run without a network, in seconds.

builtin_brackets  which bracket closes a piece of code (three choices)
builtin_recall    which of four values a name got, a few lines above (four choices)
builtin_addition  the sum of two numbers below 20 (generation)
builtin_stdlib    the text of modules of this Python's standard library (perplexity)

The first three have 200 questions (the sums 175) and more for few-shot examples, the same on every
machine.
"""

import random
import sysconfig
from pathlib import Path

import datasets

from .errors import LlamaExtError

_QUESTIONS, _EXAMPLES = 200, 256
_NAMES = "alpha beta count data first index key left name order path row size table value width"
_NAMES = _NAMES.split()
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_MODULES = ["bisect", "heapq", "keyword", "reprlib", "shelve", "stat", "string", "textwrap"]


def brackets(rng):
    """{"text": code up to where a bracket closes, "choices", "answer": index of the right one}."""
    text, still_open, least = rng.choice(_NAMES) + " = ", [], rng.randint(1, 4)
    while True:
        still_open.append(rng.choice("([{"))
        text += rng.choice(_NAMES) * (still_open[-1] != "{") + still_open[-1] + rng.choice(_NAMES)
        while still_open and rng.random() < 0.35:
            text += _CLOSING[still_open.pop()]
        least -= 1
        if still_open and least <= 0:
            choices = list(_CLOSING.values())
            answer = choices.index(_CLOSING[still_open[-1]])
            return {"text": text, "choices": choices, "answer": answer}
        text += ", " if still_open else " + "


def recall(rng):
    """{"text": lines "name = digit" and one of the names again, "choices", "answer"}."""
    names = rng.sample(_NAMES, 4)
    digits = rng.sample("123456789", 4)
    text = "".join(f"{name} = {digit}\n" for name, digit in zip(names, digits))
    answer = rng.randrange(4)
    return {"text": f"{text}{names[answer]} =", "choices": [f" {digit}" for digit in digits],
            "answer": answer}


def addition(rng):
    """{"text": "a + b =", "sum": the text of a + b}."""
    a, b = rng.randrange(20), rng.randrange(20)
    return {"text": f"{a} + {b} =", "sum": str(a + b)}


def _splits(make):
    """The data set of a maker of questions: splits train, for few-shot examples, and test; no
    question is in both, and none twice, as far as there are enough of them."""
    def load(**_):
        rng, questions, tries = random.Random(make.__name__), {}, 0
        while len(questions) < _QUESTIONS + _EXAMPLES and tries < 20_000:
            question, tries = make(rng), tries + 1
            questions.setdefault(question["text"], question)
        questions = list(questions.values())
        cut = len(questions) * _QUESTIONS // (_QUESTIONS + _EXAMPLES)
        return {"test": datasets.Dataset.from_list(questions[:cut]),
                "train": datasets.Dataset.from_list(questions[cut:])}
    return load


def _stdlib(**_):
    folder = Path(sysconfig.get_paths()["stdlib"])
    try:
        texts = [(folder / f"{name}.py").read_text(encoding="utf-8") for name in _MODULES]
    except OSError as error:
        raise LlamaExtError(f"{error.filename}: cannot read the standard library's source: "
                            f"{error.strerror}") from None
    return {"test": datasets.Dataset.from_dict({"text": texts})}


def _task(name, dataset, **config):
    return {"task": name, "custom_dataset": dataset, "test_split": "test", "doc_to_text":
            "{{text}}", "metadata": {"version": 1}, **config}


def _metric(name, aggregation, higher_is_better):
    return {"metric": name, "aggregation": aggregation, "higher_is_better": higher_is_better}


def _choice(name, make):
    return _task(name, _splits(make), output_type="multiple_choice", doc_to_choice="choices",
                 doc_to_target="answer", target_delimiter="", fewshot_split="train",
                 metric_list=[_metric("acc", "mean", True)])


TASKS = {config["task"]: config for config in (
    _choice("builtin_brackets", brackets),
    _choice("builtin_recall", recall),
    _task("builtin_addition", _splits(addition), output_type="generate_until",
          doc_to_target="{{sum}}", fewshot_split="train", fewshot_delimiter="\n",
          generation_kwargs={"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
          filter_list=[{"name": "stripped", "filter": [
              {"function": "regex", "regex_pattern": r"^\s*(\d+)\s*$"},
              {"function": "take_first"}]}],
          metric_list=[_metric("exact_match", "mean", True)]),
    _task("builtin_stdlib", _stdlib, output_type="loglikelihood_rolling", doc_to_text="",
          doc_to_target="{{text}}", num_fewshot=0,
          metric_list=[_metric("bits_per_byte", "bits_per_byte", False),
                       _metric("byte_perplexity", "weighted_perplexity", False)]))}
