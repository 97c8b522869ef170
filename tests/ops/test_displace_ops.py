"""The displace operator: derivatives, rows on another device, opcheck, torch.compile, errors in words."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mtlgrad import ops, reference
from mtlgrad.ops import _native, displacement
from mtlgrad.ops.rows import Rows, dense
from tests.ops.test_combine import assert_same
from tests.ops.test_displace import PAIRS, TYPES, Pair, problem, weights_for
from tests.support.bounds import UNIT, near, normal

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


# ---- the operator ----------------------------------------------------------------------------------------------------


def forms(pair: Pair) -> dict[str, tuple[list[Tensor], list[Tensor], int, bool]]:
    """Rows, base, tasks, stacked."""

    def make(seed: int, *shape: int, of: int = 0) -> Tensor:
        return normal(seed, *shape).to(pair[of])

    image = make(3, 2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    return {
        "stacked": ([make(1, 3, 4, 5), make(2, 3, 7)], [make(3, 4, 5, of=1), make(4, 7, of=1)], 3, True),
        "listed": (
            [make(t + p, *s) for t in range(3) for p, s in enumerate([(4, 5), (7,)])],
            [make(3, 4, 5, of=1), make(4, 7, of=1)],
            *(3, False),
        ),
        "transposed": ([make(4, 5, 4).t(), make(5, 4, 5)], [make(6, 5, 4, of=1).t()], 2, False),
        "sliced": ([make(4, 4, 9)[:, :5], make(5, 4, 5)], [make(6, 4, 9, of=1)[:, :5]], 2, False),
        "channels_last": ([image, image + 1], [image.to(pair[1])], 2, False),
        "base channels_last": ([image.contiguous(), image.contiguous()], [image.to(pair[1])], 2, False),
        "rows channels_last": ([image, image], [image.to(pair[1]).contiguous()], 2, False),
        "tasks last": ([make(8, 4, 5, 3).permute(2, 0, 1)], [make(9, 4, 5, of=1)], 3, True),
        "empty": ([make(8, 3, 0, 5)], [make(9, 0, 5, of=1)], 3, True),
    }


@TYPES
@pytest.mark.parametrize("form", list(forms(PAIRS[0])))
def test_opcheck(form: str, pair: Pair) -> None:
    rows, base, tasks, stacked = forms(pair)[form]
    weights, o = weights_for(tasks, "cpu"), torch.ops.mtlgrad
    torch.library.opcheck(o.displace.default, (rows, tasks, stacked, base, weights))
    out = [torch.empty_like(part) for part in base]
    torch.library.opcheck(o.displace_like.default, (rows, tasks, stacked, base, weights, out))


# Inductor itself uses what torch deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("form", ["stacked", "listed", "base channels_last"])
def test_compiles_without_graph_breaks(form: str, backend: str) -> None:
    torch.compiler.reset()
    tensors, parts, tasks, stacked = forms(PAIRS[4])[form]
    count = len(parts)
    rows: Any = ops.Stacked(tensors) if stacked else [tensors[t * count : (t + 1) * count] for t in range(tasks)]

    def step(base: list[Tensor], weights: Tensor) -> tuple[Tensor, list[Tensor]]:
        moved = ops.displace([2 * b for b in base], rows, weights)
        ops.displace(base, rows, weights, out=base)
        return sum(m.sin().sum() for m in moved), moved  # type: ignore[return-value]

    results: list[list[Tensor]] = []
    for call in (step, torch.compile(step, fullgraph=True, backend=backend)):
        base, weights = [part.clone() for part in parts], weights_for(tasks, "cpu").requires_grad_()
        loss, moved = call(base, weights)
        loss.backward()
        assert weights.grad is not None
        results.append([*base, *moved, weights.grad])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_autocast_does_not_reach_it() -> None:
    base, rows = problem(PAIRS[0], 3, 300)
    want = ops.displace(base, rows, weights_for(3, "cpu"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(ops.displace(base, rows, weights_for(3, "cpu")), want)


@pytest.mark.parametrize("form", list(forms(PAIRS[0])))
def test_without_kernels_the_reference_serves(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, base, tasks, stacked = forms(PAIRS[4])[form]
    weights, results = weights_for(tasks, "cpu"), []
    for kernels in (_native.KERNELS["cpu"], None):
        monkeypatch.setitem(_native.KERNELS, "cpu", kernels)
        out = [part.clone() for part in base]
        o = torch.ops.mtlgrad
        out = o.displace_like.default(rows, tasks, stacked, out, weights, out)
        results.append([*o.displace.default(rows, tasks, stacked, base, weights), *out])
    for a, b in zip(*results, strict=True):
        assert a.stride() == b.stride()
        assert torch.equal(a, b)


# ---- errors ----------------------------------------------------------------------------------------------------------

B = torch.ones(4)
R = torch.ones(3, 4)
W = torch.ones(3)
BAD_CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "no rows": (lambda: ops.displace(B, [], W), "displace: rows: expected at least one row, found none"),
    "None": (
        lambda: ops.displace([B], [[None]], W),  # type: ignore[list-item]
        r"displace: rows: expected a tensor as rows\[0\]\[0\] .*, found NoneType",
    ),
    "rows": (lambda: ops.displace(B, [B, B[:3]], W[:2]), r"displace: rows: expected \[4\] .* in row 1, .* found \[3\]"),
    "integers": (lambda: ops.displace(B.long(), R.long(), W), "displace: rows: expected float32, .* found torch.int64"),
    "base": (
        lambda: ops.displace(B[:3], R, W),
        r"displace: base: expected \[4\] torch.float32 on cpu, like tensor 0 of a row, found \[3\] torch.float32 on",
    ),
    "bases": (lambda: ops.displace([B, B], R, W), "displace: base: expected 1 tensors, found 2"),
    "no base": (lambda: ops.displace([], R, W), "displace: base: expected 1 tensors, found 0"),
    "wide base": (lambda: ops.displace(B.double(), R, W), "displace: base: expected .* torch.float32 on .*float64 on"),
    "narrow base": (lambda: ops.displace(B.bfloat16(), R, W), "displace: base: expected .* torch.float32 on .*bfloat"),
    "float16 rows": (lambda: ops.displace(B, R.half(), W), "displace: base: expected .* torch.float16 on .*float32"),
    "bfloat16 rows": (
        lambda: ops.displace(B.double(), R.bfloat16(), W),
        r"displace: base: expected \[4\] torch.bfloat16 or torch.float32 on cpu, .* found \[4\] torch.float64",
    ),
    "weights": (lambda: ops.displace(B, R, W[:2]), r"displace: weights: expected shape \[3\], found \[2\]"),
    "whole weights": (
        lambda: ops.displace(B, R, W.long()),
        "displace: weights: expected float32, .* found torch.int64",
    ),
    "weights' device": (
        lambda: ops.displace(B, R, W.to("meta")),
        "displace: weights: expected device cpu like base, found meta",
    ),
    "devices": (
        lambda: ops.displace([B, B.to("meta")], [[B, B]], W[:1]),
        "displace: base: expected .* on cpu, like tensor 1 of a row, found .* on meta",
    ),
    "out": (
        lambda: ops.displace(B, R.bfloat16(), W, out=B.bfloat16()),
        r"displace: out: expected \[4\] torch.float32 on cpu, like tensor 0 of base, found \[4\] torch.bfloat16 on cpu",
    ),
    "outs": (lambda: ops.displace([B], R, W, out=[B, B]), "displace: out: expected 1 tensors, found 2"),
}


@pytest.mark.parametrize("name", list(BAD_CALLS))
def test_errors_name_argument_expected_and_found(name: str) -> None:
    call, message = BAD_CALLS[name]
    with pytest.raises((RuntimeError, ValueError), match=message) as error:
        call()
    assert "\n" not in str(error.value)
