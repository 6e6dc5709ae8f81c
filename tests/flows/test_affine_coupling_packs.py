"""The affine coupling where GPU kernels change their way of reading: packs, single elements, several pieces."""

from typing import Any

import pytest
import torch

from mpkernels.flows import affine_coupling
from mpkernels.testing import compare, gradients


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def behind(x, elements):
    """The same values in the same order, but starting `elements` behind an aligned address."""
    room = x.new_zeros(x.numel() + elements)
    room[elements:] = x.flatten()
    return room[elements:].view(x.shape)


def every_other(x, dim):
    """The same values in every other place along a dimension."""
    return (
        torch.stack([x, torch.full_like(x, torch.nan)], dim + 1)
        .flatten(dim, dim + 1)
        .narrow(dim, 0, 2 * x.shape[dim] - 1)[(slice(None),) * dim + (slice(None, None, 2),)]
    )


CASES: dict[str, tuple[tuple[int, ...], dict[str, Any], Any]] = {
    # a border of channels within a pack, in a sample and in parameters that are aligned
    "border in a pack": ((1, 4), {"mask": "channel"}, None),
    "border in a pack, parity 1": ((1, 6, 2, 3), {"mask": "channel", "parity": 1, "inverse": True}, None),
    "border between packs": ((3, 5, 2, 4), {"mask": "channel", "scale": "sigmoid"}, None),
    "x behind an aligned address": ((2, 4, 4, 4), {"mask": "checkerboard"}, lambda x: behind(x, 1)),
    "aligned planes apart": ((2, 4, 4, 4), {"mask": "checkerboard"}, lambda x: every_other(x, 1)),
    "elements apart": ((2, 4, 4, 4), {"mask": "checkerboard", "parity": 1}, lambda x: every_other(x, 3)),
    "a last pack in part": ((3, 3, 5, 7), {"mask": "checkerboard", "scale": "softclamp"}, None),
    "more than 32 pieces": ((1, 9, 48, 40), {"mask": "channel", "scale": "tanh", "shift_first": True}, None),
}


class PacksProperties:
    backend: str
    device = "cpu"

    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_equals_the_reference(self, case, dtype):
        shape, options, order = CASES[case]
        parameters = list(shape)
        if options["mask"] == "channel":
            parameters[1] = (shape[1] + 1) // 2 if options.get("parity") else shape[1] // 2
        tensors = [normal(*shape), 0.3 * normal(*parameters, seed=1), normal(*parameters, seed=2)]
        names = ("x", "log_scale_or_raw", "shift")

        def run(backend, device, dtype):
            moved = {n: t.to(device, dtype) for n, t in zip(names, tensors, strict=True)}
            if order is not None:
                moved = {n: order(t) for n, t in moved.items()}
            out, found = gradients(lambda **a: affine_coupling(**a, **options, backend=backend), moved, names)
            return {"y": out[0], "log_abs_det": out[1]} | found

        low, gold = run("reference", "cpu", dtype), run("reference", "cpu", torch.float64)
        for name, got in run(self.backend, self.device, dtype).items():
            row = compare(name, got, low[name], gold[name], scale=1.0)
            assert row.ok, str(row)


class TestFibres(PacksProperties):
    backend = "fibres"


@pytest.mark.triton_interpreted
class TestTriton(PacksProperties):
    backend = "triton"


@pytest.mark.gpu
class TestCuda(PacksProperties):
    backend = "cuda"
    device = "cuda"


@pytest.mark.gpu
class TestTritonOnGpu(PacksProperties):
    backend = "triton"
    device = "cuda"
