"""A fully visible sigmoid belief network (Neal 1992; Frey et al. 1996) on binary digits.

    python -m python_models.fvsbn      # a minute of training, then nats of held-out digits and samples

The baseline of autoregressive models: every pixel is predicted from those before it by logistic regression,

    p(x) = prod_d Bernoulli(x_d; sigmoid(b_d + sum_{e<d} A[d, e] x_e)),

which is one strictly lower triangular matrix: :func:`mpkernels.convolution.masked_linear` with the place of a pixel as
its degree computes that triangle alone. With 4,000 digits instead of the 50,000 of the papers it stays a few nats
behind their figures (see digit_training.py for what is done about that).
"""

from __future__ import annotations

import pathlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpkernels.convolution import masked_linear
from python_models import digit_training
from python_models.digits import Digits
from python_models.transformer_training import Progress

PAPERS = "FVSBN 97.45 nats (Larochelle & Murray 2011, binarised MNIST, 50,000 digits)"


class Fvsbn(nn.Module):
    """Logits of every pixel from those before it.

    Args:
        ink: (D,) in (0, 1): how often each pixel is 1, where the model begins.
    """

    def __init__(self, ink: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(len(ink), len(ink)))  # A: the triangle below the diagonal counts
        self.bias = nn.Parameter(torch.logit(ink))
        self.register_buffer("degrees", torch.arange(len(ink)), persistent=False)

    def forward(self, x: Tensor, backend: str | None = None) -> Tensor:
        """Logits (N, D): that of pixel d depends on the pixels before d alone."""
        degrees = self.get_buffer("degrees")
        return masked_linear(x, self.weight, self.bias, degrees, degrees, strict=True, backend=backend)

    def log_prob(self, x: Tensor, backend: str | None = None) -> Tensor:
        """Nats (N,) of binary pictures (N, D)."""
        return -F.binary_cross_entropy_with_logits(self(x, backend), x, reduction="none").sum(1)

    @torch.no_grad()
    def sample(self, count: int, seed: int, backend: str | None = None) -> Tensor:
        """Binary pictures (count, D), a pixel after the other."""
        uniform = torch.rand((len(self.bias), count), generator=torch.Generator().manual_seed(seed))
        x = torch.zeros(len(self.bias), count)
        for d, (row, bias) in enumerate(zip(self.weight, self.bias, strict=True)):
            x[d] = (uniform[d] < torch.sigmoid(row[:d] @ x[:d] + bias)).float()
        return x.T.contiguous()


def fit(
    *,
    minutes: float | None = None,
    steps: int | None = None,
    backend: str | None = None,
    seed: int = 0,
    output: pathlib.Path | None,
    progress: Progress = None,
    data: Digits | None = None,
) -> dict:
    """Train on digits, and say how many nats digits take that were held out.

    Args:
        minutes: of training; 1 if neither this nor ``steps`` is given.
        steps: of training, 0 or more, instead of minutes.
        backend: of :func:`mpkernels.convolution.masked_linear`; None chooses.
        seed: of batches and samples.
        output: a folder for model.pt, samples.png, curve.png and report.json, made if missing; None writes nothing.
        progress: called after each step; see :func:`python_models.transformer_training.train`.
        data: digits to train on instead.

    Returns:
        A JSON-serialisable dict: figures, baselines, settings, timings.

    Raises:
        ValueError: an argument is not as said; the message begins with its name.
        FileNotFoundError: the digits are not there; the message says how to install them.
    """
    return digit_training.fit(
        "fvsbn",
        Fvsbn,
        papers=PAPERS,
        earlier={},
        rate=4e-3,
        weight_decay=0.1,
        shift=0.8,
        minutes=minutes,
        steps=steps,
        default_minutes=1.0,
        backend=backend,
        seed=seed,
        output=output,
        progress=progress,
        data=data,
    )


def main() -> None:
    """The command line."""
    digit_training.command("fvsbn", "Train a sigmoid belief network on digits.", fit, lambda parser: None)


if __name__ == "__main__":
    main()
