"""Runs a function in several processes that are joined by torch.distributed, for tests of parallel
training. They are forked from a server that has imported what takes long."""

import contextlib
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["pytest", "torch._dynamo", "fsspec", "llama_ext.parallel",
                                 "llama_ext.sharded", "llama_ext.train"])
_PATIENCE = 5  # seconds that the others have left when one has failed or died


def run(world, function, *args):
    """[function(*args) of rank 0, rank 1, ...], each in a process of its own with one thread.

    function: of a module's top level. Raises AssertionError that names the ranks that died, each
    with exit code or signal and its last lines on stderr; or else with the first traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes = [_context.Pipe(duplex=False) for _ in range(world)]
        ranks = [_context.Process(target=_rank, args=(rank, world, folder, sender, function, args))
                 for rank, (_, sender) in enumerate(pipes)]
        for process, (_, sender) in zip(ranks, pipes):
            process.start()
            sender.close()
        try:
            results = _receive([receiver for receiver, _ in pipes])
        finally:
            for process in ranks:
                process.join(1)
            codes = [process.exitcode for process in ranks]  # None: had to be killed
            for process in ranks:
                process.kill()
        died = [_obituary(rank, code, folder) for rank, (result, code) in
                enumerate(zip(results, codes)) if result is None and code is not None]
    assert not died, "\n".join(died)
    for ok, value in filter(None, results):
        assert ok, value
    return [value for _, value in results]


def _receive(receivers):
    """What each rank sends; None of those that die, or have not come to an end long after one
    that failed or died."""
    results, patience = [None] * len(receivers), None
    waiting = {receiver: rank for rank, receiver in enumerate(receivers)}
    while waiting and (ready := multiprocessing.connection.wait(waiting, patience)):
        for receiver in ready:
            rank = waiting.pop(receiver)
            with contextlib.suppress(EOFError):
                results[rank] = pickle.loads(receiver.recv_bytes())
            if results[rank] is None or not results[rank][0]:
                patience = _PATIENCE
    return results


def _obituary(rank, code, folder):
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    lines = Path(folder, f"stderr{rank}").read_text(errors="replace").splitlines()
    return "\n".join([f"rank {rank} died: {how}; its last lines on stderr:", *lines[-60:]])


def _rank(rank, world, folder, sender, function, args):
    os.dup2(os.open(f"{folder}/stderr{rank}", os.O_WRONLY | os.O_CREAT), 2)
    faulthandler.enable()  # Python's stack, if a signal ends this process
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    try:  # to join, too: that fails where another rank dies meanwhile
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank,
                                world_size=world)
        dist.barrier()  # nobody may leave while another still joins
        result = True, function(*args)
    except BaseException:
        result = False, f"rank {rank}: {traceback.format_exc()}"
    # Pickled whole: multiprocessing's own way with tensors needs the sender to stay.
    sender.send_bytes(pickle.dumps(result))
    if dist.is_initialized():
        dist.destroy_process_group()
