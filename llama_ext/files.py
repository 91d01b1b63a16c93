"""Files that are either whole or not there, and JSON that shows when it is damaged."""

import json
import os
import zlib
from pathlib import Path


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
