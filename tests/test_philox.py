"""The counter-based random numbers that references draw."""

import torch

from mpkernels.philox import philox


def test_philox_gives_the_known_answers():
    """Of Random123 (kat_vectors, philox4x32-10)."""
    answers = {
        "00000000 " * 6: "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        "ffffffff " * 6: "408f276d 41c83b0e a20bc7c6 6d5451fd",
        "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0": "d16cfe09 94fdcceb 5001e420 24126ea1",
    }
    for words, wanted in answers.items():
        c0, c1, c2, c3, k0, k1 = (torch.tensor(int(x, 16)) for x in words.split())
        assert " ".join(f"{int(x):08x}" for x in philox((c0, c1, c2, c3), (k0, k1))) == wanted
