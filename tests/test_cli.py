"""The command line end to end, every failure as one sentence, and no train-only library needed
for the kernels."""

import dataclasses
import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch

from corpus import flip_bit, halve, write_texts
from llama_ext import checkpoint, cli
from llama_ext.data import load_meta
from llama_ext.estimate import EstimateConfig
from llama_ext.train import TrainConfig

LLAMA_EXT = [sys.executable, "-m", "llama_ext"]
SHAPE = ["--dim=32", "--n-layers=1", "--n-heads=2", "--seq-len=32", "--batch-size=2", "--lr=0.003"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def call(*args, **options):
    """Run llama-ext as a process; returns it with exit code, stdout and stderr."""
    return subprocess.run([*LLAMA_EXT, *map(str, args)], text=True, capture_output=True, env=ENV,
                          timeout=120, **options)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with texts, data and run, made by the commands of the README."""
    work = tmp_path_factory.mktemp("work")
    write_texts(work / "texts")
    done = call("prepare", work / "texts", "--out", work / "data", "--vocab-size", 320)
    assert done.returncode == 0
    assert re.search(r"train: \d+ documents, [\d,]+ bytes, [\d,]+ tokens in 1 shards\n"
                     r"val: 1 documents, ", done.stdout)
    assert "skipped documents: 0 not text, 0 empty, 0 duplicate, 0 short\n" in done.stdout
    assert done.stderr == "training a tokenizer of 320 pieces\n"  # no bar without a terminal
    done = call("train", "--data", work / "data", "--run", work / "run", *SHAPE, "--steps=60")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"step 50/60: loss \d\.\d+, grad norm \d\.\d+, [\d,]+ tokens/s, MFU \d+%, "
                     r"lr \d\.\d\de-04, 0\.\d\d GB, 00:\d\d left", done.stdout)
    assert re.search(r"this model +\d\.\d{3}\n +xz -9 +\d\.\d{3}\n +gzip -9 +\d\.\d{3}\n",
                     done.stdout)
    return work


def test_prepare_train_generate(work):
    assert len(checkpoint.steps(work / "run")) == 1
    done = call("generate", "--run", work / "run", "--prompt", "naïve café", "--seed", 1,
                "--max-new-tokens", 8)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("naïve café") and len(done.stdout) > 15
    again = call("generate", "--run", checkpoint.latest(work / "run"), "--prompt=-", "--seed=1",
                 "--max-new-tokens=8", input="naïve café")
    assert again.stdout == done.stdout


def test_generate_needs_the_checkpoint_folder_only(work, tmp_path, capsys):
    shutil.copytree(checkpoint.latest(work / "run"), tmp_path / "elsewhere")
    assert cli.main(["generate", "--run", str(tmp_path / "elsewhere"), "--temperature=0"]) == 0
    whole = capsys.readouterr().out
    assert cli.main(["generate", "--run", str(work / "run"), "--temperature=0", "--seed=3"]) == 0
    assert capsys.readouterr().out == whole != "\n"


def test_generate_streams_whole_characters_as_they_come(work, monkeypatch, capsys):
    """Two characters of several byte tokens, then a space: each is shown once it is complete."""
    seen = []

    def ids(model, prompt_ids, count, **options):
        assert options == {"temperature": 0.8, "top_p": 0.95, "top_k": None, "seed": None,
                           "eos_id": (2,), "vocab_size": 320, "batch_size": 16, "ended": set()}
        for token in [*tokenizer.encode("\U0001f600é x"), None]:
            yield 0, token
            seen.append(capsys.readouterr().out)
    _, tokenizer = checkpoint.load_model(checkpoint.latest(work / "run"))
    monkeypatch.setattr("llama_ext.generate.stream", ids)
    assert cli.main(["generate", "--run", str(work / "run"), "--prompt", "<"]) == 0
    assert seen[:4] == ["<", "", "", "\U0001f600"] and "".join(seen) == "<\U0001f600é x"


def test_generate_many_prompts(work, tmp_path, capsys):
    """From options and files; each text as its prompt gets it alone, in the prompts' order."""
    generate = ["generate", "--run", str(work / "run"), "--max-new-tokens=9", "--top-k=50"]
    prompts = ["naïve", "x y", "a def the", "print 3"]
    alone = []
    for i, prompt in enumerate(prompts):
        assert cli.main([*generate, "--prompt", prompt, f"--seed={4 + i}"]) == 0
        alone.append(capsys.readouterr().out.removesuffix("\n"))
    (tmp_path / "p.txt").write_text("a def the\r\n\nprint 3\n")
    (tmp_path / "p.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt, "id": 7}) + "\n" for prompt in prompts[1:]))
    many = [*generate, "--seed=4", "--prompt=naïve"]
    assert cli.main([*many, "--prompt=x y", "--prompts-file", str(tmp_path / "p.txt"),
                     "--batch-size=3"]) == 0
    assert capsys.readouterr().out == "".join(
        f"--- {i + 1} of 4 ---\n{text}\n" for i, text in enumerate(alone))
    stop = alone[2][-3:]
    assert cli.main([*many, "--prompts-file", str(tmp_path / "p.jsonl"), "--stop", stop,
                     "--stop=never", "--jsonl"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [{"prompt": p, "text": text.removeprefix(p).split(stop)[0]}
                     for p, text in zip(prompts, alone)]
    assert prompts[2] + lines[2]["text"] != alone[2]


@pytest.mark.parametrize("name, content, expected", [
    ("p.txt", b"\n", "p.txt: expected at least one prompt, got an empty file"),
    ("p.txt", b"caf\xe9", "p.txt: expected UTF-8 text, got byte 0xe9 at 3"),
    ("p.jsonl", b'{"prompt": "a"}\n{"text": 1}', "line 2: expected a JSON object with a text"),
    ("p.jsonl", b'{"prompt": 3}', "line 1: expected a JSON object with a text"),
    ("p.jsonl", b"plain", "line 1: expected a JSON object with a text"),
    ("none.txt", None, "none.txt: No such file or directory")])
def test_prompts_files_that_are_none(work, tmp_path, name, content, expected, capsys):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    code, err = sentence(capsys, ["generate", "--run", work / "run", "--prompts-file",
                                  tmp_path / name])
    assert code == 1 and expected in err


def test_generate_in_bf16_and_its_plan(work, capsys, monkeypatch):
    generate = ["generate", "--run", str(work / "run"), "--prompt=x", "--max-new-tokens=5",
                "--temperature=0"]
    dtypes, load = [], checkpoint.load_model

    def load_model(*args):
        model, tokenizer = load(*args)
        dtypes.append({p.dtype for p in model.parameters()})
        return model, tokenizer
    monkeypatch.setattr(checkpoint, "load_model", load_model)
    for dtype in ("fp32", "bf16"):
        assert cli.main([*generate, "--dtype", dtype, "--device=cpu"]) == 0
        assert capsys.readouterr().out.startswith("x")
    assert dtypes == [{torch.float32}, {torch.bfloat16}]
    plans = []
    for dtype in ("fp32", "bf16"):
        with pytest.raises(SystemExit, match="0"):
            cli.main([*generate, "--dtype", dtype, "--plan", "--device=cpu"])
        plans.append(json.loads(capsys.readouterr().out))
        plan = plans[-1]
        assert plan["total"] == plan["weights"] + plan["cache"] + plan["workspace"] < plan["free"]
        assert plan["device"] == "cpu"
    assert plans[0]["cache"] == 2 * plans[1]["cache"] > 0
    assert len(dtypes) == 2  # a plan reads no weights
    monkeypatch.setattr("llama_ext.footprint.free_memory", lambda device: 10_000)
    code, err = sentence(capsys, generate)
    assert code == 1 and len(dtypes) == 2
    assert re.search(r"fit into the 0.00 GB free on cpu, got weights \d\.\d\d MB, cache", err), err
    if not torch.cuda.is_available():
        code, err = sentence(capsys, [*generate, "--device=cuda"])
        assert code == 2
        assert "device: expected auto or cpu where torch sees no CUDA device, got 'cuda'" in err


def test_info_is_json(capsys):
    assert cli.main(["info"]) == 0
    assert json.loads(capsys.readouterr().out)["cpu"]["isa"]


def test_every_option_of_train_reaches_its_field(monkeypatch, tmp_path):
    given = {f.name: {int: 7, float: 0.5, str: "text"}[type(f.default)] for f in
             dataclasses.fields(TrainConfig) if type(f.default) in (int, float, str)
             and not f.metadata["choices"]}
    given |= {"data": "d", "run": "r", "preset": "7B", "dim": 8, "n_layers": 9, "n_heads": 10,
              "n_kv_heads": 11, "hidden_dim": 12, "seq_len": 13, "warmup": 3, "optimizer": "adamax",
              "beta2": 0.25, "dtype": "fp32", "device": "cpu", "lr": 0.75,
              "batch_tokens": 4 << 20, "peak_flops": 312e12, "grad_accum": None,
              "tensorboard": True, "keep_gathered": True, "compile": True}
    assert given.keys() == {f.name for f in dataclasses.fields(TrainConfig)}
    seen = []
    monkeypatch.setattr("llama_ext.train.train", lambda c: seen.append(c) or {"signal": None})
    texts = given | {"batch_tokens": "4M", "peak_flops": "312T"}
    args = [f"--{name.replace('_', '-')}={value}" for name, value in texts.items()
            if type(value) not in (bool, type(None))]
    args += [f"--{name.replace('_', '-')}" for name, value in texts.items() if value is True]
    assert cli.main(["train", *args]) == 0
    assert cli.main(["train", "--data=d", "--run=r", "--grad-accum=14"]) == 0
    assert seen == [TrainConfig(**given), TrainConfig("d", "r", grad_accum=14)]


@pytest.mark.parametrize("command", ["info", "prepare", "mixture", "train", "generate", "eval",
                                     "estimate"])
def test_help_gives_every_options_default(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    options = re.findall(r"--[a-z0-9-]+ [A-Z{].*?(?= --[a-z0-9-]+ [A-Z{]|$)",
                         text.split("options:")[1])
    optional = [o for o in options if o.split()[0] not in ("--out", "--data", "--run")]
    assert all("(default: " in option for option in optional), optional
    train, estimate = (sum(field.type is not bool for field in dataclasses.fields(config))
                       for config in (TrainConfig, EstimateConfig))  # flags are off
    assert len(options) == {"info": 0, "prepare": 11, "mixture": 1, "train": train, "generate": 12,
                            "eval": 8, "estimate": estimate}[command]


def sentence(capsys, argv):
    """(exit code, stderr) of argv, which must fail with one line."""
    try:
        code = cli.main([str(arg) for arg in argv])
    except SystemExit as error:
        code = error.code
    err = capsys.readouterr().err
    err = err.replace("training a tokenizer of 99999 pieces\n", "")  # said before it fails
    assert err.startswith("llama-ext") and err.count("\n") == 1 and err.endswith("\n"), err
    return code, err


@pytest.mark.parametrize("argv, expected", [
    ([], "COMMAND"), (["fly"], "invalid choice: 'fly'"), (["info", "--x"], "arguments: --x"),
    (["prepare", "a"], "required: --out"), (["prepare", "--out=o"], "required: INPUT"),
    (["prepare", "stdlib", "--out=o", "--vocab-size=many"], "--vocab-size: invalid int .* 'many'"),
    (["prepare", "x", "--out=o", "--vocab-size=9", "--tokenizer=t"], "--tokenizer: not allowed"),
    (["prepare", "stdlib", "--out=o", "--val-fraction=2"], r"val_fraction must be .*, got 2\.0"),
    (["train", "--run=r"], "required: --data"), (["train", "--data=d", "--run=r", "--step=3"],
                                                 "unrecognized arguments: --step=3"),
    (["train", "--data=d", "--run=r", "--steps=1e3"], "--steps: invalid int value: '1e3'"),
    (["train", "--data=d", "--run=r", "--batch-tokens=4X"],
     "--batch-tokens: expected a finite number, with k, M, G or T behind it or not, got '4X'"),
    (["train", "--data=d", "--run=r", "--batch-tokens=0.5"], "a whole number, got '0.5'"),
    (["train", "--data=d", "--run=r", "--peak-flops=inf"], "finite number.*got 'inf'"),
    (["train", "--data=d", "--run=r", "--grad-accum=1", "--batch-tokens=1k"],
     "grad_accum: expected none beside batch_tokens, which determines it, got 1"),
    (["train", "--data=d", "--run=r", "--dtype=fp8"], "--dtype: invalid choice: 'fp8'"),
    (["train", "--data=d", "--run=r", "--lr=nan"], "lr: expected a finite number .*, got nan"),
    (["generate"], "required: --run")])
def test_wrong_usage_is_one_sentence_and_2(argv, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, err = sentence(capsys, argv)
    assert code == 2 and re.search(expected, err), err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("options, expected", [
    (["--temperature=-1"], "temperature: expected a number >= 0, got -1.0"),
    (["--top-p=0"], "top_p: expected above 0 and at most 1, got 0.0"),
    (["--max-new-tokens=-4"], "max_new_tokens: expected >= 0, got -4"),
    (["--top-k=0"], "top_k: expected >= 1 or None, got 0"),
    (["--batch-size=0"], "batch_size: expected >= 1, got 0"),
    (["--stop="], "stop: expected texts of at least one character, got ''"),
    (["--prompt", "word " * 99], r"prompt_ids: expected 1 to max_seq_len = 32 ids, got \d+")])
def test_generate_rejects_options_out_of_range(work, options, expected, capsys):
    code, err = sentence(capsys, ["generate", "--run", work / "run", *options])
    assert code == 2 and re.search(expected, err), err


def test_what_fails_otherwise_is_one_sentence_and_1(work, tmp_path, capsys):
    shutil.copytree(work, tmp_path, dirs_exist_ok=True)
    train = ["train", "--data", tmp_path / "data", "--run", tmp_path / "run", *SHAPE, "--steps=70"]
    generate = ["generate", "--run", tmp_path / "run"]
    newest, data = checkpoint.latest(tmp_path / "run"), load_meta(tmp_path / "data")["folder"]

    def fails(argv, expected):
        code, err = sentence(capsys, argv)
        assert code == 1 and re.search(expected, err), err

    fails(["prepare", tmp_path / "none", "--out", tmp_path / "o"], "none: expected a text file")
    fails(["prepare", tmp_path / "texts", "--out", tmp_path / "o", "--vocab-size=99999"],
          "vocab_size: expected at most .* got 99999")
    fails(["prepare", tmp_path / "texts", "--out", tmp_path / "o", "--tokenizer", "none.model"],
          "none.model: cannot read the tokenizer")
    fails([*train[:2], tmp_path / "texts", *train[3:]], "texts: no meta.json here")
    fails([*train, "--dim=64"], r"step-00000060 cannot be resumed: it has dim=32 \(now 64\)")
    fails(["generate", "--run", tmp_path / "none"], "none: expected a folder with")
    fails(["generate", "--run", tmp_path / "run", "--prompt", os.fsdecode(b"caf\xe9")],
          "--prompt: expected UTF-8 text, got byte 0xe9 at 3")
    halve(tmp_path / "data" / data / "train-00000.bin")
    fails(train, "train-00000.bin: truncated or changed: expected .* bytes, got ")
    shutil.rmtree(tmp_path / "data" / data)
    fails(train, "train-00000.bin: cannot open: No such file|val-00000.bin: cannot open: No such")
    flip_bit(newest / "tokenizer.model")
    fails(generate, "tokenizer.model is damaged: its checksum differs")
    halve(newest / "model.safetensors")
    fails(generate, r"model.safetensors is damaged: expected \d+ bytes, got \d+")
    (newest / "model.safetensors").unlink()
    fails(generate, "model.safetensors cannot be read: No such file")


def test_too_little_memory_is_one_sentence(work, capsys, monkeypatch):
    def allocate(*args, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1e18")
    monkeypatch.setattr("llama_ext.train.Llama", allocate)
    code, err = sentence(capsys, ["train", "--data", work / "data", "--run", work / "huge"])
    assert code == 1 and "train: expected enough memory" in err


def test_output_that_cannot_be_written(work):
    command = [*LLAMA_EXT, "generate", "--run", work / "run", "--seed=1"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=ENV)
    assert done.returncode == 1
    assert done.stderr == "llama-ext: stdout: No space left on device\n"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=ENV)
    os.close(write)
    assert done.returncode == 128 + signal.SIGPIPE
    assert done.stderr == "llama-ext: stdout: the reader of the output has gone\n"


def test_interrupting_prepare_is_one_sentence_and_130(work, tmp_path):
    """Ctrl-C while prepare works in the output folder."""
    script = ("import signal, sys, time; from llama_ext import cli, prepare\n"
              # Python leaves it ignored in a job of a shell's background.
              "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
              "def slow(*args):\n    print('here', flush=True)\n    time.sleep(60)\n"
              "prepare._split = slow\nsys.exit(cli.main())")
    process = subprocess.Popen([sys.executable, "-c", script, "prepare", work / "texts", "--out",
                                tmp_path / "out"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "llama-ext: interrupted\n"
    assert process.returncode == 130 and os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("size", [(24, 120, 0, 0), (0, 0, 0, 0)])  # 0: unknown, as often in CI
def test_a_terminal_shows_a_bar_and_ctrl_c_saves(work, tmp_path, size):
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("4H", *size))
    process = subprocess.Popen([*LLAMA_EXT, "train", "--data", work / "data", "--run",
                                tmp_path / "run", *SHAPE, "--steps=100000", "--val-every=100"],
                               stdin=end, stdout=end, stderr=end, env=ENV,
                               start_new_session=True)
    os.close(end)
    shown, stop = b"", time.monotonic() + 60
    while b"validation loss" not in shown and time.monotonic() < stop:
        shown += os.read(terminal, 4096)
    os.killpg(process.pid, signal.SIGINT)
    try:
        while part := os.read(terminal, 4096):
            shown += part
    except OSError:  # Linux's end of a terminal
        pass
    assert process.wait(60) == 130
    os.close(terminal)
    text = shown.decode()
    assert re.search(r"\r +0%\|.*\d+/100000 \[00:0\d<.*loss \d\.", text)
    assert "stopped by SIGINT after step" in text and "Traceback" not in text
    assert checkpoint.latest(tmp_path / "run") is not None


def test_kernels_and_model_need_torch_only_and_train_says_what_it_needs():
    script = """
import sys
for name in ("numpy", "tqdm", "sentencepiece", "safetensors", "matplotlib"):
    sys.modules[name] = None
import torch
import llama_ext as lx
model = lx.Llama(lx.LlamaConfig.preset("tiny", dim=32, n_layers=1, n_heads=2))
model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
lx.layers.RMSNorm(8)(torch.ones(8)), lx.ref.swiglu, lx.info()
from llama_ext import cli
for command in ("info", "train", "prepare"):
    print(cli.main([command] + ["--help"] * (command != "info")), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], text=True,
                          capture_output=True, env=ENV)
    assert re.fullmatch(r"0\n" + "".join(
        rf"llama-ext: {command}: needs the Python package \w+: pip install 'llama_ext\[train\]'\n"
        r"1\n" for command in ("train", "prepare")), done.stderr), done.stderr


def test_the_readmes_example_runs():
    text = Path(__file__).parent.parent.joinpath("README.md").read_text()
    for example in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        subprocess.run([sys.executable, "-c", example], check=True, env=ENV)
    assert "```python\n" in text
