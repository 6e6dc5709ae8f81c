"""Rasterization as one writes it in vectorised torch: all tiles at once, lists padded to the longest."""

from __future__ import annotations

import torch
from torch import Tensor


def rasterize(
    means2d: Tensor,
    conics: Tensor,
    colors: Tensor,
    opacities: Tensor,
    width: int,
    height: int,
    isect_offsets: Tensor,
    flatten_ids: Tensor,
    *,
    tile_size: int = 16,
    backgrounds: Tensor | None = None,
    masks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The outputs of :func:`mpkernels.splatting.rasterize`; memory grows with tiles x longest list x pixels."""
    lead = isect_offsets.shape[:-2]
    high, wide = isect_offsets.shape[-2:]
    starts = isect_offsets.flatten().long()
    counts = torch.diff(starts, append=starts.new_tensor([flatten_ids.numel()]))
    if masks is not None:
        counts = counts * masks.flatten()
    place = torch.arange(int(counts.max()) if counts.numel() else 0, device=starts.device)
    there = place < counts[:, None]  # (tiles, longest)
    ids = torch.zeros_like(there, dtype=torch.int64)
    ids[there] = flatten_ids[(starts[:, None] + place)[there]].long()

    tile = torch.arange(starts.numel(), device=starts.device)
    corner = torch.stack([tile % wide, tile // wide % max(high, 1)], -1) * tile_size
    steps = torch.arange(tile_size, device=starts.device)
    inside = torch.stack([steps.repeat(tile_size), steps.repeat_interleave(tile_size)], -1)
    centre = (corner[:, None] + inside).to(means2d.dtype) + 0.5  # (tiles, pixels, 2)

    channels = colors.shape[-1]
    offset = centre[:, :, None] - means2d.reshape(-1, 2)[ids][:, None]  # (tiles, pixels, longest, 2)
    a, b, c = conics.reshape(-1, 3)[ids][:, None].unbind(-1)
    power = -0.5 * (a * offset[..., 0] ** 2 + c * offset[..., 1] ** 2) - b * offset[..., 0] * offset[..., 1]
    alpha = opacities.reshape(-1)[ids][:, None] * power.exp()
    alpha = torch.where(there[:, None] & (power <= 0) & (alpha >= 1 / 255), alpha.clamp(max=0.999), 0)
    alpha = torch.where(torch.cumprod(1 - alpha, -1) > 1e-4, alpha, 0)
    passed = torch.cumprod(torch.nn.functional.pad(1 - alpha, (1, 0), value=1.0), -1)
    seen = torch.einsum("tpn,tnc->tpc", alpha * passed[..., :-1], colors.reshape(-1, channels)[ids])
    left = passed[..., -1:]
    if backgrounds is not None:
        seen = seen + left * backgrounds.reshape(-1, channels).repeat_interleave(high * wide, 0)[:, None]

    def image(x: Tensor) -> Tensor:
        x = x.reshape(*lead, high, wide, tile_size, tile_size, -1).movedim(-3, -4)
        return x.reshape(*lead, high * tile_size, wide * tile_size, -1)[..., :height, :width, :]

    return image(seen), image(1 - left)
