"""Files that are either whole or not there, JSON objects, and JSON that shows damage."""

import json
import os
import zlib
from pathlib import Path

from .errors import LlamaExtError


def fsync_folder(path):
    """Make the entries of the folder `path` (renames, new files) durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomically(path, data):
    """Replace the file `path` by the bytes `data`: a crash leaves the old file or the new one.

    Raises OSError with `path` as its filename (a full disk, say), leaving the old file as it was
    and nothing beside it.
    """
    path = Path(path)
    temp = path.with_name(f".{path.name}.tmp")  # one name, so that a killed run's is replaced
    try:
        with open(temp, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temp, path)
        fsync_folder(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temp.unlink(missing_ok=True)


def read_json(file, missing=None):
    """The JSON object in the file `file`, a dict; `missing`, unless None, where there is none.

    Raises LlamaExtError for a file that cannot be read or holds something else.
    """
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        if missing is not None:
            return missing
        raise LlamaExtError(f"{file} cannot be read: {error.strerror}") from None
    except OSError as error:
        raise LlamaExtError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise LlamaExtError(f"{file}: expected JSON, got {error}") from None
    if not isinstance(content, dict):
        raise LlamaExtError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


def seal(content):
    """The JSON of a dict, as bytes, with an entry "crc32": the checksum of the rest."""
    return json.dumps({**content, "crc32": _checksum(content)}, indent=1).encode()


def unseal(data):
    """The dict that seal() wrote. Raises ValueError when a bit of it is not as it was."""
    content = json.loads(data)
    if not isinstance(content, dict) or content.pop("crc32", None) != _checksum(content):
        raise ValueError("its checksum differs from the one in it")
    return content


def _checksum(content):
    return zlib.crc32(json.dumps(content).encode())
