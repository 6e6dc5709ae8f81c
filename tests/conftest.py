"""Parametrises the property classes, and chooses the tests that this process can run.

Triton's interpreter has to be switched on before Triton is imported, so its tests run in a process of their own, which
tests/test_own_processes.py starts. Only rung 6 (marker `gpu`) is left out without a GPU.
"""

import os

import torch

from mpkernels.testing import properties

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_configure(config):
    config.addinivalue_line("markers", "triton_interpreted: needs TRITON_INTERPRET=1, run by test_own_processes.py")


def pytest_generate_tests(metafunc):
    properties.generate(metafunc)


def pytest_collection_modifyitems(config, items):
    def runs_here(item):
        if (item.get_closest_marker("triton_interpreted") is not None) != INTERPRETED:
            return False
        return item.get_closest_marker("gpu") is None or torch.cuda.is_available()

    config.hook.pytest_deselected(items=[item for item in items if not runs_here(item)])
    items[:] = [item for item in items if runs_here(item)]
