"""benchmarks/gpu.py and the scripts that it starts, as far as a machine without a GPU can run them."""

import dataclasses
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from mpkernels import backends, masks
from mpkernels.commands import bench, contestants, terminal
from mpkernels.profiling import roofline
from mpkernels.spec import Workload, find

PATH = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
ATTENTION = PATH.with_name("attention.py")
FORWARD, BACKWARD, TRAINING = "forward", "backward", "forward+backward"


def load(path, name, monkeypatch):
    module_spec = importlib.util.spec_from_file_location(name, path)
    before = list(sys.path)
    sys.path.insert(0, str(path.parent))  # as where it is run as a script
    module = importlib.util.module_from_spec(module_spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look for it there
    module_spec.loader.exec_module(module)
    sys.path[:] = before
    return module


@pytest.fixture(scope="module")
def gpu():
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield load(PATH, "gpu_script", monkeypatch)


@pytest.fixture(scope="module")
def peers():
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield load(ATTENTION, "attention_script", monkeypatch)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(backends, "why_not", lambda *_: "no CUDA device\nis visible to torch")


@pytest.fixture
def all_well(monkeypatch):
    monkeypatch.setattr(backends, "why_not", lambda *_: None)


def row(implementation, seconds=1e-3, which=FORWARD, workload="large", share=0.5, **changes):
    made = {
        "op": "composite",
        "workload": workload,
        "pass": which,
        "implementation": implementation,
        "ours": implementation in ("cuda", "triton"),
        "default": implementation == "cuda",
        "call_overhead": workload.startswith("call overhead"),
        "problem": None,
        "seconds": seconds,
        "gb_per_s": 1234.5,
        "share_of_copy": share,
    }
    return made | changes


def data_of(rows):
    return {
        "versions": {"torch": "2.11.0"},
        "machine": {"gpus": ["NVIDIA H100 80GB HBM3"], "cores": 16},
        "machine_name": "nvidia-h100-80gb-hbm3",
        "date": "2026-01-01 00:00",
        "device": "cuda",
        "dtype": "float32",
        "ceilings": {"copy_bytes_per_s": 3e12, "read_bytes_per_s": 3e12, "flops_per_s": 5e13},
        "rows": rows,
        "interrupted": False,
    }


def test_without_a_gpu_one_line_and_status_2(gpu, no_gpu, capsys):
    assert gpu.main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "gpu.py: the CUDA kernels cannot run here: no CUDA device is visible to torch\n"


def test_a_device_without_the_cuda_library_is_told_why(gpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "why_not", lambda *_: "undefined symbol: cudaFoo")
    assert gpu.main(["--worker", "sanitize", "composite"]) == 2
    assert "undefined symbol: cudaFoo" in capsys.readouterr().err


def test_bad_arguments(gpu, no_gpu, capsys):
    assert gpu.main(["composit"]) == 2
    message = capsys.readouterr().err
    assert "OPS: expected one of" in message
    assert "'composite'" in message
    assert gpu.main(["--limit", "0"]) == 2
    assert "--limit: expected a positive number" in capsys.readouterr().err
    for arguments in (["--only", "tset"], ["--worker", "x"], ["--limit", "soon"], ["--unknown"]):
        with pytest.raises(SystemExit) as caught:
            gpu.main(arguments)
        assert caught.value.code == 2


def test_results_table_and_the_faster_backend(gpu, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    large = "131,072 rays x 128 samples x RGB"
    rows = [
        row("cuda", 1e-3, FORWARD, large, 0.85),
        row("triton", 2e-3, FORWARD, large, 0.42),
        row("eager torch", 9e-3, FORWARD, large, 0.1),
        row("cuda", 2e-3, BACKWARD, large, 0.6),
        row("torch.compile", which=BACKWARD, workload=large, problem="RuntimeError: no"),
        row("cuda", 3e-3, TRAINING, "16,384 rays x 128 samples x RGB", 0.6),
        row("triton", 2e-3, TRAINING, "16,384 rays x 128 samples x RGB", 0.9),
        row("triton", which=TRAINING, workload=large, problem="RuntimeError: broken"),
    ]
    del rows[-1]["seconds"], rows[-1]["share_of_copy"], rows[-1]["gb_per_s"]
    failures = gpu.finish(data_of(rows), [find("composite")], tmp_path)
    assert failures == [f"bench: composite, {large}, forward+backward on triton: RuntimeError: broken"]
    out = capsys.readouterr().out
    lines = {tuple(line.split("RGB")[-1].split()) for line in out.splitlines() if "RGB" in line}
    shares = ("1234", "85", "%", "1234", "42", "%", "met", "(80%)")
    assert ("forward", "1.00", "ms", "2.00", "ms", "9.00", "ms", "-", *shares) in lines
    assert any(line[0] == "backward" and line[-2:] == ("MISSED", "(70%)") for line in lines)
    assert not any(line[0] == "forward+backward" and "met" in line for line in lines)
    assert "composite: cuda takes 0.87 of triton's time; fastest_on_cuda='cuda', as the spec has it; not for" in out
    (path,) = tmp_path.rglob("*.json")
    assert path == tmp_path / "nvidia-h100-80gb-hbm3" / "composite.json"
    assert json.loads(path.read_text())["rows"][0]["share_of_copy"] == 0.85


def test_another_backend_than_the_recorded_one(gpu):
    rows = [row("cuda", 2e-3), row("triton", 1e-3)]
    assert "triton takes 0.50 of cuda's time" in gpu.fastest(rows, "cuda", "composite")
    assert "the spec has 'cuda': change it" in gpu.fastest(rows, "cuda", "composite")
    assert "nothing to compare" in gpu.fastest(rows[:1], "cuda", "composite")


@pytest.fixture
def tiny(monkeypatch):
    """Composite with one tiny workload, timed on the CPU."""

    def dense(dtype, device, generator):
        t = torch.linspace(0, 1, 9).expand(32, 9).to(device, dtype)
        sigmas = torch.rand(32, 8, generator=generator).to(device, dtype)
        return {"sigmas": sigmas, "values": sigmas[..., None].clone(), "t_starts": t[:, :-1], "t_ends": t[:, 1:]}

    spec = dataclasses.replace(find("composite"), workloads=(Workload("tiny", dense, 256),))
    monkeypatch.setattr(bench, "find", lambda name: spec)
    measure, copy = roofline.measure, roofline.copy
    monkeypatch.setattr(roofline, "measure", lambda d: measure(d, budget_s=0.01, size=2**20, matrix=64))
    monkeypatch.setattr(roofline, "copy", lambda d, size=2**20: copy(d, size))
    return spec


def test_three_passes_on_copies_in_turn(gpu, tiny, monkeypatch):
    seen, one_pass = set(), contestants.one_pass

    def watched(**arguments):
        seen.add(arguments["t_starts"].data_ptr())
        return tiny.eager(**arguments)

    monkeypatch.setattr(bench, "find", lambda name: dataclasses.replace(tiny, eager=watched))
    size = tiny.cost(tiny.workloads[0].arguments(), False).bytes
    with gpu.device_passes(cache=size):
        data = bench.collect(bench.Request(["composite"], device="cpu", repeats=2, compile=False, budget_s=0.0))
    assert contestants.one_pass is one_pass
    assert [r["pass"] for r in data["rows"] if r["ours"]] == [FORWARD, BACKWARD, TRAINING]
    assert all(r["problem"] is None and r["seconds"] > 0 for r in data["rows"])
    forward, backward, both = (r["bytes"] for r in data["rows"] if r["ours"])
    assert forward + backward == both
    assert len(seen) >= 3


def test_backward_alone_is_the_gradient(gpu, tiny):
    arguments = tiny.workloads[0].arguments()
    run = gpu.backward_alone(tiny, tiny.eager, arguments)
    wanted = contestants.one_pass(tiny, tiny.eager, arguments, TRAINING)()
    for _ in range(2):
        for a, b in zip(run(), wanted, strict=True):
            torch.testing.assert_close(a, b)


def test_processes_are_stopped_with_their_children(gpu, tmp_path):
    late = tmp_path / "late"
    start = time.monotonic()
    status, said = gpu.run_for(["sh", "-c", f"echo begun; (sleep 2; touch {late}) & wait"], 1, capture=True)
    assert (status, said) == (None, "begun\n")
    assert time.monotonic() - start < 1.9
    time.sleep(max(0.0, start + 2.3 - time.monotonic()))
    assert not late.exists()


@pytest.mark.parametrize(
    ("script", "failures", "printed"),
    [
        ("echo '30 cases, forward'; echo '========= ERROR SUMMARY: 0 errors'", 0, "cases, forward; ERROR SUMMARY: 0"),
        ("echo 'Invalid __global__ write'; exit 99", 2, "Invalid __global__ write"),
        ("echo '========= Error: Device not supported'; exit 1", 0, "does not support this device"),
        ("exit 3", 2, ""),
    ],
)
def test_sanitizer(gpu, all_well, tmp_path, monkeypatch, capsys, script, failures, printed):
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert len(gpu.sanitize([find("composite")], 20)) == failures
    assert printed in capsys.readouterr().out


def test_no_sanitizer(gpu, all_well, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert gpu.sanitize([find("composite")], 20) == []
    assert "left out" in capsys.readouterr().out


def test_the_sanitizer_runs_every_small_case(gpu, capsys):
    spec = find("composite")
    assert gpu.sanitized_worker([spec], "cpu") == 0
    assert capsys.readouterr().out == f"{sum(not c.large for c in spec.cases)} cases, forward and backward\n"


def test_tests_of_one_op(gpu):
    assert "tests" in gpu.pytest_command([find("composite")], everything=True)
    command = gpu.pytest_command([find("composite_from_alphas")], everything=False)
    assert str(Path("tests/volume/test_composite.py")) in command
    assert command[command.index("-m", 3) + 1] == "gpu"


def test_a_stage_that_breaks_fails_and_the_others_run(gpu, all_well, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "device_line", lambda: "NVIDIA H100")
    monkeypatch.setattr(gpu, "run_tests", broken)
    monkeypatch.setattr(gpu, "sanitize", lambda specs, seconds: [])
    monkeypatch.setattr(gpu, "run_benchmarks", lambda specs, seconds, results: [f"bench {results} {seconds > 100}"])
    monkeypatch.setattr(gpu, "run_peers", lambda specs, seconds, results: [f"peers {results} {seconds > 100}"])
    assert gpu.main(["--results", "there"]) == terminal.WRONG
    out = capsys.readouterr().out
    assert "RuntimeError: out of memory" in out
    assert "FAILED bench there True" in out
    assert "FAILED peers there True" in out
    assert gpu.main(["--only", "sanitize"]) == terminal.OK


def test_families_beside_their_peers_are_processes_of_their_own(gpu, monkeypatch, tmp_path):
    started, statuses = [], [0, None, 2, 0, 1]

    def run_for(command, seconds):
        started.append((command[1:], seconds))
        return statuses[len(started) - 1], ""

    monkeypatch.setattr(gpu, "run_for", run_for)
    assert gpu.run_peers([find("composite")], 100, tmp_path) == []
    for told in ([], ["attention: not done after 100 s"], ["attention: exit status 2"]):
        assert gpu.run_peers([find("composite"), find("attention")], 100, tmp_path) == told
    arguments = ["--device", "cuda", "--record", "--results", str(tmp_path), "--limit"]
    assert started == 3 * [([str(ATTENTION), *arguments, "80"], 100)]
    both = [find("attention"), find("dilated_conv1d")]
    assert gpu.run_peers(both, 100, tmp_path) == ["convolution: a row of ours did not run"]
    convolution = str(ATTENTION.with_name("convolution.py"))
    assert started[3:] == [([script, *arguments, "40"], 50) for script in (str(ATTENTION), convolution)]


@pytest.fixture
def parsed(peers, monkeypatch):
    """The arguments that run_peers gives are understood where there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return peers.parse(["--device", "cuda", "--record", "--results", "there", "--limit", "80"])


def test_attention_script_understands_its_arguments(peers, parsed, capsys):
    assert (parsed.device, parsed.record, str(parsed.results), parsed.limit) == ("cuda", True, "there", 80)
    assert peers.main(["--only", "causal nonsense"]) == terminal.BAD_USAGE
    assert "--only: expected words of one of" in capsys.readouterr().err
    for arguments in (["--quick", "--record"], ["--threads", "0"], ["--device", "tpu"]):
        with pytest.raises(SystemExit) as caught:
            peers.main(arguments)
        assert caught.value.code == 2


def test_a_gpu_row_is_one_of_the_issue(peers):
    rows = {(r.what, r.which, r.width, r.length): r for r in peers.GPU_ROWS}
    assert len(rows) == len(peers.GPU_ROWS) == 4 * 2 * 2 * 4
    assert rows[peers.FULL, FORWARD, 128, 8192].bars == {peers.OPERATIONS: 460.0}
    assert rows[peers.CAUSAL, FORWARD, 128, 16384].bars == {peers.OPERATIONS: 400.0}
    assert rows[peers.FULL, BACKWARD, 64, 2048].bars == {peers.OF_FLASH: 0.9}
    assert rows[peers.WINDOW, BACKWARD, 64, 2048].bars == {peers.DENSITY: 0.75}


def small_rows(peers):
    """One row of each kind, of 640 positions."""
    kinds = {(row.what, row.which): row for row in (*peers.GPU_ROWS, *peers.CPU_ROWS) if not row.memory}
    sizes = {"batch": 1, "heads": 2, "key_heads": 2, "length": 640, "width": 16, "dtype": "float32"}
    return [dataclasses.replace(row, **sizes) for row in kinds.values()]


def test_all_contestants_compute_the_same(peers):
    for row in small_rows(peers):
        if row.which == BACKWARD:
            continue
        problem = peers.Problem(row)
        ours, theirs = (problem.run(name)() for name in (peers.OURS, peers.SDPA))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3, msg=lambda text, row=row: f"{row.name}: {text}")
        if row.what in peers.MASK_MODS:
            q, k = torch.arange(640)[:, None], torch.arange(640)
            visible = peers.MASK_MODS[row.what]
            wanted = masks.to_dense(peers.mask_of(row), (640, 640))
            assert visible is None or torch.equal(visible(0, 0, q, k), wanted)


def test_rows_of_a_gpu_on_the_cpu(peers, monkeypatch, capsys):
    on_device = peers.Problem.names

    def names(problem, flex):
        problem.device = "cuda"
        found = on_device(problem, flex)
        problem.device = "cpu"
        return found

    monkeypatch.setattr(peers.Problem, "names", names)
    rows = [row for row in small_rows(peers) if row.which == BACKWARD and row.what in (peers.CAUSAL, peers.WINDOW)]
    asked = peers.parse(["--seconds", "0.001", "--quick", "--no-flex"])
    causal, window = peers.collect(rows, asked, terminal.output())
    assert list(causal["seconds"]) == [peers.OURS, peers.FLASH]
    assert causal["flops"] == 2 * 10 * 16 * 640 * 641 // 2
    assert set(causal["problems"]) == {peers.CUDNN}  # there is none on a CPU
    assert window["block_density"] == (1 + 2 + 3 + 3 + 3) / 25
    assert 0 < window["reached"][peers.DENSITY] < 10
    ((figure, bar, value, met),) = sys.modules["peers"].judged(window)
    assert (figure, bar, met) == (peers.DENSITY, 0.75, value >= 0.75)
    peers.show([causal, window], "cuda", terminal.output())
    assert "SDPA cuDNN" in capsys.readouterr().out


def test_block_density(peers):
    assert peers.block_density(None, 640) == 1
    assert peers.block_density(masks.causal(), 1024) == 36 / 64
    assert peers.block_density(masks.strictly_causal(), 130, 64) == 6 / 9
    assert peers.block_density(masks.padding(0), 100) == 0


def test_recorded_rows_replace_their_own(peers, tmp_path):
    path = tmp_path / "there" / peers.FILE
    for rows in ({"a": 1, "gone": 1}, {"b": 2, "a": 3}):
        peers.record({"measured": [{"name": n, "x": x} for n, x in rows.items()]}, path, ["a", "b"])
    assert json.loads(path.read_text())["measured"] == [{"name": "a", "x": 3}, {"name": "b", "x": 2}]


@pytest.fixture(scope="module")
def convolutions():
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield load(ATTENTION.with_name("convolution.py"), "convolution_script", monkeypatch)


def test_convolution_script_understands_its_arguments(convolutions, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    parsed = convolutions.SCRIPT.parse(["--device", "cuda", "--record", "--results", "there", "--limit", "40"])
    assert (parsed.device, parsed.record, str(parsed.results), parsed.limit) == ("cuda", True, "there", 40)
    assert convolutions.SCRIPT.main(["--only", "dilated nonsense"]) == terminal.BAD_USAGE
    assert "--only: expected words of one of" in capsys.readouterr().err
    for arguments in (["--quick", "--record"], ["--threads", "0"], ["--device", "tpu"]):
        with pytest.raises(SystemExit) as caught:
            convolutions.SCRIPT.main(arguments)
        assert caught.value.code == 2


@pytest.fixture(scope="module")
def flows():
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield load(ATTENTION.with_name("flows.py"), "flows_script", monkeypatch)


@pytest.mark.parametrize("script", ["convolutions", "flows"])
def test_every_row_has_peers_that_agree(script, request):
    for row in request.getfixturevalue(script).ROWS:
        if row.make is None or row.memory or "cpu" not in row.devices:
            continue
        problem = row.make("cpu", 100)
        with torch.no_grad():
            ours = problem.ours(*problem.leaves)
            for name, other in {"eager torch": problem.eager, **problem.peers}.items():
                if other is None or name in ("causal-conv1d", "zuko compiled"):  # (zuko has other splines)
                    continue
                where = f"{row.name}: {name}: "
                torch.testing.assert_close(
                    ours, other(*problem.leaves), atol=2e-3, rtol=1e-3, msg=lambda text, where=where: where + text
                )


def test_a_row_of_a_convolution_is_measured(convolutions, tmp_path, capsys):
    arguments = ["--quick", "--no-compile", "--only", "depthwise forward+backward", "--results", str(tmp_path)]
    assert convolutions.SCRIPT.main(arguments) == terminal.OK
    assert "depthwise_conv1d + SiLU" in capsys.readouterr().out
