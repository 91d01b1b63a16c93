"""Training: it learns, resumes bitwise after any kill, and fails in one sentence."""

import dataclasses
import gzip
import json
import lzma
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch._dynamo.utils import counters

from corpus import flip_bit, full_disk, write_texts
from runs import data, has_logged, rows, small  # noqa: F401, fixtures
from llama_ext import checkpoint
from llama_ext.data import TokenLoader, load_meta
from llama_ext.errors import LlamaExtError
from llama_ext.prepare import prepare
from llama_ext.train import TrainConfig, Trainer, compression, train

pytestmark = pytest.mark.usefixtures("one_thread")


def start(config, threads=1):
    """`llama-ext train` of this config as a process."""
    options = [f"--{name.replace('_', '-')}={value}"
               for name, value in dataclasses.asdict(config).items()
               if value is not None and value is not False]
    return subprocess.Popen([sys.executable, "-m", "llama_ext", "train", *options], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": str(threads),
                                 "OMP_WAIT_POLICY": "PASSIVE"})


def kill_at(process, config, step, number):
    """Send the signal once the run has logged this step; returns (exit code, stdout, stderr)."""
    while process.poll() is None:
        if has_logged(config.run, step):
            process.send_signal(number)
            break
        time.sleep(0.005)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_compiled_it_is_the_same_training(small, tmp_path):
    losses = []
    for compile in (False, True):
        config = small(compile=compile, steps=3, run=str(tmp_path / f"run-{compile}"))
        before = counters["stats"]["unique_graphs"]
        train(config)
        assert (counters["stats"]["unique_graphs"] > before) == compile
        losses.append([row["loss"] for row in rows(config.run) if "loss" in row])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6) and len(losses[0]) >= 3


@pytest.mark.parametrize("optimizer, dtype, threads", [("adamw", "bf16", 2), ("adamax", "fp32", 1)])
def test_killed_again_and_again_it_ends_bitwise_as_if_never(small, tmp_path, optimizer, dtype,
                                                            threads):
    options = {"steps": 200, "save_every": 7, "val_every": 50, "batch_size": 3, "grad_accum": 2,
               "optimizer": optimizer, "dtype": dtype}
    plain = small(**options, run=str(tmp_path / "plain"))
    killed = small(**options, run=str(tmp_path / "killed"))
    process = start(plain, threads)
    assert process.communicate(timeout=300)[1] == "" and process.returncode == 0
    for step, number in ((20, signal.SIGKILL), (50, signal.SIGKILL), (80, signal.SIGINT),
                         (110, signal.SIGTERM), (140, signal.SIGKILL)):
        code, out, err = kill_at(start(killed, threads), killed, step, number)
        reached = rows(killed.run)[-1]["step"]
        assert step <= reached < 200 and err == ""
        if number == signal.SIGKILL:
            assert code == -number
        else:  # the step under way was finished and saved
            assert code == 128 + number
            assert f"stopped by {number.name} after step {reached}; the same command" in out
            assert checkpoint.latest(killed.run).name == f"step-{reached:08d}"
    process = start(killed, threads)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "resuming" in out and err == ""
    ends = [checkpoint.latest(config.run) for config in (plain, killed)]
    assert ends[0].name == ends[1].name == "step-00000200"
    for name in ("model.safetensors", "training.safetensors", "state.json", "config.json",
                 "tokenizer.model"):
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes(), name
    assert rows(plain.run) == rows(killed.run)
    assert [row["step"] for row in rows(killed.run) if "loss" in row] == list(range(1, 201))


def test_it_learns_and_reports_what_it_measured(small, capsys):
    config = small(steps=120, val_every=60)
    result = train(config)
    log = rows(config.run)
    losses = [row["loss"] for row in log if "loss" in row]
    assert losses[0] > 5.5 and sum(losses[-10:]) / 10 < 0.6 * losses[0]
    values = [row["val_loss"] for row in log if "val_loss" in row]
    assert len(values) == 2 and values[1] < values[0] < losses[0]

    # The reported numbers once more, from the checkpoint and the shards, another way.
    model, tokenizer = checkpoint.load_model(checkpoint.find(config.run))
    loader = TokenLoader(config.data, "val", 1, config.seq_len)
    nats = 0.0
    for tokens, targets in loader.batches():
        logits = model(tokens)[0].detach().double()
        nats += float(torch.nn.functional.cross_entropy(logits, targets[0], reduction="sum"))
    text = (loader.files / "val.txt").read_bytes()
    assert result["val_loss"] == pytest.approx(nats / (loader.num_tokens - 1), rel=1e-5)
    bits = nats / math.log(2) / len(text)
    assert result["val_bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert result["gzip_bits_per_byte"] == 8 * len(gzip.compress(text, 9)) / len(text)
    assert result["xz_bits_per_byte"] == 8 * len(lzma.compress(text, preset=9)) / len(text)
    out = capsys.readouterr().out
    assert f"this model  {bits:.3f}" in out and "gzip -9" in out and "xz -9" in out
    assert (checkpoint.find(config.run).parent / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_batches_may_be_split_into_forward_passes(small, tmp_path):
    """A step on 4 sequences is a step on 2 times 2."""
    ends = []
    for name, batch, accumulate in (("a", 4, 1), ("b", 2, 2)):
        config = small(run=str(tmp_path / name), batch_size=batch, grad_accum=accumulate, steps=2)
        trainer = Trainer(config)
        trainer.train()
        trainer.close()
        ends.append(trainer)
    for a, b in zip(rows(ends[0].run_dir), rows(ends[1].run_dir)):
        assert a == pytest.approx(b, rel=1e-5)
    for a, b in zip(ends[0].model.parameters(), ends[1].model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_run_folder_belongs_to_one_process(small):
    trainer = Trainer(small())
    with pytest.raises(LlamaExtError, match="run is in use: another process trains in it"):
        Trainer(small())
    trainer.close()
    Trainer(small()).close()


def test_a_complete_run_only_reports_and_more_steps_train_on(small, capsys):
    config = small()
    train(config)
    before = rows(config.run)
    capsys.readouterr()
    assert train(config)["step"] == 6
    out = capsys.readouterr().out
    assert "is complete: 6 of 6 steps" in out and "gzip -9" in out and rows(config.run) == before
    assert train(small(steps=9))["step"] == 9
    assert "which has steps=6 (now 9)" in capsys.readouterr().out
    assert rows(config.run)[:len(before)] == before


def test_a_run_of_other_options_or_data_is_refused(small, data, tmp_path, capsys):
    train(small())
    for change in ({"dim": 64}, {"seed": 1}, {"batch_size": 2}, {"optimizer": "adamax"},
                   {"seq_len": 16}):
        name, value = next(iter(change.items()))
        name = {"batch_size": "sequences_per_step"}.get(name, name)
        with pytest.raises(LlamaExtError, match=rf"cannot be resumed: it has .*{name}=.*now "
                                                f"'?{value}.*give the same"):
            Trainer(small(**change))
    write_texts(tmp_path / "other", seed=5)
    prepare([tmp_path / "other"], tmp_path / "set", vocab_size=320, progress=False)
    with pytest.raises(LlamaExtError, match="cannot be resumed: it has data='"):
        Trainer(small(data=str(tmp_path / "set")))


def test_only_the_last_k_checkpoints_are_kept(small):
    train(small(steps=9, save_every=2, keep=2))
    assert [p.name[-1] for p in checkpoint.steps(small().run)] == ["8", "9"]


def test_a_damaged_checkpoint_stops_the_resume_and_removing_it_goes_on(small):
    config = small(steps=8)
    train(config)
    newest = checkpoint.latest(config.run)
    expected = (newest / "model.safetensors").read_bytes()
    flip_bit(newest / "model.safetensors")
    with pytest.raises(LlamaExtError, match="model.safetensors is damaged: .*00000004 is whole"):
        train(config)
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    train(config)
    assert (newest / "model.safetensors").read_bytes() == expected


def test_a_full_disk_leaves_a_run_that_can_go_on(small, tmp_path, capsys):
    whole = small(run=str(tmp_path / "whole"), steps=12)
    train(whole)
    config = small(steps=12)
    for room, error, message in ((130_000, LlamaExtError, "step-00000004 cannot be written"),
                                 (10_000, OSError, "too large: .*loss.png"),
                                 (400, LlamaExtError, "metrics.jsonl cannot be written: "),
                                 (0, LlamaExtError, "metrics.jsonl cannot be written: ")):
        with full_disk(room), pytest.raises(error, match=message):
            train(config)
    train(config)
    assert rows(config.run) == rows(whole.run)


def test_data_is_verified_when_a_run_begins(small, data, tmp_path):
    copy = tmp_path / "set"
    subprocess.run(["cp", "-r", data, copy], check=True)
    shard = copy / load_meta(copy)["folder"] / "train-00000.bin"
    flip_bit(shard)
    with pytest.raises(LlamaExtError, match="train-00000.bin: damaged: expected sha256"):
        Trainer(small(data=str(copy)))
    shard.unlink()
    with pytest.raises(LlamaExtError, match="train-00000.bin: cannot open: No such file"):
        Trainer(small(data=str(copy)))
    with pytest.raises(LlamaExtError, match="nowhere: no meta.json here"):
        Trainer(small(data="nowhere"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_data_too_short_shows_before_training(small, tmp_path):
    write_texts(tmp_path / "texts", 5)
    prepare([tmp_path / "texts"], tmp_path / "a", vocab_size=310, val_fraction=0, progress=False)
    with pytest.raises(LlamaExtError, match="the val split must have at least 2 tokens, got 0"):
        Trainer(small(data=str(tmp_path / "a")))
    prepare([tmp_path / "texts"], tmp_path / "b", vocab_size=310, val_fraction=0.3, progress=False)
    with pytest.raises(LlamaExtError, match="the train split must have at least 100001 tokens"):
        Trainer(small(data=str(tmp_path / "b"), seq_len=100_000))


@pytest.mark.parametrize("option, value", [
    ("steps", 0), ("lr", -1.0), ("lr", math.nan), ("grad_clip", math.inf), ("weight_decay", -0.1),
    ("beta1", 1.0), ("beta2", -0.5), ("seed", -1), ("seq_len", 0), ("warmup", 6), ("keep", 0),
    ("dtype", "fp8"), ("batch_size", 0)])
def test_wrong_options_are_named(small, option, value):
    with pytest.raises(ValueError, match=f"train: {option}: expected .*, got {value!r}"):
        small(**{option: value})


def test_the_run_folder_cannot_be_a_file(small, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(LlamaExtError, match="run cannot be written: File exists"):
        Trainer(small())


def test_compression_is_what_the_programs_give(tmp_path):
    """Within the few bytes of file name and time that the gzip program adds."""
    text = tmp_path / "t.txt"
    lines = [f"line {i * i}\n" for i in range(3000)]
    text.write_text("".join(lines))
    ours = compression([text])
    for name, part in (("a.txt", lines[:2000]), ("b.txt", lines[2000:])):
        (tmp_path / name).write_text("".join(part))
    assert compression([tmp_path / "a.txt", tmp_path / "b.txt"]) == ours
    for name in ("gzip", "xz"):
        size = len(subprocess.run([name, "-9", "-c", text], check=True, stdout=subprocess.PIPE)
                   .stdout)
        assert ours[name] == pytest.approx(8 * size / text.stat().st_size, rel=0.01)
