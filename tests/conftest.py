"""Parametrises the property classes, and chooses the tests that this process can run.

Triton's interpreter has to be switched on before Triton is imported, so its tests run in a process of their own, which
tests/test_own_processes.py starts. Only rung 6 (marker `gpu`) is left out without a GPU.
"""

import os

import torch

from mpkernels.testing import properties

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # workers that each use every core only wait for each other


def pytest_configure(config):
    config.addinivalue_line("markers", "triton_interpreted: needs TRITON_INTERPRET=1, run by test_own_processes.py")
    config.addinivalue_line("markers", "costly: interpreters run it on the small cases only")
    config.addinivalue_line("markers", "once: interpreters run it on one case an op")


def pytest_generate_tests(metafunc):
    properties.generate(metafunc)


def pytest_collection_modifyitems(config, items):
    def runs_here(item):
        if (item.get_closest_marker("triton_interpreted") is not None) != INTERPRETED:
            return False
        return item.get_closest_marker("gpu") is None or torch.cuda.is_available()

    # the longest first, so that no worker is left alone with it
    items.sort(key=lambda item: item.path.name not in ("test_own_processes.py", "test_contributing.py"))
    config.hook.pytest_deselected(items=[item for item in items if not runs_here(item)])
    items[:] = [item for item in items if runs_here(item)]
