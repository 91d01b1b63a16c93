"""Text generation with a key/value cache: greedy, temperature, top-k and nucleus sampling.

Prompts of any lengths share a batch without padding: each has a row of the cache, every pass takes
the newest token of each row, packed, and a row that ends goes to the next prompt at once, whose
tokens join the others' in the next pass (continuous batching: Orca, OSDI 2022).

R rows that are at work, V vocabulary.
"""

import collections
import itertools

import torch

from .layers import CacheRows
from .model import KVCache

PROMPT_TOKENS = 2048  # of several prompts in one pass, at most; a longer prompt has its own pass


def generate(model, prompt_ids, max_new_tokens, *, batch_size=16, **options):
    """Continues one prompt (a list of ids -> the list of new ids) or several (lists -> lists).

    temperature: 0 takes the most probable token, else the logits are divided by it. top_k: draw
    from that many most probable tokens (None: all). top_p: draw from the smallest set of the most
    probable of those whose probabilities sum to it (nucleus sampling, arXiv 1904.09751).
    vocab_size: draw from the first so many ids (None: all), for a model wider than its tokenizer. A
    continuation ends before eos_id (an id, or several of which any ends it), after max_new_tokens,
    or when prompt and new tokens fill the model's max_seq_len. Prompt number i draws as if
    generated alone with seed + i; seed None takes one from torch's global generator. At most
    batch_size prompts are at work at a time; together they get what each gets alone, but for what
    another batch's matrix products round otherwise.
    Raises ValueError for an empty or too long prompt, ids outside the vocabulary, a batch_size or
    top_k < 1, temperature < 0, top_p outside (0, 1], and logits that are not finite.
    """
    if not _several(prompt_ids):
        return list(stream(model, prompt_ids, max_new_tokens, **options))
    new_ids = [[] for _ in prompt_ids]
    for i, token in stream(model, prompt_ids, max_new_tokens, batch_size=batch_size, **options):
        if token is not None:
            new_ids[i].append(token)
    return new_ids


def stream(model, prompt_ids, max_new_tokens, *, temperature=1.0, top_p=1.0, top_k=None,
           vocab_size=None, eos_id=None, seed=None, batch_size=16, ended=()):
    """An iterator over the ids that `generate` returns for one prompt, each as soon as known. For
    several prompts, over pairs (i, id), and (i, None) when prompt number i is complete.

    ended: a set, to which the reader may add numbers of prompts that shall get no more ids.
    """
    several = _several(prompt_ids)
    prompts = prompt_ids if several else [prompt_ids]
    _validate(model, prompts, max_new_tokens, temperature, top_p, top_k, batch_size)
    seed = int(torch.randint(2 ** 62, ())) if seed is None else seed
    tokens = _stream(model, prompts, max_new_tokens, batch_size, vocab_size, eos_id, seed, ended,
                     {"temperature": temperature, "top_p": top_p, "top_k": top_k})
    return tokens if several else (token for _, token in tokens if token is not None)


@torch.inference_mode()
def _stream(model, prompts, max_new_tokens, batch_size, vocab_size, eos_id, seed, ended, how):
    weight, context = model.tok_embeddings.weight, model.config.max_seq_len
    limits = [min(len(prompt) + max_new_tokens, context) for prompt in prompts]
    eos_ids = (eos_id,) if eos_id is None or isinstance(eos_id, int) else tuple(eos_id)
    waiting = collections.deque()
    for i, prompt in enumerate(prompts):
        if limits[i] > len(prompt):
            waiting.append(i)
        else:
            yield i, None
    if not waiting:
        return
    size = min(batch_size, len(waiting)), max(limits[i] for i in waiting)
    cache = KVCache(model.config, *size, weight.dtype, weight.device)
    work = {}  # row of the cache -> the prompt it serves
    lengths, draws, new = [0] * size[0], {}, {}  # of rows: positions held, draws left, new tokens
    while waiting or work:
        joining = 0  # tokens of the prompts that join in this pass
        for row in range(size[0]):
            if row in work or not waiting:
                continue
            joining += len(prompts[waiting[0]])
            if joining > max(PROMPT_TOKENS, len(prompts[waiting[0]])):
                break
            i = work[row] = waiting.popleft()
            new[row], lengths[row] = prompts[i], 0
            draws[row] = iter(torch.rand(limits[i] - len(prompts[i]),
                                         generator=torch.Generator().manual_seed(seed + i)))
        order = sorted(work)
        rows = CacheRows(order, [lengths[row] for row in order], [len(new[row]) for row in order],
                         size, device=weight.device)
        tokens = torch.tensor([[*itertools.chain(*map(new.get, order))]], device=weight.device)
        logits = model(tokens, cache=cache, last_only=True, rows=rows)[0, :, :vocab_size]  # (R, V)
        draw = torch.stack([next(draws[row]) for row in order]).to(logits.device)
        for row, token in zip(order, sample(logits, draw, **how).tolist()):
            i = work[row]
            lengths[row] += len(new.pop(row))
            if token < 0:
                raise ValueError("generate: model: expected finite logits, got others at token "
                                 f"{lengths[row]}")
            if token not in eos_ids:
                yield i, token
                if i not in ended and lengths[row] + 1 < limits[i]:
                    new[row] = [token]
                    continue
            yield i, None
            del work[row]


def sample(logits, draw, temperature=1.0, top_p=1.0, top_k=None):
    """One id per row, int64 (R,), of logits (R, V); -1 where they are not finite.

    draw: (R,), uniform in [0, 1): the point at which the cumulative distribution of the tokens,
    most probable first, is inverted. Not used when temperature is 0.
    """
    logits = logits.float()
    top, ids = logits.max(-1)
    if temperature > 0:
        scaled = (logits - top[:, None]) / temperature
        scaled, order = (scaled.sort(-1, True) if top_k is None
                         else scaled.topk(min(top_k, scaled.shape[-1])))
        p = torch.softmax(scaled, -1)
        mass = p.cumsum(-1)
        kept = ((mass - p < top_p) & (p > 0)).sum(-1, keepdim=True).clamp(min=1)
        target = draw[:, None] * mass.gather(-1, kept - 1)
        choice = torch.searchsorted(mass, target, right=True).minimum(kept - 1)
        ids = order.gather(-1, choice)[:, 0]
    return torch.where(top.isfinite(), ids, -1)


def generate_text(model, tokenizer, prompts, max_new_tokens, *, stop=(), **options):
    """The continuations, a list of str, of several prompts: a list of str (encoded with
    bos) or of lists of ids.

    stop: texts before the first of which a continuation ends; the one that is complete first
    counts, the longest of several that are. options: those of `generate`; vocab_size and eos_id
    are the tokenizer's. Prompt and continuation together are what the tokenizer decodes from the
    ids of both. Raises ValueError as `generate` does, and for an empty stop text.
    """
    texts = [""] * len(prompts)
    for i, piece in stream_text(model, tokenizer, prompts, max_new_tokens, stop=stop, **options):
        texts[i] += piece or ""
    return texts


def stream_text(model, tokenizer, prompts, max_new_tokens, *, stop=(), **options):
    """An iterator over the pieces of what `generate_text` returns: pairs (i, text), each as soon as
    it cannot be half a character or the beginning of a stop text, and (i, None) when prompt number
    i is complete."""
    if "" in stop:
        raise ValueError("generate: stop: expected texts of at least one character, got ''")
    ended = set()
    prompt_ids = [tokenizer.encode(prompt, bos=True) if isinstance(prompt, str) else prompt
                  for prompt in prompts]
    ids = stream(model, prompt_ids, max_new_tokens, vocab_size=tokenizer.vocab_size,
                 eos_id=tokenizer.eos_ids, ended=ended, **options)
    decoders = [*map(tokenizer.stream_decoder, prompt_ids)]
    return _stream_text(decoders, ids, tuple(stop), ended)


def _stream_text(decoders, ids, stops, ended):
    held = [""] * len(decoders)
    for i, token in ids:
        if i not in ended:
            text = held[i] + decoders[i](token)
            end, start = min(((at + len(stop), at) for stop in stops
                              if (at := text.find(stop)) >= 0), default=(None, None))
            if end is not None:
                ended.add(i)
                text, held[i] = text[:start], ""
            elif token is not None:
                begun = max((n for stop in stops for n in range(min(len(stop), len(text) + 1))
                             if text.endswith(stop[:n])), default=0)
                text, held[i] = text[:len(text) - begun], text[len(text) - begun:]
            if text:
                yield i, text
        if token is None:
            yield i, None


def _several(prompt_ids):
    return len(prompt_ids) > 0 and isinstance(prompt_ids[0], (list, tuple))


def _validate(model, prompts, max_new_tokens, temperature, top_p, top_k, batch_size):
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
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k: expected >= 1 or None, got {top_k}")
    if batch_size < 1:
        raise ValueError(f"generate: batch_size: expected >= 1, got {batch_size}")
