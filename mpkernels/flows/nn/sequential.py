"""Transforms one after another, and several levels of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mpkernels.autograd import forward_mode
from mpkernels.flows.nn import recompute
from mpkernels.flows.nn.base import Inverse, Shape, Transform, check_module, no_log_abs_det, run
from mpkernels.flows.nn.recompute import Step

MEMORY = ("store", "recompute")


class Sequential(Transform):
    """Transforms one after another: forward from the first to the last, inverse from the last to the first.

    Args:
        *transforms: modules with nflows' contract, these or others'.
        memory: "store" lets autograd keep every activation. "recompute" keeps the outputs and a few states between the
            steps, and rebuilds the rest in backward, from the outputs through the inverses; each step's network runs
            twice in all, as long as the step overrides :meth:`Transform.rebuild` (couplings and Glow steps here do).
        checkpoint_every: with "recompute", the state before every k-th step, counted from the end, is kept. None
            measures: the first pass and every 100th after it keep all states, rebuild them beside that, and find those
            that have drifted by more than ``drift_limit``; the passes between keep these alone. Steps that lose their
            input (splines) always have it kept.
        drift_limit: the largest difference between a rebuilt and a kept state, relative to the largest element.

    With "recompute":

    - the state is float32 or float64: bfloat16 and float16 inputs are converted to float32, and so are the outputs (in
      a half type, what is rebuilt is unusable after a few steps). Networks may compute in a half type, by autocast.
    - gradients are those at the rebuilt states, so where an activation has a kink (ReLU), an element within the drift
      of it may fall on the other side.
    - random numbers that a network draws (dropout) are drawn again. Batch normalization in training is refused: a
      second run would change its running statistics again.
    - the context, a tensor or any nest of tuples, lists and dictionaries of tensors, gets its gradients.
    - gradients of gradients are refused. Under torch.func's transforms and forward mode, activations are stored.
    - torch.compile leaves the chain as it is (a graph break).
    - measuring reads a number from the device; the other passes do not.

    Raises:
        TypeError: a transform is no module with an inverse.
        ValueError: ``memory`` or ``checkpoint_every`` is none of the above.

    Example:
        >>> import torch
        >>> from mpkernels.flows import nn
        >>> flow = nn.Sequential(nn.ActNorm(4), nn.InvertibleConv1x1(4), memory="recompute")
        >>> x = torch.randn(8, 4, 5, 5)
        >>> y, logabsdet = flow(x)
        >>> torch.allclose(flow.inverse(y)[0], x, atol=1e-5)
        True
    """

    def __init__(
        self,
        *transforms: nn.Module,
        memory: str = "store",
        checkpoint_every: int | None = None,
        drift_limit: float = 1e-5,
    ):
        super().__init__()
        for i, transform in enumerate(transforms):
            check_module(f"transforms[{i}]", transform)
        if memory not in MEMORY:
            raise ValueError(f"memory: expected 'store' or 'recompute', got {memory!r}")
        if checkpoint_every is not None and (not isinstance(checkpoint_every, int) or checkpoint_every < 1):
            raise ValueError(f"checkpoint_every: expected a positive integer or None, got {checkpoint_every!r}")
        self.transforms = nn.ModuleList(transforms)
        self.memory = memory
        self._forward_plan = recompute.Plan(checkpoint_every, drift_limit)
        self._inverse_plan = recompute.Plan(checkpoint_every, drift_limit)

    def __len__(self) -> int:
        return len(self.transforms)

    def __getitem__(self, index: int) -> nn.Module:
        return self.transforms[index]

    def forward(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """From the first transform to the last: ``(outputs, logabsdet)``."""
        return self._run(inputs, context, False)

    def inverse(self, inputs: Tensor, context: Any = None) -> tuple[Tensor, Tensor]:
        """From the last transform to the first: ``(outputs, logabsdet)``."""
        return self._run(inputs, context, True)

    def output_shape(self, shape: Sequence[int]) -> Shape:
        """See :meth:`Transform.output_shape`."""
        for transform in self.transforms:
            shape = transform.output_shape(shape) if isinstance(transform, Transform) else shape
        return tuple(shape)

    def input_shape(self, shape: Sequence[int]) -> Shape:
        """See :meth:`Transform.input_shape`."""
        for transform in reversed(self.transforms):
            shape = transform.input_shape(shape) if isinstance(transform, Transform) else shape
        return tuple(shape)

    def drift(self) -> tuple[float, ...]:
        """What the last measurement found: how far the rebuilt inputs of each step were from the kept ones."""
        return self._forward_plan.drifts

    def _run(self, inputs: Tensor, context: Any, inverse: bool) -> tuple[Tensor, Tensor]:
        if self.memory == "recompute":
            if inputs.dtype in (torch.bfloat16, torch.float16):
                inputs = inputs.float()
            if len(self) and self._recorded(inputs, context):
                plan = self._inverse_plan if inverse else self._forward_plan
                steps = list(_steps(self, inverse))
                return recompute.chain(steps, plan, inputs, context)  # pyright: ignore[reportCallIssue]
        total = no_log_abs_det(inputs)
        transforms: list[nn.Module] = list(self.transforms)
        for transform in reversed(transforms) if inverse else transforms:
            inputs, log_abs_det = run(transform, inputs, context, inverse)
            total = total + log_abs_det
        return inputs, total

    def _recorded(self, inputs: Tensor, context: Any) -> bool:
        """Whether backward may follow, so that there is something to rebuild."""
        if not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active() or forward_mode():
            return False
        tensors = (x for x in pytree.tree_leaves(context) if isinstance(x, Tensor))
        return inputs.requires_grad or any(x.requires_grad for x in (*self.parameters(), *tensors))


def _steps(transform: nn.Module, inverse: bool) -> Iterable[Step]:
    """The steps of nested chains and inverses, in order."""
    if isinstance(transform, Inverse):
        yield from _steps(transform.transform, not inverse)
    elif isinstance(transform, Sequential):
        for step in reversed(transform.transforms) if inverse else transform.transforms:
            yield from _steps(step, inverse)
    else:
        yield Step(transform, inverse)
