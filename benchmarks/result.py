"""A result: its rows, the machine they come from, the table that is printed and the JSON file.

A row is a dict: op, shape, dtype, direction; unit ("B", "FLOP" or "tokens") and work (units in a
call); limit, "copy" or "matmul", and limit_rate, measured in the row's own rounds; providers,
{name: {"seconds", "p20", "p80", "rate" (units per second), "share" (of the limit), ...}}; left_out
and wrong, {name: reason}. Rows of the virtual A100 have a label, "counted" or "modelled".
"""

import datetime
import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import llama_ext as lx
from llama_ext.errors import LlamaExtError
from llama_ext.files import write_atomically
from llama_ext.memory import reuse_freed_memory

from . import plots
from .timing import spread

FORMAT = 1  # of the JSON
OURS = "llama_ext"


def entry(samples, work, ideal, **more):
    """A provider's part of a row; samples: seconds; ideal: seconds at the limit."""
    times = spread(samples)
    return {**times, "rate": work / times["seconds"], "share": ideal / times["seconds"], **more}


def sentence(fault):
    """The first line of an exception, with its type."""
    return f"{type(fault).__name__}: {str(fault).strip()}".splitlines()[0]


def key(row):
    return row["op"], row["shape"], row["dtype"], row["direction"]


def machine(device, threads):
    """Where and with what a result was measured: a dict of plain values."""
    info = lx.info()
    found = {"format": FORMAT, "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
             "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
             "device": _cpu_name(), "threads": threads, "isa": info["cpu"]["isa"],
             "freed memory": info["cpu"]["freed memory"], "platform": platform.platform(),
             "commit": _commit(), "llama_ext": info["llama_ext"], "torch": info["torch"],
             "python": info["python"]}
    if torch.device(device).type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found |= {"host": found["device"], "device": gpu.name, "memory": gpu.total_memory,
                  "cuda": torch.version.cuda, "kernels": info["cuda"]["kernels"],
                  "driver and power": _nvidia_smi()}
    return found


def _cpu_name():
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    except OSError:
        pass
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _output(*command):
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, text=True, capture_output=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _commit():
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    changed = commit and _output("git", "status", "--porcelain", "--untracked-files=no")
    return f"{commit}, with changes" if changed else commit


def _nvidia_smi():
    return _output("nvidia-smi", "--format=csv,noheader",
                   "--query-gpu=name,driver_version,power.limit,clocks.max.sm,clocks.max.mem")


def save(path, about, rows):
    text = json.dumps({**about, "rows": rows}, indent=1) + "\n"
    write_atomically(path, text.encode())


def prepare(args, defaults):
    """Give the options that are None their defaults. Raises LlamaExtError for a device that is not
    there."""
    if args.backend == "cuda" and not torch.cuda.is_available():
        raise LlamaExtError("--backend: expected cpu or vgpu where torch sees no CUDA device, got "
                            "cuda")
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def check_outputs(args):
    """Raises LlamaExtError, before anything is measured, where the result could not be written."""
    if args.json and not Path(args.json).absolute().parent.is_dir():
        raise LlamaExtError(f"--json: expected a file in a folder that exists, got {args.json}")
    if args.plots and importlib.util.find_spec("matplotlib") is None:
        raise LlamaExtError("--plots: expected matplotlib, which is not installed")


def write(args, about, rows):
    """What --json and --plots ask for."""
    if args.json:
        save(args.json, about, rows)
    if args.plots:
        plots.draw(about, rows, args.plots)


def load(path):
    """The dict that save() wrote. Raises LlamaExtError for a file that is none."""
    try:
        found = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise LlamaExtError(f"{path}: expected the JSON of a benchmark, got {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT or "rows" not in found:
        raise LlamaExtError(f"{path}: expected the JSON of a benchmark, format {FORMAT}, got "
                            "another file")
    return found


# --- the table ---

def heading(about):
    """Lines that say what was measured where."""
    device = about["device"] + (f", {about['threads']} threads, {about['isa']} kernels"
                                if "cuda" not in about else "")
    return [f"llama_ext {about['llama_ext']} ({about['commit'] or 'no git checkout'}), torch "
            f"{about['torch']}; {device}; {about['date']}",
            f"freed memory {about['freed memory']}; milliseconds: medians of interleaved rounds, "
            "with the 20th and 80th percentile;",
            "%: share of the limit, a copy beyond the caches or a matrix product, measured in the "
            "same rounds (what stays in a cache may exceed 100)"]


def columns(names):
    """The line above the table, for providers `names`, ours first."""
    return (f"{'op':20} {'shape':30} {'dtype':5} {'direction':16} {'ours, ms':>9} "
            f"{'p20 - p80':>15} {'rate':>14} {'limit':>6} "
            + " ".join(f"{name[:12] + ' %':>{_width(name)}}" for name in names)
            + f" {'best peer / ours':>24}")


def _width(name):
    return max(6, min(len(name), 12) + 2)


def rate_text(rate, unit):
    """A rate with its unit: "29.3 GB/s", "180 GFLOP/s", "4,120 tokens/s"."""
    if unit == "tokens":
        return f"{rate:,.{0 if rate >= 100 else 1}f} tokens/s"
    scale, prefix = (1e12, "T") if rate >= 1e12 and unit == "FLOP" else (1e9, "G")
    return f"{rate / scale:.4g} {prefix}{unit}/s"


def line(row, names):
    """A row as a line under columns()."""
    ours = row["providers"].get(OURS)
    if ours is None:
        times = f"{'-':>9} {'':>15} {'-':>14}"
    else:
        between = f"{ours['p20'] * 1e3:.3f} - {ours['p80'] * 1e3:.3f}"
        rate = rate_text(ours["rate"], row["unit"])
        times = f"{ours['seconds'] * 1e3:9.3f} {between:>15} {rate:>14}"
    shares = [f"{row['providers'][name]['share'] * 100:.0f}" if name in row["providers"] else "-"
              for name in names]
    ratio, best = best_peer(row)
    compared = f"{best[:18]} {ratio:5.2f}" if best else "-"
    return (f"{row['op']:20} {row['shape']:30} {row['dtype']:5} {row['direction']:16} {times} "
            f"{row['limit']:>6} "
            + " ".join(f"{share:>{_width(name)}}" for share, name in zip(shares, names))
            + f" {compared:>24}")


def best_peer(row):
    """(time of the fastest peer over ours, its name), or (None, None) where there is none."""
    peers = {name: found["seconds"] for name, found in row["providers"].items() if name != OURS}
    if not peers or OURS not in row["providers"]:
        return None, None
    best = min(peers, key=peers.get)
    return peers[best] / row["providers"][OURS]["seconds"], best


class Report:
    """The rows of a command as they come: printed, then written. args: json, plots, backend,
    threads; names: providers, ours first; absent: {provider: why it cannot run here}."""

    def __init__(self, args, names, absent):
        check_outputs(args)
        reuse_freed_memory()
        torch.set_num_threads(args.threads)
        self.args, self.rows = args, []
        self.absent = {name: reason for name, reason in absent.items() if name in names}
        self.names = [name for name in names if name not in absent]
        self.about = {**machine(args.backend, args.threads), "absent": self.absent}
        print(*heading(self.about), sep="\n")
        for name, reason in self.absent.items():
            print(f"left out: {name}: {reason}")
        print(columns(self.names), flush=True)

    def add(self, row, note=None):
        self.rows.append(row)
        tqdm.write(line(row, self.names) + (f"\n{note}" if note else ""), file=sys.stdout)
        sys.stdout.flush()

    def finish(self):
        """Write what was asked for; the exit code: 1 where a provider gave a wrong result."""
        for text in _reasons(self.rows, "left_out"):
            print(f"left out: {text}")
        for text in _reasons(self.rows, "wrong"):
            print(f"WRONG, not timed: {text}")
        write(self.args, self.about, self.rows)
        return int(any(row["wrong"] for row in self.rows))


def _reasons(rows, what):
    """"provider, provider in op dtype, op dtype: reason" for each reason in row[what]."""
    found = {}
    for row in rows:
        for name, reason in row[what].items():
            names, where = found.setdefault(reason, ({}, {}))
            names[name] = where[f"{row['op']} {row['dtype']}"] = None
    return [f"{', '.join(names)} in {', '.join(where)}: {reason}"
            for reason, (names, where) in found.items()]
