"""What the processes of one run tell each other. In a process of its own each of these does the
obvious and communicates nothing."""

import contextlib

import torch.distributed as dist


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value):
    """The values of all ranks, in order, on every rank; of anything that can be pickled."""
    values = [value]
    if world() > 1:
        values = [None] * world()
        dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def together():
    """A block that every rank enters and none leaves before all have come to its end. What it
    raises on one rank is raised on every rank, so that none waits for one that has failed."""
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    for other in gather(error):
        if other is not None:
            raise error or other

