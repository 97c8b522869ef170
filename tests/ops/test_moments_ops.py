"""The `moments` operations as PyTorch operators: opcheck, derivatives, torch.compile, errors in words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtlgrad import ops, reference
from tests.support.moments_cases import binary, cast, generator, multiclass, normal, regression


def calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Each registered operator with arguments."""
    r, b, m = regression(1, 4, 5), binary(1, 4, 5), multiclass(1, 4, 5)
    k = multiclass(1, 4, 5, structure="kron")
    samples = normal(generator(1), 7, 3, 6)
    moments = normal(generator(2), 4, 3, 5)
    o = torch.ops.mtlgrad
    return {
        "regression": (o.regression_moments, tuple(r)),
        "binary": (o.binary_moments, (*b, 32)),
        "multiclass": (o.multiclass_moments, (*m, None, 64, 0)),
        "multiclass kron": (o.multiclass_moments, (*m[:3], k.covariance[1], k.covariance[0], 64, 0)),
        "sampled binary": (o.sampled_moments, (b.features, b.targets, samples, "binary")),
        "sampled multiclass": (o.sampled_moments, (m.features, m.targets, samples, "multiclass")),
        "precision_mean": (o.precision_mean, (moments, moments**2, torch.ones(3, dtype=torch.float64))),
    }


@pytest.mark.parametrize("name", list(calls()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    op, arguments = calls()[name]
    if dtype == torch.bfloat16 and name not in ("precision_mean", "sampled binary", "sampled multiclass"):
        pytest.skip("a covariance rounded to bfloat16 is not positive semi-definite")
    power = arguments[-1] if name == "precision_mean" else None
    arguments = tuple(
        a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() and a is not power else a for a in arguments
    )
    torch.library.opcheck(op.default, arguments)


def test_gradcheck() -> None:
    """Derivatives are the reference's; gradcheck compares them with the kernels' finite differences."""
    r, b, m = regression(2, 2, 3), binary(2, 2, 3), multiclass(2, 2, 3)
    k = multiclass(2, 2, 3, structure="kron")

    def leaf(*tensors: Tensor) -> list[Tensor]:
        return [t.clone().requires_grad_() for t in tensors]

    def symmetric(s: Tensor) -> Tensor:  # finite differences must stay symmetric
        return (s + s.mT) / 2

    check = torch.autograd.gradcheck
    assert check(lambda h, y, w, s: ops.regression_moments(h, y, w, symmetric(s)), leaf(*r))
    assert check(
        lambda h, w, s: ops.binary_moments(h, b.targets, w, symmetric(s)), leaf(b.features, b.mean, b.covariance)
    )
    assert check(
        lambda h, w, s: ops.multiclass_moments(h, m.targets, w, symmetric(s), num_points=16),
        leaf(m.features, m.mean, m.covariance),
        rtol=1e-2,
        atol=1e-4,  # the reference differentiates the Cholesky factor, whose finite differences are rough
    )
    assert check(
        lambda h, w, a, s: ops.multiclass_moments(h, m.targets, w, (symmetric(a), symmetric(s)), num_points=16),
        leaf(m.features, m.mean, *k.covariance),
        rtol=1e-2,
        atol=1e-4,
    )
    samples = normal(generator(3), 5, 3, 4)
    assert check(lambda h, w: ops.sampled_moments(h, b.targets, w, kind="binary"), leaf(b.features, samples))
    assert check(lambda h, w: ops.sampled_moments(h, m.targets, w, kind="multiclass"), leaf(m.features, samples))
    means, variances = leaf(normal(generator(4), 2, 3, 4), normal(generator(5), 2, 3, 4) ** 2 + 0.1)
    assert check(lambda e, v: ops.precision_mean(e, v, [0.3, 1.0, 0.5]), (means, variances))


# Inductor itself uses what torch deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_graph_breaks(backend: str) -> None:
    r, b, m = (cast(c, torch.float32) for c in (regression(3, 4, 5), binary(3, 4, 5), multiclass(3, 4, 5)))
    samples = normal(generator(6), 7, 3, 6).float()

    def step() -> Tensor:
        parts = [
            ops.regression_moments(*r),
            ops.binary_moments(*b),
            ops.multiclass_moments(*m),
            ops.sampled_moments(b.features, b.targets, samples, kind="binary"),
        ]
        means, variances = (torch.cat(p, 1) for p in zip(*parts))
        return ops.precision_mean(means, variances, 0.5)

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(), step(), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_reference_compiles_to_the_same_numbers() -> None:
    """Inductor once traced the quadrature's own eigenproblem, and got the moments wrong without a word."""
    case = cast(binary(4, 4, 5), torch.float32)
    compiled = torch.compile(reference.binary_moments, fullgraph=True)
    for a, b in zip(compiled(*case), reference.binary_moments(*case)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_autocast_does_not_reach_the_gemms() -> None:
    case = cast(binary(5, 4, 33), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ops.binary_moments(*case)
    for a, b in zip(inside, ops.binary_moments(*case)):
        assert torch.equal(a, b)


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
    as 32 nodes integrate (test_moments_accuracy)."""
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


# ---- errors ----------------------------------------------------------------------------------------------------------


def bad_calls() -> list[tuple[Any, str]]:
    r, b, m = regression(6, 4, 5), binary(6, 4, 5), multiclass(6, 4, 5)
    samples = normal(generator(7), 7, 3, 6)
    nan_features = r.features.clone()
    nan_features[1, 2] = torch.nan
    outside = m.targets.clone()
    outside[2] = 3
    indefinite = torch.eye(5, dtype=torch.float64)
    indefinite[3, 3] = -1
    twisted = torch.eye(6, dtype=torch.float64).repeat(3, 1, 1)
    twisted[:, 0, 1] = twisted[:, 1, 0] = 2.0
    joint = -torch.eye(18, dtype=torch.float64)
    x, y, w, s = r
    return [
        (lambda: ops.regression_moments(x[0], y, w, s), r"regression_moments: features: expected shape \[B, D\]"),
        (lambda: ops.regression_moments(x, y[:, :2], w, s), r"targets: expected shape \[4, 3\], found \[4, 2\]"),
        (lambda: ops.regression_moments(x, y, w[:, :4], s), r"mean: expected shape \[O, 5\], found \[3, 4\]"),
        (lambda: ops.regression_moments(x, y, w, s[:4]), r"covariance: expected shape \[5, 5\], found \[4, 5\]"),
        (lambda: ops.regression_moments(x.long(), y, w, s), "features: expected float32.* found torch.int64"),
        (lambda: ops.regression_moments(x, y.to("meta"), w, s), "targets: expected device cpu .* found meta"),
        (lambda: ops.regression_moments(x[:0], y[:0], w, s), "features: expected at least one example, found none"),
        (lambda: ops.regression_moments(nan_features, y, w, s), r"features: expected finite.* nan at \[1, 2\]"),
        (lambda: ops.regression_moments(x, y, w * torch.inf, s), "mean: expected finite"),
        (lambda: ops.regression_moments(x, y, w, indefinite), "covariance: expected .*positive semi-definite"),
        (lambda: ops.binary_moments(*b[:3], twisted), "covariance: expected .*positive semi-definite"),
        (lambda: ops.binary_moments(*b, nodes=2), "nodes: expected 3 to 512, found 2"),
        (
            lambda: ops.binary_moments(b.features, b.targets, b.mean[:, :5], b.covariance),
            r"mean: expected shape \[O, 6\]",
        ),
        (lambda: ops.multiclass_moments(m.features, outside, *m[2:]), "from 0 to 2, .* found 3 at example 2"),
        (lambda: ops.multiclass_moments(m.features, m.targets.float(), *m[2:]), "targets: expected int64"),
        (lambda: ops.multiclass_moments(*m[:3], m.covariance[:5]), r"covariance: expected shape \[18, 18\] \(full"),
        (lambda: ops.multiclass_moments(*m[:3], joint), "covariance: expected .*positive semi-definite"),
        (lambda: ops.multiclass_moments(*m, num_points=0), "num_points: expected at least 1, found 0"),
        (lambda: ops.multiclass_moments(*m[:3], (joint,)), "covariance: expected a tensor or a pair"),
        (lambda: ops.sampled_moments(b.features, b.targets, samples[:0], kind="binary"), "at least one sample"),
        (lambda: ops.sampled_moments(b.features, b.targets, samples, kind="ternary"), "kind: expected .* 'ternary'"),
        (
            lambda: ops.sampled_moments(b.features, b.targets, samples[..., :5], kind="binary"),
            r"samples: expected shape",
        ),
        (lambda: ops.precision_mean(samples, samples[:6] ** 2), r"variances: expected shape \[7, 3, 6\]"),
        (
            lambda: ops.precision_mean(samples, samples**2, [1.0, 2.0]),
            r"power: expected one number or one per task \(3\)",
        ),
        (lambda: ops.precision_mean(samples, samples**2, -1.0), "power: expected finite numbers of at least 0"),
        (lambda: ops.precision_mean(samples[:, :0], samples[:, :0]), "at least one task"),
    ]


@pytest.mark.parametrize("index", range(len(bad_calls())))
def test_errors_name_argument_expected_and_found(index: int) -> None:
    call, message = bad_calls()[index]
    with pytest.raises((RuntimeError, ValueError), match=message) as error:
        call()
    assert "\n" not in str(error.value)
