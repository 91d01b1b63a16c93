"""Training: one flat loop over steps, with validation, checkpoints and exact resumption.

Weights and optimizer state are fp32; with dtype bf16 the matrix products and the fused operations
run in bf16 under torch.autocast. On one device, a CPU or a GPU, or on one for each process that
torchrun starts: those split the model and the batches (parallel.py), run the same loop and agree on
when to stop; rank 0 logs, prints and draws. B batch, T tokens.
"""

import contextlib
import fcntl
import gzip
import io
import lzma
import math
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from . import checkpoint, device, memory, parallel, ranks
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
        memory.reuse_freed_memory()
        self.config = config
        self.device = device.resolve(config.device)
        self.dtype = device.resolve_dtype(config.dtype, self.device)
        self.run_dir = Path(config.run)
        seq_len = config.model_config(None).max_seq_len
        self.peak_lr, self.warmup = config.peak_lr(), config.warmup_steps()
        ranks.start(self.device.type)
        with ranks.together():
            if config.tensorboard:
                require_tensorboard()
            vocab_size = open_loader(config.data, "val", 1, seq_len).vocab_size
            model_config = config.model_config(vocab_size)
            if config.tensor_parallel > 1:
                parallel.check(model_config, config.tensor_parallel, ranks.world())
            self.dp = ranks.world() // config.tensor_parallel  # ranks with batches of their own
            self.grad_accum = config.forward_passes(seq_len, self.dp)
            self._open_data(seq_len)
            self._lock = _lock(self.run_dir) if ranks.rank() == 0 else None
        self.sequences = config.batch_size * self.grad_accum * self.dp  # in a step
        self.step = 0
        self.skipped = self.skipped_in_a_row = 0  # steps without a finite loss and gradient
        self._saved_step = 0
        newest = ranks.gather(checkpoint.latest(self.run_dir))[0]
        with ranks.together():
            if newest is None and ranks.rank() == 0:
                self.loader.verify()  # reads all of it, so only once a run
        self.model = self._build_model(model_config, newest is None)
        self.optimizer = build_optimizer(
            self.model, config.optimizer, lr=self.peak_lr, beta1=config.beta1, beta2=config.beta2,
            weight_decay=config.weight_decay)
        with ranks.together():
            if newest:
                self._resume(newest)
            self.log = RunLog(self.run_dir, self.step, config.tensorboard, ranks.rank() == 0)

    def _open_data(self, seq_len):
        config, place = self.config, {"rank": ranks.rank() // self.config.tensor_parallel,
                                      "world_size": self.dp}
        self.val = open_loader(config.data, "val", config.batch_size, seq_len, **place)
        self.val.check_tokens(2)
        self.loader = open_loader(config.data, "train", config.batch_size, seq_len,
                                  seed=config.seed, **place)
        self.loader.check_tokens(seq_len + 1)
        self._tokenizer = self.loader.tokenizer_path.read_bytes()
        self.val_bytes = self.val.num_bytes

    def _build_model(self, model_config, initialize):
        """The model, with the seed's weights, the same on every device and number of processes,
        or without any."""
        config, model = self.config, Llama(model_config, device="meta")
        torch.manual_seed(config.seed)
        if ranks.is_joined():
            mesh = parallel.mesh(model_config, config.tensor_parallel, self.device.type)
            parallel.parallelize(model, mesh, torch.bfloat16 if self.dtype == "bf16" else
                                 torch.float32, reshard_after_forward=not config.keep_gathered,
                                 compile=config.compile)
        elif config.compile:
            for layer in model.layers:
                layer.compile(fullgraph=True)
        model.to_empty(device=self.device)
        if initialize:
            parallel.reset_parameters(model, config.seed)
        return model

    def train(self):
        """Run the remaining steps; return the signal that stopped it early, or None.

        After SIGINT or SIGTERM, to any of the processes, the current step is finished and saved; a
        second one ends a process that runs alone at once. A step whose loss or gradient is not
        finite leaves weights and optimizer as they are; raises LlamaExtError after max_skipped of
        them in a row.
        """
        config = self.config
        tokens = self.sequences * self.loader.seq_len
        step_flops = tokens * flops_per_token(self.model.config, self.loader.seq_len)
        peak = config.peak_flops or device.peak_flops(self.device, self.dtype)
        width, height = shutil.get_terminal_size()  # 80, 24 where it is unknown
        bar = tqdm(total=config.steps, initial=self.step, unit="step", ncols=width, nrows=height,
                   disable=ranks.rank() > 0 or None)
        with ranks.StopSignal() as stop, bar:
            while True:
                stop.agree()
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
                    row["mfu"] = round(step_flops / seconds / (peak * ranks.world()), 4)
                if self.skipped_in_a_row:
                    row["skipped"] = self.skipped
                self.log.add(**row)
                self._show(bar, loss, norm, row, seconds)
                if self.skipped_in_a_row:
                    with ranks.together():
                        self._after_skip(bar, loss, norm)

    def close(self):
        """Let go of the run folder."""
        self.log.close()
        if self._lock:
            self._lock.close()

    def _update(self):
        """One step; (loss in nats per token, norm of the gradient, learning rate). The device is
        waited for once, for the decision whether the gradient is fit for an update."""
        config = self.config
        lr = lr_at(self.step + 1, steps=config.steps, peak=self.peak_lr, warmup=self.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        losses = []
        for left in reversed(range(self.grad_accum)):
            if ranks.is_joined():
                parallel.accumulate(self.model, last=left == 0)
            tokens, targets = device.to_device(next(self.loader), self.device)  # (B, T) each
            with self._autocast():
                loss = self.model(tokens, targets) / self.grad_accum
            loss.backward()
            losses.append(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        loss = torch.stack(losses).sum()
        if ranks.is_joined():
            loss, norm = parallel.mean(loss), norm.full_tensor()
        loss, norm = torch.stack([loss, norm]).tolist()
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
            if stop is not None and stop.agree():
                return None
            n = int((targets != -100).sum())
            tokens, targets = device.to_device((tokens, targets), self.device)
            with self._autocast():
                loss = float(self.model(tokens, targets))
            nats += loss * n if n else 0.0  # a mean of nothing may be NaN
            count += n
        parts = ranks.gather((nats, count))  # the tp ranks of one batch all have its sum
        nats, count = (math.fsum(values) / self.config.tensor_parallel for values in zip(*parts))
        return nats / count, nats / math.log(2) / self.val_bytes

    def _validate(self, stop, bar):
        result = self.evaluate(stop)
        if result is None:
            return
        loss, bpb = result
        self.log.add(step=self.step, val_loss=loss, val_bits_per_byte=bpb)
        if ranks.rank() == 0:
            plot_losses(self.run_dir / "loss.png", self.log.rows,
                        self.val_bytes / self.val.num_targets)
        bar.write(f"step {self.step}: validation loss {loss:.4f}, {bpb:.4f} bits per byte")

    def _is_due(self, every):
        return self.step > 0 and (self.step % every == 0 or self.step >= self.config.steps)

    def _is_validated(self):
        row = self.log.validation()
        return row is not None and row["step"] == self.step

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16,
                              enabled=self.dtype == "bf16" and not ranks.is_joined())

    def _identity(self):
        """What must not change between the parts of one run."""
        return {**self.model.config.to_dict(), "seq_len": self.loader.seq_len,
                "data": self.loader.fingerprint, "sequences_per_step": self.sequences,
                "optimizer": self.config.optimizer, "seed": self.config.seed}

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

    Every process that torchrun starts calls it; rank 0 prints. Returns a dict: step, signal (that
    stopped it, or None), and on rank 0 val_loss (nats per token), val_bits_per_byte,
    gzip_bits_per_byte, xz_bits_per_byte, checkpoint and loss_curve (paths). Raises as Trainer
    does, and LlamaExtError when another of the processes has ended.
    """
    with contextlib.redirect_stdout(io.StringIO() if ranks.rank() else sys.stdout):
        try:
            result = _train(config)
        except RuntimeError as error:
            if not ranks.has_lost_another(error):
                raise
            raise LlamaExtError("train: expected the other processes of this run to go on, but "
                                "one has ended; what it said, if anything, tells why") from error
    ranks.finish()
    return result


def _train(config):
    trainer = Trainer(config)
    try:
        if trainer.step >= config.steps:
            print(f"{config.run} is complete: {trainer.step} of {config.steps} steps; more "
                  "--steps or another --run trains on")
        else:
            where = (f"{torch.get_num_threads()} threads" if trainer.device.type == "cpu"
                     else torch.cuda.get_device_name(trainer.device))
            if ranks.world() > 1:
                where += f" in each of {trainer.dp} x {config.tensor_parallel} processes"
            print(f"training {trainer.model.num_parameters():,} parameters in {trainer.dtype} on "
                  f"{where}, steps {trainer.step + 1} to {config.steps} of "
                  f"{trainer.sequences * trainer.loader.seq_len:,} tokens; "
                  f"an epoch has {trainer.loader.num_tokens:,}", flush=True)
        stopped = trainer.train()
        if stopped:
            print(f"stopped by {signal.Signals(stopped).name} after step {trainer.step}; the same "
                  f"command resumes there\ntrained on {trainer.loader.progress()}")
        if stopped or ranks.rank():
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
