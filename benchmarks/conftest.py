"""Makes one benchmark of every op, workload, pass and contestant: ``pytest benchmarks``.

``--device cuda`` and ``--threads N`` choose what to time on; ``-k`` chooses workloads. The claims in the docs come from
``mpkernels bench``, which times contestants in turn; this suite is for profiling and for comparing two commits
(``--benchmark-autosave``, ``--benchmark-compare``).
"""

import pytest
import torch

from mpkernels.commands import contestants, machine
from mpkernels.spec import all_specs


def pytest_addoption(parser):
    group = parser.getgroup("mpkernels")
    group.addoption("--device", default=machine.devices()[-1], choices=machine.devices(), help="what to time on")
    group.addoption("--threads", type=int, default=None, help="torch's threads")


def pytest_configure(config):
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))


def pytest_generate_tests(metafunc):
    device = metafunc.config.getoption("--device")
    found = []
    for spec in all_specs():
        names = contestants.real_backends(spec, device)
        for workload in spec.workloads:
            if device not in workload.devices:
                continue
            peers = [contestants.EAGER, contestants.COMPILED] if workload.eager else []
            for which in contestants.passes(workload):
                for name in names + peers:
                    label = f"{spec.name}: {workload.name}: {which}: {name}"
                    found.append(pytest.param(spec, workload, which, name, id=label))
    metafunc.parametrize(("spec", "workload", "which", "name"), found)


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("--device")
