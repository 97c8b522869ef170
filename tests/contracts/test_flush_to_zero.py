"""torch.set_flush_denormal makes zeros of subnormal float32: numbers below 2^-14 are subnormal as float16, not as
float32, and gradients of half precision live there. None may be lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from mtlgrad import ops
from tests.support.bounds import DTYPES, normal

#: Every subnormal of float16 as a multiple of 2^-24, and as float16 made from its bits: nothing is converted.
COUNTS = torch.cat([torch.arange(1, 1024), -torch.arange(1, 1024)])
SUBNORMALS = (COUNTS.abs() - 2**15 * (COUNTS < 0)).to(torch.int16).view(torch.float16)

# Tasks: the kernels take rows by four and by eight.
SHAPES = pytest.mark.parametrize("shape", [(1, 2046), (2, 1023), (6, 341), (66, 31)], ids=str)
# One tensor is for the bodies of vectorised loops, tensors of one element each for what remains behind them.
FORMS = pytest.mark.parametrize(
    "single", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["one tensor", "single elements"]
)


@pytest.fixture
def flush() -> Iterator[Callable[[], None]]:
    """Turn the mode on, in this thread, until the test ends."""

    def turn_on() -> None:
        assert torch.set_flush_denormal(True)

    yield turn_on
    torch.set_flush_denormal(False)


def split(x: Tensor, single: bool) -> list[Tensor]:
    """The columns of [T, N] or [N], each a tensor of its own, or all in one."""
    return [part.contiguous() for part in x.split(1, dim=-1)] if single else [x]


def same_bits(got: Tensor, want: Tensor) -> bool:
    return torch.equal(got.cpu().view(torch.int16), want.view(torch.int16))


def test_the_mode_is_on(flush: Callable[[], None]) -> None:
    small = torch.full((64,), 1e-40)
    assert (small * 1 > 0).all()
    flush()
    assert (small * 1 == 0).all()


@SHAPES
@FORMS
def test_sums_of_products(shape: tuple[int, int], single: bool, device: str, flush: Callable[[], None]) -> None:
    """Exact: sums of whole numbers of 2^-48 in float64."""
    counts, rows = COUNTS.reshape(shape), ops.Stacked(split(SUBNORMALS.reshape(shape).to(device), single))
    vector = split(SUBNORMALS[-shape[1] :].to(device), single)
    gram, dots = (counts @ counts.mT).double() * 2.0**-48, (counts @ counts[-1]).double() * 2.0**-48
    flush()
    assert torch.equal(ops.gram(rows).cpu(), gram)
    assert torch.equal(ops.dots(rows, vector).cpu(), dots)


@SHAPES
@FORMS
def test_weighted_sums(shape: tuple[int, int], single: bool, device: str, flush: Callable[[], None]) -> None:
    """Each row by itself, and on top of a base: of results too small for a normal float16 every bit is right."""
    values = SUBNORMALS.reshape(shape)
    rows = ops.Stacked(split(values.to(device), single))
    base = split(values[0].flip(0).to(device), single)
    sums = ((COUNTS.reshape(shape) + COUNTS.reshape(shape)[0].flip(0)).double() * 2.0**-24).half()
    flush()
    for t in range(0, shape[0], 1 if shape[0] < 66 else 13):
        weights = torch.zeros(shape[0], device=device)
        weights[t] = 1.0
        assert same_bits(torch.cat(ops.combine(rows, weights)), values[t])
        assert same_bits(torch.cat(ops.displace(base, rows, weights)), sums[t])


@pytest.mark.parametrize("n", [1, 7, 1000])
def test_rounding_to_subnormals(n: int, device: str, flush: Callable[[], None]) -> None:
    """From ordinary rows by a small weight: results are rounded to 2^-24, half of it to the even neighbour."""
    rows = torch.stack([torch.arange(n).float(), torch.ones(n)]).half().to(device)
    weights = torch.tensor([2.0**-25, 0.0], device=device)
    want = (torch.arange(n).double() * 2.0**-25).half()
    flush()
    assert same_bits(ops.combine(rows, weights), want)
    assert same_bits(ops.displace(torch.zeros_like(rows[0]), rows, weights), want)


def test_derivatives(device: str, flush: Callable[[], None]) -> None:
    rows, vector = SUBNORMALS.reshape(2, 1023).to(device), SUBNORMALS[:1023].to(device)
    flush()
    leaf = rows.clone().requires_grad_()
    ops.gram(leaf).trace().backward()
    assert leaf.grad is not None
    assert same_bits(leaf.grad, (COUNTS.double() * 2.0**-23).half().reshape(2, 1023))
    leaf = rows.clone().requires_grad_()
    ops.dots(leaf, vector).sum().backward()
    assert leaf.grad is not None
    assert same_bits(leaf.grad, SUBNORMALS[:1023].expand(2, -1).contiguous())
    weights = torch.ones(2, device=device, requires_grad=True)
    ops.combine(rows, weights).backward(vector)
    assert weights.grad is not None
    assert torch.equal(weights.grad.cpu(), (COUNTS.reshape(2, -1) @ COUNTS[:1023]).float() * 2.0**-48)


def test_moments_of_small_features(device: str, flush: Callable[[], None]) -> None:
    """Features of half precision are converted by torch: the moments are those of the same numbers in float32."""
    features = SUBNORMALS.reshape(62, 33).to(device)
    as_float = (COUNTS.double() * 2.0**-24).float().reshape(62, 33).to(device)
    mean, covariance = normal(1, 2, 33).float().to(device), torch.eye(33, device=device).expand(2, 33, 33) * 4.0
    targets = normal(2, 62, 2).float().to(device)
    flush()
    got = ops.regression_moments(features, targets, mean, covariance)
    want = ops.regression_moments(as_float, targets, mean, covariance)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ordinary_numbers_are_as_without(dtype: torch.dtype, device: str, flush: Callable[[], None]) -> None:
    """Of every type, and the halves without end and number: the same bits in both modes."""
    rows, weights = normal(1, 3, 1001).to(dtype).to(device), normal(2, 3).float().to(device)
    if dtype == torch.float16:
        rows[0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 65504.0], dtype=dtype)

    def results() -> list[Tensor]:
        finite = rows[:, 4:].contiguous()
        return [
            ops.gram(finite),
            ops.dots(finite, finite[0]),
            ops.gram(rows),
            ops.combine(rows, weights),
            ops.displace(rows[0], rows, weights),
        ]

    want = results()
    flush()
    for a, b in zip(results(), want, strict=True):
        assert torch.equal(a.cpu().view(torch.uint8), b.cpu().view(torch.uint8))
