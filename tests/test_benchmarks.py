"""`python -m benchmarks run`, `compare`, and what they share."""

import statistics
import xml.etree.ElementTree

import matplotlib.image
import pytest
import torch

from benchmarks import (baseline, cases, compare, plots, providers, result, run, timing,
                        virtual)
from benchmarks.__main__ import main
from benchmarks.a100 import bandwidth_report, model, report
from llama_ext.errors import LlamaExtError
from tiny_benchmarks import about, row, tiny  # noqa: F401

FP32 = torch.float32


def run_tiny(monkeypatch, *options, case=cases.rmsnorm(8, 16)):
    monkeypatch.setattr(cases, "of_size", lambda size, backend: [case])
    return main(["run", "--sizes", "small", "--rounds", "2", "--threads", "1", *options])


# --- what is measured ---

def test_times_are_of_each_stage_and_turns_are_interleaved():
    clock, calls = timing.Clock("cpu"), []
    stages = {name: [lambda name=name: calls.append(name) or name,
                     lambda before: calls.append(f"{before} again")] for name in "ab"}
    times = timing.interleave(clock, stages, 3, round_seconds=0)
    assert calls == ["a", "a again", "b", "b again"] * 3
    assert all(len(rounds) == 3 and all(len(lap) == 2 and min(lap) > 0 for lap in rounds)
               for rounds in times.values())


def test_spread_is_of_the_rounds():
    found = timing.spread([5.0, 1.0, 2.0, 3.0, 4.0, 0.0])
    assert found == {"seconds": 2.5, "p20": 1.0, "p80": 4.0}


def test_peak_counts_what_is_held_at_once():
    def call():
        a = torch.empty(1 << 20, dtype=torch.int8)
        b = torch.empty(1 << 19, dtype=torch.int8)
        del a
        return b, torch.empty(1 << 18, dtype=torch.int8)
    assert run.peak_bytes(call, torch.device("cpu")) == (1 << 20) + (1 << 19)


@pytest.mark.parametrize("seconds", [1e-3, 4e-3])
def test_share_of_the_limit(seconds):
    """A copy of the bytes at 2 GB/s takes 2 * 8 * 16 * 4 / 2e9 s; 3 times the elements backward."""
    blank, case = row(), cases.rmsnorm(8, 16)
    for direction, factor in ("forward", 2), ("backward", 3), ("forward+backward", 5):
        got = run._finished(blank, case, direction, {"x": [seconds]}, {"copy": 2e9}, {"x": {}})
        work = factor * 8 * 16 * 4
        assert (got["limit"], got["unit"], got["work"]) == ("copy", "B", work)
        assert got["providers"]["x"]["rate"] == pytest.approx(work / seconds)
        assert got["providers"]["x"]["share"] == pytest.approx(work / 2e9 / seconds)


@pytest.mark.parametrize("matmul, limit, ideal", [
    (1e9, "matmul", 4 * 2 * 3 * 8 * 64 * 64 / 2 / 1e9),
    (1e15, "copy", 4 * 2 * 64 * 3 * 8 * 4 / 1e9)])
def test_the_larger_time_is_the_limit(matmul, limit, ideal):
    case = cases.attention(2, 64, 3, 8)  # 2 x 64 rows of q, k, v and o; half of 64 x 64 pairs
    got = run._finished(row(), case, "forward", {"x": [1.0]}, {"copy": 1e9, "matmul": matmul},
                        {"x": {}})
    assert got["limit"] == limit
    assert got["providers"]["x"]["share"] == pytest.approx(ideal)


def test_products_that_would_take_too_long_are_left_out():
    limits = timing.Limits(timing.Clock("cpu"), FP32)
    limits.native, limits.best = 1e9, 1e12
    case, names = cases.attention(1, 2048, 8, 64), ["llama_ext", "eager", "built-in", "apex"]
    slow = run.too_slow(case, names, limits)
    assert set(slow) == {"eager", "built-in"}  # ours multiplies by itself, apex has no attention
    assert slow["eager"] == ("torch multiplies at 1 GFLOP/s in this dtype here, so that it would "
                             "take longer than 2 s")
    limits.best = 1e9
    assert set(run.too_slow(case, names, limits)) == {"llama_ext", "eager", "built-in"}
    limits.native = 1e12
    assert run.too_slow(case, names, limits) == {}


def rows(case, dtype=FP32, names=("llama_ext", "eager", "built-in")):
    clock = timing.Clock("cpu")
    return run.rows_of(clock, case, dtype, list(names), timing.Limits(clock, dtype), 2, 1e-4)


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16])
@pytest.mark.parametrize("case", [
    cases.rmsnorm(4, 32), cases.rmsnorm_residual(4, 32), cases.swiglu(4, 32),
    cases.rope(2, 4, 2, 8, True), cases.rope(2, 4, 2, 8, False), cases.attention(2, 16, 4, 8, 2),
    cases.attention(2, 1, 4, 8, S=16), cases.cross_entropy(4, 32),
    cases.linear_cross_entropy(4, 16, 32), cases.linear_int8(4, 16, 16)],
    ids=lambda case: f"{case.op} {case.shape}" if isinstance(case, cases.Case) else None)
def test_every_op(case, dtype):
    found = rows(case, dtype)
    directions = ["forward", "backward", "forward+backward"]
    if case.op == "linear_int8" or "1 of" in case.shape:  # for inference
        directions = ["forward"]
    elif case.op == "linear_cross_entropy":
        directions.remove("backward")
    assert [r["direction"] for r in found] == directions
    peers = {"llama_ext", "eager", *(["built-in"] if case.op in providers.BUILTIN else [])}
    for r in found:
        assert set(r["providers"]) == peers and not r["wrong"] and not r["left_out"]
        for entry in r["providers"].values():
            assert 0 < entry["p20"] <= entry["seconds"] <= entry["p80"]
            assert entry["error"] <= timing.ALLOWED_ERROR[dtype] and entry["peak_bytes"] > 0


def test_sizes_have_the_ops_at_llama_shapes():
    by_size = {size: {case.op: case.shape for case in cases.of_size(size, "cuda")}
               for size in cases.SIZES}
    assert by_size["7B"]["swiglu"] == "8192 x 11008"
    assert by_size["65B"]["rmsnorm"] == "8192 x 8192"
    assert by_size["13B"]["linear_cross_entropy"] == "8192 x 5120 -> 32000"
    assert all(set(found) == set(providers.OURS) for found in by_size.values())
    assert [case.options["T"] for case in cases.of_size("sweep", "cuda")] == 2 * [
        512, 1024, 2048, 4096, 8192, 16384]


# --- the command ---

def test_absent_peers_are_named(monkeypatch, capsys, tmp_path):
    path = tmp_path / "r.json"
    assert run_tiny(monkeypatch, "--peers", "eager", "flash-attn", "apex", "--dtypes", "fp32",
                    "--json", str(path)) == 0
    printed = capsys.readouterr().out
    assert "left out: flash-attn: not installed" in printed
    assert "left out: apex: not installed" in printed and "liger" not in printed
    found = result.load(path)
    assert found["absent"] == {"flash-attn": "not installed", "apex": "not installed"}
    assert [r["direction"] for r in found["rows"]] == ["forward", "backward", "forward+backward"]
    assert set(found["rows"][0]["providers"]) == {"llama_ext", "eager"}
    for name in ("device", "torch", "llama_ext", "commit", "date", "threads", "command"):
        assert found[name], name
    assert found["threads"] == 1


def test_a_wrong_provider_is_named_and_not_timed(monkeypatch, capsys):
    wrong = dict(providers.EAGER, rmsnorm=lambda case, dtype: lambda x, w: x * w)
    monkeypatch.setitem(providers.PROVIDERS, "eager", providers.Provider("eager", wrong))
    assert run_tiny(monkeypatch, "--peers", "eager", "built-in", "--dtypes", "fp32") == 1
    printed = capsys.readouterr().out
    assert "WRONG, not timed: eager in rmsnorm fp32: expected an error of at most 0.0001" in printed


@pytest.mark.parametrize("options, sentence", [
    (["run", "--peers", "nobody"], "--peers: expected some of eager, built-in, compile, "),
    (["run", "--json", "/nowhere/r.json"], "--json: expected a file in a folder that exists"),
    (["run", "--backend", "vgpu", "--rounds", "3"], "--rounds: expected none with --backend vgpu"),
    (["compare", "/nowhere", "/nowhere"], "/nowhere: expected the JSON of a benchmark"),
])
def test_wrong_input_is_one_sentence(options, sentence, capsys):
    assert main(options) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"benchmarks: {sentence}") and said.count("\n") == 1


def test_cuda_without_a_gpu_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in ("run", "models"):
        assert main([command, "--backend", "cuda"]) == 1
        assert capsys.readouterr().err == (
            "benchmarks: --backend: expected cpu or vgpu where torch sees no CUDA device, got "
            "cuda\n")


# --- compare ---

def test_compare_tells_a_slower_kernel_from_a_slower_machine():
    old = {"rows": [row(shape=name) for name in ("same", "worse", "better", "machine")]}
    new = {"rows": [row(shape="same", seconds=1.02e-3), row(shape="worse", seconds=1.1e-3),
                    row(shape="better", seconds=0.9e-3),
                    row(shape="machine", seconds=2e-3, ideal=1e-3), row(shape="more")]}
    found = {r["key"][1]: r for r in compare.compared(old, new, 0.05)}
    assert {name: r["verdict"] for name, r in found.items()} == {
        "same": "", "worse": "worse", "better": "better", "machine": "slower machine"}
    assert found["machine"]["speed"] == pytest.approx(0.5)
    assert found["machine"]["share"] == pytest.approx(1)
    assert [key[1] for key in compare.only_in_one(old, new)] == ["more"]


def test_compare_command(tmp_path, capsys):
    files = [str(tmp_path / name) for name in ("old.json", "new.json")]
    result.save(files[0], about(threads=2), [row(), row(op="rope")])
    result.save(files[1], about(threads=1), [row(seconds=1.08e-3), row(op="rope")])
    assert main(["compare", *files]) == 0
    assert main(["compare", *files, "--fail-worse"]) == 1
    assert "threads differs: 2 before, 1 now" in capsys.readouterr().out
    assert main(["compare", *files, "--fail-worse", "--threshold", "10"]) == 0
    assert "0 of 2 rows worse by more than 10 %" in capsys.readouterr().out


def test_json_round_trip(tmp_path):
    path, rows = tmp_path / "r.json", [row(peers={"eager": 2e-3})]
    result.save(path, about(), rows)
    assert result.load(path)["rows"] == rows
    path.write_text('{"rows": []}')
    with pytest.raises(LlamaExtError, match="expected the JSON of a benchmark"):
        result.load(path)


# --- what is shown ---

def test_line_names_the_best_peer():
    shown = result.line(row(peers={"eager": 3e-3, "built-in": 2e-3}), ["llama_ext", "eager"])
    assert shown.endswith("built-in  2.00") and " 50 " in shown and " 17 " in shown
    assert "1 GB/s" in shown


def test_means_are_geometric_and_of_the_same_shapes():
    rows = [row(shape="a", peers={"eager": 4e-3}), row(shape="b", peers={"eager": 1e-3}),
            row(shape="c", seconds=2.5e-4)]
    assert run.geometric_means(rows) == [("rmsnorm", "fp32", "forward", pytest.approx(2))]
    shares = plots.shares(rows, "fp32", "forward")["rmsnorm"]
    assert shares["eager"] == pytest.approx(100 * statistics.geometric_mean([0.125, 0.5]))
    assert shares["llama_ext"] == pytest.approx(50)


def sweep(T, seconds=1e-3, Hkv=8):
    return row(op="attention", shape=f"1 x {T}, {Hkv}", seconds=seconds, peers={"built-in": 2e-3},
               options={"T": T, "S": T, "D": 64, "H": 8, "Hkv": Hkv})


def test_no_point_lies_outside_a_picture():
    rows = [row(seconds=1e-3), row(dtype="bf16", seconds=1e-4), row(direction="backward"),
            sweep(512), sweep(1024, seconds=1e-5), sweep(512, Hkv=2), sweep(2048, Hkv=2)]
    sweeps = plots.attention_over_length(rows)
    assert [r["options"]["T"] for r in sweeps["fp32", 64, 8]] == [512, 1024]
    for figure in plots.overview(about(), rows), plots.attention(about(), sweeps):
        drawn = 0
        for axis in figure.axes:
            (left, right), (top, bottom) = axis.get_xlim(), sorted(axis.get_ylim())
            for line in axis.get_lines():
                xs, ys = line.get_data()
                if line.get_marker() not in ("None", None, ""):
                    drawn += len(xs)
                    assert all(left <= x <= right for x in xs)
                    assert all(top <= y <= bottom for y in ys)
        assert drawn >= 4


def test_pictures(tmp_path):
    rows = [row(peers={"eager": 2e-3}), row(dtype="bf16")]
    rows += [sweep(T) for T in (512, 1024)]
    written = plots.draw(about(), rows, tmp_path / "plots")
    assert [path.name for path in written] == ["overview.png", "overview.svg", "attention.png",
                                               "attention.svg"]
    for path in written:
        if path.suffix == ".png":
            image = matplotlib.image.imread(path)
            assert min(image.shape[:2]) > 200 and image.std() > 0.05
        else:
            assert xml.etree.ElementTree.parse(path).getroot().tag.endswith("svg")
    assert len(plots.draw(about(), [row()], tmp_path / "plots")) == 2  # no sweep, no second picture


def test_modelled_rows_are_those_of_the_model(monkeypatch, tmp_path, capsys):
    """As rows of a run, but labelled: they can be drawn, printed and compared."""
    monkeypatch.setattr(virtual, "SOURCES", virtual.SOURCES[1:])  # not what is counted
    monkeypatch.setattr(virtual.counts, "vgpu", lambda: None)
    path = tmp_path / "v.json"
    assert main(["run", "--backend", "vgpu", "--json", str(path),
                 "--plots", str(tmp_path / "plots")]) == 0
    printed = capsys.readouterr().out
    assert "NOTHING IS TIMED" in printed and "MODELLED" in printed
    every = result.load(path)["rows"]
    rows = [r for r in every if r["op"] == "attention"]
    assert {r["label"] for r in every} == {"modelled"} and len(rows) == 2 * 6 * 3
    table = report.ours(model.GPUS["A100-80GB"], baseline.load()["attention"])
    for D, T, *teraflops in table:
        of_shape = [r for r in rows if (r["options"]["D"], r["options"]["T"]) == (D, T)]
        rates = [r["providers"][name]["rate"] / 1e12 for name in ("llama_ext", "flash-attn")
                 for r in of_shape]
        assert rates == pytest.approx(teraflops)
    bandwidth = {(r["op"], r["direction"], r["shape"]): r["providers"]["llama_ext"]
                 for r in every if r["op"] != "attention"}
    times = bandwidth_report.ours(model.GPUS["A100-80GB"], baseline.load()["launches"])
    assert len(bandwidth) == len(times) == len(every) - len(rows)
    ms, rate = next(t[2:4] for t in times if t[:2] == ("swiglu backward", 8192))
    found = bandwidth["swiglu", "backward", "8192 rows"]
    assert (found["seconds"], found["rate"], found["share"]) == pytest.approx(
        (ms / 1e3, rate * 1e9, rate / 2039))
    assert (tmp_path / "plots" / "attention.png").exists()
