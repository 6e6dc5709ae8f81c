"""The combining functions of the Triton scans: Triton's interpreter scans one by one, a GPU combines them in a tree."""

import random

import pytest

triton_kernels = pytest.importorskip("mpkernels.volume.composite.triton_kernels", reason="triton is not installed")


def combined_as_a_tree(function, items, generator):
    if len(items) == 1:
        return items[0]
    cut = generator.randrange(1, len(items))
    left, right = (combined_as_a_tree(function, part, generator) for part in (items[:cut], items[cut:]))
    return function(*left, *right)


@pytest.mark.parametrize("seed", range(50))
def test_combining_in_any_tree_equals_combining_in_order(seed):
    generator = random.Random(seed)
    size = generator.randrange(1, 20)
    factors, offsets = ([generator.random() for _ in range(size)] for _ in range(2))
    product = total = 1.0
    carried = b = 0.3
    for i in range(size - 1):
        product, total, carried = product * factors[i], total + factors[i], offsets[i] + factors[i] * carried

    def scan(function, items):
        return combined_as_a_tree(function.fn, items, generator)

    assert scan(triton_kernels._product_before, [(x, 1.0) for x in factors]) == pytest.approx(
        (product * factors[-1], product)
    )
    assert scan(triton_kernels._sum_before, [(x, 0.0) for x in factors]) == pytest.approx(
        (total - 1 + factors[-1], total - 1)
    )
    items = [(x, y, 1.0, 0.0) for x, y in zip(factors, offsets, strict=True)]
    factor, offset, factor_before, offset_before = scan(triton_kernels._recurrence_before, items)
    assert offset + factor * b == pytest.approx(offsets[-1] + factors[-1] * carried)
    assert offset_before + factor_before * b == pytest.approx(carried)
