import dataclasses
import json
import math
import signal

import pytest
import torch

from mpkernels.commands import bench, bench_tables, contestants, machine
from mpkernels.profiling import roofline, timing
from mpkernels.spec import Workload, find


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Composite with two tiny workloads, and a copy that fits into a cache."""
    composite = find("composite")

    def dense(dtype, device, generator):
        t = torch.linspace(0, 1, 9).expand(32, 9).to(device, dtype)
        sigmas = torch.rand(32, 8, generator=generator).to(device, dtype)
        values = torch.rand(32, 8, 3, generator=generator).to(device, dtype)
        return {"sigmas": sigmas, "values": values, "t_starts": t[:, :-1], "t_ends": t[:, 1:]}

    def packed(dtype, device, generator):
        arguments = {name: x.flatten(0, 1) for name, x in dense(dtype, device, generator).items()}
        start = torch.arange(32, device=device) * 8
        return arguments | {"packed_info": torch.stack([start, torch.full_like(start, 8)], dim=-1)}

    made = (("tiny", dense), ("packed: tiny", packed), ("call overhead", dense))
    workloads = tuple(Workload(name, make, 256) for name, make in made)
    spec = dataclasses.replace(composite, workloads=workloads)
    monkeypatch.setattr(bench, "find", lambda name: spec)
    measure, copy = roofline.measure, roofline.copy
    monkeypatch.setattr(roofline, "measure", lambda d: measure(d, budget_s=0.01, size=2**20, matrix=64))
    monkeypatch.setattr(roofline, "copy", lambda d, size=2**20: copy(d, size))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for one another on a busy machine would make these tests slow
    yield spec
    torch.set_num_threads(threads)


def test_ratios_of_every_contestant(run_json):
    status, data = run_json("bench", "composite", "--repeats", "3", "--no-compile", "--device", "cpu")
    assert status == 0
    rows = data["rows"]
    assert len(rows) >= 12  # 3 workloads, 2 passes, us and eager torch
    for row in rows:
        assert row["problem"] is None
        assert row["rounds"] == 3
        assert row["times_faster_than_eager"] > 0
        assert row["times_faster_than_compiled"] is None
        assert ("share_of_copy" in row) == (not row["call_overhead"])
    assert all(row["times_faster_than_eager"] == 1 for row in rows if row["implementation"] == contestants.EAGER)
    assert [row["workload"] for row in rows if "sample_time_by_dense" in row] == ["packed: tiny"] * 2


def test_table_and_headlines(run):
    result = run("bench", "composite", "--repeats", "2", "--no-compile", "--workload", "tiny", "--device", "cpu")
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    assert f"torch {torch.__version__}" in text
    assert "of copy bandwidth" in text
    assert "as long as a dense one" in text


def test_a_peer_that_does_not_run_is_told(run_json, tiny, monkeypatch):
    def broken(**arguments):
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(contestants, "compiled", lambda spec: broken)
    status, data = run_json("bench", "composite", "--repeats", "2", "--workload", "overhead", "--device", "cpu")
    assert status == 0  # ours runs
    problems = {row["problem"] for row in data["rows"] if row["implementation"] == contestants.COMPILED}
    assert problems == {"RuntimeError: no compiler here"}
    assert any("us a call" in line for line in bench_tables.headlines(data))


def test_record(run, tmp_path):
    assert run("bench", "composite", "--repeats", "2", "--no-compile", "--device", "cpu", "--record").exit_code == 0
    (path,) = tmp_path.glob("benchmarks/results/*/composite.json")
    assert path.parent.name == machine.name()
    data = json.loads(path.read_text())
    assert {row["op"] for row in data["rows"]} == {"composite"}
    assert data["versions"]["torch"] == torch.__version__


def test_ctrl_c_prints_what_was_done(run, monkeypatch):
    paired, calls = timing.paired, []

    def interrupted_at_the_third(*arguments, **settings):
        calls.append(settings)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return paired(*arguments, **settings)

    monkeypatch.setattr(timing, "paired", interrupted_at_the_third)  # the first call measures the ceilings
    result = run("bench", "composite", "--repeats", "1", "--no-compile", "--device", "cpu", "--record")
    assert result.exit_code == 130
    assert "Interrupted" in result.stdout
    assert "forward" in result.stdout
    assert "recorded" not in result.stderr


@pytest.mark.parametrize(("load", "warned"), [(0.1, False), (6.0, True)])
def test_a_busy_machine_is_the_first_headline(run, monkeypatch, load, warned):
    monkeypatch.setattr(machine, "load", lambda: load)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    result = run("bench", "composite", "--repeats", "1", "--no-compile", "--workload", "overhead", "--device", "cpu")
    assert ("Not to be quoted" in result.stdout) == warned


def test_threads_are_put_back(run):
    before = torch.get_num_threads()
    options = ("--repeats", "1", "--no-compile", "--workload", "overhead", "--threads", f"{before + 1}")
    result = run("bench", "composite", *options)
    assert result.exit_code == 0
    assert torch.get_num_threads() == before


def test_both_passes_cost_both(tiny):
    arguments = tiny.workloads[0].arguments()
    forward, backward = tiny.cost(arguments, False), tiny.cost(arguments, True)
    both = contestants.cost(tiny, arguments, contestants.TRAINING)
    assert both.bytes == forward.bytes + backward.bytes
    assert both.flops == forward.flops + backward.flops


def test_training_pass_takes_the_gradients_it_says(tiny):
    arguments = tiny.workloads[0].arguments()
    run = contestants.one_pass(tiny, contestants.ours(tiny, "reference"), arguments, contestants.TRAINING)
    found = run()
    assert [x.shape for x in found] == [arguments["sigmas"].shape, arguments["values"].shape]
    assert all(x.abs().sum() > 0 for x in found)


def test_paired_runs_in_turn_and_ratios_pair_up():
    order = []
    times = timing.paired({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=4)
    assert [len(x) for x in times.values()] == [4, 4]
    measured = "".join(order)
    turns = "".join(letter for letter, before in zip(measured, "-" + measured, strict=False) if letter != before)
    assert turns.endswith("abab")
    assert timing.ratio({"a": [2.0, 9.0, 4.0], "b": [1.0, 3.0, 2.0]}, "a", "b") == 2.0
    assert timing.median({"a": [3.0, 1.0, 2.0]}, "a") == 2.0
    assert math.isnan(timing.spread({"a": [1.0]}, "a"))


def test_paired_goes_on_until_the_budget_is_spent():
    times = timing.paired({"a": lambda: None}, budget_s=0.2, min_rounds=1)
    assert len(times["a"]) > 3


@pytest.mark.parametrize(
    ("bytes_", "flops", "bound", "seconds"), [(100, 1, "memory", 10.0), (10, 1000, "compute", 100.0)]
)
def test_roofline(bytes_, flops, bound, seconds):
    ceilings = roofline.Ceilings("cpu", 1, copy_bytes_per_s=10.0, read_bytes_per_s=12.0, flops_per_s=10.0)
    cost = roofline.Cost(flops=flops, bytes=bytes_)
    assert ceilings.bound(cost) == bound
    assert ceilings.seconds(cost) == seconds


def test_measured_ceilings_are_plausible():
    ceilings = roofline.measure("cpu")
    assert 1e8 < ceilings.copy_bytes_per_s < 1e13
    assert 1e8 < ceilings.flops_per_s < 1e15
