"""The recipe around the training loop: skipped updates, batch size, defaults, step line, events."""

import dataclasses
import json
import math
import re
import subprocess
import sys

import pytest
import torch

from llama_ext import checkpoint, device
from llama_ext.errors import LlamaExtError
from llama_ext.estimate import flops_per_token
from llama_ext.runlog import RunLog, plot_losses
from llama_ext.train import TrainConfig, Trainer, train
from runs import data, rows, small  # noqa: F401, fixtures

pytestmark = pytest.mark.usefixtures("one_thread")


def spoil(trainer, steps, what="loss"):
    """Make the loss, or with it finite the gradient, of these steps NaN."""
    forward = trainer.model.forward

    def spoiled(tokens, targets):
        loss = forward(tokens, targets)
        if torch.is_grad_enabled() and trainer.step + 1 in steps:
            if what == "loss":
                return loss * math.nan
            loss.register_hook(lambda grad: grad * math.inf)
        return loss
    trainer.model.forward = spoiled


def state(trainer):
    """Every number of weights and optimizer, in a dict of tensors."""
    tensors = checkpoint._training_tensors(trainer.model, trainer.optimizer)
    return {name: t.clone() for name, t in (tensors | trainer.model.state_dict()).items()}


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamax"])
def test_a_step_that_is_not_finite_changes_no_bit(small, what, optimizer):
    trainer = Trainer(small(optimizer=optimizer))
    spoil(trainer, [3], what)
    for step in range(1, 6):
        before, position = state(trainer), trainer.loader.state_dict()["position"]
        loss, norm, _ = trainer._update()
        after = state(trainer)
        same = [torch.equal(before[k], after[k]) for k in before if k != "rng/cpu"]
        assert trainer.step == step and trainer.loader.state_dict()["position"] == position + 4
        if step == 3:
            assert all(same) and not math.isfinite(norm) and math.isfinite(loss) == (what != "loss")
        else:
            assert math.isfinite(loss) and math.isfinite(norm)
            assert step == 1 or not any(same)
        assert (trainer.skipped, trainer.skipped_in_a_row) == (step >= 3, step == 3)
        assert all(p.grad is None for p in trainer.model.parameters())
    trainer.close()


def test_skipped_steps_are_logged_and_counted_on_after_a_resume(small, capsys):
    config = small(save_every=3, steps=9)
    trainer = Trainer(config)
    spoil(trainer, [2, 3])
    trainer.config = dataclasses.replace(config, steps=3, warmup=0)  # stops there
    trainer.train()
    trainer.close()
    out = capsys.readouterr().out
    assert re.findall(r"step (\d): update skipped: expected a finite loss and gradient, got loss "
                      r"nan and gradient norm nan \((\d) in a row, (\d) in all\)", out) == [
                          ("2", "1", "1"), ("3", "2", "2")]
    trainer = Trainer(config)
    assert (trainer.skipped, trainer.skipped_in_a_row) == (2, 2)
    spoil(trainer, [4, 8])
    trainer.train()
    trainer.close()
    log = [row for row in rows(config.run) if "lr" in row]
    assert [row["step"] for row in log] == list(range(1, 10))
    assert {row["step"]: row["skipped"] for row in log if "skipped" in row} == {
        2: 1, 3: 2, 4: 3, 8: 4}
    assert [row["step"] for row in log if row["loss"] is None] == [2, 3, 4, 8]
    text = open(trainer.run_dir / "metrics.jsonl").read()
    assert "NaN" not in text and "(3 in a row, 3 in all)" in capsys.readouterr().out
    plot_losses(trainer.run_dir / "again.png", trainer.log.rows, 3.0)


def test_too_many_skipped_in_a_row_end_the_run(small):
    config = small(save_every=2, steps=20, max_skipped=3)
    trainer = Trainer(config)
    spoil(trainer, [3, 4, 6, 7, 8])
    with pytest.raises(LlamaExtError, match="stopped at step 8, the last of 3 in a row without a "
                       r"finite loss .* got loss nan .* last checkpoint is \S*step-00000006$"):
        trainer.train()
    trainer.close()
    trainer = Trainer(config)  # step 6 was the first of the row
    spoil(trainer, [7, 8])
    with pytest.raises(LlamaExtError, match="stopped at step 8, the last of 3"):
        trainer.train()
    trainer.close()
    trainer = Trainer(config)
    trainer.train()
    trainer.close()
    assert trainer.step == 20 and trainer.skipped == 3
    first = Trainer(dataclasses.replace(config, run=config.run + "2", max_skipped=1))
    spoil(first, [1])
    with pytest.raises(LlamaExtError, match="stopped at step 1, .* no checkpoint was written"):
        first.train()
    first.close()


def test_batch_tokens_give_the_forward_passes(small, tmp_path):
    ends = []
    for name, options in (("a", {"grad_accum": 3}), ("b", {"batch_tokens": 3 * 4 * 32})):
        config = small(run=str(tmp_path / name), steps=2, **options)
        train(config)
        ends.append((checkpoint.latest(config.run) / "model.safetensors").read_bytes())
    assert ends[0] == ends[1]
    train(small(run=config.run, steps=3, grad_accum=3))  # the same run
    paper = small(preset="7B", batch_size=4, batch_tokens=4 << 20, seq_len=2048)
    assert paper.forward_passes(2048) == 512 and paper.forward_passes(2048, ranks=8) == 64
    assert small().forward_passes(2048) == 1


@pytest.mark.parametrize("value, nearest", [(300, "256 or 384"), (100, "128")])
def test_batch_tokens_must_divide(small, tmp_path, value, nearest):
    with pytest.raises(ValueError, match=r"batch_tokens: expected a multiple of batch_size \* "
                       rf"seq_len = 128, such as {nearest}, got {value}"):
        Trainer(small(batch_tokens=value))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"seq_len \* 2 processes = 256, such as 256, got 128"):
        small(batch_tokens=128).forward_passes(32, ranks=2)


def test_the_papers_recipe_is_the_default():
    lr = {p: TrainConfig("d", "r", preset=p).peak_lr() for p in ("tiny", "7B", "13B", "33B", "65B")}
    assert lr == {"tiny": 3e-4, "7B": 3e-4, "13B": 3e-4, "33B": 1.5e-4, "65B": 1.5e-4}
    assert TrainConfig("d", "r", preset="65B", lr=1e-3).peak_lr() == 1e-3
    config = TrainConfig("d", "r", steps=250_000)
    assert config.warmup_steps() == 2000 and config.weight_decay == 0.1 and config.grad_clip == 1
    assert (config.optimizer, config.beta1, config.beta2) == ("adamw", 0.9, None)
    assert TrainConfig("d", "r", steps=50).warmup_steps() == 5
    assert TrainConfig("d", "r", steps=50, warmup=0).warmup_steps() == 0


def test_devices(small, monkeypatch):
    cpu = torch.device("cpu")
    assert device.resolve("cpu") == cpu
    if not torch.cuda.is_available():
        assert device.resolve("auto") == cpu
        with pytest.raises(ValueError, match="device: expected auto or cpu where torch sees no "
                                             "CUDA device, got 'cuda'"):
            Trainer(small(device="cuda"))
    assert device.resolve_dtype("fp32", cpu) == "fp32"
    assert device.resolve_dtype("auto", cpu) in ("bf16", "fp32")
    for name, bf16 in (("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 PCIe", 756e12),
                       ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H200", 989e12),
                       ("NVIDIA H200 NVL", 835e12), ("T4", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda d, name=name: name)
        assert device.peak_flops(torch.device("cuda"), "bf16") == bf16
        assert bf16 is None or device.peak_flops(torch.device("cuda"), "fp32") < bf16 / 10
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.resolve("auto") == device.resolve("cuda") == torch.device("cuda")


def test_the_cpus_peak_is_that_of_a_matrix_product():
    """Within a wide margin, since other processes may come between."""
    rng = torch.get_rng_state()
    peak = device.peak_flops(torch.device("cpu"), "fp32")
    assert torch.equal(rng, torch.get_rng_state()) and 1e8 < peak < 1e14
    assert 1e7 < device.peak_memory(torch.device("cpu")) < 1e13


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's file")
def test_peak_memory_of_a_process_is_not_its_parents():
    """The kernel's own count for a process starts with what the one that started it held."""
    child = "import torch; from llama_ext import device; " \
            "print(device.peak_memory(torch.device('cpu')))"
    parent = "import subprocess, sys; held = b'x' * (3 << 29); " \
             f"subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    done = subprocess.run([sys.executable, "-c", parent], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 3 << 29


def test_the_step_line_says_what_the_metrics_say(small, capsys):
    config = small(steps=4, log_every=2, peak_flops=1e9, val_every=99)
    trainer = Trainer(config)
    trainer.train()
    trainer.close()
    lines = re.findall(r"step (\d)/4: loss ([\d.]+), grad norm ([\d.]+), ([\d,]+) tokens/s, "
                       r"MFU (\d+)%, lr ([\d.e-]+), ([\d.]+) GB, [\d:]+ left",
                       capsys.readouterr().out)
    log = {str(row["step"]): row for row in map(json.loads, open(trainer.log.path))
           if "lr" in row}
    assert [line[0] for line in lines] == ["2", "4"]
    for step, loss, norm, speed, mfu, lr, memory in lines:
        row = log[step]
        assert float(loss) == pytest.approx(row["loss"], abs=6e-4)
        assert float(norm) == pytest.approx(row["grad_norm"], abs=6e-3)
        assert float(lr) == pytest.approx(row["lr"], rel=6e-3)
        assert float(memory) == pytest.approx(row["memory_bytes"] / 1e9, abs=6e-3)
        assert float(speed.replace(",", "")) == pytest.approx(row["tokens_per_second"], abs=1)
        flops = flops_per_token(trainer.model.config, config.seq_len)
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * flops / 1e9, abs=1e-3)
        assert float(mfu) / 100 == pytest.approx(row["mfu"], abs=6e-3)


def test_no_peak_no_utilization(small, monkeypatch, capsys):
    monkeypatch.setattr(device, "peak_flops", lambda *args: None)
    train(small(log_every=3))
    out = capsys.readouterr().out
    assert "tokens/s, lr" in out and "MFU" not in out
    assert "mfu" not in open(small().run + "/metrics.jsonl").read()


def events(run):
    """{tag: [(step, value)]} as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run) + "/tensorboard").Reload()
    return {tag: [(e.step, e.value) for e in shown]
            for tag in accumulator.Tags()["scalars"] if (shown := accumulator.Scalars(tag))}


def test_tensorboard_shows_the_metrics_once_though_steps_ran_twice(small):
    pytest.importorskip("tensorboard")
    config = small(steps=10, tensorboard=True)
    trainer = Trainer(config)
    spoil(trainer, [7])
    save, trainer._save = trainer._save, lambda: save() if trainer.step < 8 else None
    trainer.train()  # to the end, but as if killed before the checkpoints after step 4
    trainer.close()
    train(config)
    log = [json.loads(line) for line in open(trainer.log.path)]
    shown = events(config.run)
    assert set(shown) == {key for row in log for key in row} - {"step"} and "mfu" in shown
    for tag, values in shown.items():
        expected = [(row["step"], row[tag]) for row in log if row.get(tag) is not None]
        assert dict(values) == pytest.approx(dict(expected), rel=1e-6), tag
        assert len(values) == len(expected), tag
    assert [step for step, _ in shown["loss"]] == list(range(1, 11))


def test_tensorboard_is_off_by_default_and_says_what_it_needs(small, tmp_path, monkeypatch):
    train(small())
    assert not (tmp_path / "run" / "tensorboard").exists()
    script = ("import sys\nfrom llama_ext import cli, runlog\n"
              "runlog.importlib.util.find_spec = lambda name: None\nsys.exit(cli.main())")
    done = subprocess.run([sys.executable, "-c", script, "train", "--data=d",
                           f"--run={tmp_path / 'new'}", "--tensorboard"], capture_output=True,
                          text=True)
    assert done.returncode == 1 and not (tmp_path / "new").exists()
    assert done.stderr == ("llama-ext: train: tensorboard: expected the Python package "
                           "tensorboard, which is not installed: pip install tensorboard\n")
