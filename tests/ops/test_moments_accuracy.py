"""How close the moments come to the integrals they stand for: against weight samples, more nodes, more points."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtlgrad import ops, reference
from tests.support.moments_cases import Case, binary, cast, generator, multiclass, normal, regression


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


@pytest.mark.parametrize(("classes", "width", "scale"), [(3, 5, 1.0), (5, 32, 0.1), (10, 16, 0.1)])
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
