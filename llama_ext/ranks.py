"""What the processes of one run, started by torchrun, tell each other. In a process of its own each
of these does the obvious and communicates nothing."""

import contextlib
import os
import signal
import threading
import time
import uuid

import torch
import torch.distributed as dist

_silent = False


def launched():
    """Whether torchrun started this process."""
    return dist.is_torchelastic_launched()


def start(device):
    """Join the other processes that torchrun started; nothing without it. device: "cpu" (gloo) or
    "cuda" (NCCL; this process gets the GPU of its LOCAL_RANK)."""
    if launched() and not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        store, number, count = next(dist.rendezvous("env://"))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
                                store=_fresh(store, number, count), rank=number, world_size=count)


def _fresh(store, number, count):
    """`store` under a prefix that these processes share and none before them had.

    torchrun's store outlives the processes: after a restart it still has the addresses of those
    before, to which the new ones could connect. Machines count restarts each for itself, so that
    this count is no name that all of them have. Rank 0 chooses the name, and tells it to the others
    under names of their own: what was left behind by an earlier process is answered too, and read
    by nobody.
    """
    own = uuid.uuid4().hex
    if number > 0:
        store.set(f"asks/{number}", own)
        name = store.get(f"answer/{own}").decode()
        store.set(f"{name}/has/{number}", "")
        return dist.PrefixStore(name, store)
    end, missing = time.monotonic() + store.timeout.total_seconds(), list(range(1, count))
    while missing:
        for other in missing:
            if store.check([f"asks/{other}"]):
                store.set(f"answer/{store.get(f'asks/{other}').decode()}", own)
        missing = [other for other in missing if not store.check([f"{own}/has/{other}"])]
        if missing and time.monotonic() > end:
            raise dist.DistStoreError(f"expected {count} processes, got none of rank "
                                      f"{missing[0]} in {store.timeout}")
        time.sleep(0.01)
    return dist.PrefixStore(own, store)


def finish():
    """Part from the others, if start() joined them."""
    if launched() and dist.is_initialized():
        dist.destroy_process_group()


def is_joined():
    """Whether this process has been joined to others, if only to a group of one."""
    return dist.is_initialized()


def rank():
    if dist.is_initialized():
        return dist.get_rank()
    return int(os.environ["RANK"]) if launched() else 0


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
    global _silent
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    errors = gather(error)
    failed = next((i for i, other in enumerate(errors) if other is not None), None)
    if failed is not None:
        _silent = failed != rank()
        raise error or errors[failed]


def has_lost_another(error):
    """Whether `error`, a RuntimeError, says that another process of this run has ended."""
    global _silent
    lost = world() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))
    _silent = _silent or (lost and rank() > 0)
    return lost


def is_silent():
    """Whether it is for another rank to say what went wrong in this one: that of together() which
    failed; rank 0 for the loss of another and for what fails alike everywhere before start()."""
    return _silent or (launched() and not dist.is_initialized() and rank() > 0)


class StopSignal:
    """Holds in `signal` the SIGINT or SIGTERM that came within the block to any of the processes,
    as of the last agree(), on which all have the same; None before that."""

    def __enter__(self):
        self.signal = self._received = None
        self._previous = {}
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def agree(self):
        self.signal = next(filter(None, gather(self._received)), None)
        return self.signal

    def _receive(self, number, frame):
        self._received = number
        if not launched():  # torchrun passes on what the terminal has sent already
            self._restore()  # a second one is not held up

    def _restore(self):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def __exit__(self, *exception):
        self._restore()
