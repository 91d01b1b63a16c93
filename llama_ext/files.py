"""Files that are either whole or not there."""

import os
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
