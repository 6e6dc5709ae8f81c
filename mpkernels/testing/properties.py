"""The properties that every op keeps on every backend, as one abstract pytest class.

``tests/<family>/test_<op>.py`` subclasses :class:`OpProperties` once for the op (adding what only that op promises) and
that class once a backend. Cases, dtypes and bad inputs come from the op's spec. ``tests/conftest.py`` hands pytest's
parametrisation to :func:`generate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from mpkernels import backends, spec
from mpkernels.testing.checking import check_case, gradients
from mpkernels.testing.poison import poisoned_memory


class OpProperties:
    """Subclass it with ``ops``, ``backend`` and ``device``; pytest then runs every property on every case."""

    ops: ClassVar[Sequence[str]] = ()  # names of specs
    backend: ClassVar[str] = ""
    device: ClassVar[str] = "cpu"
    slow: ClassVar[bool] = (
        False  # an interpreter: fewer dtypes, gradcheck in its fast mode, the costly rest on small cases
    )
    large: ClassVar[bool] = True  # whether it runs the large cases

    @classmethod
    def specs(cls) -> list[spec.OpSpec]:
        """The specs under test."""
        return [spec.find(name) for name in cls.ops]

    @classmethod
    def cases(cls, op: spec.OpSpec) -> list[spec.Case]:
        """The cases that this backend runs."""
        return [case for case in op.cases if cls.large or not case.large]

    @pytest.fixture(autouse=True)
    def _poisoned(self):
        with poisoned_memory():
            yield

    def call(self, op: spec.OpSpec, **arguments) -> tuple[Tensor, ...]:
        """The op on the backend under test."""
        return tuple(op.function(**arguments, backend=self.backend))

    def check_threads(self, op: spec.OpSpec, case: str, dtype: torch.dtype) -> None:
        """Asserts that a case has the same bits on one, two and three threads, outputs and gradients."""
        arguments = op.case(case).arguments(dtype)
        threads, found = torch.get_num_threads(), []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                outputs, of_inputs = gradients(lambda **a: self.call(op, **a), arguments, op.differentiable)
                found.append([*outputs, *of_inputs.values()])
        finally:
            torch.set_num_threads(threads)
        for others in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))

    def test_backend_exists(self, op):
        assert backends.why_not(op.op, self.backend, self.device) is None

    def test_error_within_bound(self, op, case, dtype):
        rows = check_case(op, case, backend=self.backend, dtype=dtype, device=self.device)
        assert not [str(row) for row in rows if not row.ok]

    def test_equals_plain_torch(self, op, smooth_case):
        """The op as a user writes it in vectorised torch: written apart from the reference, which sets the bounds."""
        arguments = smooth_case.arguments(torch.float64, self.device)
        for got, wanted in zip(self.call(op, **arguments), op.eager(**arguments), strict=True):
            torch.testing.assert_close(got, wanted)

    @pytest.mark.costly
    @pytest.mark.once
    def test_repeats_are_bit_equal(self, op, case):
        arguments = case.arguments(torch.float32, self.device)

        def run():
            outputs, found = gradients(lambda **a: self.call(op, **a), arguments, op.differentiable)
            return [*outputs, *found.values()]

        for first, second in zip(run(), run(), strict=True):
            assert torch.equal(first.nan_to_num(nan=7.0), second.nan_to_num(nan=7.0))

    @pytest.mark.costly
    def test_input_is_not_written(self, op, case):
        arguments = case.arguments(torch.float32, self.device)
        before = {name: x.clone() for name, x in arguments.items() if isinstance(x, Tensor)}
        gradients(lambda **a: self.call(op, **a), arguments, op.differentiable)
        for name, x in before.items():
            assert torch.equal(arguments[name].nan_to_num(nan=7.0), x.nan_to_num(nan=7.0)), name

    def test_gradcheck(self, op, smooth_case):
        if not op.differentiable:
            return
        function, leaves = self._as_function(op, smooth_case)
        if self.slow:
            assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
        else:
            assert torch.autograd.gradcheck(
                function, leaves, check_forward_ad=op.second_order, check_batched_grad=op.second_order
            )

    @pytest.mark.once
    def test_gradgradcheck(self, op, smooth_case):
        if not op.second_order:
            return
        function, leaves = self._as_function(op, smooth_case)
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=self.slow)

    def _as_function(self, op: spec.OpSpec, case: spec.Case):
        arguments = case.arguments(torch.float64, self.device)
        names = [name for name in op.differentiable if isinstance(arguments.get(name), Tensor)]
        leaves = [arguments[name].detach().clone().requires_grad_() for name in names]

        def function(*xs):
            outputs = self.call(op, **(arguments | dict(zip(names, xs, strict=True))))
            return tuple(x for x in outputs if x.is_floating_point())

        return function, leaves

    def test_bad_input_is_refused(self, op, bad):
        with pytest.raises(bad.error, match=f"(?s){bad.message}"):
            op.function(**({"backend": self.backend} | bad.arguments(device=self.device)))

    @pytest.mark.costly
    @pytest.mark.once
    def test_opcheck(self, op, case):
        """Torch's own check of schema, fake function and dispatch, of the ops that this case calls."""
        if self.backend == "reference":
            return
        arguments = case.arguments(torch.float32, self.device)
        for name, recorded in _recorded_ops(
            lambda: gradients(lambda **a: self.call(op, **a), arguments, op.differentiable)
        ):
            torch.library.opcheck(
                name, recorded, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static")
            )

    @pytest.mark.once
    def test_compiles_whole(self, op, smooth_case):
        """torch.compile(fullgraph=True), forward and backward, equals eager."""
        if self.backend == "reference" or not op.differentiable:
            return
        arguments = smooth_case.arguments(torch.float32, self.device)
        leaves = [
            arguments[name].requires_grad_() for name in op.differentiable if isinstance(arguments.get(name), Tensor)
        ]

        def loss(arguments):
            return torch.stack([x.pow(2).sum() for x in self.call(op, **arguments) if x.is_floating_point()]).sum()

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=False)
        got = torch.autograd.grad(compiled(arguments), leaves)
        for a, b in zip(got, torch.autograd.grad(loss(arguments), leaves), strict=True):
            torch.testing.assert_close(a, b)
        torch._dynamo.reset()

    def test_functional_grad(self, op, smooth_case):
        """torch.func.grad equals autograd."""
        if not op.differentiable:
            return
        function, leaves = self._as_function(op, smooth_case)

        def loss(*xs):
            return torch.stack([x.pow(2).sum() for x in function(*xs)]).sum()

        found = torch.func.grad(loss, argnums=tuple(range(len(leaves))))(*(x.detach() for x in leaves))
        for a, b in zip(found, torch.autograd.grad(loss(*leaves), leaves), strict=True):
            torch.testing.assert_close(a, b)


class _Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace.startswith("mpkernels"):
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


def _recorded_ops(run) -> list[tuple]:
    with _Recorder() as recorder:
        run()
    assert recorder.calls, "no op of the package was called"
    return [
        (function, tuple(x.detach() if isinstance(x, Tensor) else x for x in args)) for function, args in recorder.calls
    ]


def generate(metafunc: pytest.Metafunc) -> None:
    """Parametrises the tests of an OpProperties class; to be called from ``pytest_generate_tests``."""
    cls = metafunc.cls
    if cls is None or not issubclass(cls, OpProperties) or "op" not in metafunc.fixturenames:
        return
    names = [name for name in ("op", "case", "smooth_case", "dtype", "bad") if name in metafunc.fixturenames]
    rows: list[tuple] = []
    ids: list[str] = []
    for op in cls.specs():
        for values, label in _rows(cls, op, names[1:]):
            if cls.slow and metafunc.definition.get_closest_marker("costly") and not values[0].second_order:
                continue
            if cls.slow and metafunc.definition.get_closest_marker("once") and rows and rows[-1][0] is op:
                continue
            if cls.slow and "dtype" in names and values[1] != torch.float32 and not values[0].second_order:
                continue
            rows.append((op, *values))
            ids.append(" ".join([op.name, *label]).replace(" ", "-"))
    metafunc.parametrize(names, rows, ids=ids)


def _rows(cls: type[OpProperties], op: spec.OpSpec, names: list[str]) -> list[tuple[tuple, tuple]]:
    choices = {
        "case": [(case, case.name) for case in cls.cases(op)],
        "smooth_case": [(case, case.name) for case in cls.cases(op) if case.second_order],
        "dtype": [(d, str(d).removeprefix("torch.")) for d in op.backend_dtypes(cls.backend, cls.device)],
        "bad": [(bad, bad.name) for bad in op.bad_inputs],
    }
    rows = [((), ())]
    for name in names:
        rows = [((*values, value), (*labels, label)) for values, labels in rows for value, label in choices[name]]
    return rows
