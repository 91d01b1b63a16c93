"""The processes that tests run functions in: a rank that dies is named, with what it left."""

import os
import signal
import sys

import pytest
import torch.distributed as dist

import processes


def end(rank, how):
    """One rank prints and ends; the others wait for it, and so hear of it from gloo at the most."""
    if dist.get_rank() == rank:
        print("the last words", file=sys.stderr, flush=True)
        how()
    dist.barrier()


def exit_with_7():
    os._exit(7)


def abort():
    os.abort()


def fail():
    raise KeyError("this one")


@pytest.mark.parametrize("how, expected", [
    (exit_with_7, "exit code 7"), (abort, "killed by SIGABRT")])
def test_a_rank_that_dies_is_named_with_its_stderr(how, expected):
    with pytest.raises(AssertionError) as raised:
        processes.run(2, end, 1, how)
    message = str(raised.value)
    assert message.startswith(f"rank 1 died: {expected}; its last lines on stderr:\nthe last words")
    assert "rank 0" not in message
    assert ("Fatal Python error: Aborted" in message) == (how is abort)
    assert ("in abort" in message) == (how is abort)


def stop_after_death(rank):
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def test_nothing_waits_for_a_rank_that_died(monkeypatch):
    monkeypatch.setattr(processes, "_PATIENCE", 0.1)
    with pytest.raises(AssertionError, match="^rank 1 died: killed by SIGKILL;[^\n]*$"):
        processes.run(2, stop_after_death, 1)


def test_an_exception_is_that_of_its_rank():
    with pytest.raises(AssertionError, match="(?s)rank [01]: Traceback.*"):
        processes.run(2, end, 0, fail)
    with pytest.raises(AssertionError, match="(?s)^rank 0: Traceback.*KeyError: 'this one'"):
        processes.run(1, end, 0, fail)


def test_results_are_in_the_order_of_ranks():
    assert processes.run(3, dist.get_rank) == [0, 1, 2]
