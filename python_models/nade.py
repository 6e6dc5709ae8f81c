"""A neural autoregressive distribution estimator (Larochelle & Murray 2011) on binary digits.

    python -m python_models.nade      # four minutes of training, then nats of held-out digits and samples

Every pixel is predicted from those before it, as in fvsbn.py, but through a layer of hidden units whose weights all
pixels share:

    p(x) = prod_d Bernoulli(x_d; sigmoid(b_d + V_d . h_d)),  h_d = sigmoid(c + sum_{e<d} W[:, e] x_e).

:func:`mpkernels.convolution.nade_log_prob` is that recurrence, and its gradient; :func:`nade_sample` draws from it.
With 4,000 digits instead of the 50,000 of the paper it stays a few nats behind the paper's figure (see
digit_training.py for what is done about that). Where out/fvsbn/report.json is missing, the belief network is trained
first, for a minute.
"""

from __future__ import annotations

import pathlib

import torch
from torch import Tensor, nn

from mpkernels.convolution import nade_log_prob, nade_sample
from python_models import digit_training, fvsbn
from python_models.digits import Digits
from python_models.likelihood_training import check_budget
from python_models.transformer_training import Progress

PAPERS = "NADE 88.33, FVSBN 97.45 nats (Larochelle & Murray 2011, binarised MNIST, 50,000 digits)"
HIDDEN = 500


class Nade(nn.Module):
    """The parameters of the estimator.

    Args:
        ink: (D,) in (0, 1): how often each pixel is 1, where the model begins.
        hidden: H, how many hidden units.
    """

    def __init__(self, ink: Tensor, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.in_weight = nn.Parameter(torch.randn(hidden, len(ink)) * 0.05)  # W
        self.in_bias = nn.Parameter(torch.zeros(hidden))  # c
        self.out_weight = nn.Parameter(torch.randn(len(ink), hidden) * 0.01)  # V
        self.out_bias = nn.Parameter(torch.logit(ink))  # b

    def log_prob(self, x: Tensor, backend: str | None = None) -> Tensor:
        """Nats (N,) of binary pictures (N, D)."""
        return nade_log_prob(x, self.in_weight, self.in_bias, self.out_weight, self.out_bias, backend=backend)

    def sample(self, count: int, seed: int, backend: str | None = None) -> Tensor:
        """Binary pictures (count, D)."""
        parameters = self.in_weight, self.in_bias, self.out_weight, self.out_bias
        return nade_sample(count, *parameters, seed=seed, backend=backend)


def fit(
    *,
    minutes: float | None = None,
    steps: int | None = None,
    hidden: int = HIDDEN,
    backend: str | None = None,
    seed: int = 0,
    output: pathlib.Path | None,
    progress: Progress = None,
    data: Digits | None = None,
) -> dict:
    """Train on digits, and say how many nats digits take that were held out.

    Args:
        minutes: of training; 4 if neither this nor ``steps`` is given.
        steps: of training, 0 or more, instead of minutes.
        hidden: units of the layer.
        backend: of :func:`mpkernels.convolution.nade_log_prob`; None chooses.
        seed: of first weights, batches and samples.
        output: a folder for model.pt, samples.png, curve.png and report.json, made if missing; None writes nothing.
            The figure of fvsbn.py is read from the folder ``fvsbn`` beside it, where the network is trained if it
            is not there.
        progress: called after each step; see :func:`python_models.transformer_training.train`.
        data: digits to train on instead.

    Returns:
        A JSON-serialisable dict: figures, baselines, settings, timings.

    Raises:
        ValueError: an argument is not as said; the message begins with its name.
        FileNotFoundError: the digits are not there; the message says how to install them.
    """
    check_budget(minutes, steps, hidden=hidden)
    folder = None if output is None else pathlib.Path(output).parent
    if folder is not None and not digit_training.earlier_nats(folder, "fvsbn"):
        shorter = None if minutes is None else min(1.0, minutes / 4)
        fvsbn.fit(minutes=shorter, steps=steps, seed=seed, output=folder / "fvsbn", progress=progress, data=data)
    return digit_training.fit(
        "nade",
        lambda ink: Nade(ink, hidden),
        papers=PAPERS,
        earlier=digit_training.earlier_nats(folder, "fvsbn"),
        rate=3e-3,
        weight_decay=0.1,
        shift=0.8,
        minutes=minutes,
        steps=steps,
        default_minutes=4.0,
        backend=backend,
        seed=seed,
        output=output,
        progress=progress,
        data=data,
    )


def main() -> None:
    """The command line."""
    hidden = lambda parser: parser.add_argument("--hidden", type=int, help=f"units of the layer ({HIDDEN})")  # noqa: E731
    digit_training.command("nade", "Train a neural autoregressive distribution estimator on digits.", fit, hidden)


if __name__ == "__main__":
    main()
