import torch

from mpkernels import BACKENDS, backends
from mpkernels.spec import all_specs


def test_lists_every_op_and_reason(run):
    result = run("info")
    assert result.exit_code == 0
    text = " ".join(result.stdout.split())
    for spec in all_specs():
        assert spec.name in text
        reason = backends.why_not(spec.op, "triton", "cpu")
        assert reason is None or reason in text
    assert torch.__version__ in text


def test_json_has_a_cell_for_every_op_and_backend(run_json):
    status, data = run_json("info")
    assert status == 0
    cells = {(cell["op"], cell["backend"]): cell for cell in data["matrix"] if cell["device"] == "cpu"}
    assert set(cells) == {(spec.name, backend) for spec in all_specs() for backend in BACKENDS}
    assert all(cell["available"] == (cell["reason"] is None) for cell in cells.values())
    for spec in all_specs():
        assert cells[spec.name, "reference"]["available"]
        defaults = [b for b in BACKENDS if cells[spec.name, b]["default"]]
        assert defaults == [backends.choose(spec.op, "cpu", None)]


def test_missing_cuda_is_told_by_what_is_missing(run_json, monkeypatch):
    monkeypatch.setattr("mpkernels.commands.machine.devices", lambda: ["cpu"])
    monkeypatch.setitem(backends.library._loaded, "cuda", "no CUDA device [here]")
    _, data = run_json("info")
    reasons = {cell["reason"] for cell in data["matrix"] if cell["backend"] == "cuda"}
    assert reasons == {"no CUDA device [here]"}


def test_kernels_without_a_table_says_how_to_make_it(run, monkeypatch):
    from mpkernels.profiling import resources

    def missing():
        raise FileNotFoundError("make it with `x`")

    monkeypatch.setattr(resources, "read_table", missing)
    result = run("info", "--kernels")
    assert result.exit_code == 1
    assert "make it with `x`" in result.stderr
