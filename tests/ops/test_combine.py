"""The `combine` operations, gram, dots and combine, on every backend: against float64 sums of the same numbers within
bounds that follow from the arithmetic, for all layouts, types and sizes that gradients come in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtlgrad import ops, reference
from tests.ops import emulated
from tests.support.bounds import DTYPES, TINY, UNIT, near, normal
from tests.support.oracles import procrustes

SIZES = [0, 1, 31, 32, 33, 255, 257, 1000, 70_000]
TYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def matrix(rows: Any) -> Tensor:
    """[T, N] float64 of any form of rows."""
    if isinstance(rows, ops.Stacked):
        return torch.cat([t.double().cpu().reshape(len(t), -1) for t in rows.tensors], 1)
    return torch.stack([vector(row) for row in rows])


def vector(row: Any) -> Tensor:
    return torch.cat([t.double().cpu().reshape(-1) for t in ([row] if isinstance(row, Tensor) else row)])


def check_sums(rows: Any) -> None:
    """gram and dots: products of two numbers are exact in float64 (but for float64's own), only sums round."""
    g = matrix(rows)
    terms = g.abs() @ g.abs().mT
    limit = (g.shape[1] + 2) ** 0.5 * 2**-51 * terms
    got = ops.gram(rows)
    assert got.dtype == torch.float64
    assert torch.equal(got, got.mT)
    assert ((got.cpu() - g @ g.mT).abs() <= limit).all()
    probe = rows.tensors if isinstance(rows, ops.Stacked) else rows
    last = [t[-1] for t in probe] if isinstance(rows, ops.Stacked) else probe[-1]
    got = ops.dots(rows, last)
    assert got.dtype == torch.float64
    assert ((got.cpu() - g @ vector(last)).abs() <= limit[:, -1]).all()


def check_combine(rows: Any, weights: Tensor, **options: Any) -> Any:
    """combine: T products and sums in float32 (float64), rounded once to the rows' type."""
    result = ops.combine(rows, weights, **options)
    first = rows.tensors[0][0] if isinstance(rows, ops.Stacked) else rows[0]
    like = [first] if isinstance(first, Tensor) else list(first)
    if isinstance(rows, ops.Stacked):
        like = [t[0] for t in rows.tensors]
    parts = [result] if isinstance(result, Tensor) else result
    assert [(p.shape, p.dtype) for p in parts] == [(p.shape, p.dtype) for p in like]
    g, w = matrix(rows), weights.double().cpu()
    start = 0
    for part in parts:
        block = g[:, start : start + part.numel()]
        start += part.numel()
        unit = UNIT[torch.float64 if part.dtype == torch.float64 else torch.float32]
        want, terms = w @ block, w.abs() @ block.abs()
        limit = (len(w) + 2) * unit * terms + UNIT[part.dtype] * want.abs() + TINY[part.dtype]
        assert ((part.double().cpu().reshape(-1) - want).abs() <= limit).all()
    return result


def check_all(rows: Any, weights: Tensor) -> Any:
    check_sums(rows)
    return check_combine(rows, weights)


def weights_for(tasks: int, device: str) -> Tensor:
    return normal(90, tasks).to(device)


# ---- parity ----------------------------------------------------------------------------------------------------------


@TYPES
@pytest.mark.parametrize("size", SIZES)
def test_sizes(size: int, dtype: torch.dtype, device: str) -> None:
    """Numbers of tasks on both sides of four, which the kernels take at a time."""
    size = min(size, 9_000) if emulated() else size
    for tasks in (1, 2, 3, 4, 5, 8, 9) if size <= 1000 else (3, 5):
        rows = normal(1, tasks, size).to(dtype).to(device)
        result = check_all(rows, weights_for(tasks, device))
        # The same rows in another form: the same bits.
        weights = weights_for(tasks, device)
        for form in (list(rows), [[r] for r in rows], ops.Stacked([rows])):
            assert torch.equal(ops.gram(form), ops.gram(rows))
            again = ops.combine(form, weights)
            assert torch.equal(again if isinstance(again, Tensor) else again[0], result)
            assert isinstance(again, list) == (form is not rows and not isinstance(form[0], Tensor))


@pytest.mark.parametrize("tasks", [16, 33, 64, 130])
def test_many_tasks(tasks: int, device: str) -> None:
    check_all(normal(2, tasks, 300).float().to(device), weights_for(tasks, device))


def test_whole_numbers_come_out_exact(device: str) -> None:
    """Sums that every order and precision has exactly: one wrong, missing or doubled element shows."""
    for tasks, size in ((1, 1), (2, 255), (3, 4097), (4, 33_000), (5, 1025), (7, 32_769), (9, 600)):
        rows = torch.randint(-8, 9, (tasks, size), generator=torch.Generator().manual_seed(size)).double()
        weights = torch.arange(1, tasks + 1).double()
        for dtype in DTYPES:
            given = rows.to(dtype).to(device)
            assert torch.equal(ops.gram(given).cpu(), rows @ rows.mT)
            assert torch.equal(ops.dots(given, given[0]).cpu(), rows @ rows[0])
            if tasks < 6 or dtype in (torch.float32, torch.float64):  # sums up to 256: bfloat16 has them
                assert torch.equal(ops.combine(given, weights.to(device)).double().cpu(), weights @ rows)


def unequal(seed: int, tasks: int, count: int, dtypes: list[torch.dtype], device: str) -> list[list[Tensor]]:
    """T rows of `count` tensors: most tiny, some empty, one or two large, of one dimension or three."""
    shapes = [(0,), (1,), (3, 0, 2), (7,), (2, 3, 5), (64,), (33, 9)]
    sizes = [shapes[(seed + 5 * p) % len(shapes)] for p in range(count)]
    sizes[count // 2] = (5_000 if count >= 100 or emulated() else 70_001,)
    return [
        [normal(seed + 31 * t + p, *s).to(dtypes[p % len(dtypes)]).to(device) for p, s in enumerate(sizes)]
        for t in range(tasks)
    ]


@pytest.mark.parametrize("count", [1, 10, 600])
@pytest.mark.parametrize("dtypes", [DTYPES[:1], DTYPES], ids=["float32", "mixed"])
def test_lists_of_tensors(count: int, dtypes: list[torch.dtype], device: str) -> None:
    """600: more than a table of a CUDA kernel holds."""
    rows = unequal(3, 3, count, dtypes, device)
    weights = weights_for(3, device)
    result = check_all(rows, weights)
    assert isinstance(result, list)
    stacked = ops.Stacked([torch.stack(parts) for parts in zip(*rows)])
    # Not to the bit: rows of a stack may lie on no boundary that a kernel wants, and are added up otherwise then.
    assert torch.allclose(ops.gram(stacked), ops.gram(rows), rtol=1e-13, atol=1e-13)
    assert all(torch.equal(a, b) for a, b in zip(ops.combine(stacked, weights), result))
    tuples = tuple(tuple(row) for row in rows)
    assert torch.equal(ops.gram(tuples), ops.gram(rows))


def test_nothing_to_sum(device: str) -> None:
    rows = [[torch.empty(0, 3, device=device), torch.empty(2, 0, device=device)] for _ in range(3)]
    assert torch.equal(ops.gram(rows).cpu(), torch.zeros(3, 3, dtype=torch.float64))
    assert torch.equal(ops.dots(rows, rows[1]).cpu(), torch.zeros(3, dtype=torch.float64))
    assert [r.shape for r in ops.combine(rows, weights_for(3, device))] == [(0, 3), (2, 0)]


# ---- layouts ---------------------------------------------------------------------------------------------------------


def _misaligned(t: Tensor) -> Tensor:
    return torch.cat([t.new_full((1,), torch.nan), t.reshape(-1)])[1:].view(t.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda t: t,
    "sliced": lambda t: torch.cat([t, torch.full_like(t, torch.nan)], -1)[..., : t.shape[-1]],
    "every other": lambda t: torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0],
    "transposed": lambda t: t.mT.contiguous().mT,
    "permuted": lambda t: t.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "expanded": lambda t: t[:1, :1].expand_as(t),
    "misaligned": _misaligned,
}


@TYPES
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_layouts(layout: str, dtype: torch.dtype, device: str) -> None:
    """All rows laid out so, or only one of them, the first or the last; and a vector and an output otherwise."""
    weights = weights_for(3, device)
    dense = [normal(4 + t, 2, 3, 5, 4).to(dtype).to(device) for t in range(3)]
    if layout == "expanded":
        dense = [LAYOUTS[layout](r).contiguous() for r in dense]
    want = ops.gram(dense), ops.dots(dense, dense[1]), ops.combine(dense, weights)
    laid = [LAYOUTS[layout](r) for r in dense]
    for rows in (laid, [laid[0], *dense[1:]], [*dense[:2], laid[2]]):
        check_all(rows, weights)
        assert torch.allclose(ops.gram(rows), want[0], rtol=1e-12, atol=1e-12)
        for other in (dense[1], laid[1]):
            assert torch.allclose(ops.dots(rows, other), want[1], rtol=1e-12, atol=1e-12)
        assert torch.equal(ops.combine(rows, weights), want[2])
        for out in (torch.empty_like(dense[0]), torch.empty_like(dense[0], memory_format=torch.channels_last)):
            assert ops.combine(rows, weights, out=out) is out
            assert torch.equal(out, want[2])
    if layout == "channels_last":
        assert ops.combine(laid, weights).is_contiguous(memory_format=torch.channels_last)


def stacks(dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """[T, ...] whose rows are dense, or not."""
    whole = normal(5, 8, 6, 5).to(dtype).to(device)
    return {
        "every other row": whole[::2],
        "rows of a wider one": whole[:4, :3],
        "columns": whole[:4, :, :2],
        "turned": whole.mT[:4],
        "tasks last": whole.permute(1, 2, 0),
        "flipped": whole.flip(0)[:4],
        "one row four times": whole[:1].expand(4, -1, -1),
        "overlapping": whole.reshape(-1).as_strided((4, 6, 5), (1, 5, 1)),
        "misaligned": _misaligned(whole[:4]),
        "no dimensions": whole[:4, 0, 0],
        "empty": whole[:4, :0],
    }


@TYPES
@pytest.mark.parametrize("name", list(stacks(torch.float32, "cpu")))
def test_strided_jacobians(name: str, dtype: torch.dtype, device: str) -> None:
    jac = stacks(dtype, device)[name]
    weights = weights_for(len(jac), device)
    result = check_all(ops.Stacked([jac, jac]), weights)
    dense = jac.contiguous()
    assert torch.equal(result[0], ops.combine(dense, weights))
    assert torch.equal(result[1], result[0])
    assert torch.allclose(ops.gram(jac), ops.gram(dense), rtol=1e-12, atol=1e-12)


def test_rows_may_be_the_same_tensor(device: str) -> None:
    row = normal(6, 300).float().to(device)
    check_all([row, row, row[:]], weights_for(3, device))
    gram = ops.gram([[row, row], [row, row]])
    assert len(set(gram.reshape(-1).tolist())) == 1
    whole = normal(7, 400).float().to(device)
    check_all([whole[:300], whole[50:350], whole[100:]], weights_for(3, device))


@TYPES
@pytest.mark.parametrize("size", [33, 1000, 70_000])
def test_written_over_one_of_the_rows(size: int, dtype: torch.dtype, device: str) -> None:
    """70,000 are two threads' shares."""
    for tasks, at in ((1, 0), (2, 1), (3, 0), (6, 4)):
        rows = [normal(8 + t, size).to(dtype).to(device) for t in range(tasks)]
        if size % 2 and tasks == 2:
            rows = [_misaligned(r) for r in rows]
        weights = weights_for(tasks, device)
        want = ops.combine(rows, weights)
        others = [r.clone() for r in rows]
        assert ops.combine(rows, weights, out=rows[at]) is rows[at]
        assert torch.equal(rows[at], want)
        assert all(torch.equal(a, b) for t, (a, b) in enumerate(zip(rows, others)) if t != at)
    jac = normal(9, 3, 4, size // 8).to(dtype).to(device)
    want = ops.combine(jac, weights_for(3, device))
    ops.combine(jac, weights_for(3, device), out=jac[1])
    assert torch.equal(jac[1], want)


@TYPES
def test_large_outputs_are_written_like_small_ones(dtype: torch.dtype) -> None:
    """Above 16 MiB the host writes past its caches, 16 bytes at a time, with a head and a tail of single elements."""
    size = (16 << 20) // dtype.itemsize + 1003
    rows = [_misaligned(normal(8 + t, size).to(dtype)) for t in range(2)]
    weights = weights_for(2, "cpu")
    want = torch.cat([ops.combine(list(parts), weights) for parts in zip(*(r.split(1 << 20) for r in rows))])
    assert torch.equal(ops.combine(rows, weights), want)
    assert ops.combine(rows, weights, out=rows[0]) is rows[0]
    assert torch.equal(rows[0], want)


def test_written_over_a_row_of_another_layout(device: str) -> None:
    for layout in ("sliced", "transposed", "every other"):
        rows = [LAYOUTS[layout](normal(10 + t, 2, 3, 5, 4).float().to(device)) for t in range(3)]
        want = ops.combine([r.clone() for r in rows], weights_for(3, device))
        ops.combine(rows, weights_for(3, device), out=rows[2])
        assert torch.equal(rows[2], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_of_any_type(dtype: torch.dtype, device: str) -> None:
    rows = normal(11, 3, 300).float().to(device)
    weights = normal(12, 3).to(dtype).to(device)
    want = check_combine(rows, weights)
    assert torch.equal(ops.combine(rows, weights.double()), want)
    strided = torch.stack([weights, torch.full_like(weights, torch.nan)], -1)[:, 0]
    assert not strided.is_contiguous()
    assert torch.equal(ops.combine(rows, strided), want)
    assert torch.equal(ops.combine(rows, weights[:1].expand(3)), check_combine(rows, weights[:1].repeat(3)))


# ---- numbers ---------------------------------------------------------------------------------------------------------


def every_bit_pattern(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_read_right(dtype: torch.dtype) -> None:
    """All 65,536 numbers, each a row of one element: its product with one, in float64."""
    rows = every_bit_pattern(dtype)[:, None]
    got = ops.dots(rows, torch.ones(1, dtype=dtype))
    want = rows[:, 0].double()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[~want.isnan()], want[~want.isnan()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_read_and_written_right(dtype: torch.dtype, device: str) -> None:
    """Rounding of float32 to nearest, ties to even, as torch rounds: products with one weight, and sums of two numbers
    that float32 has exactly, so that the order of the arithmetic is no excuse."""
    x = every_bit_pattern(dtype).to(device)
    weights = [1.0, -1.0, 2.0**-12, 2.0**-16, 3.0, 1 / 3, 65504.0, 65519.999, 1e30, 1e-30, 2.0**-133, 0.0, 1e38]
    weights += [1 + 2.0**-k for k in range(6, 14)] + (normal(13, 30) * 10 ** normal(14, 30)).tolist()
    for weight in weights:
        w = torch.tensor([weight], dtype=torch.float32, device=device)
        assert_same(ops.combine([x], w), (w * x.float()).to(dtype))
    # A neighbour scaled by a power of two adds the bits that decide about ties.
    for shift in range(1, 13):
        y = x.roll(2 * shift + 1)
        wide = x.double() + 2.0**-shift * y.double()
        exact = (wide == wide.float().double()) | ~wide.isfinite()
        assert int(exact.sum()) > 60_000
        got = ops.combine([x, y], torch.tensor([1.0, 2.0**-shift], device=device))
        assert_same(got[exact], wide[exact].float().to(dtype))


def assert_same(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[~want.isnan()], want[~want.isnan()])


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e18, 1e30])
def test_no_scale_overflows_or_underflows(size: float, device: str) -> None:
    """Squares of 1e-60 and 1e+60, in float32 0 and infinity."""
    rows = (normal(15, 5, 1000) * size).float().to(device)
    check_sums(rows)
    gram = ops.gram(rows).cpu()
    assert (gram.diagonal() > 0).all()
    assert gram.isfinite().all()
    check_combine(rows, weights_for(5, device) * 0.1)


@TYPES
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("tasks", [2, 6])
def test_nan_and_infinity_are_passed_on(tasks: int, bad: float, dtype: torch.dtype, device: str) -> None:
    """Wherever it is; a weight of zero does not hide it."""
    for size, at in ((1, 0), (33, 32), (1000, 511), (70_000, 69_999)):
        rows = normal(16, tasks, size).to(dtype).to(device)
        rows[1, at] = bad
        gram = ops.gram(rows)
        clean = [t for t in range(tasks) if t != 1]
        assert not gram[1].isfinite().any()
        assert not gram[:, 1].isfinite().any()
        assert gram[clean][:, clean].isfinite().all()
        assert not ops.dots(rows, rows[0])[1].isfinite()
        weights = torch.ones(tasks, device=device)
        weights[1] = 0.0
        result = ops.combine(rows, weights)
        assert result[at].isnan()
        assert int(result.isfinite().sum()) == size - 1
        with pytest.raises(ValueError, match=r"gram: rows: .* NaN or infinity in task 1\b"):
            ops.gram(rows, check_finite=True)
    weights[1] = torch.nan
    assert ops.combine(normal(17, tasks, 33).to(dtype).to(device), weights).isnan().all()


# ---- the same bits ---------------------------------------------------------------------------------------------------


@TYPES
@pytest.mark.parametrize("tasks", [3, 7])
def test_threads_do_not_change_a_bit(tasks: int, dtype: torch.dtype) -> None:
    rows = [[normal(18 + t, 200_000).to(dtype), normal(19 + t, 333).to(dtype)] for t in range(tasks)]
    weights = weights_for(tasks, "cpu")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append([ops.gram(rows), ops.dots(rows, rows[-1]), *ops.combine(rows, weights)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0]))


def test_same_bits_every_time(device: str) -> None:
    rows = normal(20, 5, 40_000).float().to(device)
    results = [(ops.gram(rows), ops.dots(rows, rows[1]), ops.combine(rows, weights_for(5, device))) for _ in range(3)]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0]))


# ---- rows in half the memory of the vector ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 255, 257, 1000, 70_000])
def test_dots_of_bfloat16_and_float32(size: int, device: str) -> None:
    for tasks in (1, 2, 3, 4, 5, 8, 9) if size <= 1000 else (3,):
        rows, vector = normal(1, tasks, size).bfloat16().to(device), normal(2, size).float().to(device)
        got, want = ops.dots(rows, vector).cpu(), rows.double().cpu() @ vector.double().cpu()
        assert got.dtype == torch.float64
        terms = rows.double().cpu().abs() @ vector.double().cpu().abs()
        assert ((got - want).abs() <= (size + 2) ** 0.5 * 2**-51 * terms).all()


def test_dots_of_mixed_types_in_one_call(device: str) -> None:
    """Parameters of four kinds, the first and the last of one; laid out otherwise in the vector."""
    kinds = [(torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float64,) * 2]
    kinds.append(kinds[0])
    rows = [[normal(t + p, 40 + p, 5).to(row).to(device) for p, (row, _) in enumerate(kinds)] for t in range(3)]
    vector = [normal(9 + p, 5, 40 + p).to(other).to(device).mT for p, (_, other) in enumerate(kinds)]
    assert near(ops.dots(rows, vector), reference.dots(rows, vector), 1e-13)


# ---- the reference ---------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), tasks=st.integers(1, 9), columns=st.integers(1, 60))
def test_reference(seed: int, tasks: int, columns: int) -> None:
    """The specification itself, by plain sums and by the decomposition of the rows."""
    rows, weights = normal(seed, tasks, columns), normal(seed + 1, tasks)
    assert near(reference.gram(rows), rows @ rows.mT, 1e-13)
    assert near(reference.dots(rows, rows[0]), rows @ rows[0], 1e-13)
    assert near(reference.combine(rows, weights), weights @ rows, 1e-13, 1.0)  # type: ignore[arg-type]
    for scale in ("min", "median", "rmse"):
        want = procrustes(rows, weights, scale, 1e-6)
        got = reference.align(rows @ rows.mT, weights, scale, 1e-6)  # type: ignore[arg-type]
        assert int(got.rank) == want.rank
        assert near(got.transform, want.transform, 1e-8)
        assert near(got.weights, want.weights, 1e-8, float(want.transform.abs().max()))
