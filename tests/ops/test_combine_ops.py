"""The operators of the `combine` and `align` stems: opcheck, derivatives, torch.compile, errors in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mtlgrad import ops, reference
from mtlgrad.ops import _native
from tests.support.bounds import near, normal
from tests.support.oracles import procrustes

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)


def lists(dtype: torch.dtype, grad: bool = False) -> dict[str, tuple[list[Tensor], int, bool]]:
    """Rows as the operators take them: tensors, tasks, stacked."""

    def make(seed: int, *shape: int) -> Tensor:
        return normal(seed, *shape).to(dtype)

    image = make(3, 2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    video = make(3, 2, 3, 2, 4, 5).contiguous(memory_format=torch.channels_last_3d)
    found = {
        "stacked": ([make(1, 3, 4, 5), make(2, 3, 7)], 3, True),
        "listed": ([make(t + p, *s) for t in range(3) for p, s in enumerate([(4, 5), (7,)])], 3, False),
        "transposed": ([make(4, 5, 4).t(), make(5, 4, 5), make(6, 4, 5)], 3, False),
        "sliced": ([make(4, 4, 9)[:, :5], make(5, 4, 5), make(6, 4, 5)], 3, False),
        "expanded": ([make(4, 4, 1).expand(4, 5), make(5, 4, 5)], 2, False),
        "channels_last": ([image, image + 1], 2, False),
        "channels_last_3d": ([video, video + 1], 2, False),
        "one channels_last": ([make(7, 2, 3, 4, 5), image], 2, False),
        "strided stack": ([make(8, 6, 4, 5)[::2], make(9, 3, 5, 4).mT], 3, True),
        "tasks last": ([make(8, 4, 5, 3).permute(2, 0, 1)], 3, True),
        "empty": ([make(8, 3, 0, 5)], 3, True),
    }
    return {k: ([t.requires_grad_(grad) for t in tensors], *rest) for k, (tensors, *rest) in found.items()}  # type: ignore[misc]


def like_row(tensors: list[Tensor], tasks: int, stacked: bool) -> list[Tensor]:
    return [torch.empty(t[0].shape, dtype=t.dtype) for t in tensors] if stacked else tensors[: len(tensors) // tasks]


@DTYPES
@pytest.mark.parametrize("form", list(lists(torch.float32)))
def test_opcheck(form: str, dtype: torch.dtype) -> None:
    """Above all that the traced version has the shapes, types and strides of the real one."""
    tensors, tasks, stacked = lists(dtype)[form]
    o, weights = torch.ops.mtlgrad, normal(9, tasks).float()
    row = [torch.ones_like(t) for t in like_row(tensors, tasks, stacked)]
    torch.library.opcheck(o.gram.default, (tensors, tasks, stacked))
    torch.library.opcheck(o.dots.default, (tensors, tasks, stacked, row))
    torch.library.opcheck(o.combine.default, (tensors, tasks, stacked, weights))
    torch.library.opcheck(o.combine_like.default, (tensors, tasks, stacked, weights, row))
    result = list(ops.align(torch.eye(tasks)))
    preference = torch.ones(tasks, dtype=torch.float64)
    options = (preference, "min", 1e-6, False)
    if form != "empty":  # whose condition number is NaN, which opcheck takes for a difference
        torch.library.opcheck(o.merge.default, (tensors, tasks, stacked, *options))
        torch.library.opcheck(o.merge_like.default, (tensors, tasks, stacked, *options, [*row, *result]))


@pytest.mark.parametrize("tasks", [1, 3, 65])
def test_opcheck_align(tasks: int) -> None:
    rows = normal(1, tasks, 100)
    for gram in (rows @ rows.mT, (rows @ rows.mT).float()):
        arguments = (gram, torch.ones(tasks), "rmse", 1e-7)
        torch.library.opcheck(torch.ops.mtlgrad.align.default, arguments)
        torch.library.opcheck(torch.ops.mtlgrad.align_like.default, (*arguments, list(ops.align(torch.eye(tasks)))))


def test_nothing_of_what_was_in_memory_remains(device: str) -> None:
    """torch fills new memory with NaN where algorithms are to be deterministic."""
    rows, tensors = normal(1, 5, 300).float().to(device), [normal(i, 5, 3, i).to(device) for i in (1, 4)]

    def results() -> list[Tensor]:
        found: list[Tensor] = []
        for own in (rows, ops.Stacked(tensors), [list(t) for t in zip(*tensors)]):
            merged, result = ops.merge(own)
            gram = ops.gram(own)
            combined = ops.combine(own, result.weights)
            dots = ops.dots(own, combined)
            moved = ops.displace(combined, own, result.weights)  # type: ignore[call-overload]
            for part in (merged, combined, moved):
                found += [part] if isinstance(part, Tensor) else part
            found += [*result, gram, dots, *ops.align(gram)]
        return found

    expected = results()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        found = results()
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


class Names(TorchDispatchMode):
    """Writes down which operators ran."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_the_operators() -> None:
    """Those that are called directly where nobody looks."""
    rows, weights = normal(1, 3, 5), normal(2, 3)
    with Names() as names:
        found = ops.combine(rows, weights)
        ops.combine(rows, weights, out=torch.empty_like(found))
    assert [name for name in names.found if "mtlgrad" in name] == [
        "mtlgrad.combine.default",
        "mtlgrad.combine_like.default",
    ]


def test_gradcheck() -> None:
    def leaf(*shape: int, seed: int = 1) -> Tensor:
        return normal(seed, *shape).requires_grad_()

    check = torch.autograd.gradcheck
    stack, weights, vector = leaf(3, 2, 4), leaf(3, seed=2), leaf(2, 4, seed=3)
    parts = [leaf(4, seed=s) for s in range(4)]
    assert check(ops.gram, stack)
    assert check(ops.combine, (stack, weights))
    assert check(ops.dots, (stack, vector))
    assert check(lambda *p: ops.gram([p[:2], p[2:]]), parts)
    assert check(lambda w, *p: tuple(ops.combine([p[:2], p[2:]], w)), (leaf(2, seed=5), *parts))
    assert check(lambda *p: ops.dots([p[:2], p[2:]], p[:2]), parts)
    assert check(lambda *p: ops.gram(ops.Stacked(p)), (leaf(2, 3), leaf(2, 1, seed=6)))
    # Some inputs constant.
    assert check(lambda w: ops.combine(stack.detach(), w), weights)
    assert check(lambda s: ops.combine([s, stack.detach()[0]], torch.tensor([2.0, 3.0])), vector)
    # alphaVIL's derivative: of a loss at theta + combine(delta, alpha) in alpha.
    alpha = weights.detach().clone().requires_grad_()
    (ops.combine(stack.detach(), alpha).sin()).sum().backward()
    slope = ops.combine(stack, weights).detach().cos()
    assert near(alpha.grad, ops.dots(stack.detach(), slope), 1e-12)  # type: ignore[arg-type]


def test_other_work_sees_what_was_written_in_place() -> None:
    """Autograd refuses a graph whose tensors a kernel wrote over, whatever the element order that they have."""
    rows = normal(1, 3, 2, 3, 4, 5)
    calls: list[Callable[[Tensor], Any]] = [
        lambda out: ops.combine(rows, torch.ones(3), out=out),
        lambda out: ops.displace(out, rows, torch.ones(3), out=out),
        lambda out: ops.merge(rows, out=out),
    ]
    for call in calls:
        for order in (torch.contiguous_format, torch.channels_last):
            leaf = torch.ones(2, 3, 4, 5, dtype=torch.float64).to(memory_format=order).requires_grad_()
            loss = leaf.square().sum()
            with torch.no_grad():
                call(leaf)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
        with torch.inference_mode():
            call(torch.ones(2, 3, 4, 5, dtype=torch.float64))


def test_what_is_written_in_place_has_no_derivative() -> None:
    rows = normal(1, 3, 4).requires_grad_()
    out = torch.empty(4, dtype=torch.float64)
    assert not ops.combine(rows, torch.ones(3, requires_grad=True), out=out).requires_grad
    gradient, result = ops.merge(rows)
    assert not gradient.requires_grad  # type: ignore[union-attr]
    assert not any(v.requires_grad for v in result)
    assert not ops.align(ops.gram(rows)).weights.requires_grad


# Inductor itself uses what torch deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("form", ["stacked", "listed", "transposed", "channels_last", "expanded", "strided stack"])
def test_compiles_without_graph_breaks(form: str, backend: str) -> None:
    torch.compiler.reset()
    tensors, tasks, stacked = lists(torch.float32)[form]
    count = len(tensors) if stacked else len(tensors) // tasks

    def step(*tensors: Tensor) -> tuple[Any, ...]:
        parts = list(tensors)
        rows = ops.Stacked(parts) if stacked else [parts[t * count : (t + 1) * count] for t in range(tasks)]
        result = ops.align(ops.gram(rows), scale="rmse")
        merged = ops.combine(rows, result.weights)
        merged = [m * 2 + m.mean() for m in merged]
        again, _ = ops.merge(rows, scale="rmse")
        out = [torch.empty_like(m) for m in merged]
        ops.combine(rows, result.weights, out=out)
        return result.weights, ops.dots(rows, out), *merged, *again, *out

    got, want = torch.compile(step, fullgraph=True, backend=backend)(*tensors), step(*tensors)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_compiled_derivatives() -> None:
    torch.compiler.reset()

    def loss(rows: Tensor, weights: Tensor) -> Tensor:
        return ops.combine(rows * 2, weights).square().sum() + ops.gram(rows).sum() + ops.dots(rows, rows[0]).sum()

    results = []
    for call in (loss, torch.compile(loss, fullgraph=True)):
        rows, weights = normal(1, 3, 40).float().requires_grad_(), normal(2, 3).float().requires_grad_()
        call(rows, weights).backward()
        results.append((rows.grad, weights.grad))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_autocast_does_not_reach_them() -> None:
    rows, weights = normal(5, 3, 300).float(), normal(6, 3).float()

    def all_of_them() -> list[Tensor]:
        return [ops.gram(rows), ops.dots(rows, rows[0]), ops.combine(rows, weights), *ops.align(ops.gram(rows))]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = all_of_them()
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(inside, all_of_them()))


def test_without_kernels_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Same results, layouts and writes in place on a device that no kernel was built for."""
    forms = lists(torch.float32)
    want = {}
    for device in ("kernels", "reference"):
        if device == "reference":
            monkeypatch.setitem(_native.KERNELS, "cpu", None)
        for form, (tensors, tasks, stacked) in forms.items():
            weights = normal(9, tasks)
            o = torch.ops.mtlgrad
            merged = o.combine.default(tensors, tasks, stacked, weights)
            out = [torch.empty_like(m) for m in merged]
            out = o.combine_like.default(tensors, tasks, stacked, weights, out)
            gram = o.gram.default(tensors, tasks, stacked)
            found = [gram, o.dots.default(tensors, tasks, stacked, merged), *merged, *out]
            found += [v for v in ops.align(gram) if form != "empty"]
            if device == "kernels":
                want[form] = found
                continue
            for a, b in zip(found, want[form], strict=True):
                assert a.stride() == b.stride()
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# ---- rows in half the memory of the vector ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 255, 257, 1000, 70_000])
def test_dots_of_bfloat16_and_float32(size: int, device: str) -> None:
    for tasks in (1, 2, 3, 4, 5, 8, 9) if size <= 1000 else (3,):
        rows, vector = normal(1, tasks, size).bfloat16().to(device), normal(2, size).float().to(device)
        got, want = ops.dots(rows, vector).cpu(), rows.double().cpu() @ vector.double().cpu()
        assert got.dtype == torch.float64
        terms = rows.double().cpu().abs() @ vector.double().cpu().abs()
        assert ((got - want).abs() <= (size + 2) ** 0.5 * 2**-51 * terms).all()
    torch.library.opcheck(torch.ops.mtlgrad.dots.default, ([rows], tasks, True, [vector]))


def test_dots_of_mixed_types_in_one_call(device: str) -> None:
    """Parameters of four kinds, the first and the last of one; laid out otherwise in the vector."""
    kinds = [(torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float64,) * 2]
    kinds.append(kinds[0])
    rows = [[normal(t + p, 40 + p, 5).to(row).to(device) for p, (row, _) in enumerate(kinds)] for t in range(3)]
    vector = [normal(9 + p, 5, 40 + p).to(other).to(device).mT for p, (_, other) in enumerate(kinds)]
    assert near(ops.dots(rows, vector), reference.dots(rows, vector), 1e-13)


# ---- merge -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", list(lists(torch.float32)))
@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
def test_merge_is_the_three_in_one(form: str, scale: Any, device: str) -> None:
    tensors, tasks, stacked = lists(torch.float32)[form]
    tensors = [t.to(device) for t in tensors]
    count = len(tensors) // tasks
    rows = ops.Stacked(tensors) if stacked else [tensors[t * count : (t + 1) * count] for t in range(tasks)]
    preference = normal(4, tasks).abs().to(device)
    want = ops.align(ops.gram(rows), preference, scale)
    merged, result = ops.merge(rows, preference, scale)
    assert all(torch.equal(a, b) for a, b in zip(result, want) if not b.isnan().any())
    combined = ops.combine(rows, want.weights)
    assert len(merged) == len(combined)
    assert all(torch.equal(a, b) for a, b in zip(merged, combined))
    out = [torch.full_like(m, torch.nan) for m in combined]
    other = ops.align(torch.eye(tasks, device=device))
    again, same = ops.merge(rows, preference, scale, out=out, result=other)
    assert same is other
    assert all(a is b for a, b in zip(again, out))
    assert all(torch.equal(a, b) for a, b in zip(again, combined))
    assert torch.equal(other.weights, want.weights)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), tasks=st.integers(1, 8), sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5))
def test_merged_gradient(seed: int, tasks: int, sizes: list[int]) -> None:
    """Lists of tensors or one vector; doubled rows double it; it is Procrustes' update."""
    rows = [[normal(seed + 7 * t + p, s) for p, s in enumerate(sizes)] for t in range(tasks)]
    whole = torch.stack([torch.cat(row) for row in rows])
    want = procrustes(whole, rtol=1e-7).update if whole.numel() else torch.zeros(0)
    merged, result = ops.merge(rows, rtol=1e-7)
    slack = 1e-12 * float(result.condition_number.nan_to_num(posinf=1e4).clamp(1, 1e4)) ** 2
    if want.numel():
        assert near(torch.cat(merged), want, slack)
        assert near(ops.merge(whole, rtol=1e-7)[0], want, slack)  # type: ignore[arg-type]
        assert near(ops.merge(2 * whole, rtol=1e-7)[0], 2 * want, slack)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_merge_of_nan_and_infinity(bad: float, device: str) -> None:
    rows = normal(1, 3, 100).float().to(device)
    rows[2, 5] = bad
    merged, result = ops.merge(rows, [1.0, 1.0, 0.0])
    assert merged.isnan().all()  # type: ignore[union-attr]
    assert result.weights.isnan().all()
    out = torch.full((100,), 7.0, device=device)
    with pytest.raises(ValueError, match=r"merge: rows: expected finite gradients.* in task 2\b"):
        ops.merge(rows, check_finite=True, out=out)
    assert (out == 7.0).all()


# ---- errors ----------------------------------------------------------------------------------------------------------

R = torch.ones(3, 4)
W = torch.ones(3)
BAD_CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "no rows": (lambda: ops.gram([]), "gram: rows: expected at least one row, found none"),
    "no rows stacked": (
        lambda: ops.merge(ops.Stacked([R[:0]])),
        r"merge: rows: expected tensors \[T, ...\] with T > 0",
    ),
    "no rows in a tensor": (lambda: ops.gram(R[:0]), r"gram: rows: expected at least one row, found shape \[0, 4\]"),
    "number": (lambda: ops.gram(torch.tensor(1.0)), r"gram: rows: expected a tensor \[T, ...\] or a sequence"),
    "empty lists": (lambda: ops.gram([[], []]), "gram: rows: expected at least one tensor a row, found none"),
    "mixed": (
        lambda: ops.dots([R[0], [R[1]]], R[0]),
        "dots: rows: expected all rows tensors, or all lists, found both",
    ),
    "ragged": (lambda: ops.gram([[R, R], [R]]), "gram: rows: expected 2 tensors in row 1, as in row 0, found 1"),
    "None": (
        lambda: ops.gram([[R, R], [R, None]]),  # type: ignore[list-item]
        r"gram: rows: expected a tensor as rows\[1\]\[1\] \(zeros where a task does not reach\), found NoneType",
    ),
    "shapes": (
        lambda: ops.gram([R[0], R[1, :3]]),
        r"gram: rows: expected \[4\] torch.float32 in row 1, tensor 0, as in row 0, found \[3\] torch.float32",
    ),
    "types": (lambda: ops.combine([R[0], R[1].double()], torch.ones(2)), "combine: rows: .* found .4. torch.float64"),
    "integers": (lambda: ops.gram(R.long()), "gram: rows: expected float32, float64, .* found torch.int64"),
    "devices": (lambda: ops.gram([R[0], R[1].to("meta")]), "gram: rows: expected all on cpu, found meta"),
    "no stack": (lambda: ops.gram(ops.Stacked([])), "gram: rows: expected at least one tensor"),
    "stack of numbers": (
        lambda: ops.gram(ops.Stacked([torch.tensor(1.0)])),
        r"gram: rows: expected tensors \[T, ...\]",
    ),
    "stack": (
        lambda: ops.gram(ops.Stacked([R, R[:2]])),
        r"gram: rows: expected 3 rows in every tensor, found shape \[2, 4\] in tensor 1",
    ),
    "vector": (
        lambda: ops.dots(R, R[0, :3]),
        r"dots: vector: expected \[4\] torch.float32 on cpu, like tensor 0 of a row, found \[3\] torch.float32 on cpu",
    ),
    "vectors": (lambda: ops.dots(R, [R[0], R[0]]), "dots: vector: expected 1 tensors, found 2"),
    "vector's type": (lambda: ops.dots(R, R[0].double()), "dots: vector: .* found .4. torch.float64"),
    "bfloat16's vector": (
        lambda: ops.dots(R.bfloat16(), R[0].double()),
        r"dots: vector: expected \[4\] torch.bfloat16 or torch.float32 on cpu, .* found \[4\] torch.float64",
    ),
    "float16's vector": (lambda: ops.dots(R.half(), R[0]), "dots: vector: expected .4. torch.float16 on .* found .*32"),
    "narrow vector": (lambda: ops.dots(R, R[0].bfloat16()), "dots: vector: expected .4. torch.float32 on .* found"),
    "weights": (lambda: ops.combine(R, W[:2]), r"combine: weights: expected shape \[3\], found \[2\]"),
    "weights' device": (lambda: ops.combine(R, W.to("meta")), "combine: weights: expected device cpu .* found meta"),
    "out": (lambda: ops.combine(R, W, out=R[0].double()), "combine: out: .* found .4. torch.float64"),
    "outs": (lambda: ops.combine(R, W, out=[R[0]] * 2), "combine: out: expected 1 tensors, found 2"),
    "merge's preference": (lambda: ops.merge(R, [1.0, 2.0]), r"merge: preference: expected shape \[3\], found \[2\]"),
    "merge's scale": (lambda: ops.merge(R, scale="max"), "merge: scale: expected one of min, median, rmse"),  # type: ignore[arg-type]
    "merge's rtol": (lambda: ops.merge(R, rtol=2.0), "merge: rtol: expected a number from 0 to below 1, found 2.0"),
    "merge's out": (lambda: ops.merge(R, out=R[0, :2]), r"merge: out: expected \[4\] torch.float32"),
}


@pytest.mark.parametrize("name", list(BAD_CALLS))
def test_errors_name_argument_expected_and_found(name: str) -> None:
    call, message = BAD_CALLS[name]
    with pytest.raises((RuntimeError, ValueError), match=message) as error:
        call()
    assert "\n" not in str(error.value)


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
