"""Text generation with a key/value cache: greedy, temperature and nucleus sampling.

B prompts generated together, V vocabulary.
"""

import itertools

import torch

from .model import KVCache


def generate(model, prompt_ids, max_new_tokens, *, temperature=1.0, top_p=1.0, eos_id=None,
             seed=None):
    """Continues one prompt (a list of ids -> the list of new ids) or several (lists -> lists).

    temperature: 0 takes the most probable token, else the logits are divided by it. top_p: draw
    from the smallest set of most probable tokens whose probabilities sum to it (nucleus sampling,
    arXiv 1904.09751). A continuation ends before eos_id, after max_new_tokens, or when prompt and
    new tokens fill the model's max_seq_len. Prompt number i draws as if generated alone with seed
    + i; seed None takes one from torch's global generator. Prompts of equal length share a batch.
    Raises ValueError for an empty or too long prompt, ids outside the vocabulary, temperature < 0,
    top_p outside (0, 1], and logits that are not finite.
    """
    several = len(prompt_ids) > 0 and isinstance(prompt_ids[0], (list, tuple))
    prompts = prompt_ids if several else [prompt_ids]
    _validate(model, prompts, max_new_tokens, temperature, top_p)
    seed = _fresh_seed() if seed is None else seed
    by_length = {}
    for i, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(i)
    new_ids, ended = [[] for _ in prompts], set()
    for group in by_length.values():
        steps = _decode(model, [prompts[i] for i in group], max_new_tokens, temperature, top_p,
                        [seed + i for i in group])
        for ids in steps:
            ended.update(i for i, token in zip(group, ids) if token == eos_id)
            for i, token in zip(group, ids):
                if i not in ended:
                    new_ids[i].append(token)
            if ended.issuperset(group):
                break
    return new_ids if several else new_ids[0]


def stream(model, prompt_ids, max_new_tokens, *, temperature=1.0, top_p=1.0, eos_id=None,
           seed=None):
    """An iterator over the ids that `generate` returns for one prompt, each as soon as known."""
    _validate(model, [prompt_ids], max_new_tokens, temperature, top_p)
    seed = _fresh_seed() if seed is None else seed
    steps = _decode(model, [prompt_ids], max_new_tokens, temperature, top_p, [seed])
    return itertools.takewhile(lambda token: token != eos_id, (ids[0] for ids in steps))


@torch.inference_mode()
def _decode(model, prompts, max_new_tokens, temperature, top_p, seeds):
    """Yields the next id of each prompt, a list of B, until steps or context run out.

    The prompts, all of one length, go through the model in one pass, then one token at a time."""
    weight, length = model.tok_embeddings.weight, len(prompts[0])
    steps = min(max_new_tokens, model.config.max_seq_len - length)
    cache = KVCache(model.config, len(prompts), length + steps, weight.dtype, weight.device)
    draws = torch.stack([torch.rand(steps, generator=torch.Generator().manual_seed(seed))
                         for seed in seeds]).to(weight.device)  # (B, steps)
    tokens = torch.tensor(prompts, device=weight.device)
    for step in range(steps):
        logits = model(tokens, cache=cache, last_only=True)[:, 0]
        tokens = sample(logits, draws[:, step], temperature, top_p)[:, None]
        ids = tokens[:, 0].tolist()
        if min(ids) < 0:
            raise ValueError(f"generate: model: expected finite logits, got others at token "
                             f"{length + step}")
        yield ids


def sample(logits, draw, temperature=1.0, top_p=1.0):
    """One id per row, int64 (B,), of logits (B, V); -1 where they are not finite.

    draw: (B,), uniform in [0, 1): the point at which the cumulative distribution of the tokens,
    most probable first, is inverted. Not used when temperature is 0.
    """
    logits = logits.float()
    top, ids = logits.max(-1)
    if temperature > 0:
        p, order = torch.softmax((logits - top[:, None]) / temperature, -1).sort(-1, True)
        mass = p.cumsum(-1)
        kept = ((mass - p < top_p) & (p > 0)).sum(-1, keepdim=True).clamp(min=1)
        target = draw[:, None] * mass.gather(-1, kept - 1)
        choice = torch.searchsorted(mass, target, right=True).minimum(kept - 1)
        ids = order.gather(-1, choice)[:, 0]
    return torch.where(top.isfinite(), ids, -1)


def _fresh_seed():
    return int(torch.randint(2 ** 62, ()))


def _validate(model, prompts, max_new_tokens, temperature, top_p):
    context = model.config.max_seq_len
    for prompt in prompts:
        if not 0 < len(prompt) <= context:
            raise ValueError(f"generate: prompt_ids: expected 1 to max_seq_len = {context} ids, "
                             f"got {len(prompt)}")
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens: expected >= 0, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"generate: temperature: expected a number >= 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p: expected above 0 and at most 1, got {top_p}")
