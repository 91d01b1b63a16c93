"""Runs a function in several processes that are joined by torch.distributed, for tests of parallel
training. They are forked from a server that has imported what takes long."""

import multiprocessing
import os
import pickle
import tempfile
import traceback

import torch
import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["pytest", "torch._dynamo", "fsspec", "llama_ext.parallel",
                                 "llama_ext.sharded", "llama_ext.train"])


def run(world, function, *args):
    """[function(*args) of rank 0, rank 1, ...], each in a process of its own with one thread.

    function: of a module's top level. Raises AssertionError with the first traceback of a rank.
    """
    with tempfile.TemporaryDirectory() as folder:
        ends = [_context.Pipe(duplex=False) for _ in range(world)]
        ranks = [_context.Process(target=_rank, args=(rank, world, folder, sender, function, args))
                 for rank, (_, sender) in enumerate(ends)]
        for process, (_, sender) in zip(ranks, ends):
            process.start()
            sender.close()
        try:
            results = [pickle.loads(receiver.recv_bytes()) for receiver, _ in ends]
        finally:
            for process in ranks:
                process.join(1)
                process.kill()
    for ok, value in results:
        assert ok, value
    return [value for _, value in results]


def _rank(rank, world, folder, sender, function, args):
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank,
                            world_size=world)
    try:
        result = True, function(*args)
    except BaseException:
        result = False, f"rank {rank}: {traceback.format_exc()}"
    # Pickled whole: multiprocessing's own way with tensors needs the sender to stay.
    sender.send_bytes(pickle.dumps(result))
    dist.destroy_process_group()
