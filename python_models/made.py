"""A masked autoencoder for distribution estimation (Germain et al. 2015) on binary digits.

    python -m python_models.made                # about six minutes: one order, then several; nats and samples of both
    python -m python_models.made --orders 1     # the natural order alone

A network with two hidden layers predicts every pixel from those before it in some order, all of them in one pass: a
hidden unit has a degree, the place in the order up to which it may see, and a weight counts where degrees allow it,

    h1 = relu(b1 + W1 x),  h2 = relu(b2 + W2 h1),  p(x_d = 1 | earlier) = sigmoid(b + V h2 + A x),

with W1 and W2 masked by <= and V and A by < (:func:`mpkernels.convolution.masked_linear`, which never multiplies what a
mask takes away). The same weights serve many masks. Training takes a member of a fixed set at each step: one order of
pixels and one draw of hidden degrees. Figures and samples are of the mixture of all members, log mean p, as in section
4.2 of the paper. With one order the members differ in hidden degrees alone; with several, training is order-agnostic.

The paper has 50,000 digits and hidden layers of 8,000 units; here are 4,000 digits (see digit_training.py for what is
done about that). Where out/made_natural/report.json is missing, the natural order is trained first.
"""

from __future__ import annotations

import math
import pathlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpkernels.convolution import masked_linear
from python_models import digit_training
from python_models.digits import Digits
from python_models.likelihood_training import check_budget
from python_models.transformer_training import Progress

PAPERS = (
    "MADE 88.40 with one mask, 86.64 with two layers and 32 masks; NADE 88.33 nats (Germain et al. 2015, binarised "
    "MNIST, 50,000 digits)"
)
HIDDEN = 500
ORDERS = 8
MEMBERS = 8


class Made(nn.Module):
    """The weights, and the degrees of the members that share them.

    Args:
        ink: (D,) in (0, 1): how often each pixel is 1, where the model begins.
        hidden: units of each of the two layers.
        orders: of the pixels: the natural one, then ``orders`` - 1 random ones.
        members: how many sets of degrees; member i has order i modulo ``orders``.
        seed: of orders and degrees.
    """

    degrees: Tensor  # (members, D + 2 hidden)

    def __init__(
        self, ink: Tensor, hidden: int = HIDDEN, orders: int = 1, members: int = MEMBERS, seed: int = 0
    ) -> None:
        super().__init__()
        pixels = len(ink)
        self.sizes = pixels, hidden, hidden
        self.first = nn.Parameter(torch.randn(hidden, pixels) * 0.05)  # W1
        self.second = nn.Parameter(torch.randn(hidden, hidden) / hidden**0.5)  # W2
        self.out = nn.Parameter(torch.randn(pixels, hidden) * 0.01)  # V
        self.direct = nn.Parameter(torch.zeros(pixels, pixels))  # A
        self.first_bias = nn.Parameter(torch.zeros(hidden))
        self.second_bias = nn.Parameter(torch.zeros(hidden))
        self.out_bias = nn.Parameter(torch.logit(ink))
        generator = torch.Generator().manual_seed(seed)
        natural = torch.arange(pixels)
        places = [natural, *(torch.randperm(pixels, generator=generator) for _ in range(orders - 1))]
        # the last place of the order is seen by nobody: a hidden unit that saw it would have no use
        unit = torch.randint(0, max(pixels - 1, 1), (members, 2 * hidden), generator=generator)
        self.register_buffer("degrees", torch.cat([torch.stack([places[i % orders] for i in range(members)]), unit], 1))
        self.turn = 0

    def logits(self, x: Tensor, member: int, backend: str | None = None, wanted: slice = slice(None)) -> Tensor:
        """Logits (N, D) of x_d = 1 given the pixels before d, in the order of a member; of the wanted pixels alone."""
        pixel, one, two = self.degrees[member].split(self.sizes)
        h = F.relu(masked_linear(x, self.first, self.first_bias, pixel, one, backend=backend))
        h = F.relu(masked_linear(h, self.second, self.second_bias, one, two, backend=backend))
        out, bias, direct = (p[wanted] for p in (self.out, self.out_bias, self.direct))
        through = masked_linear(h, out, bias, two, pixel[wanted], True, backend=backend)
        return through + masked_linear(x, direct, None, pixel, pixel[wanted], True, backend=backend)

    def log_prob(self, x: Tensor, backend: str | None = None) -> Tensor:
        """Nats (N,) of binary pictures (N, D): by the next member in training, else by the mixture of all."""
        if self.training:
            self.turn = (self.turn + 1) % len(self.degrees)
            return self._log_prob_of(x, self.turn, backend)
        each = torch.stack([self._log_prob_of(x, member, backend) for member in range(len(self.degrees))])
        return each.logsumexp(dim=0) - math.log(len(each))

    def _log_prob_of(self, x: Tensor, member: int, backend: str | None) -> Tensor:
        logits = self.logits(x, member, backend)
        return -F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(dim=1)

    @torch.no_grad()
    def sample(self, count: int, seed: int, backend: str | None = None) -> Tensor:
        """Binary pictures (count, D) of the mixture: each from one member, as many from one as from another."""
        generator = torch.Generator().manual_seed(seed)
        parts = []
        for member in range(len(self.degrees)):
            x = self.out_bias.new_zeros((len(range(member, count, len(self.degrees))), self.sizes[0]))
            chance = torch.rand(x.shape, generator=generator).to(x.dtype)
            for pixel in self.degrees[member, : self.sizes[0]].argsort().tolist():
                logits = self.logits(x, member, backend, slice(pixel, pixel + 1))[:, 0]
                x[:, pixel] = (chance[:, pixel] < logits.sigmoid()).to(x.dtype)
            parts.append(x)
        return torch.cat(parts)


def fit(
    *,
    minutes: float | None = None,
    steps: int | None = None,
    hidden: int = HIDDEN,
    orders: int = ORDERS,
    members: int = MEMBERS,
    backend: str | None = None,
    seed: int = 0,
    output: pathlib.Path | None,
    progress: Progress = None,
    data: Digits | None = None,
) -> dict:
    """Train on digits, and say how many nats digits take that were held out.

    Args:
        minutes: of training; 3 if neither this nor ``steps`` is given.
        steps: of training, 0 or more, instead of minutes.
        hidden: units of each of the two layers.
        orders: of the pixels: 1 for the natural one; more for order-agnostic training, at most ``members``.
        members: sets of degrees that share the weights, and whose mixture is evaluated.
        backend: of :func:`mpkernels.convolution.masked_linear`; None chooses.
        seed: of first weights, degrees, batches and samples.
        output: a folder for model.pt, samples.png, curve.png and report.json, made if missing; None writes nothing.
            With several orders the figure of one is read from the folder ``made_natural`` beside it, where that model
            is trained if it is not there.
        progress: called after each step; see :func:`python_models.transformer_training.train`.
        data: digits to train on instead.

    Returns:
        A JSON-serialisable dict: figures, baselines, settings, timings.

    Raises:
        ValueError: an argument is not as said; the message begins with its name.
        FileNotFoundError: the digits are not there; the message says how to install them.
    """
    check_budget(minutes, steps, hidden=hidden, orders=orders, members=members)
    if orders > members:
        raise ValueError(f"orders: expected at most one for each of {members} members, got {orders}")
    folder = None if output is None else pathlib.Path(output).parent
    if orders > 1 and folder is not None and not digit_training.earlier_nats(folder, "made_natural"):
        settings = {"minutes": minutes, "steps": steps, "hidden": hidden, "members": members, "backend": backend}
        fit(**settings, orders=1, seed=seed, output=folder / "made_natural", progress=progress, data=data)
    return digit_training.fit(
        "made" if orders > 1 else "made_natural",
        lambda ink: Made(ink, hidden, orders, members, seed),
        papers=PAPERS,
        earlier=digit_training.earlier_nats(folder, "fvsbn", "nade", *(["made_natural"] if orders > 1 else [])),
        rate=3e-3,  # 400 steps: 119 nats; 143 with 1e-3
        weight_decay=0.1,
        shift=0.8,
        minutes=minutes,
        steps=steps,
        default_minutes=3.0,
        backend=backend,
        seed=seed,
        output=output,
        progress=progress,
        data=data,
    )


def main() -> None:
    """The command line."""

    def add(parser):
        parser.add_argument("--hidden", type=int, help=f"units of each layer ({HIDDEN})")
        parser.add_argument("--orders", type=int, help=f"of the pixels; 1: the natural one alone ({ORDERS})")
        parser.add_argument("--members", type=int, help=f"sets of degrees that share the weights ({MEMBERS})")

    digit_training.command("made", "Train a masked autoencoder for distribution estimation on digits.", fit, add)


if __name__ == "__main__":
    main()
