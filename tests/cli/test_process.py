import json

import pytest


def test_json_is_all_that_is_printed(process):
    done = process("info", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["devices"][0] == "cpu"


def test_bad_usage(process):
    done = process("validate", "nothing")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("mpkernels: OPS: expected one of ")
    assert "'composite'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_triton_runs_without_a_gpu(process):
    pytest.importorskip("triton")
    done = process(
        *("validate", "composite", "--backend", "triton", "--device", "cpu"),
        *("--dtype", "float32", "--cases", "packed, small", "--json"),
    )
    (row,) = json.loads(done.stdout)["rows"]
    assert row["interpreter"]
    assert row["ok"], row["failures"]
    assert done.returncode == 0
