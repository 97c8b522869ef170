"""The `moments` operations against their float64 reference, on every backend there is: the CPU kernels, the CUDA
kernels in the host emulator, and the CUDA kernels on a GPU where there is one; and how close they come to the integrals
that they stand for."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtlgrad import ops, reference
from tests.ops import emulated

#: Of a batch and its features; of the CUDA kernels in the emulator: a warp and less, several with a tail, blocks.
SIZES = [(1, 1), (2, 0), (3, 31), (2, 32), (33, 33), (5, 255), (4, 257), (2, 1000)]
FEW = [(1, 1), (2, 0), (3, 31), (5, 65), (2, 257)]
# In float64 the reference is no better than what it checks: its own centred sums of tight posteriors lose some digits.
EPS = {torch.float32: 1.2e-7, torch.float64: 1e-13, torch.float16: 1.2e-7, torch.bfloat16: 1.2e-7}


# ---- random posteriors and batches -----------------------------------------------------------------------------------


class Case(NamedTuple):
    features: Tensor
    targets: Tensor
    mean: Tensor
    covariance: Tensor | tuple[Tensor, Tensor]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def spd(g: torch.Generator, *batch: int, size: int) -> Tensor:
    """Covariances with eigenvalues between about 0.01 and 4."""
    a = normal(g, *batch, size, size)
    return a @ a.mT / max(size, 1) + 0.01 * torch.eye(size, dtype=torch.float64)


def regression(
    seed: int,
    batch: int,
    width: int,
    outputs: int = 3,
    scale: float = 1.0,
    per_output: bool = False,
    bias: bool = False,
) -> Case:
    g = generator(seed)
    shape = (outputs,) if per_output else ()
    return Case(
        normal(g, batch, width),
        normal(g, batch, outputs),
        normal(g, outputs, width + bias),
        scale * spd(g, *shape, size=width + bias),
    )


def binary(seed: int, batch: int, width: int, outputs: int = 3, scale: float = 1.0, diagonal: bool = False) -> Case:
    g = generator(seed)
    targets = torch.randint(0, 2, (batch, outputs), generator=g).double()
    mean = normal(g, outputs, width + 1) / (width + 1) ** 0.5
    covariance = scale * spd(g, outputs, size=width + 1)
    return Case(normal(g, batch, width), targets, mean, covariance.diagonal(dim1=1, dim2=2) if diagonal else covariance)


def multiclass(
    seed: int, batch: int, width: int, classes: int = 3, scale: float = 1.0, structure: str = "full"
) -> Case:
    g = generator(seed)
    targets = torch.randint(0, classes, (batch,), generator=g)
    size = width + 1
    mean = normal(g, classes, size) / size**0.5
    covariance: Tensor | tuple[Tensor, Tensor]
    if structure == "full":
        covariance = scale * spd(g, size=classes * size)
    elif structure == "block":
        covariance = scale * spd(g, classes, size=size)
    elif structure == "diag":
        covariance = scale * (0.1 + torch.rand(classes, size, generator=g, dtype=torch.float64))
    else:
        covariance = (spd(g, size=classes), scale * spd(g, size=size))
    return Case(normal(g, batch, width), targets, mean, covariance)


def cast(case: Case, dtype: torch.dtype) -> Case:
    """Floating tensors in another dtype; rounded once, so that the float64 reference sees the same numbers after."""

    def to(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() else t

    covariance = tuple(to(c) for c in case.covariance) if isinstance(case.covariance, tuple) else to(case.covariance)
    return Case(to(case.features), to(case.targets), to(case.mean), covariance)  # type: ignore[arg-type]


def worst(got: Tensor, want: Tensor) -> Tensor:
    """The largest error of each (example, task) row, [B, T]."""
    error = (got.double() - want).abs()
    return error.amax(-1) if error.shape[-1] else error.sum(-1)


def assert_within_bound(got: Tensor, eager: Tensor, want: Tensor, terms: Tensor, eps: float, what: str) -> None:
    """At most twice the eager computation's error in the same precision, plus a few eps of the size of the terms.

    By rows: one element's eager error may be zero by luck, a row's largest one is not.
    """
    assert got.shape == want.shape
    assert got.isfinite().all(), f"{what}: not finite"
    limit = 2 * worst(eager, want) + 8 * eps * (terms.amax(-1) if terms.shape[-1] else terms.sum(-1))
    excess = worst(got, want) - limit
    assert (excess <= 0).all(), f"{what}: error {worst(got, want).max():.2e} over its bound by {excess.max():.2e}"


def sizes_with_features() -> list[tuple[int, int]]:
    return [size for size in (FEW if emulated() else SIZES) if size[1]]


def on(device: str, *values: Any) -> list[Any]:
    return [tuple(x.to(device) for x in v) if isinstance(v, tuple) else v.to(device) for v in values]


def wide(case: Case) -> Case:
    return cast(case, torch.float64)


def compare(
    name: str,
    case: Case,
    dtype: torch.dtype,
    device: str,
    terms: tuple[Tensor, Tensor] | None = None,
    **options: int,
) -> None:
    """One operation, all its results, against the float64 reference of the same rounded inputs."""
    case = cast(case, dtype)
    want = getattr(reference, name)(*wide(case), **options)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    eager = getattr(reference, name)(*cast(case, compute), **options)
    got = getattr(ops, name)(*on(device, *case), **options)
    for i, what in enumerate(("mean", "variance")):
        assert got[i].dtype == compute
        scale = want[i].abs() if terms is None else terms[i]
        assert_within_bound(got[i].cpu(), eager[i], want[i], scale, EPS[dtype], f"{name} {what}")


def regression_terms(case: Case) -> tuple[Tensor, Tensor]:
    """The closed form with every term made positive: what rounding errors are relative to."""
    h, y, m, s = (t.abs().double() for t in case)  # type: ignore[union-attr]
    return reference.regression_moments(h, -y, m, s)


# ---- parity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_regression(dtype: torch.dtype, device: str) -> None:
    tight = 1e-3 if dtype == torch.float16 else 1e-6  # float16 has no 1e-8
    for size in FEW if emulated() else SIZES:
        for scale, per_output in ((tight, False), (tight, True), (1.0, True), (1e2, False)):
            for bias in (False, True):
                case = regression(1, *size, scale=scale, per_output=per_output, bias=bias)
                compare("regression_moments", case, dtype, device, regression_terms(cast(case, dtype)))


def test_regression_with_a_bias_is_one_with_another_feature(device: str) -> None:
    """Of a one, last, whose own gradient is left out."""
    features, targets, mean, covariance = regression(1, 5, 9, bias=True)
    assert isinstance(covariance, Tensor)
    hidden = torch.cat([features, torch.ones(5, 1).double()], 1)
    want = reference.regression_moments(hidden, targets, mean, covariance)
    got = ops.regression_moments(*on(device, features, targets, mean, covariance))
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs[..., :-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("diagonal", [False, True])
def test_binary(diagonal: bool, dtype: torch.dtype, device: str) -> None:
    for size in sizes_with_features():
        for scale in (1e-6, 1.0, 1e2):
            check_binary(size, scale, diagonal, dtype, device)


def check_binary(size: tuple[int, int], scale: float, diagonal: bool, dtype: torch.dtype, device: str) -> None:
    outputs = 1 if size[1] >= 1000 else 3
    if dtype == torch.bfloat16 and not diagonal:
        scale = min(scale, 1.0)
        case = binary(2, *size, scale=scale, outputs=outputs)
        # a covariance rounded to bfloat16 is not one any more: make its diagonal dominant
        case = case._replace(covariance=case.covariance + scale * size[1] * torch.eye(size[1] + 1))
    else:
        case = binary(2, *size, scale=scale, outputs=outputs, diagonal=diagonal)
    compare("binary_moments", case, dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("logit", [39.9, 40.1, 88.0, 120.0, 300.0, 399.0, 401.0, 800.0])
def test_binary_far_from_the_middle(logit: float, dtype: torch.dtype, device: str) -> None:
    """Logits whose smaller probability leaves the dtype's range, and deviations that bring it back."""
    for sign in (-1.0, 1.0):
        for deviation in (1e-3, 1.0, 30.0, 100.0, 300.0):
            mean = torch.tensor([[sign * logit, 0.0]] * 2, dtype=torch.float64)
            covariance = torch.diag(torch.tensor([deviation**2, 1e-3], dtype=torch.float64)).expand(2, 2, 2)
            targets = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
            case = cast(Case(torch.ones(1, 1).double(), targets, mean, covariance), dtype)
            want, got = reference.binary_moments(*wide(case)), ops.binary_moments(*on(device, *case))
            # A residual is at most one: relative to the weight, and its second moment.
            second = logit**2 + deviation**2
            assert (got[0].cpu() - want[0]).abs().max() <= EPS[dtype] * second**0.5
            assert (got[1].cpu() - want[1]).abs().max() <= 10 * EPS[dtype] * second


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("structure", ["full", "block", "kron", "diag"])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e2])
def test_multiclass(scale: float, structure: str, dtype: torch.dtype, device: str) -> None:
    # One class has no gradient: residuals are exactly 0, and so are the moments. 37 points leave a ragged warp.
    for classes, size, points in ((1, (2, 3), 37), (2, (1, 1), 128), (3, (3, 31), 37), (5, (2, 33), 64)):
        case = multiclass(3, *size, classes=classes, scale=scale, structure=structure)
        compare("multiclass_moments", case, dtype, device, num_points=points)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["binary", "multiclass"])
@pytest.mark.parametrize("spread", [1e-6, 1.0, 1e2])
def test_sampled(kind: str, spread: float, dtype: torch.dtype, device: str) -> None:
    for size in sizes_with_features():
        check_sampled(size, kind, spread, dtype, device)


def check_sampled(size: tuple[int, int], kind: str, spread: float, dtype: torch.dtype, device: str) -> None:
    many = [(9, 140)] if size[1] in (1, 31, 33) else [(2, 130)]
    for classes, samples in [(1, 1), (3, 37), *many] if size[1] < (200 if emulated() else 1000) else many:
        case = binary(4, *size, outputs=classes) if kind == "binary" else multiclass(4, *size, classes=classes)
        weights = (case.mean + spread**0.5 * normal(generator(5), samples, classes, size[1] + 1)).to(dtype)
        features = case.features.to(dtype)
        targets = case.targets.to(dtype) if kind == "binary" else case.targets
        wide_targets = targets.double() if kind == "binary" else targets
        want = reference.sampled_moments(features.double(), wide_targets, weights.double(), kind=kind)
        eager = reference.sampled_moments(features, targets, weights, kind=kind)
        got = ops.sampled_moments(*on(device, features, targets, weights), kind=kind)
        # A gradient is a product of a residual, as wrong as the logit, with a weight; the variance squares it.
        error = features.abs().double().sum(1)[:, None, None] * weights.abs().double().amax(0).amax(-1)[None, :, None]
        size_of = weights.abs().double().amax() * (1 + error.amax(1, keepdim=True)).expand_as(want[0])
        deviation = want[1].sqrt().amax()
        for i, (what, terms) in enumerate((("mean", size_of), ("variance", size_of * deviation + want[1]))):
            assert_within_bound(got[i].cpu(), eager[i], want[i], terms, EPS[dtype], f"sampled {kind} {what}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 31), (2, 2, 33), (5, 8, 257), (2, 20, 1000), (4, 3, 0)], ids=str)
@pytest.mark.parametrize("power", [1.0, 0.0, 0.3, 2.0, "per task"])
def test_precision_mean(shape: tuple[int, int, int], power: float | str, dtype: torch.dtype, device: str) -> None:
    g = generator(6)
    means = normal(g, *shape).to(dtype)
    variances = (10 ** (6 * normal(g, *shape)).clamp(-9, 9)).to(dtype)  # across the clamp at 1e-8
    exponent = torch.linspace(0, 1, shape[1]).tolist() if power == "per task" else power
    want = reference.precision_mean(means.double(), variances.double(), exponent)[:, None]
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    eager = reference.precision_mean(means.to(compute), variances.to(compute), exponent)[:, None]
    got = ops.precision_mean(*on(device, means, variances), exponent)[:, None]
    assert got.dtype == compute
    terms = reference.precision_mean(means.double().abs(), variances.double(), exponent)[:, None]
    assert_within_bound(got.cpu(), eager, want, terms, EPS[dtype], "precision_mean")


# ---- labels, degenerate posteriors, extremes -------------------------------------------------------------------------


def test_missing_labels_have_no_gradient(device: str) -> None:
    for name, case in (("regression_moments", regression(8, 5, 9)), ("binary_moments", binary(8, 5, 9))):
        targets = case.targets.clone()
        targets[1], targets[3, 2] = torch.nan, torch.nan
        full = getattr(ops, name)(*on(device, *case))
        some = getattr(ops, name)(*on(device, *case._replace(targets=targets)))
        missing = targets.isnan()
        assert (some[0].cpu()[missing] == 0).all()
        assert (some[1].cpu()[missing] == torch.inf).all()
        for a, b in zip(some, full):
            assert torch.equal(a.cpu()[~missing], b.cpu()[~missing])
    case = multiclass(8, 5, 9)
    targets = case.targets.clone()
    targets[2] = -100
    for mean, variance in (
        ops.multiclass_moments(*on(device, *case._replace(targets=targets))),
        ops.sampled_moments(*on(device, case.features, targets, normal(generator(1), 6, 3, 10)), kind="multiclass"),
    ):
        assert (mean[2] == 0).all()
        assert (variance[2] == torch.inf).all()
        assert variance[[0, 1, 3, 4]].isfinite().all()


def test_missing_labels_get_no_weight(device: str) -> None:
    g = generator(9)
    means, variances = normal(g, 4, 3, 7), normal(g, 4, 3, 7) ** 2
    variances[0, 1], means[0, 1] = torch.inf, 0.0
    variances[1], means[1] = torch.inf, 0.0
    got = ops.precision_mean(*on(device, means, variances), 0.0).cpu()
    torch.testing.assert_close(got[0], means[0, [0, 2]].mean(0) / 4)
    assert (got[1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_certain_posterior_has_the_gradient_of_its_mean(dtype: torch.dtype, device: str) -> None:
    """Covariance zero: the variance is zero, the mean is autograd's gradient."""
    makers = {"regression": regression, "binary": binary, "multiclass": multiclass}
    for kind, make in makers.items():
        case = cast(make(10, 4, 6), dtype)
        assert isinstance(case.covariance, Tensor)
        case = case._replace(covariance=torch.zeros_like(case.covariance))
        mean, variance = getattr(ops, f"{kind}_moments")(*on(device, *case))
        assert (variance <= 1e-28).all()  # the float64 rounding of a mean over equal points, squared
        h = case.features.double().requires_grad_()
        w = case.mean.double()
        if kind == "regression":
            losses = ((h @ w.T - case.targets.double()) ** 2).T
        else:
            z = h @ w[:, :-1].T + w[:, -1]
            losses = (
                torch.nn.functional.binary_cross_entropy_with_logits(z, case.targets.double(), reduction="none").T
                if kind == "binary"
                else torch.nn.functional.cross_entropy(z, case.targets, reduction="none")[None]
            )
        for task, loss in enumerate(losses):
            gradient = torch.autograd.grad(loss.sum(), h, retain_graph=True)[0]
            tolerance = 1e-5 if dtype == torch.float32 else 1e-12
            torch.testing.assert_close(mean[:, task].cpu().double(), gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rank", [1, 3])
def test_rank_deficient_covariances(rank: int, device: str) -> None:
    """Logits and weights without variance in most directions; along h~ there may be none at all."""
    g = generator(11)
    for kind, make in (("regression", regression), ("binary", binary), ("multiclass", multiclass)):
        case = make(11, 6, 12)
        assert isinstance(case.covariance, Tensor)
        a = normal(g, *case.covariance.shape[:-1], rank)
        case = case._replace(covariance=a @ a.mT / rank)
        want = getattr(reference, f"{kind}_moments")(*case)  # once rounded to float32 the matrix is indefinite
        got = getattr(ops, f"{kind}_moments")(*on(device, *cast(case, torch.float32)))
        for i in range(2):
            scale = want[i].abs().amax(-1, keepdim=True)
            assert ((got[i].cpu().double() - want[i]).abs() <= 1e-4 * scale).all()


def test_no_variance_along_the_features(device: str) -> None:
    """h is in the null space of S: the logit is certain, the weights are not. Rounding must not make it imaginary."""
    g = generator(12)
    h = normal(g, 1, 8)
    a = normal(g, 8, 8)
    a = a - (a @ h.T) @ h / (h @ h.T)  # rows orthogonal to h
    covariance = (a.T @ a).float()
    mean, target = normal(g, 1, 8).float(), normal(g, 1, 1).float()
    got = ops.regression_moments(*on(device, h.float(), target, mean, covariance))
    residual = h @ mean.double().T - target.double()
    torch.testing.assert_close(got[0].cpu().double()[0], 2 * residual * mean.double(), rtol=1e-4, atol=1e-4)
    want = 4 * covariance.double().diagonal() * residual**2
    torch.testing.assert_close(got[1].cpu().double()[0], want, rtol=1e-3, atol=1e-3)
    block = torch.block_diag(covariance, torch.zeros(1, 1))[None]
    weight = torch.cat([mean, torch.ones(1, 1)], 1)
    _, variance = ops.binary_moments(*on(device, h.float(), torch.ones(1, 1), weight, block))
    assert variance.isfinite().all()
    assert (variance >= 0).all()


@pytest.mark.parametrize("logit", [-60.0, -20.0, 20.0, 60.0])
@pytest.mark.parametrize("target", [0.0, 1.0, 0.3])
def test_saturated_logits(logit: float, target: float, device: str) -> None:
    """A confident and right prediction has a tiny gradient, not a zero one that cancellation made."""
    case = binary(13, 3, 5, scale=1e-2)
    assert isinstance(case.covariance, Tensor)
    mean = case.mean * 0.01
    mean[:, -1] = logit
    case = cast(case._replace(mean=mean, targets=torch.full((3, 3), target, dtype=torch.float64)), torch.float32)
    want, got = reference.binary_moments(*wide(case)), ops.binary_moments(*on(device, *case))
    exact = target == 0.3 or (target == 0.0) == (logit > 0)  # else want itself has only 1e-16 / e^-60 to go by
    for a, b in zip(got, want):
        if exact or abs(logit) < 30:
            scale = b.abs().amax(-1, keepdim=True)
            assert ((a.cpu().double() - b).abs() <= 2e-5 * scale).all()
        assert a.isfinite().all()


@pytest.mark.parametrize("size", [1e-20, 1e-10, 1e10, 1e17])
def test_extreme_targets(size: float, device: str) -> None:
    """Gradients of 1e-20 and 1e+17: relative accuracy as anywhere, until the variance leaves float32."""
    case = regression(14, 3, 5)
    case = cast(case._replace(targets=case.targets * size, mean=case.mean * min(size, 1.0)), torch.float32)
    covariance = case.covariance * min(size, 1.0) ** 2  # type: ignore[operator]
    case = case._replace(covariance=covariance)
    want, got = reference.regression_moments(*wide(case)), ops.regression_moments(*on(device, *case))
    for i in range(2):
        scale = want[i].abs().amax(-1, keepdim=True)
        assert ((got[i].cpu().double() - want[i]).abs() <= 1e-5 * scale + 1e-44).all()


def test_overflow_is_not_taken_for_a_missing_label(device: str) -> None:
    """Infinity means "no label"; a variance that overflows must not end up there."""
    case = cast(regression(15, 3, 5), torch.float32)
    case = case._replace(targets=torch.full_like(case.targets, 1e25))
    if device == "cpu":
        with pytest.raises(ValueError, match="overflowing variance"):
            ops.regression_moments(*case)
    else:
        assert ops.regression_moments(*on(device, *case))[1].isnan().all()


def test_weights_out_of_range_are_nan(device: str) -> None:
    variances = torch.full((2, 2, 3), 1e30)
    assert ops.precision_mean(torch.ones(2, 2, 3, device=device), variances.to(device), 4.0).isnan().all()


def test_same_bits_every_time(device: str) -> None:
    """Reductions in a fixed order: nothing depends on scheduling."""
    case = cast(binary(16, 64, 100, outputs=5), torch.float32)
    multi = cast(multiclass(16, 16, 33, classes=4), torch.float32)
    first = [*ops.binary_moments(*on(device, *case)), *ops.multiclass_moments(*on(device, *multi))]
    for _ in range(3):
        again = [*ops.binary_moments(*on(device, *case)), *ops.multiclass_moments(*on(device, *multi))]
        assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_threads_do_not_change_the_result() -> None:
    case = cast(multiclass(17, 13, 33, classes=4), torch.float32)
    samples = normal(generator(17), 50, 4, 34).float()
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(
                [*ops.multiclass_moments(*case), *ops.sampled_moments(*case[:2], samples, kind="multiclass")]
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(other, results[0]):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)  # the GEMMs before the kernels may split otherwise


# ---- the integrals ---------------------------------------------------------------------------------------------------


def weight_samples(case: Case, count: int, seed: int) -> Tensor:
    """[count, rows, width] from N(mean, covariance), float64."""
    assert isinstance(case.covariance, Tensor)
    noise = normal(generator(seed), count, *case.mean.shape)
    if case.covariance.dim() == 3:
        return case.mean + torch.einsum("opq,soq->sop", torch.linalg.cholesky(case.covariance), noise)
    factor = torch.linalg.cholesky(case.covariance)
    return case.mean + (noise.flatten(1) @ factor.T).view_as(noise)


def limit(case: Case, kind: str, chunks: int, size: int) -> tuple[Tensor, Tensor]:
    """Moments over chunks x size weight samples, by the law of total variance."""
    means, variances = [], []
    for i in range(chunks):
        mean, variance = ops.sampled_moments(case.features, case.targets, weight_samples(case, size, seed=i), kind=kind)
        means.append(mean)
        variances.append(variance)
    mean = torch.stack(means).mean(0)
    return mean, torch.stack(variances).mean(0) + torch.stack(means).var(0, unbiased=False)


def hard_binary() -> Case:
    """Logits with standard deviations up to 3.7: from half a probability to saturation and back. Beyond, 32 nodes lose
    accuracy (2e-3 at worst for 4.5, 3e-2 for 8) and more nodes help."""
    return binary(20, 6, 8, outputs=2, scale=0.7)


@pytest.mark.slow
def test_binary_against_samples() -> None:
    case = hard_binary()
    _, variance = ops.binary_moments(*case)
    _, sampled = limit(case, "binary", 24, 100_000)  # 2.4 million: good to about 1e-3 itself
    error = (variance / sampled - 1).abs()
    assert error.mean() < 2e-3
    few = ops.sampled_moments(case.features, case.targets, weight_samples(case, 512, seed=99), kind="binary")[1]
    assert error.mean() < 0.1 * (few / sampled - 1).abs().mean()


def test_binary_against_more_nodes() -> None:
    case = hard_binary()
    _, variance = ops.binary_moments(*case, nodes=32)
    _, finer = ops.binary_moments(*case, nodes=128)
    assert (variance / finer - 1).abs().max() < 1e-3


def test_binary_float32_with_a_tight_posterior() -> None:
    case = cast(binary(21, 16, 64, scale=1e-6), torch.float32)
    want = ops.binary_moments(*cast(case, torch.float64))
    got = ops.binary_moments(*case)
    for a, b in zip(got, want):
        assert ((a.double() - b).abs() <= 1e-4 * b.abs() + 1e-6 * b.abs().amax(-1, keepdim=True)).all()
    assert (got[1].double() / want[1] - 1).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("classes", "width", "scale"),
    [(3, 5, 1.0), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((5, 32, 0.1), (10, 16, 0.1)))],
)
def test_multiclass_against_samples(classes: int, width: int, scale: float) -> None:
    """Logits with standard deviations of about 2."""
    case = multiclass(22, 8, width, classes=classes, scale=scale)
    _, variance = ops.multiclass_moments(*case, num_points=256)
    _, sampled = limit(case, "multiclass", 10, 20_000)
    error = (variance / sampled - 1).abs()
    assert error.mean() < 1.2e-2  # 1 % of its own, and what 200,000 samples leave open
    _, finer = ops.multiclass_moments(*case, num_points=16384)
    assert (variance / finer - 1).abs().mean() < 1e-2


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e2])
def test_regression_equals_the_explicit_formula(scale: float) -> None:
    """E[g g'] from all fourth moments of a Gaussian (Isserlis), as full [D, D] matrices, in float64."""
    case = cast(regression(23, 7, 24, outputs=2, scale=scale), torch.float32)
    h, y, m, s = (t.double() for t in case)  # type: ignore[union-attr]
    w2 = s + torch.einsum("od,oe->ode", m, m)  # E[w w']
    outer = torch.einsum("bd,be->bde", h, h)
    mean = 2 * (torch.einsum("ode,be->bod", w2, h) - y[..., None] * m)
    # E[w_d w_e (w.h)]  and  E[w_d w_e (w.h)^2] by pairing the factors of Gaussians with means
    mh, sh = m @ h.T, torch.einsum("de,be->bd", s, h)  # [O, B], [B, D]
    third = torch.einsum("ode,ob->bode", w2, mh)
    third = third + torch.einsum("od,be->bode", m, sh) + torch.einsum("bd,oe->bode", sh, m)
    v = torch.einsum("bde,de->b", outer, s)
    fourth = torch.einsum("ode,bo->bode", w2, (mh**2).T + v[:, None])
    cross = torch.einsum("od,be->bode", m, sh) + torch.einsum("bd,oe->bode", sh, m)
    fourth = fourth + 2 * mh.T[..., None, None] * cross + 2 * torch.einsum("bd,be->bde", sh, sh)[:, None]
    second = 4 * (y[..., None, None] ** 2 * w2 - 2 * y[..., None, None] * third + fourth)
    variance = (second - torch.einsum("bod,boe->bode", mean, mean)).diagonal(dim1=-2, dim2=-1)
    got = ops.regression_moments(*case)
    for a, b in zip(got, (mean, variance)):
        assert (a.double() - b).norm() <= 1e-5 * b.norm()
    # Explicit second moments cancel by 1/scale: compare elements where float64 has digits left.
    assert (got[1].double() / variance - 1).abs().max() < 1e-5 + 1e-15 / scale
    # The residual m.h - y is rounded to float32 relative to its terms, not to itself.
    terms = 2 * (m.abs() * (m.abs() @ h.abs().T + y.abs().T).T[..., None] + (s.abs() @ h.abs().T).T[:, None])
    assert ((got[0].double() - mean).abs() <= 1e-6 * terms).all()


@pytest.mark.parametrize("kind", ["binary", "multiclass"])
def test_sampled_equals_the_literal_computation(kind: str) -> None:
    case = binary(24, 16, 40, outputs=4) if kind == "binary" else multiclass(24, 16, 40, classes=4)
    weights = weight_samples(case, 300, seed=3).float()
    targets = case.targets.float() if kind == "binary" else case.targets
    got = ops.sampled_moments(case.features.float(), targets, weights, kind=kind)
    want = reference.sampled_moments(case.features.float().double(), case.targets, weights.double(), kind=kind)
    for a, b in zip(got, want):
        assert (a.double() - b).norm() <= 1e-5 * b.norm()
    assert (got[1].double() / want[1] - 1).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_reference_compiles_to_the_same_numbers() -> None:
    """Inductor once traced the quadrature's own eigenproblem, and got the moments wrong without a word."""
    case = cast(binary(4, 4, 5), torch.float32)
    compiled = torch.compile(reference.binary_moments, fullgraph=True)
    for a, b in zip(compiled(*case), reference.binary_moments(*case)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---- properties ------------------------------------------------------------------------------------------------------

sizes = st.integers(1, 6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), batch=sizes, tasks=sizes, width=sizes, power=st.floats(0, 2))
def test_precision_mean_properties(seed: int, batch: int, tasks: int, width: int, power: float) -> None:
    g = generator(seed)
    means, variances = normal(g, batch, tasks, width), normal(g, batch, tasks, width) ** 2 + 1e-3
    out = ops.precision_mean(means, variances, power)
    order = torch.randperm(tasks, generator=g)
    torch.testing.assert_close(ops.precision_mean(means[:, order], variances[:, order], power), out)
    torch.testing.assert_close(ops.precision_mean(3 * means, variances, power), 3 * out)
    torch.testing.assert_close(ops.precision_mean(means, 7 * variances, power), out)  # a common scale drops out
    twice = ops.precision_mean(means.repeat(1, 2, 1), variances.repeat(1, 2, 1), power)
    torch.testing.assert_close(twice, out)
    low, high = means.amin(1) / batch, means.amax(1) / batch  # a convex combination
    assert ((out >= low - 1e-12) & (out <= high + 1e-12)).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), batch=sizes, width=sizes, scale=st.floats(1e-6, 0.5))
def test_moments_properties(seed: int, batch: int, width: int, scale: float) -> None:
    """Flipping the label and the weights' sign leaves a binary task as it is; two classes are one binary task, as far
    as 32 nodes integrate (test_binary_against_more_nodes)."""
    case = binary(seed, batch, width, outputs=1, scale=scale)
    mean, variance = ops.binary_moments(*case)
    flipped = ops.binary_moments(case.features, 1 - case.targets, -case.mean, case.covariance)
    torch.testing.assert_close(flipped[0], mean)
    torch.testing.assert_close(flipped[1], variance)
    assert (variance >= 0).all()
    # Weights (0, w): the softmax over two classes is the logistic of the second's logit.
    size = width + 1
    joint = torch.zeros(2 * size, 2 * size, dtype=torch.float64)
    joint[size:, size:] = case.covariance[0]  # type: ignore[index]
    stacked = torch.stack([torch.zeros_like(case.mean[0]), case.mean[0]])
    two = ops.multiclass_moments(case.features, case.targets[:, 0].long(), stacked, joint, num_points=4096)
    spread = variance.sqrt().amax() + 1e-12
    assert ((two[0] - mean).abs() <= 0.05 * spread).all()
    assert ((two[1] - variance).abs() <= 0.1 * variance.amax() + 1e-12).all()
