"""One check of ``mpkernels validate``: an op, a backend or a function of the user's, a dtype, a case.

Jobs that need Triton's interpreter run in a process of their own, because ``TRITON_INTERPRET`` has to be set before
Triton is imported: ``python -m mpkernels.commands.jobs`` reads a list of jobs and answers each with a line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import mpkernels
from mpkernels import testing
from mpkernels.commands.terminal import DTYPES
from mpkernels.spec import find

ANSWER = "answer "  # what a line of the interpreter's process starts with


@dataclass(frozen=True)
class Job:
    """What to check."""

    op: str
    backend: str  # or the name of the user's function
    dtype: str  # a key of DTYPES
    device: str
    case: str
    backward: bool = True


@dataclass(frozen=True)
class Finding:
    """One output or gradient of a job; an exception is a finding with the name "exception"."""

    output: str
    error: float
    bound: float
    problem: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the error is within the bound, and nothing else is wrong."""
        return self.problem is None and self.error <= self.bound

    @property
    def ratio(self) -> float:
        """Error by bound: above 1 fails."""
        if self.error == 0 and self.problem is None:
            return 0.0
        return self.error / self.bound if self.bound > 0 else float("inf")


def run(job: Job, implementation: Callable | None = None) -> list[Finding]:
    """Runs a job in this process. What it raises becomes a finding."""
    spec = find(job.op)
    checked = _Implementation(implementation) if implementation is not None else None
    try:
        comparisons = testing.check_case(
            spec,
            spec.case(job.case),
            backend=None if checked else job.backend,
            implementation=checked,
            dtype=DTYPES[job.dtype],
            device=job.device,
            backward=job.backward,
        )
    except Exception as error:  # whatever a kernel raises is the result of its check
        text = " ".join(str(error).split())
        return [Finding("exception", float("inf"), 0.0, f"{type(error).__name__}: {text}")]
    found = []
    for c in comparisons:
        problem = c.problem
        if checked is not None and not checked.has_gradient and c.name.startswith("grad "):
            problem = "no output of the function has a gradient (--no-backward checks the outputs alone)"
        found.append(Finding(c.name, c.error, c.bound, problem))
    return found


class _Implementation:
    """A user's function, with what it returns looked at."""

    def __init__(self, function: Callable) -> None:
        self.function = function
        self.has_gradient = False

    def __call__(self, **arguments) -> Sequence[Tensor]:
        returned = self.function(**arguments)
        outputs = (returned,) if isinstance(returned, Tensor) else tuple(returned)
        for i, x in enumerate(outputs):
            if not isinstance(x, Tensor):
                raise TypeError(f"output {i}: expected a torch.Tensor, got {type(x).__name__}")
        self.has_gradient = any(x.requires_grad for x in outputs)
        return outputs


def run_interpreted(jobs: Sequence[Job]) -> Iterator[list[Finding]]:
    """Runs jobs under Triton's interpreter, in another process; yields the findings of each, in order.

    If that process dies, the jobs that it did not answer fail with what it said last.
    """
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(mpkernels.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "mpkernels.commands.jobs"]
    answered = 0
    with (
        tempfile.TemporaryFile("w+") as questions,
        tempfile.TemporaryFile("w+") as said,
    ):
        json.dump({"threads": torch.get_num_threads(), "jobs": [asdict(job) for job in jobs]}, questions)
        questions.seek(0)
        # a session of its own, so that Ctrl-C reaches this process alone, which then ends the other
        process = subprocess.Popen(
            command,
            stdin=questions,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env=environment,
            start_new_session=True,
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(ANSWER):
                    answered += 1
                    yield [Finding(**finding) for finding in json.loads(line.removeprefix(ANSWER))]
            status = process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if answered < len(jobs):
            said.seek(0)
            last = (said.read().strip().splitlines() or [""])[-1]
            problem = f"Triton's interpreter ended with status {status}: {last}"
            for _ in jobs[answered:]:
                yield [Finding("exception", float("inf"), 0.0, problem)]


def _answer_jobs() -> None:
    """The other process: jobs on standard input, answers on standard output, everything else on standard error."""
    asked = json.load(sys.stdin)
    torch.set_num_threads(asked["threads"])
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        for job in asked["jobs"]:
            findings = run(Job(**job))
            print(ANSWER + json.dumps([asdict(finding) for finding in findings]), file=answers, flush=True)


if __name__ == "__main__":
    _answer_jobs()
