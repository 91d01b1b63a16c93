"""Zero- and few-shot evaluation through lm-evaluation-harness (the Python package lm_eval).

LanguageModel is its view of a Llama: log-likelihoods of texts, and generation. `evaluate` runs its
tasks, whose data come from the Hugging Face hub, and the project's own (evaltasks.py), which need
no network.

R requests in a batch, V vocabulary.
"""

import functools
import json
import logging
from pathlib import Path

import torch
from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import (get_rolling_token_windows, handle_non_serializable, make_disjoint_window,
                           make_table)
from tqdm import tqdm

from . import checkpoint, evaltasks
from .errors import LlamaExtError
from .files import write_atomically
from .generate import PROMPT_TOKENS, generate_text
from .layers import CacheRows
from .model import KVCache
from .ops import cross_entropy


class LanguageModel(LM):
    """What lm-eval asks of a model. Every text begins with bos, or as else the tokenizer's models
    expect; what exceeds the model's max_seq_len is cut off on the left. Batches hold at most
    batch_size requests."""

    def __init__(self, model, tokenizer, batch_size=16):
        super().__init__()
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.max_seq_len = model.config.max_seq_len
        self.cut = 0  # requests that were longer than max_seq_len
        self._device = model.tok_embeddings.weight.device

    def loglikelihood(self, requests):
        """[(log P(continuation | context), whether greedy decoding gives it)] of requests whose
        args are (context, continuation), texts; the context may be empty.

        Raises LlamaExtError for a continuation that is empty or of more than max_seq_len tokens.
        """
        return self._score([self._split(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests):
        """[log P(text)] of requests whose args are (text,), of any length: every token counts once,
        behind as many of those before it as a window of max_seq_len holds."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            ids = self.tokenizer.encode(request.args[0])
            new = [*map(make_disjoint_window, get_rolling_token_windows(
                ids, self.tokenizer.bos_id, self.max_seq_len, context_len=1))]
            windows += new
            owners += [i] * len(new)
        total = [0.0] * len(requests)
        for i, (logprob, _) in zip(owners, self._score(windows)):
            total[i] += logprob
        return total

    def generate_until(self, requests):
        """The continuations of requests whose args are (context, options): until (the texts before
        which one ends), max_gen_toks, do_sample, temperature, top_p, top_k.

        A context is cut so that max_gen_toks tokens fit behind it, but not to less than half of
        max_seq_len. Raises LlamaExtError for other options.
        """
        texts, groups = [None] * len(requests), {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        for options, group in groups.items():
            options = normalize_gen_kwargs(json.loads(options))
            stop = [text for text in options.pop("until", []) if text]
            options.setdefault("temperature", 1.0 if options.pop("do_sample") else 0.0)
            count = options.pop("max_gen_toks")
            if unknown := options.keys() - {"temperature", "top_p", "top_k"}:
                raise LlamaExtError("eval: generation options: expected until, max_gen_toks, "
                                    "do_sample, temperature, top_p or top_k, got "
                                    f"{', '.join(sorted(unknown))}")
            room = max(self.max_seq_len - count, self.max_seq_len // 2)
            prompts = [self.tokenizer.encode(requests[i].args[0], bos=True) for i in group]
            self.cut += sum(len(prompt) > room for prompt in prompts)
            new = generate_text(self.model, self.tokenizer, [ids[-room:] for ids in prompts], count,
                                stop=stop, seed=0, batch_size=self.batch_size, **options)
            for i, text in zip(group, new):
                texts[i] = text
        return texts

    def _split(self, context, continuation):
        """(ids of the context, ids of the continuation). They are those of the whole text when its
        pieces end where the context does; else (a piece of the tokenizer spans that place) both are
        encoded by themselves."""
        if not continuation:
            raise LlamaExtError("eval: continuation: expected a text of at least one character, "
                                "got ''")
        ids, whole = self.tokenizer.encode_batch([context, context + continuation])
        if whole[:len(ids)] == ids:
            new = whole[len(ids):]
        else:
            new = self.tokenizer.encode_continuation(continuation)
        return self.tokenizer.with_bos(ids), new

    @torch.inference_mode()
    def _score(self, pairs):
        """[(log P(new | old), greedy)] of pairs of ids (old, new), longest first so that a batch
        has similar lengths and one that does not fit into memory is the first."""
        limit = self.max_seq_len
        inputs = []
        for old, new in pairs:
            if len(new) > limit:
                raise LlamaExtError(f"eval: continuation: expected at most max_seq_len = {limit} "
                                    f"tokens, got {len(new)}")
            self.cut += len(old) + len(new) - 1 > limit
            inputs.append([*old, *new[:-1]][-limit:])
        scores = [None] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda i: -len(inputs[i]))
        with tqdm(total=len(pairs), desc="requests", disable=None) as bar:
            while order:
                size = max(1, min(self.batch_size, PROMPT_TOKENS // len(inputs[order[0]])))
                batch, order = order[:size], order[size:]
                found = self._score_batch([inputs[i] for i in batch], [pairs[i][1] for i in batch])
                for i, score in zip(batch, found):
                    scores[i] = score
                bar.update(len(batch))
        return scores

    def _score_batch(self, inputs, targets):
        weight = self.model.tok_embeddings.weight
        counts, last = list(map(len, inputs)), list(map(len, targets))
        cache = KVCache(self.model.config, len(inputs), max(counts), weight.dtype, weight.device)
        rows = CacheRows(list(range(len(inputs))), [0] * len(inputs), counts,
                         (len(inputs), max(counts)), last, weight.device)
        tokens = torch.tensor([sum(inputs, [])], device=weight.device)
        target = torch.tensor(sum(targets, []), device=weight.device)  # (sum(last),)
        logits = self.model(tokens, cache=cache, last_only=True, rows=rows)[0].float()
        logprob = -cross_entropy(logits, target, reduction="none")
        if not logprob.isfinite().all():
            raise LlamaExtError("eval: model: expected finite log-likelihoods, got others")
        greedy = logits.argmax(-1) == target
        return [(part.sum(dtype=torch.float64).item(), bool(same.all()))
                for part, same in zip(logprob.split(last), greedy.split(last))]


def evaluate(model, tokenizer, tasks, *, num_fewshot=None, limit=None, batch_size=16):
    """What lm-eval's simple_evaluate finds, a dict: "results" has the metrics of each task; and
    "cut", the number of requests that were longer than the model's max_seq_len.

    tasks: what load_tasks() takes or returns. num_fewshot: examples before each question (None: as
    the task says). limit: questions of each task at most (None: all). Raises LlamaExtError as
    load_tasks() does, ValueError for other options out of range.
    """
    _validate(num_fewshot, limit, batch_size)
    lm = LanguageModel(model, tokenizer, batch_size)
    results = simple_evaluate(lm, tasks=load_tasks(tasks), num_fewshot=num_fewshot, limit=limit,
                              batch_size=batch_size, log_samples=False,
                              task_manager=_task_manager(False))
    return {**results, "cut": lm.cut}


def _validate(num_fewshot, limit, batch_size):
    for name, value, least in (("num_fewshot", num_fewshot, 0), ("limit", limit, 1),
                               ("batch_size", batch_size, 1)):
        if value is not None and value < least:
            raise ValueError(f"eval: {name}: expected >= {least}, got {value}")


def load_tasks(tasks):
    """lm-eval's task objects, with their data, of a list of names: those that lm-eval knows
    (patterns with * too; data from the Hugging Face hub), those of evaltasks.py, or "builtin" for
    all of the latter. What is no name is taken as it is.

    Raises LlamaExtError for an unknown task and for one whose data cannot be loaded.
    """
    loaded = [task for task in tasks if not isinstance(task, str)]
    names = list(dict.fromkeys(one for name in tasks if isinstance(name, str)
                               for one in (evaltasks.TASKS if name == "builtin" else [name])))
    manager = _task_manager(not evaltasks.TASKS.keys() >= set(names))
    for name in names:
        found = [evaltasks.TASKS[name]] if name in evaltasks.TASKS else manager.match_tasks([name])
        if not found:
            raise LlamaExtError(f"eval: tasks: expected builtin, {', '.join(evaltasks.TASKS)} or "
                                f"names that lm-eval lists, got {name!r}")
        for spec in found:
            try:
                one = manager.load([spec])
            except LlamaExtError:
                raise
            except Exception as error:  # of the hub, the network, or a task's own code
                raise LlamaExtError(
                    f"eval: the data of task {name} cannot be loaded: they come from the Hugging "
                    f"Face hub, or its cache on this machine ({' '.join(str(error).split())})"
                ) from error
            group = isinstance(spec, str) and one["groups"].get(spec)
            loaded += [group] if group else one["tasks"].values()
    return loaded


@functools.cache
def _task_manager(with_lm_evals):
    return TaskManager(include_defaults=with_lm_evals)  # reads thousands of files if so


def report(run, tasks, out=None, device=None, dtype=None, int8=False, **options):
    """`evaluate` the checkpoint meant by the path `run`, print its table, and write all it found to
    the file `out` as JSON. device, dtype, int8: as in
    checkpoint.load_model().

    Raises LlamaExtError before it begins when `out` exists or its folder does not.
    """
    _validate(**options)
    if out is not None and (Path(out).exists() or not Path(out).parent.is_dir()):
        raise LlamaExtError(f"{out}: expected a new file in a folder that exists")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it comments on what is as it should be
    path = checkpoint.find(run)
    tasks = load_tasks(tasks)
    model, tokenizer = checkpoint.load_model(path, device, dtype, int8=int8)
    results = evaluate(model, tokenizer, tasks, **options)
    if out is not None:
        text = json.dumps(results, indent=1, default=handle_non_serializable)
        write_atomically(out, text.encode())
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    if results["cut"]:
        print(f"{results['cut']} requests were longer than the model's max_seq_len = "
              f"{model.config.max_seq_len} and lost their beginning")
