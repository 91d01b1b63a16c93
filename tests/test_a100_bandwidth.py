"""The model of kernels that memory limits (benchmarks/a100/bandwidth.py): against what others
measured, its arithmetic, and the counts that it works with."""

import dataclasses
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent))

from benchmarks import baseline, launches  # noqa: E402
from benchmarks.a100 import bandwidth, bandwidth_report, peers  # noqa: E402
from benchmarks.a100.model import GPUS  # noqa: E402

A100, H100 = GPUS["A100-80GB"], GPUS["H100"]
ROWS = peers.check()
LAUNCH = bandwidth.Launch(2048, 8, 4, 8, bytes=2e8, asked=2.2e8, instructions=1e7, rounds=3)
EVERY = pytest.mark.parametrize("case", launches.CASES, ids=lambda case: case.name)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.gpu}-{row.what}-{row.of}")
def test_published_times(row):
    """Three numbers were fitted to 17 of the 57; what is wrong is known to be."""
    if row.wrong:
        assert 0.15 < abs(row.error) < 0.35
    elif (row.gpu, row.what) in peers.FITTED:
        assert abs(row.error) < 0.15
    else:
        assert abs(row.error) < 0.125


def test_published_times_on_average():
    errors = [abs(row.error) for row in ROWS if (row.gpu, row.what) not in peers.FITTED]
    assert len(errors) == 40 and sum(errors) / 40 < 0.07
    assert {(row.gpu, row.what, row.of) for row in ROWS if row.wrong} == set(peers.WRONG)


def test_no_launch_beats_its_limits():
    for gpu in GPUS.values():
        found = bandwidth.estimate(gpu, LAUNCH)
        clock = gpu.clock * bandwidth.CLOCK * gpu.sms
        for least in (LAUNCH.bytes / gpu.bandwidth, LAUNCH.asked / bandwidth.LINK / clock,
                      LAUNCH.instructions / 4 / clock):
            assert found.seconds > least
        assert 0 < found.memory <= 1 and 0 < found.pipes <= 1


@pytest.mark.parametrize("change", [
    {"bytes": 3e8}, {"asked": 2e9}, {"instructions": 1e9}, {"rounds": 300}, {"resident": 1},
    {"teams": 1}, {"again": 4e8}])
def test_more_to_do_or_fewer_to_do_it_is_slower(change):
    """A little memory-bound, so that each of them shows."""
    launch = dataclasses.replace(LAUNCH, resident=2, rounds=20)
    slower = dataclasses.replace(launch, **change)
    assert (bandwidth.estimate(A100, slower).seconds
            > 1.01 * bandwidth.estimate(A100, launch).seconds)


def test_time_is_linear_in_the_work_of_a_full_gpu():
    twice = {name: 2 * getattr(LAUNCH, name) for name in ("grid", "bytes", "asked", "instructions")}
    one, two = (bandwidth.estimate(A100, launch).seconds
                for launch in (LAUNCH, dataclasses.replace(LAUNCH, **twice)))
    assert two == pytest.approx(2 * one, rel=1e-12)


def test_one_team_alone_waits_for_everything_in_turn():
    """And many on one SM are as fast as the slower of its two queues."""
    assert bandwidth.teams_per_second(1, 2.0, 3.0, 5.0, 1) == pytest.approx(1 / 10)
    assert bandwidth.teams_per_second(1, 2.0, 3.0, 5.0, 500) == pytest.approx(1 / 3, rel=1e-3)
    assert bandwidth.teams_per_second(4, 2.0, 3.0, 5.0, 500) == pytest.approx(1 / 2, rel=1e-3)


def test_what_l2_holds_is_read_once():
    again = dataclasses.replace(LAUNCH, again=LAUNCH.bytes)
    blocks = A100.sms * LAUNCH.resident
    fits = dataclasses.replace(again, grid=LAUNCH.bytes * blocks / A100.l2)
    assert (bandwidth.estimate(A100, fits).seconds
            == bandwidth.estimate(A100, dataclasses.replace(fits, again=0)).seconds)


@EVERY
def test_counts_are_linear_in_the_size(vgpu, case):
    """Beyond the two sizes that they were taken at."""
    size = case.size * 3 // 2
    counted = launches.measure(case, size).values()
    expected, must = bandwidth_report.interpolate(baseline.load()["launches"], case, size)
    assert len(counted) == len(expected)
    for found, launch in zip(counted, expected):
        assert found.pop("must") == must
        for name, number in found.items():
            assert getattr(launch, name) == pytest.approx(number, rel=0.02), name


@EVERY
def test_between_the_counted_sizes(case):
    figures = baseline.load()["launches"]
    low, high = (figures[f"{case.name}, {size}, 1"] for size in case.sizes)
    for size, share in ((case.size // 2, 0), (case.size, 1), (case.size * 3 // 4, 0.5)):
        launches_found, must = bandwidth_report.interpolate(figures, case, size)
        assert must == low["must"] + share * (high["must"] - low["must"])
        assert launches_found[0].bytes == low["bytes"] + share * (high["bytes"] - low["bytes"])


@EVERY
def test_bytes_are_what_the_op_must_move(case):
    for size in (2048, 16384):
        found, must = bandwidth_report.interpolate(baseline.load()["launches"], case, size)
        assert must <= sum(launch.bytes for launch in found) * 1.001
        assert sum(launch.bytes for launch in found) <= 1.15 * must


def test_the_report_knows_every_op(capsys):
    bandwidth_report.run(A100)
    printed = capsys.readouterr().out
    for case in launches.CASES:
        assert printed.count(case.name) >= 3
    table = bandwidth_report.ours(A100, baseline.load()["launches"])
    for what, size, ms, rate, why in table:
        assert rate < A100.reached * A100.bandwidth / 1e9 and ms > 1e3 * bandwidth.START
    for what, liger, mine in bandwidth_report.beside_liger(A100, table):
        assert mine < 1.02 * liger, what
