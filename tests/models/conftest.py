"""What tests of several models share: a single thread, small pictures instead of digits, weights that all matter."""

import pytest
import torch

from python_models.digits import Digits


@pytest.fixture
def one_thread():
    """Threads only wait for each other where tensors are as small as in tests of models."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def bars():
    """Pictures of one bar each, and in which of four places it stands: what makes them, by side and number."""

    def make(side, number=60):
        generator = torch.Generator().manual_seed(0)
        pictures = torch.randint(20, (number, side, side), generator=generator)
        labels = torch.arange(number) % 4
        wide = side // 4
        for i, label in enumerate(labels.tolist()):
            top = int(torch.randint(2, (), generator=generator))
            ink = torch.randint(200, 256, (side - 2, wide), generator=generator)
            pictures[i, top : side - 2 + top, label * wide : (label + 1) * wide] = ink
        pictures, ends = pictures.to(torch.uint8), (number - 40, number - 20, number)
        cut = [slice(begin, end) for begin, end in zip((0, *ends[:-1]), ends, strict=True)]
        return Digits(*(pictures[part] for part in cut)), Digits(*(labels[part] for part in cut))

    return make


@pytest.fixture
def shaken():
    """Gives a model in float64 weights that all have an influence: new couplings are near the identity."""

    def make(model, *example, std=0.1):
        with torch.no_grad():
            model.train().log_prob(*example)
            generator = torch.Generator().manual_seed(0)
            for parameter in model.parameters():
                parameter += std * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        return model.double().eval()

    return make
