"""Training: one flat loop over steps, with validation, checkpoints and exact resumption.

Weights and optimizer state are fp32; with dtype bf16 the matrix products and the fused operations
run in bf16 under torch.autocast. B batch, T tokens.
"""

import dataclasses
import fcntl
import gzip
import lzma
import math
import shutil
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from . import checkpoint, memory
from .errors import LlamaExtError
from .info import info
from .mixture import open_loader
from .model import Llama, LlamaConfig
from .optim import BETA2, build_optimizer, lr_at
from .runlog import RunLog, plot_losses


def _option(default, text, choices=None):
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices})


@dataclass
class TrainConfig:
    """Everything a run is made of; `llama-ext train` has one option for each field."""

    data: str = _option(dataclasses.MISSING, "folder written by `llama-ext prepare`, or a "
                        "mixture of some (*.json; see `llama-ext mixture`)")
    run: str = _option(dataclasses.MISSING, "folder for checkpoints, metrics and the loss curve; "
                       "one that has checkpoints is resumed")
    preset: str = _option("tiny", "shape of the model", ("tiny", "7B", "13B", "33B", "65B"))
    dim: int | None = _option(None, "width (default: the preset's)")
    n_layers: int | None = _option(None, "layers (default: the preset's)")
    n_heads: int | None = _option(None, "attention heads (default: the preset's)")
    n_kv_heads: int | None = _option(None, "key/value heads (default: as many as heads)")
    hidden_dim: int | None = _option(None, "feed-forward width (default: the paper's rule)")
    seq_len: int | None = _option(None, "tokens in a sequence (default: the preset's max_seq_len)")
    batch_size: int = _option(8, "sequences in a forward pass")
    grad_accum: int = _option(1, "forward passes in a step")
    steps: int = _option(1000, "optimizer steps, resumed ones included")
    lr: float = _option(3e-4, "peak learning rate")
    warmup: int | None = _option(None, "warm-up steps (default: the paper's 2000, at most a tenth "
                                 "of --steps)")
    optimizer: str = _option("adamw", "update rule; weight decay is decoupled in both",
                             tuple(BETA2))
    beta1: float = _option(0.9, "decay of the gradient's average")
    beta2: float | None = _option(None, "decay of the second average (default: 0.95 for adamw, "
                                  "0.999 for adamax)")
    weight_decay: float = _option(0.1, "decoupled weight decay of matrices")
    grad_clip: float = _option(1.0, "largest norm of the whole gradient")
    dtype: str = _option("auto", "precision of the operations; auto: bf16 where the CPU has "
                         "instructions for it, else fp32", ("auto", "bf16", "fp32"))
    seed: int = _option(0, "of the initial weights and the order of the data")
    val_every: int = _option(100, "steps between validations (the last step has one too)")
    save_every: int = _option(100, "steps between checkpoints (the last step has one too)")
    keep: int = _option(3, "checkpoints to keep")
    log_every: int = _option(10, "steps between printed lines where there is no terminal")

    def __post_init__(self):
        for name in ("batch_size", "grad_accum", "steps", "val_every", "save_every", "keep",
                     "log_every"):
            self._expect(name, getattr(self, name) >= 1, "at least 1")
        self._expect("seq_len", self.seq_len is None or self.seq_len >= 1, "at least 1")
        self._expect("seed", 0 <= self.seed < 1 << 63, "0 to 2^63 - 1")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            self._expect(name, value is None or 0 <= value < 1, "at least 0 and below 1")
        for name in ("lr", "grad_clip"):
            self._expect(name, 0 < getattr(self, name) < math.inf, "a finite number above 0")
        self._expect("weight_decay", 0 <= self.weight_decay < math.inf, "a finite number >= 0")
        self._expect("dtype", self.dtype in ("auto", "bf16", "fp32"), "auto, bf16 or fp32")
        self._expect("warmup", self.warmup is None or 0 <= self.warmup < self.steps,
                     f"0 to steps - 1 = {self.steps - 1}")

    def _expect(self, name, ok, expected):
        if not ok:
            raise ValueError(f"train: {name}: expected {expected}, got {getattr(self, name)!r}")

    def model_config(self, vocab_size):
        """The LlamaConfig: the preset, what overrides it, and room for seq_len positions."""
        names = ("dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim")
        overrides = {n: getattr(self, n) for n in names if getattr(self, n) is not None}
        if self.seq_len is not None:
            overrides["max_seq_len"] = self.seq_len
        return LlamaConfig.preset(self.preset, vocab_size=vocab_size, **overrides)


class Trainer:
    """One run: builds everything from a TrainConfig, resumes where the run folder stands, trains.

    Only one process at a time may hold a run folder. The data's checksums are compared when a run
    begins; when it resumes, only sizes. Raises LlamaExtError for data, checkpoints and run folders
    that do not fit, ValueError for options that do not.
    """

    def __init__(self, config):
        memory.reuse_freed_memory()
        self.config = config
        self.run_dir = Path(config.run)
        seq_len = config.seq_len or LlamaConfig.preset(config.preset).max_seq_len
        self.val = open_loader(config.data, "val", config.batch_size, seq_len)
        self.val.check_tokens(2)
        self.loader = open_loader(config.data, "train", config.batch_size, seq_len,
                                  seed=config.seed)
        self.loader.check_tokens(seq_len + 1)
        model_config = config.model_config(self.loader.vocab_size)
        self._tokenizer = self.loader.tokenizer_path.read_bytes()
        self._lock = _lock(self.run_dir)
        torch.manual_seed(config.seed)
        self.model = Llama(model_config)
        self.optimizer = build_optimizer(
            self.model, config.optimizer, lr=config.lr, beta1=config.beta1, beta2=config.beta2,
            weight_decay=config.weight_decay)
        self.dtype = _resolve_dtype(config.dtype)
        self.warmup = min(2000, config.steps // 10) if config.warmup is None else config.warmup
        self.val_bytes = self.val.num_bytes
        self.step = 0
        self._saved_step = 0
        if newest := checkpoint.latest(self.run_dir):
            self._resume(newest)
        else:
            self.loader.verify()  # reads all of it, so only once a run
        self.log = RunLog(self.run_dir, self.step)

    def train(self):
        """Run the remaining steps; return the signal that stopped it early, or None.

        After SIGINT or SIGTERM the current step is finished and saved; a second one ends the
        process at once. Raises LlamaExtError when the loss is not finite, before the update.
        """
        config = self.config
        width, height = shutil.get_terminal_size()  # 80, 24 where it is unknown
        with _StopSignal() as stop, tqdm(total=config.steps, initial=self.step, disable=None,
                                         unit="step", ncols=width, nrows=height) as bar:
            while True:
                if self._is_due(config.val_every) and not self._is_validated():
                    self._validate(stop, bar)
                if (self._is_due(config.save_every) or stop.signal) and self.step:
                    self._save()
                if stop.signal or self.step >= config.steps:
                    return stop.signal
                start = time.perf_counter()
                loss, norm, lr = self._update()
                tokens = config.grad_accum * config.batch_size * self.loader.seq_len
                speed = tokens / (time.perf_counter() - start)
                self.log.add(step=self.step, loss=loss, grad_norm=norm, lr=lr,
                             tokens_per_second=round(speed, 1))
                self._show(bar, loss, norm, speed, tokens)

    def close(self):
        """Let go of the run folder."""
        self.log.close()
        self._lock.close()

    def _update(self):
        """One optimizer step; (loss in nats per token, norm of the gradient, learning rate)."""
        config = self.config
        lr = lr_at(self.step + 1, steps=config.steps, peak=config.lr, warmup=self.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        total = 0.0
        for _ in range(config.grad_accum):
            tokens, targets = next(self.loader)  # (B, T) each
            with self._autocast():
                loss = self.model(tokens, targets) / config.grad_accum
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip).item()
        if not (math.isfinite(total) and math.isfinite(norm)):
            kept = checkpoint.latest(self.run_dir)
            raise LlamaExtError(
                f"training stopped at step {self.step + 1}: expected a finite loss and gradient, "
                f"got loss {total} and gradient norm {norm}; "
                + (f"the last good checkpoint is {kept}" if kept else "no checkpoint was written"))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return total, norm, lr

    @torch.no_grad()
    def evaluate(self, stop=None):
        """(nats per token, bits per byte) over all validation text; None when `stop` came."""
        nats, count = 0.0, 0
        for tokens, targets in self.val.batches():
            if stop is not None and stop.signal:
                return None
            n = int((targets != -100).sum())
            with self._autocast():
                nats += float(self.model(tokens, targets)) * n
            count += n
        return nats / count, nats / math.log(2) / self.val_bytes

    def _validate(self, stop, bar):
        result = self.evaluate(stop)
        if result is None:
            return
        loss, bpb = result
        self.log.add(step=self.step, val_loss=loss, val_bits_per_byte=bpb)
        plot_losses(self.run_dir / "loss.png", self.log.rows,
                    self.val_bytes / self.val.num_targets)
        bar.write(f"step {self.step}: validation loss {loss:.4f}, {bpb:.4f} bits per byte")

    def _is_due(self, every):
        return self.step > 0 and (self.step % every == 0 or self.step >= self.config.steps)

    def _is_validated(self):
        row = self.log.validation()
        return row is not None and row["step"] == self.step

    def _autocast(self):
        return torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bf16")

    def _identity(self):
        """What must not change between the parts of one run."""
        same = {n: getattr(self.config, n) for n in ("batch_size", "grad_accum", "optimizer",
                                                     "seed")}
        return {**self.model.config.to_dict(), "seq_len": self.loader.seq_len,
                "data": self.loader.fingerprint, **same}

    def _options(self):
        """What may change, at the price of a curve that is no longer one recipe's."""
        names = ("steps", "lr", "beta1", "beta2", "weight_decay", "grad_clip")
        return {**{n: getattr(self.config, n) for n in names}, "warmup": self.warmup,
                "dtype": self.dtype}

    def _save(self):
        if self.step == self._saved_step:
            return
        self.log.sync()
        state = {"identity": self._identity(), "options": self._options(),
                 "loader": self.loader.state_dict()}
        checkpoint.save(self.run_dir, self.step, self.model, self.optimizer, state,
                        tokenizer=self._tokenizer, keep=self.config.keep)
        self._saved_step = self.step

    def _resume(self, path):
        self.step, state = checkpoint.read_state(path)
        if changes := _changes(state["identity"], self._identity()):
            raise LlamaExtError(f"{path} cannot be resumed: it has {changes}; give the same "
                                "options and data, or another --run")
        checkpoint.load(path, self.model, self.optimizer)
        self._saved_step = self.step
        self.loader.load_state_dict(state["loader"])
        changes = _changes(state["options"], self._options())
        print(f"resuming {path}" + (f", which has {changes}" if changes else ""))

    def _show(self, bar, loss, norm, speed, tokens):
        """The bar on a terminal; elsewhere a line now and then."""
        text = f"loss {loss:.3f}, grad norm {norm:.2f}, {speed:,.0f} tokens/s"
        bar.set_postfix_str(text, refresh=False)
        bar.update()
        if bar.disable and self.step % self.config.log_every == 0:
            left = (self.config.steps - self.step) * tokens / speed
            print(f"step {self.step}/{self.config.steps}: {text}, "
                  f"{tqdm.format_interval(left)} left", flush=True)


def train(config):
    """Train as `config`, a TrainConfig, says; print a report at the end.

    Returns a dict: step, signal (that stopped it, or None), val_loss (nats per token),
    val_bits_per_byte, gzip_bits_per_byte, xz_bits_per_byte, checkpoint and loss_curve (paths).
    Raises as Trainer does.
    """
    trainer = Trainer(config)
    try:
        if trainer.step >= config.steps:
            print(f"{config.run} is complete: {trainer.step} of {config.steps} steps; more "
                  "--steps or another --run trains on")
        else:
            params, threads = trainer.model.num_parameters(), torch.get_num_threads()
            print(f"training {params:,} parameters in {trainer.dtype} on {threads} threads, steps "
                  f"{trainer.step + 1} to {config.steps} of "
                  f"{config.batch_size * config.grad_accum * trainer.loader.seq_len:,} tokens; "
                  f"an epoch has {trainer.loader.num_tokens:,}", flush=True)
        stopped = trainer.train()
        if stopped:
            print(f"stopped by {signal.Signals(stopped).name} after step {trainer.step}; the same "
                  f"command resumes there\ntrained on {trainer.loader.progress()}")
            return {"step": trainer.step, "signal": stopped}
        return _report(trainer)
    finally:
        trainer.close()


def compression(paths):
    """Bits per byte that `gzip -9` and `xz -9` need for the files `paths`, one after another."""
    data = b"".join(Path(path).read_bytes() for path in paths)
    sizes = {"gzip": len(gzip.compress(data, 9)), "xz": len(lzma.compress(data, preset=9))}
    return {name: 8 * size / len(data) for name, size in sizes.items()}


def _report(trainer):
    val = trainer.log.validation()
    others = compression(trainer.val.text_paths)
    result = {"step": trainer.step, "signal": None, "val_loss": val["val_loss"],
              "val_bits_per_byte": val["val_bits_per_byte"],
              "gzip_bits_per_byte": others["gzip"], "xz_bits_per_byte": others["xz"],
              "checkpoint": str(checkpoint.latest(trainer.run_dir)),
              "loss_curve": str(trainer.run_dir / "loss.png")}
    print(f"bits per byte of {trainer.val_bytes:,} bytes of held-out text:\n"
          f"  this model  {result['val_bits_per_byte']:.3f}\n"
          f"  xz -9       {others['xz']:.3f}\n"
          f"  gzip -9     {others['gzip']:.3f}\n"
          f"trained on {trainer.loader.progress()}\n"
          f"loss curve: {result['loss_curve']}\ncheckpoint: {result['checkpoint']}", flush=True)
    return result


class _StopSignal:
    """Holds in `signal` the SIGINT or SIGTERM that came within the block, None before that."""

    def __enter__(self):
        self.signal, self._previous = None, {}
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number, frame):
        self.signal = number
        self._restore()  # a second one is not held up

    def _restore(self):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def __exit__(self, *exception):
        self._restore()


def _lock(run_dir):
    """An open file whose lock says that this process trains in `run_dir`."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = open(run_dir / ".lock", "w")
    except OSError as error:
        raise LlamaExtError(f"{run_dir} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise LlamaExtError(f"{run_dir} is in use: another process trains in it") from None
    except OSError:
        pass  # a file system without locks
    return file


def _resolve_dtype(dtype):
    if dtype != "auto":
        return dtype
    return "bf16" if "avx512_bf16" in info()["cpu"]["available"] else "fp32"


def _changes(before, now):
    """"dim=320 (now 384), seed=0 (now 1)" for the entries that differ; "" when none does."""
    return ", ".join(f"{name}={before.get(name)!r} (now {value!r})"
                     for name, value in now.items() if before.get(name) != value)
