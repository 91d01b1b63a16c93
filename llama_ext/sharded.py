"""A checkpoint's tensors as the shards of many processes (torch.distributed.checkpoint)."""

import warnings

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException


def write(folder, tensors):
    """Write `tensors`, {name: DTensor or what every rank has alike}, into the new folder `folder`.

    Every rank calls it; returns the names of the files that are to be accounted for by this rank.
    Raises OSError on every rank when one cannot write (a full disk).
    """
    try:
        dcp.save(tensors, checkpoint_id=folder)
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, OSError):
            raise cause from None
        # What torch's archives make of it, when a disk is full.
        raise OSError(f"{folder}: a shard could not be written whole: {cause}") from None
    mine = sorted(folder.glob(f"__{dist.get_rank()}_*.distcp"))
    return mine + [folder / ".metadata"] * (dist.get_rank() == 0)


def shapes(folder):
    """{name: shape} of the tensors in the folder."""
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in metadata.items()}


def read(folder, tensors):
    """Fill `tensors`, {name: DTensor or plain tensor}, from the folder; every rank calls it."""
    with warnings.catch_warnings():  # that torch.distributed is not used, which may be meant
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(tensors, checkpoint_id=folder)
