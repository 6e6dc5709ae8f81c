import json
import signal
import subprocess

import pytest

from mpkernels import library
from mpkernels.commands import jobs
from mpkernels.commands.jobs import Job

EAGER = """
import torch
from mpkernels.volume.composite import eager

def right(**arguments):
    return eager.composite(**arguments)

def without_background(background=None, **arguments):
    return eager.composite(**arguments)

def raises(sigmas, **arguments):
    raise RuntimeError("no [rays]\\nat all")

def detached(**arguments):
    return tuple(x.detach() for x in eager.composite(**arguments))

def one_output(**arguments):
    return eager.composite(**arguments)[0]

def a_list(**arguments):
    return [x.tolist() for x in eager.composite(**arguments)]
"""


@pytest.fixture
def mine(tmp_path, run_json, monkeypatch):
    """Validates a function of EAGER: (exit code, its row)."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "user_kernels.py").write_text(EAGER)

    def mine(function: str, *arguments: str):
        name = f"user_kernels:{function}"
        status, data = run_json("validate", "composite", "--implementation", name, "--device", "cpu", *arguments)
        (row,) = data["rows"]
        assert row["backend"] == name
        return status, row

    return mine


def test_reference_passes(run_json):
    status, data = run_json("validate", "composite", "--backend", "reference", "--cases", "one", "--dtype", "float32")
    assert status == 0
    assert data["ok"]
    for row in data["rows"]:
        assert row["cases"] == row["of"] > 0
        assert row["error"] <= row["bound"]


def test_table_shows_the_worst_error_and_the_holes(run, monkeypatch):
    monkeypatch.setitem(library._loaded, "fibres", "not built [for] tests")
    from mpkernels import backends

    backends.forget_choices()
    result = run("validate", "composite", "--cases", "packed, small", "--device", "cpu", "--backend", "fibres")
    backends.forget_choices()
    assert result.exit_code == 1  # named, and cannot run
    assert "not built [for] tests" in result.stdout
    result = run("validate", "composite", "--cases", "packed, small", "--device", "cpu", "--backend", "reference")
    assert result.exit_code == 0
    assert "grad" in result.stdout
    assert "Nothing was checked but the reference" in result.stdout


def test_a_right_function_passes(mine):
    status, row = mine("right", "--cases", "four channels")
    assert (status, row["ok"], row["failures"], row["sets_bound"]) == (0, True, [], False)


def test_a_wrong_function_fails(mine):
    status, row = mine("without_background", "--cases", "four channels")
    assert status == 1
    assert {failure["output"] for failure in row["failures"]} >= {"values", "grad background"}
    assert row["ratio"] is None or row["ratio"] > 1


def test_an_exception_is_the_result_of_its_case(mine, run):
    status, row = mine("raises", "--cases", "channels")
    assert status == 1
    assert row["cases"] > 1
    assert len(row["failures"]) == row["cases"]
    assert row["failures"][0]["problem"] == "RuntimeError: no [rays] at all"
    shown = run("validate", "composite", "--implementation", "user_kernels:raises", "--cases", "channels")
    assert "no [rays] at all" in shown.stdout
    assert "Traceback" not in shown.output


def test_a_function_without_gradients_is_told_so(mine):
    status, row = mine("detached", "--cases", "four channels")
    assert status == 1
    assert all("--no-backward" in failure["problem"] for failure in row["failures"])
    assert mine("detached", "--cases", "four channels", "--no-backward")[0] == 0


@pytest.mark.parametrize(("function", "problem"), [("one_output", "expected 4 outputs"), ("a_list", "Tensor")])
def test_wrong_outputs_are_told(mine, function, problem):
    status, row = mine(function, "--cases", "four channels")
    assert status == 1
    assert problem in row["failures"][0]["problem"]


def test_writes_what_the_report_reads(run, tmp_path):
    run("validate", "composite", "--backend", "reference", "--cases", "four", "--output", "made/here")
    assert json.loads((tmp_path / "made/here/validation.json").read_text())["ok"]


def test_interpreter_runs_in_another_process():
    pytest.importorskip("triton")
    answers = list(jobs.run_interpreted([Job("composite", "reference", "float32", "cpu", "four channels")] * 2))
    assert len(answers) == 2
    assert all(finding.ok for finding in answers[0])
    assert answers[0] == answers[1]


def test_a_dead_interpreter_fails_what_it_did_not_answer(monkeypatch, tmp_path):
    dead = tmp_path / "dead"
    dead.write_text("#!/bin/sh\necho last words >&2\nexit 3\n")
    dead.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(dead))
    ((finding,),) = jobs.run_interpreted([Job("composite", "triton", "float32", "cpu", "four channels")])
    assert not finding.ok
    assert finding.problem is not None
    assert "status 3: last words" in finding.problem


def test_ctrl_c_prints_what_was_done(run, monkeypatch):
    started = []

    def interrupted_at_the_third(job, implementation):
        started.append(job)
        if len(started) == 3:
            signal.raise_signal(signal.SIGINT)
        return [jobs.Finding("values", 0.0, 1.0)]

    monkeypatch.setattr(jobs, "run", interrupted_at_the_third)
    result = run("validate", "composite", "--backend", "reference")
    assert result.exit_code == 130
    assert "2 of" in result.stdout
    assert "Interrupted" in result.stdout


def test_ctrl_c_ends_the_interpreter(monkeypatch):
    started = []
    popen = subprocess.Popen

    def start(*arguments, **settings):
        started.append(popen(*arguments, **settings))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    many = [Job("composite", "reference", "float32", "cpu", "four channels")] * 1000
    answers = jobs.run_interpreted(many)
    next(answers)
    (process,) = started
    assert process.poll() is None
    answers.close()  # what an interrupt does to the generator
    assert process.poll() is not None
