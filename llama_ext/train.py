"""Training: one flat loop over steps, with validation, checkpoints and exact resumption.

Weights and optimizer state are fp32; with dtype bf16 the matrix products and the fused operations
run in bf16 under torch.autocast. On one device, a CPU or a GPU. B batch, T tokens.
"""

import fcntl
import gzip
import lzma
import math
import shutil
import signal
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm

from . import checkpoint, device, memory
from .errors import LlamaExtError
from .estimate import flops_per_token
from .mixture import open_loader
from .model import Llama
from .optim import build_optimizer, lr_at
from .recipe import TrainConfig
from .runlog import RunLog, plot_losses, require_tensorboard


class Trainer:
    """One run: builds everything from a TrainConfig, resumes where the run folder stands, trains.

    Only one process at a time may hold a run folder. The data's checksums are compared when a run
    begins; when it resumes, only sizes. Raises LlamaExtError for data, checkpoints and run folders
    that do not fit, ValueError for options that do not.
    """

    def __init__(self, config):
        if config.tensorboard:
            require_tensorboard()
        memory.reuse_freed_memory()
        self.config = config
        self.device = device.resolve(config.device)
        self.dtype = device.resolve_dtype(config.dtype, self.device)
        self.run_dir = Path(config.run)
        seq_len = config.model_config(None).max_seq_len
        self.grad_accum = config.forward_passes(seq_len)
        self.peak_lr, self.warmup = config.peak_lr(), config.warmup_steps()
        self.val = open_loader(config.data, "val", config.batch_size, seq_len)
        self.val.check_tokens(2)
        self.loader = open_loader(config.data, "train", config.batch_size, seq_len,
                                  seed=config.seed)
        self.loader.check_tokens(seq_len + 1)
        model_config = config.model_config(self.loader.vocab_size)
        self._tokenizer = self.loader.tokenizer_path.read_bytes()
        self._lock = _lock(self.run_dir)
        torch.manual_seed(config.seed)
        self.model = Llama(model_config).to(self.device)  # the same weights on every device
        self.optimizer = build_optimizer(
            self.model, config.optimizer, lr=self.peak_lr, beta1=config.beta1, beta2=config.beta2,
            weight_decay=config.weight_decay)
        self.val_bytes = self.val.num_bytes
        self.step = 0
        self.skipped = self.skipped_in_a_row = 0  # steps without a finite loss and gradient
        self._saved_step = 0
        if newest := checkpoint.latest(self.run_dir):
            self._resume(newest)
        else:
            self.loader.verify()  # reads all of it, so only once a run
        self.log = RunLog(self.run_dir, self.step, tensorboard=config.tensorboard)

    def train(self):
        """Run the remaining steps; return the signal that stopped it early, or None.

        After SIGINT or SIGTERM the current step is finished and saved; a second one ends the
        process at once. A step whose loss or gradient is not finite leaves weights and optimizer
        as they are; raises LlamaExtError after max_skipped of them in a row.
        """
        config = self.config
        tokens = self.grad_accum * config.batch_size * self.loader.seq_len
        step_flops = tokens * flops_per_token(self.model.config, self.loader.seq_len)
        peak = config.peak_flops or device.peak_flops(self.device, self.dtype)
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
                seconds = time.perf_counter() - start
                row = {"step": self.step, "loss": _finite(loss), "grad_norm": _finite(norm),
                       "lr": lr, "tokens_per_second": round(tokens / seconds, 1),
                       "memory_bytes": device.peak_memory(self.device)}
                if peak:
                    row["mfu"] = round(step_flops / seconds / peak, 4)
                if self.skipped_in_a_row:
                    row["skipped"] = self.skipped
                self.log.add(**row)
                self._show(bar, loss, norm, row, seconds)
                if self.skipped_in_a_row:
                    self._after_skip(bar, loss, norm)

    def close(self):
        """Let go of the run folder."""
        self.log.close()
        self._lock.close()

    def _update(self):
        """One step; (loss in nats per token, norm of the gradient, learning rate). The device is
        waited for once, for the decision whether the gradient is fit for an update."""
        config = self.config
        lr = lr_at(self.step + 1, steps=config.steps, peak=self.peak_lr, warmup=self.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        losses = []
        for _ in range(self.grad_accum):
            tokens, targets = device.to_device(next(self.loader), self.device)  # (B, T) each
            with self._autocast():
                loss = self.model(tokens, targets) / self.grad_accum
            loss.backward()
            losses.append(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        loss, norm = torch.stack([torch.stack(losses).sum(), norm]).tolist()
        if math.isfinite(loss) and math.isfinite(norm):
            self.optimizer.step()
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
        self.optimizer.zero_grad()
        self.step += 1
        return loss, norm, lr

    def _after_skip(self, bar, loss, norm):
        """Say that the update was skipped; raise LlamaExtError when that was one too many."""
        config, got = self.config, f"loss {loss} and gradient norm {norm}"
        if self.skipped_in_a_row < config.max_skipped:
            bar.write(f"step {self.step}: update skipped: expected a finite loss and gradient, got "
                      f"{got} ({self.skipped_in_a_row} in a row, {self.skipped} in all)")
            return
        kept = checkpoint.latest(self.run_dir)
        raise LlamaExtError(
            f"training stopped at step {self.step}, the last of {self.skipped_in_a_row} in a row "
            f"without a finite loss and gradient, got {got}; "
            + (f"the last checkpoint is {kept}" if kept else "no checkpoint was written"))

    @torch.no_grad()
    def evaluate(self, stop=None):
        """(nats per token, bits per byte) over all validation text; None when `stop` came."""
        nats, count = 0.0, 0
        for tokens, targets in self.val.batches():
            if stop is not None and stop.signal:
                return None
            n = int((targets != -100).sum())
            tokens, targets = device.to_device((tokens, targets), self.device)
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
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bf16")

    def _identity(self):
        """What must not change between the parts of one run."""
        same = {n: getattr(self.config, n) for n in ("batch_size", "optimizer", "seed")}
        return {**self.model.config.to_dict(), "seq_len": self.loader.seq_len,
                "data": self.loader.fingerprint, "grad_accum": self.grad_accum, **same}

    def _options(self):
        """What may change, at the price of a curve that is no longer one recipe's."""
        names = ("steps", "beta1", "beta2", "weight_decay", "grad_clip")
        return {**{n: getattr(self.config, n) for n in names}, "lr": self.peak_lr,
                "warmup": self.warmup, "device": self.device.type, "dtype": self.dtype}

    def _save(self):
        if self.step == self._saved_step:
            return
        self.log.sync()
        state = {"identity": self._identity(), "options": self._options(),
                 "loader": self.loader.state_dict(),
                 "skipped": [self.skipped, self.skipped_in_a_row]}
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
        self.skipped, self.skipped_in_a_row = state.get("skipped", (0, 0))
        changes = _changes(state["options"], self._options())
        print(f"resuming {path}" + (f", which has {changes}" if changes else ""))

    def _show(self, bar, loss, norm, row, seconds):
        """The bar on a terminal, cut to its width; elsewhere a line now and then."""
        text = f"loss {loss:.3f}, grad norm {norm:.2f}, {row['tokens_per_second']:,.0f} tokens/s"
        text += f", MFU {row['mfu']:.0%}" if "mfu" in row else ""
        text += f", lr {row['lr']:.2e}, {row['memory_bytes'] / 1e9:.2f} GB"
        bar.set_postfix_str(text, refresh=False)
        bar.update()
        if bar.disable and self.step % self.config.log_every == 0:
            left = tqdm.format_interval((self.config.steps - self.step) * seconds)
            print(f"step {self.step}/{self.config.steps}: {text}, {left} left", flush=True)


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
            where = (f"{torch.get_num_threads()} threads" if trainer.device.type == "cpu"
                     else torch.cuda.get_device_name(trainer.device))
            print(f"training {trainer.model.num_parameters():,} parameters in {trainer.dtype} on "
                  f"{where}, steps {trainer.step + 1} to {config.steps} of "
                  f"{config.batch_size * trainer.grad_accum * trainer.loader.seq_len:,} tokens; "
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


def _finite(value):
    """value, or None, which JSON can hold, where it is not finite."""
    return value if math.isfinite(value) else None


def _changes(before, now):
    """"dim=320 (now 384), seed=0 (now 1)" for the entries that differ; "" when none does."""
    return ", ".join(f"{name}={before.get(name)!r} (now {value!r})"
                     for name, value in now.items() if before.get(name) != value)
