"""MADE's layer, slowly: every set of outputs of one degree is a linear map of the inputs that it sees."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_degrees: Tensor, out_degrees: Tensor, strict: bool
) -> Tensor:
    """Returns y (N, O) for x (N, I): an output sees the inputs of degrees below its own, or at most its own."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    parts, places = [x.new_zeros((x.shape[0], 0), dtype=wide)], [out_degrees.new_zeros((0,), dtype=torch.int64)]
    for degree in out_degrees.unique():
        outputs = (out_degrees == degree).nonzero()[:, 0]
        inputs = (in_degrees < degree if strict else in_degrees <= degree).nonzero()[:, 0]
        seen = weight.index_select(0, outputs).index_select(1, inputs).to(wide)
        parts.append(x.index_select(1, inputs).to(wide) @ seen.T)
        places.append(outputs)
    y = torch.cat(parts, dim=1).index_select(1, torch.cat(places).argsort())
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(x.dtype)
