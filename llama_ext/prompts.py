"""The prompts of `llama-ext generate`: from its options and files, and its texts in their order."""

import json
import os
import sys

from .errors import LlamaExtError


def read_prompts(prompts, file):
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


def in_order(pieces, count):
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


def _utf8(where, data):
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise LlamaExtError(f"generate: {where}: expected UTF-8 text, got byte "
                            f"{data[error.start]:#04x} at {error.start}") from None
