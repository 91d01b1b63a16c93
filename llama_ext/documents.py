"""Finding and reading documents: text files, JSON lines and Parquet, compressed or not.

A document is a text file, a line of a .jsonl or .ndjson file, or a row of a .parquet file. Files
may be compressed (.gz, .bz2, .xz, .zst). Nothing is held in memory but a block of a text file, a
line, or a batch of rows.
"""

import bz2
import contextlib
import gzip
import json
import lzma
import os
import sysconfig
import zlib
from pathlib import Path

from .errors import LlamaExtError

SUFFIXES = (".txt", ".md", ".rst", ".py", ".pyi", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp",
            ".rs", ".go", ".java", ".js", ".ts", ".sh", ".tex", ".html", ".css", ".jsonl",
            ".ndjson", ".parquet")
_STDLIB_SKIPPED = ("site-packages", "dist-packages", "test", "tests", "idle_test")
_OPEN = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": lambda p: _open_zstd(p)}
BLOCK = 1 << 20  # bytes read at once
_ROWS = 256      # of a Parquet file read at once


def find(inputs, suffixes, out):
    """Yield the paths of the files that `inputs` names; see `prepare` for what these can be.

    Raises LlamaExtError for an input that is neither a file, a folder nor the word stdlib, and for
    one that is the output folder `out`.
    """
    for entry in inputs:
        if entry == "stdlib":
            folder = Path(sysconfig.get_paths()["stdlib"])
            yield from _walk(folder, (".py",), out, _STDLIB_SKIPPED)
        elif Path(entry).is_dir():
            if Path(entry).resolve() == out.resolve():
                raise LlamaExtError(f"{out}: expected an output folder that is not an input too")
            yield from _walk(Path(entry), tuple(suffixes), out, ())
        elif Path(entry).is_file():
            yield Path(entry)
        else:
            raise LlamaExtError(f"{entry}: expected a text file, a folder or the word stdlib, "
                                "got a path that is neither")


def _walk(folder, suffixes, out, skipped_names):
    def fail(error):
        raise error
    out = out.resolve()
    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders
                            if not name.startswith(".") and name not in skipped_names
                            and Path(parent, name).resolve() != out)
        for name in sorted(names):
            path = Path(parent, name)
            if (_uncompressed(name).endswith(suffixes) and not name.startswith(".")
                    and path.is_file()):
                yield path


def _uncompressed(name):
    """The file name without .gz and the like."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix in _OPEN else name


def is_plain(path):
    """Whether the file at `path` is one document, as it is."""
    return path.suffix not in (*_OPEN, ".jsonl", ".ndjson", ".parquet")


def read_documents(path, text_key):
    """Yield the documents of a file, each an iterable of blocks of bytes that is good until the
    next document. The bytes are meant to be UTF-8 and may not be.

    text_key: of a line's text, or a Parquet file's column; null there is an empty document. Raises
    LlamaExtError, naming file and line, where there is none, and for a file that is damaged or
    cannot be read.
    """
    name = _uncompressed(path.name)
    if name.endswith((".jsonl", ".ndjson")):
        yield from _read_json_lines(path, text_key)
    elif name.endswith(".parquet"):
        yield from _read_parquet(path, text_key)
    else:
        yield _read_blocks(path)


@contextlib.contextmanager
def _reading(path):
    """What the libraries raise for a file that is damaged or cannot be read, as one sentence."""
    try:
        yield
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as e:
        raise LlamaExtError(f"{path}: cannot read: {getattr(e, 'strerror', None) or e}") from None


def _open(path):
    return _OPEN.get(path.suffix, lambda p: open(p, "rb"))(path)


def _open_zstd(path):
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")


def _read_blocks(path):
    with _reading(path), _open(path) as f:
        while block := f.read(BLOCK):
            yield block


def _read_json_lines(path, text_key):
    for number, line in enumerate(_lines(_read_blocks(path)), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line.decode(errors="surrogateescape"))
        except (ValueError, RecursionError) as e:
            raise LlamaExtError(f"{path}: line {number}: expected JSON: {e}") from None
        if not isinstance(entry, dict) or text_key not in entry:
            got = f"the keys {', '.join(entry)}" if isinstance(entry, dict) else repr(entry)[:60]
            raise LlamaExtError(f"{path}: line {number}: expected an object with the key "
                                f"{text_key!r} (see --text-key), got {got}")
        text = "" if entry[text_key] is None else entry[text_key]
        if not isinstance(text, str):
            raise LlamaExtError(f"{path}: line {number}: {text_key}: expected a string, got "
                                f"{repr(text)[:60]}")
        yield [text.encode(errors="surrogatepass")]  # invalid where it holds a surrogate


def _lines(blocks):
    """The lines, without their ends, of a file that comes in blocks."""
    parts = []  # of a line that is longer than a block
    for block in blocks:
        first, *lines = block.split(b"\n")
        parts.append(first)
        for line in lines:
            yield b"".join(parts)
            parts = [line]
    yield b"".join(parts)


def _read_parquet(path, text_key):
    import pyarrow
    from pyarrow import parquet

    with _reading(path), parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
        if text_key not in schema.names:
            raise LlamaExtError(f"{path}: expected a column {text_key!r} (see --text-key), got "
                                f"{', '.join(schema.names)}")
        kind = schema.field(text_key).type
        if kind not in (pyarrow.string(), pyarrow.large_string()):
            raise LlamaExtError(f"{path}: {text_key}: expected a column of strings, got {kind}")
        for batch in file.iter_batches(_ROWS, columns=[text_key]):
            for text in batch.column(0).cast(pyarrow.large_binary()):  # bytes, valid or not
                yield [text.as_py() or b""]
