"""The alignment of task gradients: accuracy against the singular value decomposition of the gradients themselves,
against 50 digits, and the properties that define it; on every backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtlgrad import ops, reference
from mtlgrad.ops import AlignResult
from tests.support.bounds import near, normal
from tests.support.oracles import procrustes


def dependent(seed: int, tasks: int, columns: int) -> Tensor:
    """Whole numbers, the last row exactly the first less the second (T = 2: twice the first): the rank is T - 1. They
    are positive, so that sums grow from end to end, and with them the rounding of a careless one."""
    rows = torch.randint(1, 100, (tasks, columns), generator=torch.Generator().manual_seed(seed)).double()
    if tasks == 2:
        rows[1] = 2 * rows[0]
    elif tasks > 2:
        rows[-1] = rows[0] - rows[1]
    return rows


def _twice(rows: Tensor, factor: float) -> Tensor:
    rows[1] = factor * rows[0]
    return rows


def _scaled(rows: Tensor, factors: Sequence[float]) -> Tensor:
    return rows * torch.tensor(factors, dtype=rows.dtype)[:, None]


#: Systems of gradients [T, N] and their rank under the default tolerance.
SYSTEMS: dict[str, tuple[Callable[[], Tensor], int]] = {
    "full rank": (lambda: normal(1, 5, 300), 5),
    "two tasks": (lambda: normal(2, 2, 1000), 2),
    "one task": (lambda: normal(3, 1, 33), 1),
    "one number": (lambda: normal(4, 1, 1), 1),
    "dependent": (lambda: dependent(5, 4, 257), 3),
    "same twice": (lambda: _twice(normal(6, 3, 100), 1.0), 2),
    "opposite": (lambda: _twice(normal(7, 2, 100), -1.0), 1),
    "opposite of three": (lambda: _twice(normal(8, 3, 100), -1.0), 2),
    "nearly opposite": (lambda: torch.cat([n := normal(9, 1, 1000), 0.02 * normal(10, 1, 1000) - n]), 2),
    "dominated": (lambda: _scaled(normal(11, 3, 500), [1e3, 1.0, 1e-2]), 2),
    "dominated by six": (lambda: _scaled(normal(12, 3, 500), [1e3, 1.0, 1.0]), 3),
    "more tasks than columns": (lambda: normal(13, 6, 3), 3),
    "many more": (lambda: normal(14, 20, 7), 7),
    "twenty tasks": (lambda: normal(15, 20, 500), 20),
    "twenty tasks of rank 19": (lambda: dependent(16, 20, 500), 19),
    "absent task": (lambda: _scaled(normal(17, 4, 100), [1.0, 1.0, 0.0, 1.0]), 3),
    "no gradient": (lambda: torch.zeros(3, 50, dtype=torch.float64), 0),
    "orthonormal": (lambda: torch.eye(5, 9, dtype=torch.float64), 5),
    "alike": (lambda: normal(18, 1, 400) + 0.1 * normal(19, 8, 400), 8),
}

SCALES = ["min", "median", "rmse"]


def check(got: AlignResult, rows: Tensor, tolerance: float, full: bool, **options: object) -> None:
    """All that :func:`ops.align` returns, against the decomposition of `rows`."""
    want = procrustes(rows, **options)  # type: ignore[arg-type]
    assert int(got.rank) == want.rank
    zero = 1e-5 * float(want.transform.abs().max())  # opposite gradients: the weights are rounding errors
    assert near(got.weights, want.weights, tolerance, zero)
    if full:
        assert ((got.weights.cpu() - want.weights).abs() <= tolerance * want.weights.abs()).all()
    assert near(got.transform, want.transform, tolerance)
    assert near(got.transform, got.transform.mT.cpu(), 1e-15)
    values = got.singular_values.cpu()
    assert (values[1:] <= values[:-1]).all()
    # Its square is an eigenvalue of a rounded matrix: of the smallest ones half the digits are gone.
    assert ((values.square() - want.singular_values.square()).abs() <= 1e-14 * len(rows) * values[0] ** 2).all()
    kept = want.singular_values[: want.rank]
    assert near(values[: want.rank], kept, 1e-9) if want.rank else (values == 0).all()
    # What is formed of the gradients, in float64: the update lies right in parameter space, not only in weights.
    assert near(got.weights.cpu() @ rows.double(), want.update, tolerance, zero * float(rows.abs().max()))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("name", list(SYSTEMS))
def test_weights_are_those_of_the_nearest_orthogonal_system(name: str, weighed: bool, scale: str, device: str) -> None:
    make, rank = SYSTEMS[name]
    rows = make().float()
    preference = normal(99, len(rows)).abs() + 0.1 if weighed else None
    given_preference = None if preference is None else preference.to(device)
    got = ops.align(ops.gram(rows.to(device)), given_preference, scale)
    assert int(got.rank) == rank
    check(got, rows, 1e-9, rank == len(rows), scale=scale, preference=preference)
    assert got.weights.dtype == got.transform.dtype == torch.float64
    assert got.rank.dtype == torch.int64


@pytest.mark.parametrize("scale", SCALES)
def test_all_digits_of_dominated_gradients(scale: str, device: str) -> None:
    """Norms 1e3 : 1 : 1e-2, all kept: eigenvalues ten orders apart, from float32 gradients."""
    rows = SYSTEMS["dominated"][0]().float()
    got = ops.align(ops.gram(rows.to(device)), None, scale, rtol=1e-12)
    check(got, rows, 1e-6, True, scale=scale, rtol=1e-12)


@pytest.mark.parametrize("gap", [3e-5, 3e-4])
def test_tolerance_of_1e_9_from_float32_gradients(gap: float, device: str) -> None:
    """Rows that differ by 3e-5 and 3e-4 of their length: singular values whose squares are 2e-10 and 2e-8 of the
    largest. A Gram matrix summed in float32 knows neither."""
    first = normal(30, 1, 100_000)
    rows = torch.cat([first, first + gap * normal(31, 1, 100_000)]).float()
    got = ops.align(ops.gram(rows.to(device)), rtol=1e-9)
    assert int(got.rank) == (2 if gap > 1e-4 else 1)
    check(got, rows, 1e-6, int(got.rank) == 2, rtol=1e-9)


@pytest.mark.parametrize("tasks", [2, 3, 8])
def test_rank_of_dependent_gradients(tasks: int, device: str) -> None:
    """A smaller size of what bench/ runs with 1e7 columns."""
    for trial in range(5):
        rows = dependent(trial, tasks, 200_000 if device == "cuda" else 20_000).float()
        result = ops.align(ops.gram(rows.to(device)))
        assert int(result.rank) == tasks - 1
        assert int(ops.align(ops.gram(rows.to(device)), rtol=1e-9).rank) == tasks - 1
    noise = torch.zeros_like(rows)
    noise[-1] = normal(32, rows.shape[1])  # now it is not
    assert int(ops.align(ops.gram((rows + noise).to(device))).rank) == tasks


# ---- sizes of numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-24, 1e-20, 1e-12, 1e12, 1e18])
def test_size_of_the_gradients_does_not_matter(size: float, device: str) -> None:
    rows = SYSTEMS["full rank"][0]()
    scaled = (rows * size).float()
    got = ops.align(ops.gram(scaled.to(device), check_finite=True), check_finite=True)
    check(got, scaled, 1e-9, True)
    assert near(got.weights, procrustes(rows).weights, 1e-5)  # float32 rounds the rows otherwise


@pytest.mark.parametrize("exponent", [-80, -40, -1, 1, 30, 60])
def test_powers_of_two_do_not_change_a_bit(exponent: int, device: str) -> None:
    rows = SYSTEMS["alike"][0]().float().to(device)
    want, got = (ops.align(ops.gram(r), scale="rmse") for r in (rows, rows * 2.0**exponent))
    assert torch.equal(got.weights, want.weights)
    assert torch.equal(got.transform, want.transform)
    assert torch.equal(got.singular_values, want.singular_values * 2.0**exponent)
    assert torch.equal(got.condition_number, want.condition_number)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("tasks", [1, 3, 9, 70])
def test_nan_and_infinity(tasks: int, bad: float, device: str) -> None:
    rows = normal(33, tasks, 50).float()
    task = tasks // 2
    rows[task, 17] = bad
    gram = ops.gram(rows.to(device))
    result = ops.align(gram, [0.0 if t == task else 1.0 for t in range(tasks)])
    for value in (result.weights, result.singular_values, result.condition_number, result.transform):
        assert value.isnan().all()
    assert int(result.rank) == -1
    for call in (lambda: ops.align(gram, check_finite=True), lambda: ops.gram(rows.to(device), check_finite=True)):
        with pytest.raises(ValueError, match=rf"expected finite gradients, found NaN or infinity in task {task}\b"):
            call()


@pytest.mark.parametrize("columns", [1, 1000, 70_000])
def test_gradients_below_float32_are_named(columns: int, device: str) -> None:
    """A row of subnormals has lost digits, however many there are; one normal number, and it is a gradient."""
    rows = normal(34, 3, columns).float()
    rows[1] = 1e-39
    with pytest.raises(ValueError, match=r"float32 holds with all digits, found norm .* in task 1; scale the losses"):
        ops.gram(rows.to(device), check_finite=True)
    rows[1, 0] = 1e-37
    ops.gram(rows.to(device), check_finite=True)
    rows[1] = 0.0  # an absent task is not too small
    ops.align(ops.gram(rows.to(device), check_finite=True), check_finite=True)


def test_gradients_of_float64_have_more_room() -> None:
    rows = normal(35, 3, 100)
    for size in (1e-60, 1e-120, 1e60, 1e120):
        gram = ops.gram(rows * size, check_finite=True)
        assert near(ops.align(gram).weights, procrustes(rows).weights, 1e-9)
    for size in (1e-170, 1e-300, 1e200):  # squares that float64 does not hold
        with pytest.raises(ValueError, match="in task 0"):
            ops.gram(rows * size, check_finite=True)


# ---- the eigenproblem ------------------------------------------------------------------------------------------------


def exact(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Singular values and transform (scale min) with 50 digits."""
    mpmath = pytest.importorskip("mpmath")  # a GPU machine may not have it
    with mpmath.workdps(50):
        values, vectors = mpmath.eigsy(mpmath.matrix(gram.tolist()))
        order = sorted(range(len(values)), key=lambda k: -values[k])
        tasks = range(len(values))
        shortest = values[order[rank - 1]]
        kept = order[:rank]
        transform = [
            [float(sum(mpmath.sqrt(shortest / values[k]) * vectors[i, k] * vectors[j, k] for k in kept)) for j in tasks]
            for i in tasks
        ]
        roots = [float(mpmath.sqrt(max(values[k], 0))) for k in order]
    return torch.tensor(roots, dtype=torch.float64), torch.tensor(transform, dtype=torch.float64)


@pytest.mark.parametrize("tasks", [2, 3, 5, 8, 16])
@pytest.mark.parametrize("grade", [1.0, 0.1, 1e-2])
def test_graded_matrices(tasks: int, grade: float, device: str) -> None:
    """Row t of length grade^t: small eigenvalues keep their digits beside large ones, as Jacobi's method can."""
    length = grade ** torch.arange(tasks).double()
    if float(length[-1]) < 1e-12:
        length = torch.logspace(0, -12, tasks, dtype=torch.float64)
    rows = normal(36, tasks, 50) * length[:, None]
    gram = rows @ rows.mT
    got = ops.align(gram.to(device), rtol=0.0)
    values, transform = exact(gram, tasks)
    assert int(got.rank) == tasks
    assert ((got.singular_values.cpu() - values).abs() <= 1e-12 * values).all()
    assert near(got.transform, transform, 1e-11)
    assert float(got.condition_number) == pytest.approx(float(values[0] / values[-1]), rel=1e-11)


@pytest.mark.parametrize("tasks", [1, 2, 31, 32, 33, 63, 64, 65, 100])
def test_any_number_of_tasks(tasks: int, device: str) -> None:
    """Up to 64 in the kernel, beyond by torch.linalg.eigh."""
    rows = normal(37, tasks, 300)
    for scale in SCALES:
        check(ops.align((rows @ rows.mT).to(device), scale=scale), rows, 1e-9, False, scale=scale)  # type: ignore[arg-type]


def clusters() -> dict[str, Tensor]:
    q = torch.linalg.qr(normal(38, 12, 12))[0]
    block = torch.eye(6, dtype=torch.float64)
    block[:3, :3] = 1.0
    return {
        "identity": torch.eye(7, dtype=torch.float64),
        "ones": torch.ones(7, 7, dtype=torch.float64),
        "equal block": block,
        "two clusters": q @ torch.diag(torch.tensor([4.0] * 5 + [1.0] * 7, dtype=torch.float64)) @ q.mT,
        "within rounding": q @ torch.diag(1 + 1e-15 * torch.arange(12).double()) @ q.mT,
        "equal rows and columns": 3 * torch.eye(8, dtype=torch.float64) + 1,
        "zeros inside": torch.diag(torch.tensor([0.0, 2.0, 0.0, 1.0], dtype=torch.float64)),
    }


@pytest.mark.parametrize("name", list(clusters()))
@pytest.mark.parametrize("scale", SCALES)
def test_equal_eigenvalues(name: str, scale: str, device: str) -> None:
    """Eigenvectors are not unique there; the transform is."""
    gram = clusters()[name]
    gram = (gram + gram.mT) / 2
    got, want = ops.align(gram.to(device), scale=scale), reference.align(gram, scale=scale)  # type: ignore[arg-type]
    assert int(got.rank) == int(want.rank)
    assert near(got.transform, want.transform, 1e-13)
    assert near(got.singular_values.square(), want.singular_values.square(), 1e-13)


def test_hand_computed(device: str) -> None:
    def align(gram: list[list[float]], **options: object) -> AlignResult:
        return AlignResult(*(v.cpu() for v in ops.align(torch.tensor(gram, device=device), **options)))  # type: ignore[arg-type]

    one = align([[4.0]])
    assert [v.tolist() for v in one] == [[1.0], [2.0], 1, 1.0, [[1.0]]]
    none = align([[0.0, 0.0], [0.0, 0.0]], preference=[0.25, 3.0])
    assert none.weights.tolist() == [0.25, 3.0]
    assert int(none.rank) == 0
    assert none.condition_number.isnan()
    absent = align([[0.0, 0.0], [0.0, 9.0]])
    assert absent.weights.tolist() == [0.0, 1.0]
    assert absent.condition_number.isinf()
    diagonal = [[16.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 4.0, 0], [0, 0, 0, 9.0]]  # singular values 4, 3, 2, 1
    assert align(diagonal).weights.tolist() == [0.25, 1.0, 0.5, 1 / 3]
    assert align(diagonal, scale="median").weights.tolist() == pytest.approx([0.5, 2.0, 1.0, 2 / 3], rel=1e-15)
    rmse = 7.5**0.5
    assert align(diagonal, scale="rmse").weights.tolist() == pytest.approx([rmse / s for s in (4, 1, 2, 3)], rel=1e-15)
    assert align(diagonal, preference=[1.0, 0, 0, 2.0]).weights.tolist() == pytest.approx([0.25, 0, 0, 2 / 3])
    # The tolerance is one on eigenvalues, and what lies on it is dropped.
    assert int(align([[4.0, 0], [0, 1.0]], rtol=0.25).rank) == 1
    assert int(align([[4.0, 0], [0, 1.0]], rtol=0.2499).rank) == 2
    assert int(align([[1.0, 0], [0, 2.3e-7]]).rank) == 1  # 2 x 1.2e-7
    assert int(align([[1.0, 0], [0, 2.5e-7]]).rank) == 2
    # Rows (1, 0) and (-1, 0): no direction is good for both, and the update is zero.
    assert align([[1.0, -1.0], [-1.0, 1.0]]).weights.abs().max() <= 1e-15


@pytest.mark.parametrize("tasks", [2, 5, 66])
def test_only_the_upper_triangle_is_read(tasks: int) -> None:
    rows = normal(39, tasks, 100)
    for gram in (rows @ rows.mT, torch.block_diag(torch.eye(2), rows @ rows.mT, torch.eye(2))):
        want = ops.align(torch.triu(gram) + torch.triu(gram, 1).mT)
        got = ops.align(torch.triu(gram) + torch.tril(torch.full_like(gram, 1e9), -1))
        for a, b in zip(got, want):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gram_matrices_of_other_types(dtype: torch.dtype, device: str) -> None:
    gram = clusters()["equal rows and columns"]  # whole numbers, the same in each type
    want = ops.align(gram.to(device))
    strided = torch.stack([gram, gram], -1).to(dtype)[..., 0].to(device)
    for other in (gram.to(dtype).to(device), strided):
        for a, b in zip(ops.align(other), want):
            assert torch.equal(a, b)


# ---- properties ------------------------------------------------------------------------------------------------------

seeds, few = st.integers(0, 2**16), st.integers(1, 9)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, tasks=few, extra=st.integers(-4, 12), scale=st.sampled_from(SCALES))
def test_aligned_gradients_are_orthogonal_and_equally_long(seed: int, tasks: int, extra: int, scale: str) -> None:
    rows = normal(seed, tasks, max(tasks + extra, 1))
    gram = rows @ rows.mT
    result = ops.align(gram, scale=scale, rtol=1e-9)  # type: ignore[arg-type]
    rank, values = int(result.rank), result.singular_values
    length = {
        "min": values[rank - 1],
        "median": values[:rank].median(),
        "rmse": values[:rank].square().mean().sqrt(),
    }[scale]
    aligned = result.transform @ gram @ result.transform / length**2
    projection = aligned @ aligned
    slack = 1e-12 * float(values[0] / values[rank - 1]) ** 2
    assert near(projection, aligned, slack + 1e-12)  # s^2 times an orthogonal projection
    assert float(aligned.trace()) == pytest.approx(rank, abs=slack + 1e-9)
    if rank == tasks:
        assert near(aligned, torch.eye(tasks, dtype=torch.float64), slack + 1e-12)
    singular = torch.linalg.eigvalsh(result.transform)
    assert singular.min() >= -1e-12 * singular.max()  # B is positive semi-definite


@settings(max_examples=40, deadline=None)
@given(seed=seeds, tasks=few, scale=st.sampled_from(SCALES))
def test_no_task_is_hurt(seed: int, tasks: int, scale: str) -> None:
    """Full rank: the update has with every gradient a product of the sign of its preference, by the same angle to each
    of the aligned ones."""
    rows = normal(seed, tasks, tasks + 20)
    preference = normal(seed + 1, tasks).abs() + 0.1
    result = ops.align(rows @ rows.mT, preference, scale)  # type: ignore[arg-type]
    update = result.weights @ rows
    with_aligned = (result.transform @ rows) @ update
    length = float((result.transform @ rows)[0].square().sum())
    assert near(with_aligned, length * preference, 1e-9)
    ones = ops.align(rows @ rows.mT, None, scale)  # type: ignore[arg-type]
    assert float(((ones.transform @ rows) @ (ones.weights @ rows)).min()) > 0


@settings(max_examples=40, deadline=None)
@given(seed=seeds, tasks=few, columns=st.integers(1, 20), scale=st.sampled_from(SCALES))
def test_symmetries(seed: int, tasks: int, columns: int, scale: str) -> None:
    """Numbering the tasks otherwise, turning the parameter space, turning a gradient's sign, a common factor."""
    rows, preference = normal(seed, tasks, columns), normal(seed + 1, tasks).abs()

    def align(rows: Tensor, preference: Tensor) -> Tensor:
        return ops.align(ops.gram(rows), preference, scale, rtol=1e-7).weights  # type: ignore[arg-type]

    want = align(rows, preference)
    spread = procrustes(rows, rtol=1e-7)
    slack = 1e-13 * float(spread.singular_values[0] / spread.singular_values[spread.rank - 1]) ** 2 + 1e-12
    order = torch.randperm(tasks, generator=torch.Generator().manual_seed(seed))
    assert near(align(rows[order], preference[order]), want[order], slack)
    turned = torch.linalg.qr(normal(seed + 2, columns, columns))[0]
    assert near(align(rows @ turned, preference), want, slack)
    assert near(align(3 * rows, preference), want, slack)
    assert near(align(rows, 3 * preference), 3 * want, slack)
    signs = torch.ones(tasks, dtype=torch.float64)
    signs[0] = -1
    assert near(align(signs[:, None] * rows, signs * preference), signs * want, slack)


# ---- strides of what is given ----------------------------------------------------------------------------------------


def strided(tensor: Tensor) -> Tensor:
    """The same numbers, every second one of memory whose others are NaN."""
    return torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1)[..., 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_preferences_with_strides(dtype: torch.dtype, device: str) -> None:
    rows, preference = normal(1, 3, 40).to(device), normal(2, 3).abs().to(device, dtype)
    gram, want = ops.gram(rows), ops.align(ops.gram(rows), preference)
    turned = torch.stack([preference, -preference], 1)[:, 0]
    for other in (strided(preference), turned):
        assert not other.is_contiguous()
        assert torch.equal(ops.align(gram, other).weights, want.weights)
        assert torch.equal(ops.merge(rows, other)[1].weights, want.weights)
    one = torch.full((1,), 2.0, dtype=dtype, device=device)
    assert torch.equal(ops.align(gram, one.expand(3)).weights, ops.align(gram, [2.0] * 3).weights)


# ---- merge -----------------------------------------------------------------------------------------------------------


def forms(device: str) -> dict[str, Any]:
    def make(seed: int, *shape: int) -> Tensor:
        return normal(seed, *shape).float().to(device)

    image = make(3, 2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    video = make(3, 2, 3, 2, 4, 5).contiguous(memory_format=torch.channels_last_3d)
    return {
        "stacked": ops.Stacked([make(1, 3, 4, 5), make(2, 3, 7)]),
        "listed": [[make(t + p, *s) for p, s in enumerate([(4, 5), (7,)])] for t in range(3)],
        "transposed": [[make(4, 5, 4).t()], [make(5, 4, 5)], [make(6, 4, 5)]],
        "sliced": [[make(4, 4, 9)[:, :5]], [make(5, 4, 5)], [make(6, 4, 5)]],
        "expanded": [[make(4, 4, 1).expand(4, 5)], [make(5, 4, 5)]],
        "channels_last": [[image], [image + 1]],
        "channels_last_3d": [[video], [video + 1]],
        "one channels_last": [[make(7, 2, 3, 4, 5)], [image]],
        "strided stack": ops.Stacked([make(8, 6, 4, 5)[::2], make(9, 3, 5, 4).mT]),
        "tasks last": ops.Stacked([make(8, 4, 5, 3).permute(2, 0, 1)]),
        "empty": ops.Stacked([make(8, 3, 0, 5)]),
    }


@pytest.mark.parametrize("form", list(forms("cpu")))
@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
def test_merge_is_the_three_in_one(form: str, scale: Any, device: str) -> None:
    rows = forms(device)[form]
    tasks = len(ops.gram(rows))
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
