"""Training under torchrun: as in one process, through kills, stops and failures of single ranks."""

import dataclasses
import errno
import itertools
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

import processes
from llama_ext import checkpoint, ranks
from llama_ext.errors import LlamaExtError
from llama_ext.train import Trainer, train
from runs import data, has_logged, rows, small  # noqa: F401  fixtures

pytestmark = pytest.mark.usefixtures("one_thread")


def weights(run):
    model, _ = checkpoint.load_model(checkpoint.find(run))
    return dict(model.named_parameters())


def run_all(configs):
    """The results of this rank's trainings."""
    return [train(config) for config in configs]


def torchrun(config, processes, *options, machines=("--standalone",)):
    arguments = [f"--{name.replace('_', '-')}={value}"
                 for name, value in dataclasses.asdict(config).items()
                 if value is not None and value is not False]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *machines,
         f"--nproc-per-node={processes}", *options, "-m", "--", "llama_ext", "train", *arguments],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"})


def worker(process, rank):
    """The process id of a rank that this torchrun has started; None where another has."""
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        for pid in file.read().split():
            with open(f"/proc/{pid}/environ") as environ:
                if f"RANK={rank}" in environ.read().split("\0"):
                    return int(pid)
    return None


def wait_for(process, config, step):
    while not has_logged(config.run, step):
        if process.poll() is not None:
            pytest.fail("\n".join(process.communicate()))
        time.sleep(0.005)


def test_several_processes_train_as_one_does(small, tmp_path):  # noqa: F811
    def config(name, **options):
        return small(run=str(tmp_path / name), grad_clip=1e9, **options)
    plain = config("plain", grad_accum=2, optimizer="adamax")
    train(plain)
    split = [config("dp", optimizer="adamax"),
             config("tp", tensor_parallel=2, grad_accum=2, optimizer="adamax", batch_tokens=None),
             config("bf16", optimizer="adamax", dtype="bf16", keep_gathered=True)]
    first, second = processes.run(2, run_all, split)
    alone = config("alone", grad_accum=2, optimizer="adamax")  # a group of one
    processes.run(1, run_all, [alone])
    mixed = config("mixed", tensor_parallel=2, batch_size=2, batch_tokens=8 * 32,
                   optimizer="adamax")
    results = processes.run(4, run_all, [mixed])
    assert [set(result[0]) for result in results[1:]] == 3 * [{"step", "signal"}]
    expected = weights(plain.run)
    for run in (split[0].run, alone.run):  # the same two gradients are added
        for name, p in weights(run).items():
            assert torch.equal(p, expected[name]), (run, name)
    for other, result in zip((*split, mixed), (*first, results[0][0])):
        loose = 0.02 if other.dtype == "bf16" else 1e-4  # test_parallel has the exact comparison
        assert len(rows(other.run)) == len(rows(plain.run))
        for a, b in zip(rows(other.run), rows(plain.run)):
            assert a == pytest.approx(b, rel=loose), other.run
        assert result["val_loss"] == rows(other.run)[-1]["val_loss"]
        assert os.path.exists(result["loss_curve"])
        for name, p in weights(other.run).items():  # a tiny gradient's sign moves a weight by lr
            assert (p - expected[name]).norm() < 0.05 * expected[name].norm(), (other.run, name)
    assert [row["loss"] for row in rows(split[0].run) if "loss" in row] == \
        [row["loss"] for row in rows(plain.run) if "loss" in row]


def test_a_run_goes_on_with_other_numbers_of_processes(small, tmp_path, capsys):  # noqa: F811
    plain = small(run=str(tmp_path / "plain"), grad_accum=4, batch_size=2, steps=8)
    train(plain)

    def config(**options):
        return small(batch_size=2, save_every=2, **options)
    processes.run(2, stop_after, config(grad_accum=2, steps=8), 2)
    before = Trainer(config(grad_accum=4, steps=8))
    for step in (3, 4):
        before._update()
    before._save()
    before.close()
    processes.run(4, stop_after, config(grad_accum=2, steps=8, tensor_parallel=2), 2)
    processes.run(4, run_all, [config(steps=8)])
    assert [p.name[-1] for p in checkpoint.steps(config().run)] == ["4", "6", "8"]
    capsys.readouterr()
    assert train(config(steps=8, grad_accum=4))["step"] == 8
    assert "is complete: 8 of 8 steps" in capsys.readouterr().out
    for a, b in zip(rows(plain.run)[-2:], rows(config().run)[-2:]):
        assert a == pytest.approx(b, rel=1e-4)
    with pytest.raises(LlamaExtError, match=r"it has sequences_per_step=8 \(now 4\)"):
        train(config(steps=8, grad_accum=2))


def stop_after(config, count):
    """Steps until SIGTERM comes to rank 1, after `count` of them."""
    trainer = Trainer(config)
    update = trainer._update

    def update_and_stop():
        nonlocal count
        count -= 1
        if count == 0 and ranks.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return update()
    trainer._update = update_and_stop
    assert trainer.train() == signal.SIGTERM
    trainer.close()
    return trainer.step


def test_processes_that_are_killed_and_stopped_end_bitwise_as_if_never(small,  # noqa: F811
                                                                       tmp_path):
    options = {"steps": 40, "save_every": 5, "val_every": 20, "dtype": "bf16"}
    plain = small(run=str(tmp_path / "plain"), **options)
    killed = small(run=str(tmp_path / "killed"), **options)
    processes.run(2, run_all, [plain])

    process = torchrun(killed, 2, "--max-restarts=1")
    wait_for(process, killed, 12)
    os.kill(worker(process, 1), signal.SIGKILL)
    wait_for(process, killed, 24)
    os.kill(worker(process, 1), signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    reached = rows(killed.run)[-1]["step"]
    assert 24 <= reached < 40 and process.returncode != 0
    assert out.count("resuming") == 1
    assert f"stopped by SIGTERM after step {reached}; the same command resumes there" in out
    assert checkpoint.latest(killed.run).name == f"step-{reached:08d}"

    process = torchrun(killed, 2)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and out.count("resuming") == 1
    assert rows(plain.run) == rows(killed.run)
    expected = weights(plain.run)
    assert all(torch.equal(p, expected[name]) for name, p in weights(killed.run).items())


def test_a_killed_process_costs_two_machines_no_more(small, tmp_path):  # noqa: F811
    options = {"steps": 30, "save_every": 5, "val_every": 20}
    plain = small(run=str(tmp_path / "plain"), **options)
    killed = small(run=str(tmp_path / "killed"), **options)
    processes.run(2, run_all, [plain])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    machines = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}",
                "--local-addr=localhost")
    agents = [torchrun(killed, 1, "--max-restarts=1", machines=machines) for _ in range(2)]
    wait_for(agents[0], killed, 12)
    victim, = filter(None, (worker(agent, 1) for agent in agents))
    os.kill(victim, signal.SIGKILL)
    ends = [agent.communicate(timeout=120) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], ends
    assert sum(out.count("resuming") for out, _ in ends) == 1
    assert rows(plain.run) == rows(killed.run)


def test_what_is_wrong_for_all_is_said_once_before_any_work(small):  # noqa: F811
    process = torchrun(small(tensor_parallel=3), 2)
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0 and out == ""
    lines = [line for line in err.splitlines() if "llama-ext" in line]
    assert lines == ["llama-ext: tensor_parallel: expected a divisor of the number of processes = "
                     "2, got 3"]
    assert not os.path.exists(small().run)


def fail(config, rank=None, place=None, error=None):
    """What the training ends with on this rank, and whether another is to say so, when a rank
    fails at the third call of a place."""
    if ranks.rank() == rank:
        owner, _, name = place.rpartition(".")
        owner = pkgutil.resolve_name(owner)
        working, calls = getattr(owner, name), itertools.count(1)

        def replacement(*args, **options):
            if next(calls) == 3:
                raise error
            return working(*args, **options)
        setattr(owner, name, replacement)
    try:
        return train(config)
    except (LlamaExtError, ValueError) as ending:
        return str(ending), ranks.is_silent()


@pytest.mark.parametrize("rank, place, error", [
    (0, "llama_ext.runlog.RunLog.add", LlamaExtError("metrics.jsonl cannot be written")),
    (1, "llama_ext.data.TokenLoader.__next__", LlamaExtError("train-0.bin: damaged")),
    (1, "llama_ext.checkpoint._fingerprint", OSError(errno.ENOSPC, "No space left"))])
def test_a_failure_of_one_rank_ends_all(small, rank, place, error):  # noqa: F811
    ends = processes.run(2, fail, small(save_every=1), rank, place, error)
    (message, silent), (other, _) = ends[rank], ends[1 - rank]
    assert str(error) in message and not silent
    if isinstance(error, OSError):  # while all of them save
        assert message == other and "step-00000003 cannot be written" in message
        assert [p.name[-1] for p in checkpoint.steps(small().run)] == ["1", "2"]
    else:
        assert "other processes of this run to go on, but one has ended" in other
        checkpoint.read_state(checkpoint.latest(small().run))
    assert ends[1][1] or rank == 1


def test_errors_that_all_share_leave_the_run_folder_alone(small, tmp_path):  # noqa: F811
    for options, message in (
            ({"data": "nowhere"}, "nowhere: no meta.json here"),
            ({"batch_tokens": 300}, "expected a multiple of .* 2 processes = 256, such as 256 or")):
        (first, silent), (second, also) = processes.run(2, fail, small(**options))
        assert first == second and not silent and also and message.split(" .* ")[-1] in first
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="tensor_parallel: expected a divisor of the number of "
                                         "processes = 1, got 2"):
        train(small(tensor_parallel=2))
