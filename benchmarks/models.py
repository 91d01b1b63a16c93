"""A whole model beside transformers' LlamaForCausalLM of the same shape with the same weights.

training step   forward with the loss, and backward; the optimizer, which is the same for all, is
                left out. Its rate is held against that of a matrix product, the FLOPs counted as in
                llama_ext.estimate (causal attention halved, nothing but products): what MFU, which
                is printed for an A100, H100 or H200, is with the data sheet's peak
prompt          one pass over the prompt and the first new token
decode          each further token, greedy; held against the bandwidth of a copy by the bytes of the
                weights, which each of them reads once (reading alone may exceed a copy)
kept            bytes that autograd keeps of a forward for the backward, per token, weights left out;
                with linear_cross_entropy the output layer's gradient is among them, made already

Providers: llama_ext (lx.Llama); hf (transformers with its sdpa attention); hf-compile (that under
torch.compile; in generation, its static cache); hf-patched (that with lx.patch_hf). Weights and
activations are in the dtype. Before anything is timed, each one's loss and the gradient of its
embeddings must be those of hf, and the tokens that it generates must be the most probable ones
according to hf.
"""

import dataclasses
from typing import Callable

import torch
from tqdm import tqdm

import llama_ext as lx
from llama_ext.device import data_sheet_peak
from llama_ext.estimate import flops_per_token
from llama_ext.formats import hf_name, is_rotated, to_half, to_hf_config
from llama_ext.generate import generate

from . import result
from .memory import kept_bytes
from .run import peak_bytes
from .timing import ALLOWED_ERROR, DTYPES, Clock, Limits, interleave

REFERENCE = "hf"
PROVIDERS = (result.OURS, REFERENCE, "hf-compile", "hf-patched")
SIZES = ("small", "tiny", "7B", "13B", "33B", "65B")
SMALL = {"dim": 512, "n_layers": 8, "n_heads": 8, "hidden_dim": 1408}
DEFAULTS = {"rounds": 3, "dtypes": ("fp32", "bf16"), "threads": torch.get_num_threads()}
LONGEST, LONGEST_PROMPT = 60, 3  # seconds of a training step's and a prompt's products


@dataclasses.dataclass
class Entrant:
    module: torch.nn.Module
    loss: Callable      # tokens, targets (B, T) -> scalar
    generate: Callable  # prompt (B, P), n -> (B, n) new ids, greedy


def config_of(size, layers=None, length=0):
    """The LlamaConfig of "small" or of a preset, with another number of layers if given and room
    for `length` positions."""
    config = lx.LlamaConfig(**SMALL) if size == "small" else lx.LlamaConfig.preset(size)
    return dataclasses.replace(config, n_layers=layers or config.n_layers,
                               max_seq_len=max(length, config.max_seq_len))


def transformers_twin(model):
    """transformers' LlamaForCausalLM with the weights of `model`, a Llama; the tensors are shared
    but for those of queries and keys, whose rows lie in another order."""
    import transformers

    config, weight = model.config, model.tok_embeddings.weight
    with torch.device("meta"):
        twin = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            **to_hf_config(config, weight.dtype), attn_implementation="sdpa"))
    state = {hf_name(name): to_half(p.detach(), config.dim // config.n_heads) if is_rotated(name)
             else p.detach() for name, p in model.named_parameters()}
    twin.load_state_dict({name: torch.nn.Parameter(t) for name, t in state.items()}, assign=True)
    rotary = twin.model.rotary_emb  # its frequencies are still on the meta device
    twin.model.rotary_emb = type(rotary)(twin.config).to(weight.device)
    twin.generation_config.eos_token_id = None  # no token ends a text early
    twin.generation_config.pad_token_id = 0
    return twin.train()


def _transformers(model, compile=False, patch=False):
    twin = transformers_twin(model)
    if patch:
        lx.patch_hf(twin)
    forward = torch.compile(twin, dynamic=False) if compile else twin
    options = {"cache_implementation": "static",
               "compile_config": _compile_on_any_device()} if compile else {}

    def loss(tokens, targets):
        return forward(input_ids=tokens, labels=targets, shift_labels=targets,
                       use_cache=False).loss

    def continuation(prompt, n):
        ids = twin.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                            max_new_tokens=n, **options)
        return ids[:, prompt.shape[1]:]
    return Entrant(twin, loss, continuation)


def _compile_on_any_device():
    from transformers import CompileConfig

    config = CompileConfig()
    config._compile_all_devices = True  # else on accelerators only
    return config


def _ours(model):
    def continuation(prompt, n):
        return torch.tensor(generate(model, prompt.tolist(), n, temperature=0.0,
                                     batch_size=len(prompt)), device=prompt.device)
    return Entrant(model, model, continuation)


def entrants(model, names):
    """{provider: Entrant} of those named, with the weights of `model`, a Llama."""
    make = {result.OURS: _ours, REFERENCE: _transformers,
            "hf-compile": lambda model: _transformers(model, compile=True),
            "hf-patched": lambda model: _transformers(model, patch=True)}
    return {name: make[name](model) for name in names}


def step(entrant, tokens, targets):
    """The stages of a training step, for Clock.seconds: forward, backward, gradients dropped."""
    def forward():
        return entrant.loss(tokens, targets)

    def drop(_):
        entrant.module.zero_grad(set_to_none=True)
    return [forward, lambda loss: loss.backward(), drop]


def loss_and_gradient(entrant, tokens, targets):
    """The loss, and its gradient by the embeddings, which every layer has a part in; fp32."""
    loss = entrant.loss(tokens, targets)
    loss.backward()
    gradient = next(p.grad for name, p in entrant.module.named_parameters()
                    if name in ("tok_embeddings.weight", "model.embed_tokens.weight")).float()
    entrant.module.zero_grad(set_to_none=True)
    return loss.detach().float(), gradient


def wrong_training(entrant, tokens, targets, true):
    """Why an Entrant's training step is not right, a sentence, or None; true: what
    loss_and_gradient() gives of the reference."""
    allowed = ALLOWED_ERROR[next(entrant.module.parameters()).dtype]
    for what, got, expected in zip(("loss", "gradient of the embeddings"),
                                   loss_and_gradient(entrant, tokens, targets), true):
        error = ((got - expected).norm() / expected.norm()).item()
        limit = allowed * (0.1 if what == "loss" else 3)  # a mean; a chain of many roundings
        if not error <= limit:
            return f"{what}: expected an error of at most {limit:g}, got {error:.3g}"
    return None


@torch.no_grad()
def wrong_generation(entrant, reference, prompt, n):
    """Why the `n` ids that an Entrant generates are not the most probable ones by the reference,
    up to rounding; a sentence, or None."""
    new = entrant.generate(prompt, n)
    if new.shape != (len(prompt), n):
        return f"generation: expected ids {(len(prompt), n)}, got {tuple(new.shape)}"
    logits = reference.module(input_ids=torch.cat((prompt, new), 1),
                              use_cache=False).logits[:, prompt.shape[1] - 1:-1].float()
    chosen = logits.gather(-1, new[..., None])[..., 0]
    gap = ((logits.amax(-1) - chosen) / logits.abs().amax(-1)).max().item()
    allowed = ALLOWED_ERROR[next(entrant.module.parameters()).dtype]
    if not gap <= allowed:
        return (f"generation: expected tokens within {allowed:g} of the largest logit, "
                f"got one {gap:.3g} below")
    return None


def _checked(found, check, *args):
    """(entrants that check() finds nothing wrong with, {name: why another is left out}, {name: what
    is wrong with it})."""
    right, left_out, wrong = {}, {}, {}
    for name, entrant in found.items():
        try:
            if reason := check(entrant, *args):
                wrong[name] = reason
            else:
                right[name] = entrant
        except torch.OutOfMemoryError:
            left_out[name] = "out of memory"
        except Exception as fault:  # another package's: its fault must not end the run
            wrong[name] = result.sentence(fault)
    return right, left_out, wrong


def _row(config, size, detail, dtype, direction, **rest):
    shape = f"{size} {config.dim} x {config.n_layers}, {detail}"
    name = next(name for name in DTYPES if DTYPES[name] == dtype)
    return {"op": "model", "shape": shape, "dtype": name, "direction": direction,
            "unit": "tokens", **rest}


def training_row(clock, model, found, size, batch, length, rounds):
    """The row of the training step; found: {provider: Entrant}, the reference among them if it is
    there."""
    config, weight = model.config, model.tok_embeddings.weight
    ids = torch.randint(config.vocab_size, (batch, length + 1), device=weight.device)
    tokens, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    limits = Limits(clock, weight.dtype)
    work, flops = tokens.numel(), tokens.numel() * flops_per_token(config, length)
    row = _row(config, size, f"{batch} x {length}", weight.dtype, "training step", work=work,
               limit="matmul", providers={}, left_out={}, wrong={})
    if reason := limits.too_long(flops, LONGEST):
        return row | {"limit_rate": None, "left_out": dict.fromkeys(found, reason)}
    true = loss_and_gradient(found.get(REFERENCE, found[result.OURS]), tokens, targets)
    right, row["left_out"], row["wrong"] = _checked(found, wrong_training, tokens, targets, true)
    kept, peaks = {}, {}
    for name, entrant in right.items():
        kept[name] = kept_bytes(lambda _, *args: entrant.loss(*args), entrant.module,
                                (tokens, targets))
        if weight.is_cuda:
            peaks[name] = {"peak_bytes": peak_bytes(
                lambda: clock.seconds(step(entrant, tokens, targets)), weight.device)}
    times = interleave(clock, {name: step(entrant, tokens, targets)
                               for name, entrant in right.items()}
                       | {"matmul": limits.stages["matmul"]}, rounds, 0)
    row["limit_rate"] = limits.rate("matmul", times)
    row["providers"] = {name: result.entry(
        [sum(stages) for stages in times[name]], work, flops / row["limit_rate"],
        kept_bytes=kept[name], **peaks.get(name, {})) for name in right}
    if weight.is_cuda and (peak := data_sheet_peak(torch.cuda.get_device_name(), row["dtype"])):
        for entry in row["providers"].values():
            entry["mfu"] = flops / entry["seconds"] / peak
    return row


def generation_rows(clock, model, found, size, batch, length, new, rounds):
    """The rows of the prompt and of decoding `new` further tokens."""
    config, weight = model.config, model.tok_embeddings.weight
    prompt = torch.randint(config.vocab_size, (batch, length), device=weight.device)
    limits = Limits(clock, weight.dtype)
    output = 2 * config.vocab_size * config.dim  # FLOPs; of the last token alone
    flops = batch * (length * (flops_per_token(config, length, training=False) - output) + output)
    right, left_out, wrong = found, {}, {}
    if reason := limits.too_long(flops, LONGEST_PROMPT):
        right, left_out = {}, dict.fromkeys(found, reason)
    elif REFERENCE in found:
        right, left_out, wrong = _checked(found, wrong_generation, found[REFERENCE], prompt,
                                          new + 1)
    calls = {}
    for name, entrant in right.items():
        calls[name, "first"] = [lambda entrant=entrant: entrant.generate(prompt, 1)]
        calls[name, "all"] = [lambda entrant=entrant: entrant.generate(prompt, 1 + new)]
    times = interleave(clock, calls | limits.stages, rounds)
    rates = {what: limits.rate(what, times) for what in limits.stages}
    weights = sum(p.nbytes for name, p in model.named_parameters()
                  if name != "tok_embeddings.weight" or config.tie_embeddings)
    first = {name: [s for s, in times[name, "first"]] for name in right}
    rest = {name: [max(b - a, 1e-9) for a, (b,) in zip(first[name], times[name, "all"])]
            for name in right}
    rows = []
    for direction, samples, work, ideal, limit in (
            ("prompt", first, batch * length, flops / rates["matmul"], "matmul"),
            ("decode", rest, batch * new, new * weights / rates["copy"], "copy")):
        rows.append(_row(
            config, size, f"{batch} x {length} + {new}", weight.dtype, direction, work=work,
            limit=limit, limit_rate=rates[limit], left_out=left_out, wrong=wrong,
            providers={name: result.entry(samples[name], work, ideal) for name in right}))
    return rows


def _more(row):
    """Lines on what a training row knows of its providers besides time, or None."""
    shown = (("kept_bytes", "kept for the backward, bytes per token", 1 / row["work"], ",.0f"),
             ("peak_bytes", "peak memory beside the weights, GB", 1e-9, ".2f"),
             ("mfu", "MFU by the data sheet, %", 100, ".1f"))
    lines = []
    for key, what, scale, form in shown:
        each = [f"{name} {entry[key] * scale:{form}}" for name, entry in row["providers"].items()
                if key in entry]
        lines += [f"    {what}: {', '.join(each)}"] if each else []
    return "\n".join(lines) or None


def missing():
    """{provider: reason} of those that cannot run here."""
    try:
        import transformers  # noqa: F401
    except ImportError:
        return dict.fromkeys(PROVIDERS[1:], "transformers is not installed")
    return {}


def run(args):
    """Exit code of `python -m benchmarks models`."""
    result.prepare(args, DEFAULTS)
    clock = Clock(args.backend)
    names = [name for name in PROVIDERS if name == result.OURS or name in (args.peers or PROVIDERS)]
    absent = missing()
    report = result.Report(args, names, absent)
    present = [name for name in names if name not in absent]
    work = [(size, name) for size in args.sizes for name in args.dtypes]
    for size, dtype in tqdm(work, unit="model", disable=None):
        config = config_of(size, args.layers, max(args.tokens, args.prompt + args.new + 1))
        torch.manual_seed(0)
        model = lx.Llama(config, device=args.backend, dtype=DTYPES[dtype])
        found = entrants(model, present)
        batch, tokens, prompt, new = args.batch, args.tokens, args.prompt, args.new
        row = training_row(clock, model, found, size, batch, tokens, args.rounds)
        report.add(row, _more(row))
        for row in generation_rows(clock, model, found, size, 1, prompt, new, args.rounds):
            report.add(row)
        del model, found
        torch.compiler.reset()
    return report.finish()
