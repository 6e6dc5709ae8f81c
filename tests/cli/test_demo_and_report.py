import dataclasses
import json
import re
import sys
import types
from pathlib import Path

import pytest

from mpkernels.commands import bench, demo, report
from mpkernels.spec import find


@pytest.fixture(autouse=True)
def tiny_demo(monkeypatch):
    """A demo of three steps that writes one picture."""

    def fit(*, steps=3, device=None, backend=None, seed=0, output, progress=None):
        if steps < 0:
            raise ValueError(f"steps: expected an integer of at least 0, got {steps}")
        done = 0
        for step in range(steps):
            if step == 7:
                break  # as after Ctrl-C
            done += 1
            progress({"step": done, "steps": steps, "loss": 1 / done, "psnr_held_out": 20.0})
        print("printed by the demo")
        (output / "view.png").write_bytes(b"png")
        pictures = [{"file": "view.png", "title": "A <view>", "caption": "What is seen & how"}]
        settings = {"steps": steps, "backend": backend}
        return {"figures": {"psnr_held_out": 21.25}, "pictures": pictures, "settings": settings, "steps_done": done}

    module = types.ModuleType("tiny_demo")
    module.fit = fit
    monkeypatch.setitem(sys.modules, "tiny_demo", module)
    spec = dataclasses.replace(find("composite"), demo="tiny_demo")
    monkeypatch.setattr(demo, "all_specs", lambda: (spec,))


def test_demo_writes_pictures_and_figures(run, tmp_path):
    result = run("demo", "composite")
    assert result.exit_code == 0
    assert "21.25" in result.stdout
    assert "out/report/composite/view.png" in result.stdout
    assert "printed by the demo" in result.stderr
    folder = tmp_path / "out/report/composite"
    assert (folder / "view.png").exists()
    assert json.loads((folder / "result.json").read_text())["figures"] == {"psnr_held_out": 21.25}


def test_demo_json_and_settings(run_json):
    status, data = run_json("demo", "--steps", "5", "--backend", "reference", "--output", "here")
    assert status == 0
    assert data["composite"]["settings"] == {"steps": 5, "backend": "reference"}


def test_demo_says_which_setting_is_wrong(run):
    for arguments, name in ((("--steps", "-1"), "--steps"), (("--planes", "4"), "--planes")):
        result = run("demo", *arguments)
        assert result.exit_code == 2
        assert name in result.stderr


def test_an_interrupted_demo_exits_130(run, tmp_path):
    assert run("demo", "--steps", "9").exit_code == 130
    assert json.loads((tmp_path / "out/report/composite/result.json").read_text())["interrupted"]


def test_report_is_one_page_without_hosts_or_absolute_paths(run, tmp_path):
    run("demo")
    run("validate", "composite", "--backend", "reference", "--cases", "four", "--output", "out/report")
    result = run("report", "--no-bench")
    assert result.exit_code == 0
    assert "out/report/index.html" in result.stdout
    html = (tmp_path / "out/report/index.html").read_text()
    assert str(tmp_path) not in html
    assert not re.search(r"https?://|src=\"/|href=\"/|<script", html)
    sources = re.findall(r'<img src="([^"]+)"', html)
    assert sources == ["composite/view.png"]
    assert (tmp_path / "out/report" / sources[0]).exists()
    assert "A &lt;view&gt;" in html
    assert "21.25" in html
    assert "composite_from_alphas" in html  # the matrix
    assert "Restricted to ops composite" in html
    assert "mpkernels bench --record" in html


def test_report_copies_pictures_that_lie_elsewhere(run, tmp_path):
    run("demo")
    elsewhere = tmp_path / "elsewhere.png"
    elsewhere.write_bytes(b"png")
    path = tmp_path / "out/report/composite/result.json"
    data = json.loads(path.read_text())
    data["pictures"][0]["file"] = str(elsewhere)
    path.write_text(json.dumps(data))
    run("validate", "composite", "--backend", "reference", "--cases", "four", "--output", "out/report")
    run("report", "--no-bench")
    assert (tmp_path / "out/report/composite/elsewhere.png").exists()
    assert str(tmp_path) not in (tmp_path / "out/report/index.html").read_text()


def test_report_shows_failures_and_fails(run, tmp_path):
    run("validate", "composite", "--backend", "reference", "--cases", "four", "--output", "out/report")
    path = tmp_path / "out/report/validation.json"
    data = json.loads(path.read_text())
    data["ok"] = data["rows"][0]["ok"] = False
    data["rows"][0]["failures"] = [
        {"case": "four", "output": "values", "error": 1.0, "bound": 0.5, "problem": "<b>odd</b>"}
    ]
    path.write_text(json.dumps(data))
    assert run("report", "--no-bench").exit_code == 1
    assert "&lt;b&gt;odd&lt;/b&gt;" in (tmp_path / "out/report/index.html").read_text()


def test_report_shows_recorded_benchmarks(run, tmp_path, monkeypatch):
    from mpkernels.commands import bench, machine

    row = {
        **{"op": "composite", "workload": "a lot", "pass": "forward", "implementation": "cpu", "ours": True},
        **{"default": True, "call_overhead": False, "problem": None, "seconds": 0.25, "spread": 0.02},
        **{"times_faster_than_eager": 3.5, "times_faster_than_compiled": 0.5, "gb_per_s": 7.0},
        **{"share_of_copy": 0.7, "bound": "memory"},
    }
    ceilings = {"copy_bytes_per_s": 1e10, "read_bytes_per_s": 1e10, "flops_per_s": 1e11}
    data = {
        **{"versions": machine.versions(), "machine": machine.describe(), "machine_name": machine.name()},
        **{"date": "today", "device": "cpu", "dtype": "float32", "ceilings": ceilings, "load_before": 0.0},
        **{"rows": [row], "interrupted": False},
    }
    run("validate", "composite", "--backend", "reference", "--cases", "four", "--output", "out/report")
    bench.record(data, bench.RESULTS)
    monkeypatch.setattr(bench, "collect", lambda request: pytest.fail("there is a record"))
    monkeypatch.setattr(machine, "devices", lambda: ["cpu"])
    assert run("report").exit_code == 0
    html = (tmp_path / "out/report/index.html").read_text()
    assert "3.50 times as fast as eager torch, 2.00 times slower than torch.compile" in html


def test_report_refuses_broken_results(run, tmp_path):
    (tmp_path / "validation.json").write_text("{")
    result = run("report", "--output", ".", "--no-bench")
    assert result.exit_code == 2
    assert "--fresh" in result.stderr
    assert report.PAGE == "index.html"


def test_what_other_scripts_recorded_is_passed_over(monkeypatch):
    """The repository's own records, those of benchmarks/*.py among them."""
    folder = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
    monkeypatch.setattr(bench, "RESULTS", folder)
    found = report.benches(fresh=False, allowed=False)
    assert 0 < len(found) < len(list(folder.glob("*/*.json")))
    assert all("machine_name" in data for data in found)
