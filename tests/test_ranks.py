"""Joining under torchrun: a store that still has what processes before a restart left in it."""

import datetime
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from llama_ext.ranks import _fresh


def join(store, count):
    """What each of `count` processes finds under a name that all of them write to."""
    with ThreadPoolExecutor(count) as pool:
        stores = list(pool.map(lambda rank: _fresh(store, rank, count), range(count)))
    return [one.add("met", 1) for one in stores]


def test_processes_meet_whatever_was_left_in_the_store():
    store = dist.HashStore()
    store.set_timeout(datetime.timedelta(seconds=10))
    store.set("asks/1", "of a process that was killed before an answer came")
    for count in (3, 3, 1, 2, 4):  # restarts, with other numbers of processes
        assert join(store, count) == list(range(1, count + 1))


def test_a_process_that_does_not_come_is_named():
    store = dist.HashStore()
    store.set_timeout(datetime.timedelta(seconds=0.2))
    store.set("asks/1", "of a process that was killed")
    with pytest.raises(dist.DistStoreError, match="expected 3 processes, got none of rank 1 in "):
        _fresh(store, 0, 3)
    with pytest.raises(dist.DistStoreError):  # rank 0 does not come
        _fresh(store, 1, 2)
