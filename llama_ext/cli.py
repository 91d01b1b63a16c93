"""The command line, `llama-ext` or `python -m llama_ext`.

Each command's options are added, and its libraries imported, only when it is the one that runs.
Every foreseeable failure ends in one sentence on stderr. Exit codes: 2 for wrong options, 128 plus
the number of the signal that stopped the command, 1 for all else.
"""

import argparse
import dataclasses
import inspect
import json
import os
import signal
import sys
import typing

from . import ranks
from .errors import LlamaExtError
from .info import info


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _info_options(parser):
    parser.set_defaults(run_command=_run_info)


def _run_info(options):
    print(json.dumps(info(), indent=2))


def _prepare_options(parser):
    from .cleaning import DEDUP, INVALID
    from .documents import SUFFIXES
    from .prepare import prepare

    defaults = inspect.signature(prepare).parameters

    def add(to, name, text, **more):
        to.add_argument("--" + name.replace("_", "-"), default=defaults[name].default,
                        help=f"{text} (default: %(default)s)", **more)

    parser.add_argument("inputs", nargs="+", metavar="INPUT",
                        help="a file (text, .jsonl, .parquet; or one of these as .gz, .bz2, .xz, "
                             ".zst), a folder to search for such files, or the word stdlib: the "
                             "Python standard library's sources on this machine")
    parser.add_argument("--out", required=True, help="folder for the data set")
    vocabulary = parser.add_mutually_exclusive_group()
    add(vocabulary, "vocab_size", "pieces of the tokenizer that is trained on the text", type=int)
    vocabulary.add_argument("--tokenizer", metavar="FILE",
                            help="SentencePiece model to use instead (default: train one)")
    add(parser, "val_fraction", "share of the text held out for validation", type=float)
    add(parser, "shard_tokens", "tokens in a shard", type=int)
    add(parser, "seed", "of the choice of held-out documents", type=int)
    add(parser, "text_key", "where the text is: key in the lines of .jsonl files, column of "
        ".parquet files")
    add(parser, "dedup", "what is left out when it comes again: documents, or lines (and so "
        "documents too)", choices=DEDUP)
    add(parser, "min_chars", "length of the shortest document that is kept", type=int)
    add(parser, "invalid", "what happens to documents that are not UTF-8: skip them, or replace "
        "the invalid bytes by U+FFFD", choices=INVALID)
    parser.add_argument("--fix-text", action="store_true", help="repair mojibake, entities of "
                        "HTML, control characters and the like (ftfy; default: leave text as it "
                        "is)")
    parser.add_argument("--suffixes", nargs="+", default=SUFFIXES, metavar="SUFFIX",
                        help=f"of the files taken from folders (default: {' '.join(SUFFIXES)})")
    parser.set_defaults(run_command=_run_prepare)


def _run_prepare(options):
    from .prepare import prepare

    meta = prepare(**options)
    for split in ("train", "val"):
        part = meta[split]
        print(f"{split}: {part['documents']:,} documents, {part['bytes']:,} bytes, "
              f"{part['tokens']:,} tokens in {len(part['shards'])} shards")
    skipped = ", ".join(f"{count} {why.replace('_', ' ')}"
                        for why, count in meta["skipped"].items())
    print(f"skipped documents: {skipped}")
    if any(meta["cleaned"].values()):
        print("cleaned: {repaired_documents:,} documents repaired, {removed_lines:,} lines removed "
              "({removed_bytes:,} bytes)".format(**meta["cleaned"]))
    print(f"data set: {options['out']}")


def _mixture_options(parser):
    from .quantity import count

    parser.add_argument("config", metavar="CONFIG", help="the mixture's JSON file: "
                        '{"sources": {NAME: {"path": FOLDER, "share": S}, ...}}, where FOLDER is '
                        "one that `llama-ext prepare` wrote, relative to the file, and the shares "
                        "sum to 1")
    parser.add_argument("--tokens", type=count, help="of a training run, for the epochs that it "
                        "makes of every source; k, M, G, T are powers of 1000 (default: no epochs "
                        "are shown)")
    parser.set_defaults(run_command=_run_mixture)


def _run_mixture(options):
    from .mixture import load_mixture

    tokens = options["tokens"]
    if tokens is not None and tokens < 1:
        raise ValueError(f"mixture: --tokens: expected at least 1, got {tokens}")
    table = [("source", "share", "tokens", "bytes", "epochs")]
    for source in load_mixture(options["config"]):
        train = source.meta["train"]
        epochs = float(source.share) * (tokens or 0) / max(1, train["tokens"])
        table.append((source.name, f"{100 * float(source.share):g} %", f"{train['tokens']:,}",
                      f"{train['bytes']:,}", f"{epochs:.2f}"))
    columns = list(zip(*table))[:5 if tokens else 4]
    widths = [max(map(len, column)) for column in columns]
    for name, *values in zip(*columns):
        print("  ".join([name.ljust(widths[0]), *map(str.rjust, values, widths[1:])]))


def _add_fields(parser, config_class):
    """An option for every field of a dataclass made with recipe.option()."""
    for field in dataclasses.fields(config_class):
        name, text = "--" + field.name.replace("_", "-"), field.metadata["help"]
        kind = next(iter(typing.get_args(field.type)), field.type)  # int of int | None
        if kind is bool:
            parser.add_argument(name, action="store_true", help=text)
            continue
        required = field.default is dataclasses.MISSING
        if not required and field.default is not None:
            text += " (default: %(default)s)"
        parser.add_argument(name, required=required, type=field.metadata["parse"] or kind,
                            default=None if required else field.default, help=text,
                            choices=field.metadata["choices"])


def _train_options(parser):
    from .train import TrainConfig

    _add_fields(parser, TrainConfig)
    parser.set_defaults(run_command=_run_train)


def _run_train(options):
    from .train import TrainConfig, train

    stopped = train(TrainConfig(**options))["signal"]
    return 128 + stopped if stopped else 0


def _device_options(parser):
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"],
                        help="auto: a GPU where there is one (default: %(default)s)")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"],
                        help="of weights and cache (default: %(default)s)")
    parser.add_argument("--int8", action="store_true", help="keep the weights of linear layers in "
                        "int8, quantised one by one as they are read: half the memory of bf16")


def _device_and_dtype(options):
    """Takes --device and --dtype out of the options, as torch's objects."""
    import torch

    device, dtype = options.pop("device"), options.pop("dtype")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: expected auto or cpu where torch sees no GPU, got cuda")
    device = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    return device, {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]


def _generate_options(parser):
    parser.add_argument("--run", required=True,
                        help="a run's folder, whose newest checkpoint is taken, or a checkpoint's")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="text to continue; - "
                        "reads it from stdin; may be given several times (default: none, the "
                        "beginning of a new text)")
    parser.add_argument("--prompts-file", metavar="FILE", help="more prompts, one a line; in a "
                        ".jsonl file, each line an object with the entry \"prompt\" "
                        "(default: none)")
    parser.add_argument("--special-tokens", action="store_true", help="read the special tokens' "
                        "texts in prompts, such as <|eot_id|>, as these tokens (else as text)")
    parser.add_argument("--max-new-tokens", type=int, default=200, help="tokens to add at most; "
                        "fewer where the text ends or fills the model's context "
                        "(default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the most "
                        "probable token; 1: as the model says (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=0.95, help="draw from the most probable "
                        "tokens that together have this probability (default: %(default)s)")
    parser.add_argument("--top-k", type=int, help="draw from this many most probable tokens "
                        "(default: all)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before "
                        "this text; may be given several times (default: none)")
    parser.add_argument("--seed", type=int, help="of the draws for the first prompt, one more for "
                        "each after it (default: another every time)")
    parser.add_argument("--batch-size", type=int, default=16, help="prompts to continue at a time "
                        "(default: %(default)s)")
    _device_options(parser)
    parser.add_argument("--plan", action="store_true", help="print what memory this takes, and "
                        "what is free, and stop before the weights are read")
    parser.add_argument("--jsonl", action="store_true", help="print a JSON object a line for each "
                        "prompt, with the entries prompt and text")
    parser.set_defaults(run_command=_run_generate)


def _run_generate(options):
    from . import checkpoint, footprint
    from .generate import stream_text

    run, file, special, jsonl, plan, int8 = map(
        options.pop, ("run", "prompts_file", "special_tokens", "jsonl", "plan", "int8"))
    device, dtype = _device_and_dtype(options)
    prompts = _read_prompts(options.pop("prompt"), file)

    def start(model, tokenizer):
        ids = [tokenizer.encode(prompt, bos=True, special=special) for prompt in prompts]
        return stream_text(model, tokenizer, ids, **options), [*map(len, ids)]

    def before(model, tokenizer):
        _, lengths = start(model, tokenizer)  # also for the errors in prompts and options
        needed = footprint.footprint(model, dtype, lengths, options["max_new_tokens"],
                                     options["batch_size"])
        if plan:
            print(json.dumps({**needed, "total": sum(needed.values()),
                              "free": footprint.free_memory(device), "device": str(device)}))
        footprint.require(needed, device)
        if plan:
            raise SystemExit(0)

    model, tokenizer = checkpoint.load_model(checkpoint.find(run), device, dtype, before,
                                             int8)
    pieces, _ = start(model, tokenizer)
    sys.stdout.reconfigure(errors="replace")  # of a terminal that cannot show every character
    for i, (prompt, texts) in enumerate(zip(prompts, _in_order(pieces, len(prompts)))):
        if jsonl:
            print(json.dumps({"prompt": prompt, "text": "".join(texts)}), flush=True)
            continue
        if len(prompts) > 1:
            print(f"--- {i + 1} of {len(prompts)} ---")
        print(prompt, end="", flush=True)
        for text in texts:
            print(text, end="", flush=True)
        print()


def _in_order(pieces, count):
    """For each of `count` prompts, an iterator over its texts in stream_text's pieces, which must
    be read to its end; what comes for later prompts meanwhile is kept."""
    kept = [[] for _ in range(count)]

    def texts(i):
        while True:
            while kept[i]:
                text = kept[i].pop(0)
                if text is None:
                    return
                yield text
            j, text = next(pieces)
            kept[j].append(text)
    return map(texts, range(count))


def _read_prompts(prompts, file):
    """The texts of --prompt and of the lines of --prompts-file; [""] when neither is given."""
    if prompts is None and file is None:
        return [""]
    prompts = [_utf8("--prompt", sys.stdin.buffer.read() if prompt == "-" else os.fsencode(prompt))
               for prompt in prompts or []]
    if file is None:
        return prompts
    with open(file, "rb") as f:
        lines = _utf8(file, f.read()).split("\n")
    for number, line in enumerate(lines, 1):
        if not (line := line.removesuffix("\r")):
            continue
        if file.endswith(".jsonl"):
            try:
                line = json.loads(line)["prompt"]
                line.encode()
            except (ValueError, TypeError, KeyError, AttributeError):
                raise LlamaExtError(f"{file}: line {number}: expected a JSON object with a text "
                                    "\"prompt\"") from None
        prompts.append(line)
    if not prompts:
        raise LlamaExtError(f"{file}: expected at least one prompt, got an empty file")
    return prompts


def _utf8(where, data):
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise LlamaExtError(f"generate: {where}: expected UTF-8 text, got byte "
                            f"{data[error.start]:#04x} at {error.start}") from None


def _eval_options(parser):
    parser.add_argument("--run", required=True,
                        help="a run's folder, whose newest checkpoint is taken, or a checkpoint's")
    parser.add_argument("--tasks", default="builtin", metavar="NAME,...", help="tasks that lm-eval "
                        "knows, with data from the Hugging Face hub (hellaswag,arc_easy), or the "
                        "small ones that need no network: builtin (default: %(default)s)")
    parser.add_argument("--num-fewshot", type=int, help="examples before each question; the LLaMA "
                        "paper has 0, 1, 5 and 64 (default: as each task says)")
    parser.add_argument("--limit", type=int, help="questions of each task at most (default: all)")
    parser.add_argument("--batch-size", type=int, default=16,
                        help="requests in one pass at most (default: %(default)s)")
    parser.add_argument("--out", metavar="FILE", help="JSON file to write all results to "
                        "(default: none)")
    _device_options(parser)
    parser.set_defaults(run_command=_run_eval)


def _run_eval(options):
    from . import evaluate

    device, dtype = _device_and_dtype(options)
    evaluate.report(tasks=options.pop("tasks").split(","), device=device, dtype=dtype, **options)


def _estimate_options(parser):
    from .estimate import EstimateConfig

    _add_fields(parser, EstimateConfig)
    parser.set_defaults(run_command=_run_estimate)


def _run_estimate(options):
    from .estimate import EstimateConfig, report

    text, what_to_change = report(EstimateConfig(**options))
    print(text)
    if what_to_change:
        raise LlamaExtError(what_to_change)


def _convert_options(parser):
    from .convert import FORMATS

    parser.add_argument("input", help="folder of the model: Hugging Face's (config.json), Meta's "
                        "(params.json), or a run's or checkpoint's of ours")
    parser.add_argument("out", help="the new folder")
    parser.add_argument("--to", required=True, choices=FORMATS, help="format to write")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"),
                        help="of the output (default: each tensor's own)")
    parser.add_argument("--shard-size", default="5GB", metavar="SIZE", help="bytes in a file of "
                        "hf at most; meta and ours have one file (default: %(default)s)")
    parser.set_defaults(run_command=_run_convert)


def _run_convert(options):
    from .convert import convert

    lacks = convert(options["input"], options["out"], options["to"], options["dtype"],
                    options["shard_size"])
    print(f"model: {options['out']}" + (f"\nnote: {lacks}" if lacks else ""))


_COMMANDS = {
    "info": ("show versions and which kernels serve which tensors", _info_options),
    "prepare": ("turn text into a vocabulary and token shards", _prepare_options),
    "mixture": ("show the shares of a mixture of data sets", _mixture_options),
    "train": ("train a LLaMA on prepared text, or go on with a run", _train_options),
    "generate": ("let a trained model write", _generate_options),
    "estimate": ("say what training or serving a model takes: memory, FLOPs, time",
                 _estimate_options),
    "convert": ("turn a model into Hugging Face's, Meta's or our format", _convert_options),
    "eval": ("score a trained model on lm-eval's tasks", _eval_options),
}


def _parse(argv):
    parser = _Parser(prog="llama-ext", description="LLaMA kernels, training and generation.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, add_options) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        if argv[:1] == [name]:
            add_options(command)
    options = vars(parser.parse_args(argv))
    del options["command"]
    return options.pop("run_command"), options


def main(argv=None):
    """Run the command that `argv` (default: sys.argv[1:]) names; return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        run_command, options = _parse(argv)
        code = run_command(options)
        sys.stdout.flush()
        return code or 0
    except KeyboardInterrupt:
        return _fail("interrupted", 128 + signal.SIGINT)
    except ModuleNotFoundError as error:
        extra = "train,eval" if argv[0] == "eval" else "train"
        return _fail(f"{argv[0]}: needs the Python package {error.name}: "
                     f"pip install 'llama_ext[{extra}]'", 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for Python's own flush at exit
        return _fail("stdout: the reader of the output has gone", 128 + signal.SIGPIPE)
    except LlamaExtError as error:
        return _fail(error, 1)
    except ValueError as error:
        return _fail(error, 2)
    except OSError as error:
        return _fail(f"{error.filename or 'stdout'}: {error.strerror or error}", 1)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        return _fail(f"{argv[0]}: expected enough memory, but none is left; a smaller model or "
                     "batch needs less", 1)


def _fail(message, code):
    if not ranks.is_silent():
        print(f"llama-ext: {message}", file=sys.stderr, flush=True)
    return int(code)
