"""Checkpoints: one folder a step, complete as soon as it is there.

    RUN/step-00001000/
      model.safetensors      weights under Meta's names
      config.json            the model's shape
      tokenizer.model        the tokenizer, so that the folder is all that generation needs; in a
                             converted model all files of its tokenizer (release_tokenizers.FILES)
      training.safetensors   "optimizer/<parameter>/<slot>" tensors, "rng/cpu", and where
                             the model is on a GPU "rng/cuda"
      state.json             step, the trainer's state, size and CRC-32 of every other file and of
                             itself

The processes of one run (torch.distributed), which share the folder, each write their part: instead
of the two .safetensors there is a folder `shards` of torch.distributed.checkpoint, with the weights
as "model/<parameter>". Either is read into a model that is split over any number of processes, or
over none.

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

from . import ranks
from .errors import LlamaExtError
from .files import fsync_folder, seal, unseal
from .model import Llama, LlamaConfig
from .quantize import Int8Linear, quantize, quantize_
from .release_tokenizers import check_fits, load_tokenizer

_STEP = re.compile(r"step-(\d{8,})")
_TEMP = ".tmp-"
_SHARDS = "shards"
_WHOLE = (("model.safetensors", "model/"), ("training.safetensors", ""))  # file, prefix of its keys


def save(run, step, model, optimizer=None, state=None, *, tokenizer=None, keep=3):
    """Write the checkpoint of `step` under the folder `run`; return its path.

    model: an nn.Module with a `.config` that has to_dict(). optimizer: its tensors are kept too.
    state: anything JSON can hold, given back by read_state(). tokenizer: the bytes of its .model
    file. keep: how many checkpoints to keep, this one included.
    Every rank of a distributed run calls it, with the same arguments but for its part of model and
    optimizer, and returns when the checkpoint is complete.
    Raises LlamaExtError when it cannot be written (a full disk); the earlier ones stay as they are.
    """
    run = Path(run)
    final = run / f"step-{step:08d}"
    temp = run / f"{_TEMP}{final.name}"
    first = ranks.rank() == 0
    try:
        with ranks.together():
            if first:
                run.mkdir(parents=True, exist_ok=True)
                for leftover in run.glob(f"{_TEMP}step-*"):  # of a run that was killed while saving
                    shutil.rmtree(leftover)
                temp.mkdir()
        with ranks.together():
            files = _write_tensors(temp, model, optimizer)
            files = {str(p.relative_to(temp)): _fingerprint(p, sync=True) for p in files}
        files = {name: entry for part in ranks.gather(files) for name, entry in part.items()}
        with ranks.together():
            if first:
                _complete(temp, final, step, model, state, tokenizer, files)
                for old in steps(run)[:-max(1, keep)]:
                    _remove(old)
    except (OSError, SafetensorError) as error:
        with ranks.together():
            if first:
                shutil.rmtree(temp, ignore_errors=True)
        raise LlamaExtError(f"checkpoint {final} cannot be written ({error}); the earlier "
                            f"checkpoints in {run} are as they were") from error
    return final


def _write_tensors(folder, model, optimizer):
    """Write what this rank has to; return the paths of the files it must account for."""
    training = _training_tensors(model, optimizer)
    if ranks.is_joined():
        from . import sharded

        weights = {f"model/{name}": p.detach() for name, p in model.named_parameters()}
        return sharded.write(folder / _SHARDS, {**weights, **training})
    st.save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
    st.save_file(training, folder / "training.safetensors")
    return [folder / "model.safetensors", folder / "training.safetensors"]


def _complete(temp, final, step, model, state, tokenizer, files):
    """Write the rest of the checkpoint into `temp`, and rename that to `final`."""
    texts = {"config.json": json.dumps(model.config.to_dict(), indent=1).encode()}
    if tokenizer is not None:
        texts["tokenizer.model"] = tokenizer
    for name, data in texts.items():
        _write(temp / name, data)
        files[name] = _fingerprint(temp / name)
    _write(temp / "state.json", seal({"step": step, "state": state or {}, "files": files}))
    for folder in (temp / _SHARDS, temp):
        if folder.is_dir():
            fsync_folder(folder)
    if final.exists():
        _remove(final)
    temp.rename(final)
    fsync_folder(final.parent)


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
    if (path / "model.safetensors").is_file() or (path / _SHARDS).is_dir() or \
            _STEP.fullmatch(path.name):
        return path
    newest = latest(path)
    if newest is None:
        raise LlamaExtError(f"checkpoint {path}: expected a folder with model.safetensors or with "
                            "step-NNNNNNNN folders in it, found neither")
    return newest


def read_state(path):
    """(step, state) of the checkpoint `path`, after checking every file in it.

    Every rank of a distributed run calls it; they share the work. Raises LlamaExtError naming the
    damaged file and the newest older checkpoint that is whole.
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
    `model`, the rest into `optimizer` and torch's generators of the CPU and the model's GPU.

    The model may be split over processes (all of which then call this), in another way than the
    one that was saved. Raises LlamaExtError for another model's.
    """
    path = Path(path)
    stored = _shapes(path, _WHOLE)
    parameters, slots = dict(model.named_parameters()), {}
    tensors = {**_fitting(path, parameters, stored), "rng/cpu": torch.get_rng_state()}
    if "rng/cuda" in stored and _is_on_cuda(model):
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    for key, shape in stored.items():
        kind, _, rest = key.partition("/")
        if kind == "optimizer":
            name, _, slot = rest.rpartition("/")
            p = parameters[name]
            tensors[key] = torch.zeros_like(p) if shape == p.shape else torch.zeros(shape)
            slots.setdefault(p, {})[slot] = tensors[key]
    _read(path, tensors)
    index = {p: i for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
    optimizer.load_state_dict({"state": {index[p]: entry for p, entry in slots.items()},
                               "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["rng/cpu"])
    if "rng/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng/cuda"])


def load_model(path, device=None, dtype=None, before=None, int8=False):
    """(model, tokenizer) of the checkpoint folder `path`, for generation, on `device` (None: the
    CPU) and in `dtype` (None: fp32). before: called with both before the weights are read, the
    model still on the meta device; what it raises ends the loading.

    int8: linear layers become Int8Linear, quantised one by one as they are read, so that no more
    than one is ever held in full. A checkpoint that was saved quantised is loaded as it is.
    Raises LlamaExtError naming the file that is missing or damaged, and for a tokenizer with more
    ids than the model has embeddings.
    """
    path = Path(path)
    if fault := _fault(path, but="training.safetensors"):
        raise LlamaExtError(fault)
    config = LlamaConfig.from_dict(json.loads((path / "config.json").read_bytes()))
    stored = _shapes(path, _WHOLE[:1])
    quantized = any(key.endswith(".scale") for key in stored)

    def weights():  # what is stored of the model, or to be
        return {name: t for name, t in model.state_dict().items()
                if quantized or not name.endswith(".scale")}

    with torch.device("meta"):
        model = Llama(config, dtype=dtype)
        if int8 or quantized:
            quantize_(model)
    tokenizer = load_tokenizer(path)
    check_fits(path, tokenizer, config.vocab_size)
    if before is not None:
        before(model, tokenizer)
    _fitting(path, weights(), stored)
    model.to_empty(device=device or "cpu")
    tensors = _fitting(path, weights(), stored)
    if int8 and not quantized:
        for name, layer in model.named_modules():
            if isinstance(layer, Int8Linear):
                key = f"model/{name}.weight"
                del tensors[key]
                _read_and_quantize(path, key, layer)
    _read(path, tensors)
    return model, tokenizer


def _read_and_quantize(path, key, layer):
    weight = torch.empty(layer.weight.shape, device=layer.weight.device)
    _read(path, {key: weight})
    try:
        layer.weight, layer.scale = quantize(weight)
    except ValueError as error:
        raise LlamaExtError(f"{path}: {key.removeprefix('model/')}: {error}") from error


def shapes(path):
    """{name: shape} of the weights that the checkpoint `path` holds."""
    stored = _shapes(Path(path), _WHOLE[:1])
    return {key.removeprefix("model/"): shape for key, shape in stored.items()
            if key.startswith("model/")}


def read(path, weights):
    """Fill `weights`, {name: tensor}, some of those that the checkpoint `path` holds."""
    _read(Path(path), {f"model/{name}": tensor for name, tensor in weights.items()})


def _fitting(path, tensors, stored):
    """{"model/<name>": tensor}. Raises LlamaExtError unless those are what is stored."""
    weights = {f"model/{name}": t.detach() for name, t in tensors.items()}
    for key in sorted(weights.keys() | {key for key in stored if key.startswith("model/")}):
        expected = tuple(weights[key].shape) if key in weights else "nothing"
        if expected != stored.get(key, "nothing"):
            raise LlamaExtError(f"{path} does not fit the model: {key.removeprefix('model/')}: "
                                f"expected {expected}, got {stored.get(key, 'nothing')}")
    return weights


def _shapes(path, files):
    """{key: shape} of what the checkpoint `path` holds, in these of its files if it is whole."""
    if (path / _SHARDS).is_dir():
        from . import sharded

        return sharded.shapes(path / _SHARDS)
    found = {}
    for file, prefix in files:
        with safe_open(path / file, "pt") as f:
            found |= {prefix + key: tuple(f.get_slice(key).get_shape()) for key in f.keys()}
    return found


def _read(path, tensors):
    """Fill `tensors`, {key: DTensor or plain tensor}, with what the checkpoint `path` holds."""
    if (path / _SHARDS).is_dir():
        from . import sharded

        return sharded.read(path / _SHARDS, tensors)
    for file, prefix in _WHOLE:
        wanted = {key: t for key, t in tensors.items() if key.startswith("model/") == bool(prefix)}
        if wanted:
            with safe_open(path / file, "pt") as f:
                for key, tensor in wanted.items():
                    _fill(tensor, f, key.removeprefix(prefix))


def _fill(tensor, file, key):
    if hasattr(tensor, "to_local"):  # a DTensor
        from .parallel import local_part

        part, place = local_part(tensor)
        if part.numel():
            part.copy_(file.get_slice(key)[place])
    else:
        tensor.copy_(file.get_tensor(key))


def _training_tensors(model, optimizer):
    tensors = {"rng/cpu": torch.get_rng_state()}
    if _is_on_cuda(model):
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    for name, p in model.named_parameters() if optimizer else ():
        for slot, value in optimizer.state.get(p, {}).items():
            tensors[f"optimizer/{name}/{slot}"] = value.contiguous()
    return tensors


def _is_on_cuda(model):
    return next(model.parameters()).is_cuda


def _fault(path, but=None):
    """None when the files of the checkpoint `path`, `but` one, are as they were written, else what
    is wrong."""
    faults = ranks.gather(_fault_of_part(path, but))
    return next((fault for fault in faults if fault), None)


def _fault_of_part(path, but):
    manifest = path / "state.json"
    try:
        files = unseal(manifest.read_bytes())["files"]
        for name in [name for name in files if name != but][ranks.rank()::ranks.world()]:
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
