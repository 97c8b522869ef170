"""ops.displace, parameters moved along the rows of T tasks: the reference's very bits wherever products are exact, on
every backend, for all layouts, types and sizes that parameters come in."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mtlgrad import ops, reference
from mtlgrad.ops import displacement
from mtlgrad.ops.rows import Rows, dense
from tests.ops.test_combine import LAYOUTS, assert_same, stacks
from tests.support.bounds import DTYPES, UNIT, near, normal

SIZES = [0, 1, 31, 32, 33, 255, 257, 1000, 70_000]
# Of the rows, of base.
PAIRS = [*((dtype, dtype) for dtype in DTYPES), (torch.bfloat16, torch.float32)]
TYPES = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: " ".join(str(d).removeprefix("torch.") for d in pair))
Pair = tuple[torch.dtype, torch.dtype]


def weights_for(tasks: int, device: str) -> Tensor:
    return normal(90, tasks).float().to(device)


def problem(pair: Pair, tasks: int, *shape: int, device: str = "cpu", seed: int = 1) -> tuple[Tensor, Tensor]:
    """Base, and rows [T, ...]."""
    return normal(seed, *shape).to(pair[1]).to(device), normal(seed + 1, tasks, *shape).to(pair[0]).to(device)


def listed(rows: Any) -> list[Any]:
    return list(zip(*rows.tensors)) if isinstance(rows, ops.Stacked) else rows


def check(base: Any, rows: Any, weights: Tensor, **options: Any) -> Any:
    """The reference's bits: float32 products are exact in float64, and sums have one order. Products of float64 are
    not, and a kernel may fuse them with the sum."""
    want = reference.displace(base, listed(rows), weights)
    parts = [want] if isinstance(want, Tensor) else want
    terms = reference.displace(
        [part.double().abs() for part in ([base] if isinstance(base, Tensor) else base)],
        [[part.double().abs() for part in ([row] if isinstance(row, Tensor) else row)] for row in listed(rows)],
        weights.abs(),
    )
    got = ops.displace(base, rows, weights, **options)
    assert isinstance(got, Tensor) == isinstance(base, Tensor)
    exact = weights.dtype != torch.float64
    for a, b, term in zip([got] if isinstance(got, Tensor) else got, parts, terms, strict=True):
        assert a.shape == b.shape
        if exact and a.dtype != torch.float64:
            assert_same(a, b)
        else:
            limit = (len(weights) + 2) * 2.0**-53 * term + 2 * UNIT[b.dtype] * b.double().abs()
            assert a.dtype == b.dtype
            assert ((a.double() - b.double()).abs() <= limit).all()
    return got


# ---- parity ----------------------------------------------------------------------------------------------------------


@TYPES
@pytest.mark.parametrize("size", SIZES)
def test_sizes(size: int, pair: Pair, device: str) -> None:
    for tasks in (1, 2, 3, 4, 5, 8, 9, 20) if size <= 1000 else (3, 5):
        base, rows = problem(pair, tasks, size, device=device)
        weights = weights_for(tasks, device)
        result = check(base, rows, weights)
        # The same rows in another form: the same bits.
        for form in (list(rows), [[row] for row in rows], ops.Stacked([rows])):
            assert torch.equal(ops.displace(base, form, weights), result)
            assert torch.equal(ops.displace([base], form, weights)[0], result)


@TYPES
def test_every_number_of_tasks(pair: Pair, device: str) -> None:
    for tasks in (*range(1, 21), 64):
        check(*problem(pair, tasks, 257, device=device), weights_for(tasks, device))


def test_float64_sums_rounded_once(device: str) -> None:
    """Three deltas, each too small to move a float32 of one, move it together."""
    base, row = torch.ones(40, device=device), torch.full((40,), 2.0**-25, device=device)
    ones = torch.ones(3, device=device)
    assert torch.equal(ops.displace(base, [row] * 3, ones), base + 2.0**-23)
    assert torch.equal(ops.displace(base, [row.bfloat16()] * 3, ones), base + 2.0**-23)
    assert torch.equal(base + row + row + row, base)
    # Base first, then the rows in their order: all float64 digits of the first two are gone again with the third.
    huge = torch.full((40,), 1e30, device=device)
    assert torch.equal(ops.displace(row, [huge, -huge, base], ones), base)
    assert torch.equal(ops.displace(huge, [-huge, base, row], ones), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_weights_of_any_type(dtype: torch.dtype, device: str) -> None:
    base, rows = problem((torch.float32, torch.float32), 3, 300, device=device)
    weights = normal(12, 3).to(dtype).to(device)
    want = check(base, rows, weights)
    strided = torch.stack([weights, torch.full_like(weights, torch.nan)], -1)[:, 0]
    assert not strided.is_contiguous()
    assert torch.equal(ops.displace(base, rows, strided), want)
    check(base, rows, weights[:1].expand(3))
    check(base, rows, torch.tensor([1 / 3, 0.1, 1e-3], dtype=torch.float64, device=device))


@pytest.mark.parametrize("count", [1, 10, 500])
def test_lists_of_mixed_types(count: int, device: str) -> None:
    shapes = [(0,), (1,), (3, 0, 2), (7,), (2, 3, 5), (64,), (33, 9)]
    sizes = [shapes[5 * p % len(shapes)] for p in range(count)]
    sizes[count // 2] = (5_001,)
    base, *rows = (
        [normal(31 * t + p, *s).to(PAIRS[p % 5][t < 0]).to(device) for p, s in enumerate(sizes)] for t in range(-1, 3)
    )
    weights = weights_for(3, device)
    result = check(base, rows, weights)
    assert isinstance(result, list)
    stacked = ops.Stacked([torch.stack(parts) for parts in zip(*rows)])
    assert all(torch.equal(a, b) for a, b in zip(ops.displace(base, stacked, weights), result))
    assert all(torch.equal(a, b) for a, b in zip(ops.displace(tuple(base), tuple(map(tuple, rows)), weights), result))


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
def test_no_scale_overflows_or_underflows(size: float, device: str) -> None:
    base, rows = problem((torch.float64, torch.float64), 5, 1000, device=device)
    for factors in (size, torch.logspace(-20, 20, 5, device=device, dtype=torch.float64)[:, None]):
        scaled = (rows * factors).float()
        check((base * size).float(), scaled, weights_for(5, device))
        check((base * size).float(), scaled.bfloat16(), weights_for(5, device) / size)


@TYPES
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_are_passed_on(bad: float, pair: Pair, device: str) -> None:
    """Wherever it is; a weight of zero does not hide it."""
    for tasks, size, at in ((2, 1, 0), (6, 33, 32), (3, 1000, 511), (2, 70_000, 69_999)):
        base, rows = problem(pair, tasks, size, device=device)
        weights = torch.ones(tasks, device=device)
        rows[1, at] = bad
        result = ops.displace(base, rows, weights)
        assert_same(result, reference.displace(base, rows, weights))
        assert not result[at].isfinite()
        weights[1] = 0.0
        result = ops.displace(base, rows, weights)
        assert result[at].isnan()
        assert int(result.isfinite().sum()) == size - 1
        base, rows = problem(pair, tasks, size, device=device)
        base[at] = bad
        result = ops.displace(base, rows, weights)
        assert not result[at].isfinite()
        assert int(result.isfinite().sum()) == size - 1
    weights[1] = torch.nan
    assert ops.displace(base, rows, weights).isnan().all()


def test_reference() -> None:
    """The specification itself, in one matrix product."""
    for pair in PAIRS:
        base, rows = problem(pair, 4, 50)
        weights = weights_for(4, "cpu")
        want = (base.double() + weights.double() @ rows.double()).to(pair[1])
        for got in (
            reference.displace(base, rows, weights),
            reference.displace([base], [[row] for row in rows], weights)[0],
            reference.displace([base], rows, weights)[0],
        ):
            assert got.dtype == pair[1]
            assert near(got, want, UNIT[pair[1]])


# ---- layouts ---------------------------------------------------------------------------------------------------------


@TYPES
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_layouts(layout: str, pair: Pair, device: str) -> None:
    """Of base, of all rows or of one of them, and of an output."""
    weights = weights_for(3, device)
    base, whole = problem(pair, 3, 2, 3, 5, 4, device=device)
    if layout == "expanded":
        base, whole = LAYOUTS[layout](base).contiguous(), whole[:, :1, :1].expand_as(whole).contiguous()
    dense = list(whole)
    want = check(base, dense, weights)
    lay = LAYOUTS[layout]
    laid = [lay(row) for row in dense]
    for rows in (dense, laid, [laid[0], *dense[1:]], [*dense[:2], laid[2]]):
        for one in (base, lay(base)):
            result = ops.displace(one, rows, weights)
            assert torch.equal(result, want)
            if layout == "channels_last":
                assert result.stride() == one.stride()
            for out in (torch.empty_like(base), torch.empty_like(base, memory_format=torch.channels_last)):
                assert ops.displace(one, rows, weights, out=out) is out
                assert torch.equal(out, want)


@TYPES
@pytest.mark.parametrize("name", list(stacks(torch.float32, "cpu")))
def test_strided_jacobians(name: str, pair: Pair, device: str) -> None:
    rows = stacks(pair[0], device)[name]
    base = rows[0].to(pair[1]) + 1
    weights = weights_for(len(rows), device)
    result = check([base, base], ops.Stacked([rows, rows]), weights)
    assert torch.equal(result[0], ops.displace(base, rows.contiguous(), weights))
    assert torch.equal(result[1], result[0])


# ---- in place --------------------------------------------------------------------------------------------------------


@TYPES
@pytest.mark.parametrize("size", [33, 1000, 70_000])
def test_moved_in_place(size: int, pair: Pair, device: str) -> None:
    """70,000 are two threads' shares."""
    for tasks in (1, 3, 6):
        base, rows = problem(pair, tasks, size, device=device)
        if tasks == 3:
            base = LAYOUTS["misaligned"](base)
        weights, kept = weights_for(tasks, device), rows.clone()
        want = ops.displace(base, rows, weights)
        assert ops.displace(base, rows, weights, out=base) is base
        assert torch.equal(base, want)
        assert torch.equal(rows, kept)


def test_parameters_moved_in_place(device: str) -> None:
    """Leaves that require gradients, some in another element order than the rows, or with gaps between."""
    shapes = [(2, 3, 5, 4), (7,), (4, 6)]
    base = [normal(p, *s).float().to(device) for p, s in enumerate(shapes)]
    base[0] = base[0].contiguous(memory_format=torch.channels_last)
    base[2] = LAYOUTS["sliced"](base[2])
    parameters = [torch.nn.Parameter(b) for b in base]
    rows = [[normal(5 + t + p, *s).float().to(device) for p, s in enumerate(shapes)] for t in range(3)]
    want = ops.displace([b.clone() for b in base], rows, weights_for(3, device))
    versions = [b._version for b in base]
    moved = ops.displace(parameters, rows, weights_for(3, device), out=parameters)
    assert all(a is b for a, b in zip(moved, parameters))
    assert all(p.is_leaf and p.requires_grad for p in parameters)
    assert all(torch.equal(a, b) for a, b in zip(parameters, want))
    assert all(p._version > before for p, before in zip(parameters, versions))


@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[1], PAIRS[4]])
def test_large_outputs_are_written_like_small_ones(pair: Pair) -> None:
    """Above 16 MiB the host writes past its caches, 16 bytes at a time, with a head and a tail of single elements."""
    size = (16 << 20) // pair[1].itemsize + 1003
    base, rows = problem(pair, 2, size)
    base, weights = LAYOUTS["misaligned"](base), weights_for(2, "cpu")
    pieces = zip(base.split(1 << 20), rows.split(1 << 20, dim=1))
    want = torch.cat([ops.displace(b, r, weights) for b, r in pieces])
    assert torch.equal(ops.displace(base, rows, weights), want)
    assert ops.displace(base, rows, weights, out=base) is base
    assert torch.equal(base, want)


@TYPES
def test_threads_do_not_change_a_bit(pair: Pair) -> None:
    base, rows = problem(pair, 6, 200_000)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(ops.displace(base, rows, weights_for(6, "cpu")))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results[1:])


# ---- derivatives -----------------------------------------------------------------------------------------------------


def leaf(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return normal(seed, *shape).to(dtype).requires_grad_()


def test_gradcheck() -> None:
    """Once and twice: rows of a tensor, lists and stacks; some inputs constant."""
    base, rows, weights = leaf(1, 2, 4), leaf(2, 3, 2, 4), leaf(3, 3)
    parts = [leaf(s, *shape) for s, shape in enumerate([(4,), (2, 3)] * 4)]

    def move_listed(w: Tensor, *p: Tensor) -> tuple[Tensor, ...]:
        return tuple(ops.displace(p[:2], [p[2:4], p[4:6], p[6:8]], w))

    def move_stacked(w: Tensor, *p: Tensor) -> tuple[Tensor, ...]:
        return tuple(ops.displace(p[:2], ops.Stacked(p[2:]), w))

    cases: list[tuple[Callable[..., Any], tuple[Tensor, ...]]] = [
        (ops.displace, (base, rows, weights)),
        (move_listed, (weights, *parts)),
        (move_stacked, (weights, *parts[:2], leaf(8, 3, 4), leaf(9, 3, 2, 3))),
        (lambda w: ops.displace(base.detach(), rows.detach(), w), (weights,)),
        (lambda b: ops.displace(b, rows.detach(), weights.detach()), (base,)),
        (lambda r: ops.displace(base.detach(), [r, rows.detach()[0], r], weights), (leaf(4, 2, 4),)),
    ]
    for call, arguments in cases:
        assert torch.autograd.gradcheck(call, arguments)
        assert torch.autograd.gradgradcheck(call, arguments)


@TYPES
def test_derivatives_are_the_references(pair: Pair, device: str) -> None:
    found = []
    for room in (ops, reference):
        base, rows = (t.detach().requires_grad_() for t in problem(pair, 3, 40, device=device))
        weights = weights_for(3, device).requires_grad_()
        room.displace(base, rows, weights).double().sin().sum().backward()
        assert [t.grad.dtype for t in (base, rows, weights)] == [t.dtype for t in (base, rows, weights)]  # type: ignore[union-attr]
        found.append((base.grad, rows.grad, weights.grad))
    for got, want in zip(*found, strict=True):
        assert near(got, want, 4 * UNIT[pair[0]])


def test_alpha_descends_through_a_model(device: str) -> None:
    """d loss / d alpha_t = <gradient at theta + sum alpha delta, delta_t> (DESIGN 4.5)."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).to(device)
    names, base = zip(*((n, p.detach()) for n, p in model.named_parameters()))
    deltas = [[0.1 * normal(10 * t + p, *b.shape).float().to(device) for p, b in enumerate(base)] for t in range(3)]
    x, alpha = normal(3, 8, 4).float().to(device), torch.ones(3, device=device, requires_grad=True)
    moved = ops.displace(base, deltas, alpha)
    torch.func.functional_call(model, dict(zip(names, moved)), x).square().mean().backward()
    at = [p.detach().requires_grad_() for p in moved]
    loss = torch.func.functional_call(model, dict(zip(names, at)), x).square().mean()
    slope = torch.autograd.grad(loss, at)
    assert near(alpha.grad, reference.dots(deltas, slope), 1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("stacked", [False, True])
def test_parameters_without_a_gradient_are_not_touched(stacked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No zeros are made for them, and no kernel reads their rows."""
    seen: list[int] = []
    dots = displacement.dots_of
    monkeypatch.setattr(displacement, "dots_of", lambda rows, vector: seen.append(len(vector)) or dots(rows, vector))
    base = [leaf(p, 5) for p in range(3)]
    jac = [normal(p, 2, 5).requires_grad_() for p in range(3)]
    weights = leaf(9, 2)
    moved = ops.displace(base, ops.Stacked(jac) if stacked else [[j[t] for j in jac] for t in range(2)], weights)
    (moved[1] * torch.arange(5)).sum().backward()
    assert seen == [1]
    assert torch.equal(weights.grad, jac[1].detach() @ torch.arange(5).double())  # type: ignore[arg-type]
    assert [b.grad is None for b in base] == [True, False, True]
    assert all(b.grad is None or not b.grad.any() for b in (jac[0], jac[2]))
    assert jac[1].grad is not None


def test_rows_may_be_written_over_where_weights_are_constant() -> None:
    base, rows = leaf(1, 5), normal(2, 3, 5)
    moved = ops.displace(base, rows, torch.ones(3))
    rows.zero_()
    moved.sum().backward()
    assert torch.equal(base.grad, torch.ones(5, dtype=torch.float64))  # type: ignore[arg-type]
    moved = ops.displace(base, rows, leaf(3, 3))
    rows.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        moved.sum().backward()


# ---- rows on another device ------------------------------------------------------------------------------------------


def test_chunks() -> None:
    """Consecutive, all there, none above the limit unless it is one alone."""
    assert displacement.chunks([3, 3, 3, 9, 1, 1, 8, 20, 0, 0], 9) == [
        *(range(3), range(3, 4), range(4, 6), range(6, 7), range(7, 8), range(8, 10)),
    ]
    assert displacement.chunks([0, 0], 9) == [range(2)]
    assert displacement.chunks([100], 9) == [range(1)]


class Staging:
    """Makes rows on base's own device go the way of those on another; knows what is staged at a time."""

    def __init__(self, patch: pytest.MonkeyPatch, limit: int):
        self.staged, self.most, self.calls = displacement._staged, 0, 0
        self.alive: list[weakref.ref[Tensor]] = []
        patch.setattr(displacement, "STAGED_BYTES", limit)
        patch.setattr(displacement, "_streams", lambda parts, tensors: True)
        patch.setattr(displacement, "_staged", self)

    def __call__(self, *arguments: Any) -> Rows:
        assert all(one() is None for one in self.alive)
        rows = self.staged(*arguments)
        tensors, count = rows.tensors, rows.parameters
        assert len(tensors) == count * arguments[0].tasks
        assert all(
            dense(t) and t.stride() == tensors[i % count].stride() for i, t in enumerate(tensors)
        )  # none copied again
        self.alive = [weakref.ref(tensor) for tensor in tensors]
        self.most = max(self.most, sum(tensor.nbytes for tensor in tensors))
        self.calls += 1
        return rows


@pytest.mark.parametrize("stacked", [False, True])
def test_streamed(stacked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as without, forwards, backwards and in place, with no more than a chunk of the rows at a time."""
    shapes = [(40, 3), (7,), (0,), (500,), (2, 3, 4, 5), (1,), (33,)]
    base = [normal(p, *s).float() for p, s in enumerate(shapes)]
    jac = [normal(20 + p, 3, *s).to(PAIRS[p % 2 * 4][0]) for p, s in enumerate(shapes)]
    jac[0], base[4] = jac[0].mT.contiguous().mT, base[4].contiguous(memory_format=torch.channels_last)
    jac[3] = jac[3].t().contiguous().t()
    rows: Any = ops.Stacked(jac) if stacked else [[j[t] for j in jac] for t in range(3)]
    results = []
    for limit in (None, 1, 1000, 2000, 1 << 30):
        with monkeypatch.context() as patch:
            staging = None if limit is None else Staging(patch, limit)
            leaves, weights = [b.clone().requires_grad_() for b in base], weights_for(3, "cpu").requires_grad_()
            moved = ops.displace(leaves, rows, weights)
            sum(m.sin().sum() for m in [moved[0], *moved[3:]]).backward()  # type: ignore[union-attr]
            kept = [b.clone() for b in base]
            assert ops.displace(kept, rows, weights, out=kept) is not None
            assert moved[4].is_contiguous(memory_format=torch.channels_last)
            results.append([*moved, *kept, *(b.grad for b in leaves if b.grad is not None), weights.grad])
            if staging is not None:
                sizes = [j.nbytes for j in jac]
                assert staging.most <= max(limit, *sizes)
                every, some = (displacement.chunks(s, limit) for s in (sizes, [sizes[0], *sizes[3:]]))
                assert staging.calls == 2 * len(every) + len(some)
    for other in results[1:]:
        for a, b in zip(other[:-1], results[0][:-1], strict=True):
            assert torch.equal(a, b)  # type: ignore[arg-type]
        assert near(other[-1], results[0][-1], 1e-6)  # type: ignore[arg-type]


def test_streamed_rows_and_derivatives_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    Staging(monkeypatch, 100)
    base, rows, weights = normal(1, 5), leaf(2, 3, 5), leaf(3, 3)
    with pytest.raises(RuntimeError, match="displace: rows: expected none that requires a gradient on another device"):
        ops.displace(base, rows, weights)
    moved = ops.displace(base, rows.detach(), weights)
    with pytest.raises(RuntimeError, match=r"displace: rows: expected rows on base's device .* differentiated again"):
        torch.autograd.grad(moved.square().sum(), weights, create_graph=True)


def test_streamed_in_place_checks_all_before_it_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    Staging(monkeypatch, 1)
    base = [torch.ones(3), torch.ones(4)]
    with pytest.raises(RuntimeError, match=r"displace: base: expected \[5\]"):
        ops.displace(base, [[torch.ones(3), torch.ones(5)]], torch.ones(1), out=base)
    with pytest.raises(RuntimeError, match=r"displace: out: expected \[4\]"):
        ops.displace(base, [[torch.ones(3), torch.ones(4)]], torch.ones(1), out=[base[0], torch.ones(5)])
    assert torch.equal(base[0], torch.ones(3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_streamed_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(displacement, "STAGED_BYTES", 1 << 20)
    base = [normal(p, 100_000).float().cuda() for p in range(8)]
    rows = [[normal(t + p, 100_000).bfloat16().pin_memory() for p in range(8)] for t in range(3)]
    weights = weights_for(3, "cuda").requires_grad_()
    moved = ops.displace(base, rows, weights)
    sum(m.sin().sum() for m in moved).backward()  # type: ignore[union-attr]
    there = [[part.cuda() for part in row] for row in rows]
    assert all(torch.equal(a, b) for a, b in zip(moved, ops.displace(base, there, weights)))
    slope = [m.detach().cos() for m in moved]
    assert near(weights.grad, ops.dots(there, slope), 1e-6)  # type: ignore[arg-type]
