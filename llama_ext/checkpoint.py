"""Checkpoints: one folder a step, complete as soon as it is there.

    RUN/step-00001000/
      model.safetensors      weights under Meta's names
      config.json            the model's shape
      tokenizer.model        the tokenizer, so that the folder is all that generation needs
      training.safetensors   "optimizer/<parameter>/<slot>" tensors, and "rng/cpu"
      state.json             step, the trainer's state, size and CRC-32 of every other file and of
                             itself

A checkpoint is written and fsynced under a temporary name, then renamed. Older ones beyond `keep`
go only after that.
"""

import json
import os
import re
import shutil
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as st

from .errors import LlamaExtError
from .files import fsync_folder, seal, unseal
from .model import Llama, LlamaConfig
from .quantize import quantize_
from .tokenizer import Tokenizer

_STEP = re.compile(r"step-(\d{8,})")
_TEMP = ".tmp-"


def save(run, step, model, optimizer=None, state=None, *, tokenizer=None, keep=3):
    """Write the checkpoint of `step` under the folder `run`; return its path.

    model: an nn.Module with a `.config` that has to_dict(). optimizer: its tensors are kept too.
    state: anything JSON can hold, given back by read_state(). tokenizer: the bytes of its .model
    file. keep: how many checkpoints to keep, this one included.
    Raises LlamaExtError when it cannot be written (a full disk); the earlier ones stay as they are.
    """
    run = Path(run)
    final = run / f"step-{step:08d}"
    temp = run / f"{_TEMP}{final.name}"
    try:
        run.mkdir(parents=True, exist_ok=True)
        for leftover in run.glob(f"{_TEMP}step-*"):  # of a run that was killed while saving
            shutil.rmtree(leftover)
        temp.mkdir()
        st.save_model(model, str(temp / "model.safetensors"), metadata={"format": "pt"})
        st.save_file(_training_tensors(model, optimizer), temp / "training.safetensors")
        _write(temp / "config.json", json.dumps(model.config.to_dict(), indent=1).encode())
        if tokenizer is not None:
            _write(temp / "tokenizer.model", tokenizer)
        files = {p.name: _fingerprint(p, sync=True) for p in sorted(temp.iterdir())}
        _write(temp / "state.json", seal({"step": step, "state": state or {}, "files": files}))
        fsync_folder(temp)
        if final.exists():
            _remove(final)
        temp.rename(final)
        fsync_folder(run)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temp, ignore_errors=True)
        raise LlamaExtError(f"checkpoint {final} cannot be written ({error}); the earlier "
                            f"checkpoints in {run} are as they were") from error
    for old in steps(run)[:-max(1, keep)]:
        _remove(old)
    return final


def steps(run):
    """The complete checkpoints under the folder `run`, oldest first."""
    run = Path(run)
    found = [p for p in run.iterdir() if _STEP.fullmatch(p.name)] if run.is_dir() else []
    return sorted(found, key=lambda p: int(_STEP.fullmatch(p.name)[1]))


def latest(run):
    """The newest complete checkpoint under the folder `run`, or None."""
    return (steps(run) or [None])[-1]


def find(path):
    """The checkpoint folder meant by `path`: itself, or the newest one when it is a run's folder.

    Raises LlamaExtError when there is none.
    """
    path = Path(path)
    if (path / "model.safetensors").is_file() or _STEP.fullmatch(path.name):
        return path
    newest = latest(path)
    if newest is None:
        raise LlamaExtError(f"checkpoint {path}: expected a folder with model.safetensors or with "
                            "step-NNNNNNNN folders in it, found neither")
    return newest


def read_state(path):
    """(step, state) of the checkpoint `path`, after checking every file in it.

    Raises LlamaExtError naming the damaged file and the newest older checkpoint that is whole.
    """
    path = Path(path)
    fault = _fault(path)
    if fault:
        whole = next((p for p in reversed(steps(path.parent)) if p != path and not _fault(p)), None)
        hint = (f"{whole} is whole: remove {path} to go on from there" if whole
                else f"no other checkpoint in {path.parent} is whole")
        raise LlamaExtError(f"{fault}; {hint}")
    content = unseal((path / "state.json").read_bytes())
    return content["step"], content["state"]


def load(path, model, optimizer):
    """Load the checkpoint `path`, which read_state() found whole, in place: the weights into
    `model`, the rest into `optimizer` and torch's CPU generator.

    Raises LlamaExtError for another model's.
    """
    _load_weights(Path(path) / "model.safetensors", model)
    _load_training_tensors(Path(path) / "training.safetensors", model, optimizer)


def load_model(path, int8=False):
    """(model, tokenizer) of the checkpoint folder `path`, for generation.

    int8: linear layers become Int8Linear, quantised one by one as they are read, so that no more
    than one is ever held in full. A checkpoint that was saved quantised is loaded as it is.
    Raises LlamaExtError naming the file that is missing or damaged.
    """
    path = Path(path)
    if fault := _fault(path, ("config.json", "model.safetensors", "tokenizer.model")):
        raise LlamaExtError(fault)
    config = LlamaConfig.from_dict(json.loads((path / "config.json").read_bytes()))
    file = path / "model.safetensors"
    if int8 or _is_quantized(file):
        with torch.device("meta"):
            model = quantize_(Llama(config))
        _load_weights_one_by_one(file, model.to_empty(device="cpu"))
    else:
        model = Llama(config)
        _load_weights(file, model)
    return model, Tokenizer(path / "tokenizer.model")


def _load_weights(file, model):
    try:
        st.load_model(model, file)
    except (OSError, SafetensorError) as error:
        raise LlamaExtError(f"{file} cannot be read: {error}") from error
    except RuntimeError as error:  # names or shapes differ: torch lists them, a line each
        detail = " ".join(str(error).split())
        raise LlamaExtError(f"{file} does not fit the model: {detail}") from error


def _is_quantized(file):
    with safe_open(file, "pt") as f:
        return any(name.endswith(".scale") for name in f.keys())


def _load_weights_one_by_one(file, model):
    """Into a quantised model, from weights in full or quantised."""
    full = not _is_quantized(file)
    expected = {name for name in model.state_dict() if not (full and name.endswith(".scale"))}
    with safe_open(file, "pt") as f:
        names = set(f.keys())
        if names != expected:
            raise LlamaExtError(f"{file} does not fit the model: it lacks "
                                f"{sorted(expected - names)} and has {sorted(names - expected)}")
        try:
            for name in names:
                model.load_state_dict({name: f.get_tensor(name)}, strict=False)
        except RuntimeError as error:  # shapes differ
            raise LlamaExtError(f"{file} does not fit the model: {' '.join(str(error).split())}"
                                ) from error
        except ValueError as error:
            raise LlamaExtError(f"{file}: {error}") from error


def _training_tensors(model, optimizer):
    tensors = {"rng/cpu": torch.get_rng_state()}
    for name, p in model.named_parameters() if optimizer else ():
        for slot, value in optimizer.state.get(p, {}).items():
            tensors[f"optimizer/{name}/{slot}"] = value.contiguous()
    return tensors


def _load_training_tensors(file, model, optimizer):
    tensors = st.load_file(file)
    index = {p: i for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
    slots = {}
    names = dict(model.named_parameters())
    for key, value in tensors.items():
        kind, _, rest = key.partition("/")
        if kind == "optimizer":
            name, _, slot = rest.rpartition("/")
            slots.setdefault(index[names[name]], {})[slot] = value.clone()
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": slots, "param_groups": groups})
    torch.set_rng_state(tensors["rng/cpu"])


def _fault(path, names=None):
    """None when the files `names` (default: all) of the checkpoint `path` are as they were
    written, else what is wrong."""
    manifest = path / "state.json"
    try:
        files = unseal(manifest.read_bytes())["files"]
        for name in names or files:
            file, size = path / name, (path / name).stat().st_size
            expected = files[name]
            if size != expected["bytes"]:
                return f"{file} is damaged: expected {expected['bytes']} bytes, got {size}"
            if _fingerprint(file) != expected:
                return f"{file} is damaged: its checksum differs from the one in {manifest.name}"
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    except ValueError as error:
        return f"{manifest} is damaged: {error}"
    return None


def _fingerprint(file, sync=False):
    """{"bytes": size, "crc32": checksum} of a file; with `sync`, made durable as well."""
    crc = size = 0
    with open(file, "rb") as f:
        while block := f.read(1 << 20):
            crc = zlib.crc32(block, crc)
            size += len(block)
        if sync:
            os.fsync(f.fileno())
    return {"bytes": size, "crc32": crc}


def _remove(path):
    """Remove a checkpoint; killed halfway, it leaves no folder that looks complete."""
    doomed = path.with_name(f"{_TEMP}{path.name}-old")
    path.rename(doomed)
    shutil.rmtree(doomed)


def _write(path, data):
    with open(path, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
