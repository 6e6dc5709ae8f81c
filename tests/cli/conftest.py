import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mpkernels.cli import app

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a command in an empty folder: ``run("validate", "composite")`` -> result with exit_code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str):
        result = CliRunner().invoke(app, list(arguments))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture
def run_json(run):
    """The same with --json: (exit code, what was printed, parsed)."""

    def run_json(*arguments: str):
        result = run(*arguments, "--json")
        return result.exit_code, json.loads(result.stdout)

    return run_json


@pytest.fixture
def process(tmp_path):
    """Runs ``python -m mpkernels ...`` in an empty folder, in a process of its own."""

    def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        return subprocess.run(
            [sys.executable, "-m", "mpkernels", *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": path} | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    return process
