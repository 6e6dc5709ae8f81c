"""Masks against definitions in two loops, and resolve() against what kernels may rely on."""

import dataclasses
import doctest
import importlib
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mpkernels import masks

SIZES = [(length, keys) for length in range(5) for keys in range(5)]


def by_loops(sees, length, keys):
    rows = [[bool(sees(i, j)) for j in range(keys)] for i in range(length)]
    return torch.tensor(rows, dtype=torch.bool).reshape(length, keys)


def check(mask, shape, expected):
    """``expected`` is bool and broadcasts to ``shape``; kernels rely on the rest of what stands here."""
    expected = expected.expand(shape)
    first, last, dense = masks.resolve(mask, shape)
    assert (first is None) == (last is None)
    if first is not None:
        assert first.shape == last.shape
        for x in (first, last):
            assert x.dtype == torch.int32
            assert x.is_contiguous()
            assert x.numel() == 0 or (int(x.min()) >= 0 and int(x.max()) <= shape[-1])
        if len(shape) > 2:
            *batch, heads, _ = first.shape
            assert list(batch) in ([1] * len(batch), list(shape[:-3]))
            assert heads in (1, shape[-3])
            assert len(first.shape) == len(shape) - 1
        assert first.shape[-1] == shape[-2]
    if dense is not None:
        assert dense.dtype == torch.bool
        dense.expand(shape)
    assert torch.equal(masks.to_dense(mask, shape), expected)
    assert masks.visible_pairs(mask, shape) == int(expected.sum())


@pytest.mark.parametrize("align", ["upper_left", "lower_right"])
def test_causal_and_windows_by_loops(align):
    for length, keys in SIZES:
        level = keys - length if align == "lower_right" else 0

        def compare(mask, sees, shape=(length, keys)):
            check(mask, shape, by_loops(sees, *shape))

        compare(masks.causal(align), lambda i, j, level=level: j <= i + level)
        compare(masks.strictly_causal(align), lambda i, j, level=level: j < i + level)
        for left in (None, 0, 2):
            for right in (None, 0, 1):
                compare(
                    masks.window(left, right, align),
                    lambda i, j, left=left, right=right, level=level: (
                        (left is None or j >= i + level - left) and (right is None or j <= i + level + right)
                    ),
                )


def test_prefix_and_padding_by_loops():
    for length, keys in SIZES:
        for n in (0, 1, 3, 9):
            check(masks.prefix(n), (length, keys), by_loops(lambda i, j, n=n: j < max(i + 1, n), length, keys))
            if n <= keys:
                check(masks.padding(n), (length, keys), by_loops(lambda i, j, n=n: j < n, length, keys))


def test_documents_by_loops():
    for ids, key_ids in (
        ([0, 0, 1, 3, 3], None),
        ([5, 5, 2, 2, 7], None),  # together, if not in order
        ([3, 0, 3, 9], [0, 0, 3]),  # queries may lie anywhere; document 9 has no keys
        ([-1, 4], [4, 4, -1]),
        ([1], []),
        ([], [1, 1]),
        ([], None),
    ):
        own = ids if key_ids is None else key_ids
        expected = by_loops(lambda i, j, ids=ids, own=own: ids[i] == own[j], len(ids), len(own))
        for integers in (list, lambda x: torch.tensor(x, dtype=torch.int32)):
            mask = masks.documents(integers(ids), None if key_ids is None else integers(key_ids))
            check(mask, expected.shape, expected)
            assert masks.resolve(mask, expected.shape)[2] is None
            check(mask & masks.causal(), expected.shape, expected.tril())


def test_documents_in_pieces():
    ids = torch.tensor([[0, 1, 0], [0, 0, 1]])
    expected = (ids[:, None, :, None] == ids[:, None, None, :]).expand(2, 2, 3, 3)
    for pieces in (ids, ids.tolist()):
        with pytest.raises(ValueError, match=r"documents: ids: .*torch.argsort\(ids, dim=-1, stable=True\)"):
            masks.documents(pieces)
        mask = masks.documents(pieces, unsorted="dense")
        check(mask, (2, 2, 3, 3), expected)
        check(mask & masks.causal(), (2, 2, 3, 3), expected.tril())
    assert masks.resolve(masks.documents(ids[1], unsorted="dense"), (3, 3))[2] is None
    with pytest.raises(ValueError, match=r"documents: key_ids: .*torch\.argsort"):
        masks.documents([0, 1], [1, 0, 1])


@pytest.mark.parametrize("batch", [(), (0,), (1,), (3,), (2, 3)])
def test_one_value_for_each_batch_item(batch):
    shape = (*batch, 2, 4, 5)
    numbers = torch.randint(0, 6, batch, generator=torch.Generator().manual_seed(0))
    rows, columns = torch.arange(4)[:, None], torch.arange(5)
    wide = numbers[..., None, None, None]
    check(masks.padding(numbers), shape, columns < wide)
    check(masks.prefix(numbers), shape, columns < torch.maximum(rows + 1, wide))
    ids, key_ids = numbers[..., None] // 2 + torch.arange(4) // 2, torch.arange(5).expand(*batch, 5) // 2
    check(masks.documents(ids, key_ids), shape, ids[..., None, :, None] == key_ids[..., None, None, :])
    if batch == (2, 3):
        check(masks.padding(numbers[1]), shape, columns < wide[1])
        check(masks.padding(numbers[:, :1]), shape, columns < wide[:, :1])
        assert masks.resolve(masks.padding(numbers[1]), shape)[0].shape == (2, 3, 1, 4)
        check(masks.padding(numbers.tolist()), shape, columns < wide)


def test_intervals_are_clamped_and_broadcast():
    shape = (2, 3, 4, 5)
    columns = torch.arange(5)
    for first, last in (((4,), (4,)), ((3, 1), (1, 4)), ((2, 1, 4), (3, 1)), ((2, 3, 1), (1,))):
        first = torch.randint(-3, 8, first, generator=torch.Generator().manual_seed(1))
        last = torch.randint(-3, 8, last, generator=torch.Generator().manual_seed(2))
        above, below = columns >= first[..., None], columns < last[..., None]
        check(masks.intervals(first, last), shape, above & below)
        check(masks.intervals(first.int(), None), shape, above)
        check(masks.intervals(None, last), shape, below)


def test_broadcast_dimensions_stay_one():
    shape = (2, 3, 4, 5, 6)
    for mask, expected in (
        (masks.causal(), (1, 1, 1, 5)),
        (masks.padding([1, 2, 3]), (2, 3, 1, 5)),
        (masks.intervals(torch.zeros(4, 1, dtype=torch.int64), None), (1, 1, 4, 5)),
    ):
        first, last, _ = masks.resolve(mask & masks.window(1, 2), shape)
        assert first.shape == last.shape == expected
    for empty in (None, masks.window(None, -1)):
        assert masks.resolve(empty, shape) == (None, None, None)
        check(empty, shape, torch.ones((), dtype=torch.bool))
    tensor = torch.ones(5, 1, dtype=torch.bool)
    assert masks.resolve(tensor, shape)[2] is tensor


KINDS = ["causal", "window", "prefix", "padding", "documents", "dense", "intervals"]


@st.composite
def compositions(draw):
    """A mask, the shape of scores, and the pairs it lets through, by the definitions."""
    batch = draw(st.sampled_from([(), (2,), (2, 3)]))
    heads, length, keys = draw(st.integers(1, 2)), draw(st.integers(0, 6)), draw(st.integers(0, 6))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (*batch, heads, length, keys)
    i, j = torch.arange(length)[:, None], torch.arange(keys)
    parts = []
    for kind in draw(
        st.lists(
            st.sampled_from(["causal", "window", "prefix", "padding", "documents", "dense", "intervals"]), max_size=4
        )
    ):
        align = draw(st.sampled_from(["upper_left", "lower_right"]))
        level = i + (keys - length if align == "lower_right" else 0)
        if kind == "causal":
            parts.append(
                draw(st.sampled_from([(masks.causal(align), j <= level), (masks.strictly_causal(align), j < level)]))
            )
        elif kind == "window":
            left, right = draw(st.integers(0, 7)), draw(st.integers(0, 7))
            parts.append((masks.window(left, right, align), (j >= level - left) & (j <= level + right)))
        elif kind in ("prefix", "padding"):
            n = torch.randint(0, keys + 1, batch if draw(st.booleans()) else (), generator=random)
            wide = n[..., None, None, None]
            if kind == "prefix":
                parts.append((masks.prefix(n), j < torch.maximum(i + 1, wide)))
            else:
                parts.append((masks.padding(n), j < wide))
        elif kind == "documents":
            ids = torch.randint(0, 3, (*batch, length), generator=random)
            key_ids = torch.randint(0, 3, (*batch, keys), generator=random).sort().values
            parts.append((masks.documents(ids, key_ids), ids[..., None, :, None] == key_ids[..., None, None, :]))
        elif kind == "dense":
            which = [size if draw(st.booleans()) else 1 for size in shape]
            tensor = torch.rand(which, generator=random) > 0.3
            parts.append((draw(st.sampled_from([tensor, masks.dense(tensor)])), tensor))
        else:
            first = torch.randint(-2, keys + 3, (heads, length), generator=random)
            last = first + torch.randint(-1, 5, (*batch, 1, length), generator=random)
            parts.append((masks.intervals(first, last), (first[..., None] <= j) & (j < last[..., None])))
    mask, expected = None, torch.ones((), dtype=torch.bool)
    for part, sees in parts:
        mask = part if mask is None else mask & part
        expected = expected & sees
    return mask, shape, expected


@settings(max_examples=120, deadline=None, derandomize=True)
@given(compositions())
def test_compositions(case):
    check(*case)


def test_values():
    assert masks.causal() == masks.causal()
    assert masks.causal() != masks.strictly_causal()
    assert masks.window(1, -1) == masks.window(1, None)
    assert len({masks.causal() & masks.padding([1, 2]), masks.causal() & masks.padding((1, 2)), masks.prefix(1)}) == 2
    lengths = torch.tensor([1, 2])
    assert masks.padding(lengths) == masks.padding(lengths.clone())
    assert masks.padding(lengths) != masks.padding(lengths + 1)
    assert masks.dense(lengths > 1) & masks.causal() == masks.dense(lengths > 1) & masks.causal()
    with pytest.raises(TypeError, match="unhashable"):
        hash(masks.causal() & masks.padding(lengths))
    with pytest.raises(dataclasses.FrozenInstanceError):
        masks.window(1, 2).left = 3
    with pytest.raises(TypeError):
        masks.causal() & 3
    mask = masks.padding(lengths)
    lengths.zero_()  # what was checked stays
    assert masks.visible_pairs(mask, (2, 1, 1, 2)) == 3
    assert pickle.loads(pickle.dumps(mask)) == mask


def test_reprs_read_like_the_expression():
    for text in (
        "causal()",
        "strictly_causal(align='lower_right') & window(3, None)",
        "window(None, 2, align='lower_right') & prefix(3)",
        "padding([1, 2]) & padding(7)",
        "documents([0, 1, 1]) & documents([[0], [1]], [[0], [0]])",
        "documents([0, 1, 0], unsorted='dense')",
    ):
        mask = eval(text, vars(masks))
        assert repr(mask) == text
    assert repr(masks.padding(torch.tensor([3, 5]))) == "padding(tensor([3, 5]))"
    assert repr(masks.dense(torch.ones(2, 3, 4, dtype=torch.bool))) == "dense(<bool (2, 3, 4)>)"


def test_answers_are_kept():
    mask = masks.documents(torch.arange(6) // 2) & masks.causal()
    first, _, _ = masks.resolve(mask, (6, 6))
    assert masks.resolve(mask, (6, 6))[0].data_ptr() == first.data_ptr()
    mask = masks.padding(torch.tensor([1, 3])) & masks.causal()
    for length in (2, 4):
        assert masks.resolve(mask, (2, 1, length, 4))[0].shape == (2, 1, length)
    assert pickle.loads(pickle.dumps(mask)) == mask
    last = torch.tensor([1, 2])
    mask = masks.intervals(None, last) & masks.causal()
    assert masks.visible_pairs(mask, (2, 2)) == 3
    last.zero_()  # what others can write to is read again
    assert masks.visible_pairs(mask, (2, 2)) == 0


def test_integers_alone_are_resolved_once():
    one = masks.resolve(masks.causal() & masks.padding([2, 3]), (2, 1, 4, 4))
    other = masks.resolve(masks.causal() & masks.padding([2, 3]), (2, 1, 4, 4))
    assert one[0] is other[0]
    with torch.inference_mode():
        first, _, _ = masks.resolve(masks.window(5, 6), (7, 9))
    assert not first.is_inference()  # it would be of no use in training


BAD = [
    (lambda: masks.causal("left"), ValueError, "causal: align: .*'left'"),
    (lambda: masks.strictly_causal(None), ValueError, "strictly_causal: align"),
    (lambda: masks.window(1, 2, "right"), ValueError, "window: align"),
    (lambda: masks.window(-2, 0), ValueError, "window: left: .*-2"),
    (lambda: masks.window(0, 1.5), TypeError, "window: right: .*float"),
    (lambda: masks.window(True, 1), TypeError, "window: left: .*bool"),
    (lambda: masks.prefix(-1), ValueError, "prefix: n: .*-1"),
    (lambda: masks.prefix(torch.tensor([1, -4])), ValueError, "prefix: n: .*-4"),
    (lambda: masks.prefix(2.0), TypeError, "prefix: n: .*float"),
    (lambda: masks.padding([3, -1]), ValueError, "padding: lengths: .*-1"),
    (lambda: masks.padding([1.0]), TypeError, "padding: lengths: .*float"),
    (lambda: masks.padding([[1, 2], [3]]), ValueError, "padding: lengths: .*one length"),
    (lambda: masks.padding(torch.ones(2)), TypeError, "padding: lengths: .*float32"),
    (lambda: masks.documents(torch.ones(3)), TypeError, "documents: ids: .*float32"),
    (lambda: masks.documents(3), ValueError, "documents: ids: .*one number"),
    (lambda: masks.documents([0], unsorted="sort"), ValueError, "documents: unsorted: .*'sort'"),
    (lambda: masks.documents([[0], [1]], [[0], [1], [2]]), ValueError, r"documents: key_ids: .*\(2,\) and \(3,\)"),
    (lambda: masks.dense(torch.ones(2, 2)), TypeError, "dense: .*float32.*bias"),
    (lambda: masks.dense([[True]]), TypeError, "dense: .*list"),
    (lambda: masks.intervals(None, None), ValueError, "intervals: first, last"),
    (lambda: masks.intervals([0], None), TypeError, "intervals: first: .*list"),
    (lambda: masks.intervals(None, torch.tensor(3)), ValueError, "intervals: last: .*shape"),
    (
        lambda: masks.intervals(torch.zeros(2).int(), torch.zeros(2).int().to("meta")),
        ValueError,
        "device of first, cpu",
    ),
]
UNFIT = [
    (torch.ones(3, 4), TypeError, "mask: .*float32"),
    ("causal", TypeError, "mask: .*str"),
    (torch.ones(3, 5, dtype=torch.bool), ValueError, r"mask: shape \(3, 5\) .*\(2, 2, 3, 4\)"),
    (torch.ones(1, 2, 2, 3, 4, dtype=torch.bool), ValueError, "mask: shape"),
    (masks.padding([1, 2, 3]), ValueError, r"padding: lengths: shape \(3,\) .*\(2,\)"),
    (masks.padding([4, 5]), ValueError, "padding: lengths: .*S = 4 keys, got 5"),
    (masks.causal() & masks.padding(torch.tensor([4, 5])), ValueError, "padding: lengths: .*S = 4 keys, got 5"),
    (masks.prefix([[1, 2]] * 2), ValueError, "prefix: n: shape"),
    (masks.documents([0, 0]), ValueError, "documents: ids: .*L = 3 .*got 2"),
    (masks.documents([0, 0, 0]), ValueError, "documents: ids .*no key_ids.*S = 4 .*got 3"),
    (masks.documents([0, 0, 0], [0]), ValueError, "documents: key_ids: .*S = 4 .*got 1"),
    (masks.documents([[0] * 3] * 3, [0] * 4), ValueError, r"documents: ids: shape \(3,\)"),
    (masks.intervals(torch.zeros(2, 2).int(), None), ValueError, r"intervals: first: shape \(2, 2\) .*\(2, 2, 3\)"),
    (
        masks.dense(torch.ones(4, dtype=torch.bool, device="meta")),
        ValueError,
        "mask: expected the device .*cpu, got meta",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(("mask", "error", "message"), UNFIT)
def test_masks_that_do_not_fit(mask, error, message):
    with pytest.raises(error, match=message):
        masks.resolve(mask, (2, 2, 3, 4), "cpu")


@pytest.mark.parametrize("shape", [(3,), (2, -1), (2**31, 3)])
def test_bad_shapes(shape):
    with pytest.raises(ValueError, match="shape"):
        masks.resolve(masks.causal(), shape)


def made_of_integers(x):
    mask = masks.causal("lower_right") & masks.window(2, -1) & masks.padding([3, 4]) & masks.prefix(1)
    return masks.resolve(mask, (2, 2, x.shape[0], x.shape[0] + 1), x.device)


def made_of_ids(x):
    return masks.resolve(masks.documents(x) & masks.strictly_causal(), (2, 2, x.shape[0], x.shape[0]), x.device)


@pytest.mark.parametrize("function", [made_of_integers, made_of_ids])
def test_compiles_whole(function):
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for x in (torch.arange(5) // 2, torch.arange(8) // 3):
        for mine, theirs in zip(compiled(x), function(x), strict=True):
            assert mine is theirs is None or torch.equal(mine, theirs)
    if function is made_of_ids:
        with pytest.raises(RuntimeError, match=r"documents: ids: .*lie together"):
            compiled(torch.tensor([0, 1, 0, 1, 2]))


def test_masks_are_arguments_and_constants_of_compiled_functions():
    kept = masks.causal() & masks.padding(torch.tensor([1, 3]))

    def resolved(mask):
        return masks.resolve(mask, (2, 1, 3, 3))[1] + masks.resolve(kept, (2, 1, 3, 3))[1]

    compiled = torch.compile(resolved, fullgraph=True, backend="eager")
    for mask in (masks.documents(torch.tensor([0, 1, 1])), masks.causal() & masks.dense(torch.ones(3) > 0)):
        assert torch.equal(compiled(mask), resolved(mask))


def test_under_vmap():
    lengths = torch.tensor([1, 3, 2])
    last = torch.vmap(lambda n: masks.resolve(masks.padding(n) & masks.causal(), (2, 3, 4), n.device)[1])(lengths)
    assert torch.equal(last[:, 0], torch.minimum(lengths[:, None], torch.arange(1, 4)))


def test_show_large_masks_by_blocks():
    text = masks.show(masks.causal() & masks.window(127, None), 512, 512)
    lines = text.splitlines()
    assert lines[0] == "causal() & window(127, None)"
    assert len(lines) == 2 + 32 + 3
    assert lines[2 + 8].endswith("│ ▒▒██████████████▒▒" + "·" * 46)
    assert lines[-3].startswith("a mark is 16 x 8 pairs")
    pairs = masks.visible_pairs(masks.window(127, 0), (512, 512))
    assert lines[-2] == f"visible pairs: {100 * pairs / 512**2:.1f} % ({pairs:,} of 262,144)"
    assert lines[-1] == "blocks of 64 x 64 visited: 32.8 % (21 of 64, 14 masked)"
    assert masks.show(masks.to_dense(masks.window(127, 0), (512, 512)), 512, 512).splitlines()[1:] == lines[1:]


def test_show_chooses_batch_and_head():
    mask = masks.padding([1, 3]) & masks.intervals(torch.tensor([[0], [1]]), None)
    seen = [masks.show(mask, 1, 3, batch=b, head=h).splitlines()[2][-6:] for b in range(2) for h in range(2)]
    assert seen == ["██····", "······", "██████", "··████"]
    for chosen in ({"batch": 2}, {"head": 2}, {"head": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(chosen))}: expected an index below 2"):
            masks.show(mask, 1, 3, **chosen)
    with pytest.raises(ValueError, match="batch and head"):
        masks.show(masks.padding([1, 2]) & masks.padding([1, 2, 3]), 4, 4)


@pytest.mark.parametrize(("length", "keys"), [(0, 3), (3, 0), (0, 0), (1, 1), (3, 70)])
def test_show_of_any_size(length, keys, tmp_path):
    for mask in (None, masks.causal(), torch.ones(length, keys, dtype=torch.bool)):
        text = masks.show(mask, length, keys, path=tmp_path / "mask.png")
        assert max(map(len, text.splitlines())) <= 82
        assert (tmp_path / "mask.png").stat().st_size < 10_000


def test_png_has_three_tones(tmp_path):
    path = tmp_path / "mask.png"
    masks.show(masks.causal(), 1024, 1024, path=path)
    image = Image.open(path).convert("RGB")
    counts = {tone: count for count, tone in image.getcolors()}
    skipped, some, full = (233, 236, 240), (146, 190, 226), (31, 94, 148)
    cell = 6 * 6
    assert counts[full] >= cell * 64 * 63 // 2
    assert counts[skipped] >= cell * 64 * 63 // 2
    assert cell * 64 <= counts[some] < cell * 64 + 400  # the diagonal, and the legend


@pytest.mark.parametrize("module", ["api", "representation", "picture"])
def test_examples(module):
    name = f"mpkernels.masks.{module}"
    importlib.import_module(name)
    found = doctest.testmod(sys.modules[name])
    assert found.attempted > 0
    assert found.failed == 0


def test_the_page_about_masks_runs(tmp_path, monkeypatch, capsys):
    docs = Path(__file__).resolve().parents[1] / "docs"
    page = (docs / "masks.md").read_text()
    monkeypatch.chdir(tmp_path)
    exec(page.split("```python\n")[1].split("```")[0], {})
    assert "blocks of 64 x 64 visited" in capsys.readouterr().out
    shown = re.findall(r"\]\((pictures/\w+\.png)\)", page)
    assert sorted(Path(name).name for name in shown) == sorted(path.name for path in tmp_path.iterdir())
    assert all((docs / name).is_file() for name in shown)
