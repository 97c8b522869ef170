"""The layer in use: the scale of the loss, symmetries, dtypes, memory, threads."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.bounds import assert_near
from tests.support.nets import (
    KINDS,
    LAYERS,
    HeadData,
    Problem,
    head_data,
    linear,
    problem,
    published_layer,
    published_regression,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- the scale of the loss


@pytest.mark.parametrize("factor", [1024.0, 0.25])  # GradScaler, four accumulated batches
@pytest.mark.parametrize("as_dict", [False, True])
def test_total_carries_the_scale(factor: float, as_dict: bool) -> None:
    m = problem()
    m.see()
    m.layer.refresh()
    rows = slice(0, 6)
    features = m.data[0].features[rows].clone().requires_grad_()
    losses: Any = m.losses(m.layer(features, m.targets(rows)), rows)
    losses = dict(zip("abc", losses)) if as_dict else losses
    (m.layer.total(losses) * factor).backward()
    assert features.grad is not None
    assert torch.equal(features.grad, m.aggregate(rows) * factor)  # powers of two: exact


def test_without_total_the_scale_is_read() -> None:
    m = problem()
    m.see()
    m.layer.refresh()
    rows = slice(0, 6)
    features = m.data[0].features[rows].clone().requires_grad_()
    (sum(m.losses(m.layer(features, m.targets(rows)), rows)) * 1024).backward()  # type: ignore[union-attr]
    assert torch.equal(features.grad, m.aggregate(rows) * 1024)  # type: ignore[arg-type]


def test_interleaved_passes_keep_their_own_scales() -> None:
    m = problem()
    m.see()
    m.layer.refresh()
    parts = []
    for rows, factor in ((slice(0, 6), 8.0), (slice(6, 10), 0.5)):
        features = m.data[0].features[rows].clone().requires_grad_()
        total = m.layer.total(m.losses(m.layer(features, m.targets(rows)), rows)) * factor
        with torch.no_grad():
            m.layer(features)  # someone looks at the features in between
        parts.append((rows, factor, features, total))
    for _, _, _, total in parts[::-1]:
        total.backward()
    for rows, factor, features, _ in parts:
        assert torch.equal(features.grad, m.aggregate(rows) * factor)  # type: ignore[arg-type]


def test_evaluation_between_forward_and_total_does_not_lose_the_scale() -> None:
    m = problem()
    m.see()
    m.layer.refresh()
    features = m.data[0].features.clone().requires_grad_()
    out = m.layer(features, m.targets())
    with torch.no_grad():
        m.layer(features)
    (m.layer.total(m.losses(out)) * 4).backward()
    assert torch.equal(features.grad, m.aggregate() * 4)  # type: ignore[arg-type]


def test_total_is_the_sum() -> None:
    m = problem()
    out = m.layer(m.data[0].features.clone().requires_grad_(), m.targets())
    losses = m.losses(out)
    assert m.layer.total(losses).item() == pytest.approx(sum(loss.item() for loss in losses), rel=1e-15)
    mixed = [losses[0], losses[1].float().reshape(1), losses[2].bfloat16()]
    assert m.layer.total(mixed).dtype == torch.float64
    assert m.layer.total(loss for loss in losses).dim() == 0


def test_a_second_backward_through_one_graph_is_refused() -> None:
    """gradcheck does not apply, the gradient is replaced; a second backward, or one of changed features, must be
    refused."""
    m = problem()
    m.see()
    m.layer.refresh()
    base = m.data[0].features.clone().requires_grad_()
    features = base * 1.0
    total = m.layer.total(m.losses(m.layer(features, m.targets())))
    (first,) = torch.autograd.grad(total, base, retain_graph=True)
    assert torch.equal(first, m.aggregate())
    with pytest.raises(RuntimeError, match=r"BayesAgg: batch 2: expected one backward .* a second; add the losses"):
        total.backward()
    total = m.layer.total([m.layer(features, m.targets()).square().sum()])
    (once,) = torch.autograd.grad(total, features, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        once.sum().backward()
    out = m.layer(features, m.targets())
    total = m.layer.total([(out * 1.0).sum()])
    with torch.no_grad():
        features.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


# ---- properties


@settings(max_examples=15, deadline=None, derandomize=True)
@given(draw=st.data())
def test_order_of_tasks_and_examples(draw: Any) -> None:
    heads = draw.draw(st.permutations(range(3)))
    examples = torch.tensor(draw.draw(st.permutations(range(10))))
    m = problem(missing=0.2)
    moved = Problem(
        [m.data[i] for i in heads], [m.heads[i] for i in heads], published_layer([m.layer.heads[i] for i in heads])
    )
    for part in (m, moved):
        part.see()
        part.layer.refresh()
    plain, permuted = m.see(slice(0, 10)), moved.see(examples)
    # Sums in another order.
    assert_near(permuted, plain[examples], 1e-11)
    tasks = [range(0, 3), range(3, 6), range(6, 7)]
    order = [t for i in heads for t in tasks[i]]
    assert_near(moved.layer.task_weights, m.layer.task_weights[order], 1e-11)  # type: ignore[index, arg-type]


@settings(max_examples=10, deadline=None, derandomize=True)
@given(kind=st.sampled_from(KINDS), copies=st.integers(2, 4))
def test_a_task_repeated_with_its_weights_is_the_task(kind: str, copies: int) -> None:
    m = problem((kind,))
    many = Problem(m.data * copies, m.heads * copies, published_layer(list(m.layer.heads) * copies))
    for part in (m, many):
        part.see()
        part.layer.refresh()
    assert_near(many.aggregate(), m.aggregate(), 1e-12)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(power=st.floats(0.0, 3.0))
def test_equal_variances_average_plainly(power: float) -> None:
    """Tasks that differ in the sign of weights and targets alone have one variance and opposite residuals."""
    m = problem(("regression",))
    data, head = m.data[0], m.heads[0]
    mirrored = linear(HeadData(data.kind, data.features, -data.targets, -data.weight))
    layer = published_layer([published_regression(head, 0.4, power), published_regression(mirrored, 0.4, power)])
    features = data.features.clone().requires_grad_()
    targets = [data.targets, -data.targets]
    layer(features, targets)
    layer.refresh()
    # (-w).h - (-y) = -(w.h - y), and times -w: the same gradient.
    alone = published_layer([published_regression(head, 0.4, power)])
    alone(features, targets[:1])
    alone.refresh()
    assert_near(layer.aggregate(features, targets), alone.aggregate(features, targets[:1]), 1e-11)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(scale=st.sampled_from([2.0**-6, 0.5, 2.0]))
def test_units_of_the_features(scale: float) -> None:
    """Features times s and gamma over s^2 leave predictions alone and divide gradients by s. (Units of the targets do
    not scale: the noise has unit variance. Nor do variances under 1e-8, the published floor.)"""
    m = problem(("regression",))
    data = m.data[0]
    plain, moved = (published_layer([published_regression(m.heads[0], gamma, 0.5)]) for gamma in (0.4, 0.4 / scale**2))
    for layer, factor in ((plain, 1.0), (moved, scale)):
        layer((data.features * factor).requires_grad_(), m.targets())
        layer.refresh()
    assert_near(
        moved.aggregate(data.features * scale, m.targets()) * scale, plain.aggregate(data.features, m.targets()), 1e-10
    )


# ---- dtypes, memory, threads


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("moments_of", ["exact", "sampled"])
def test_half_precision_features_are_those_features_in_float32(dtype: torch.dtype, moments_of: str) -> None:
    m = problem(missing=0.2, moments=moments_of)
    m.heads = [head.float() for head in m.heads]
    for data in m.data:
        data.features = data.features.to(dtype)
    wide = copy.deepcopy(m)
    for data in wide.data:
        data.features = data.features.float()
    gradients = []
    for part, kind in ((m, dtype), (wide, torch.float32)):
        for _ in range(2):
            features = part.data[0].features.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
                out = part.layer(features, part.targets())
                total = part.layer.total(part.losses(out.float()))
            total.backward()
            part.layer.refresh()
        assert features.grad is not None
        gradients.append(features.grad)
    assert gradients[0].dtype == dtype
    assert torch.equal(gradients[0], gradients[1].to(dtype))


def test_float32_is_close_to_float64() -> None:
    m = problem(missing=0.2)
    m.see()
    m.layer.refresh()
    features, targets = m.data[0].features[:9].float(), m.targets(slice(0, 9))
    narrow = m.layer.aggregate(features, [t.float() if t.is_floating_point() else t for t in targets])
    assert narrow.dtype == torch.float32
    assert_near(narrow.double(), m.layer.aggregate(features.double(), targets), 1e-5)


class LargestAllocation(TorchDispatchMode):
    """The largest storage, in bytes, that an operation returned and was not given."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, returned = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), out))
        known = {x.untyped_storage().data_ptr() for x in given}
        new = [x.untyped_storage() for x in returned if x.untyped_storage().data_ptr() not in known]
        self.bytes = max([self.bytes, *(storage.nbytes() for storage in new)])
        return out


@pytest.mark.parametrize("batch", [64, 100])  # fewer and more examples than weights
@pytest.mark.parametrize(("kind", "missing"), [("binary", 0.0), ("binary", 0.1), ("regression", 0.0)])
def test_no_tensor_of_all_tasks_and_dimensions(kind: str, missing: float, batch: int) -> None:
    """(Regression labels that are missing one by one cost a posterior for every output.)"""
    tasks, width = 40, 80
    data = head_data(kind, 200, width, tasks, missing=missing)
    layer = published_layer([LAYERS[kind](nn.Linear(width, tasks))])
    features, targets = data.features.float().requires_grad_(), data.targets.float()
    layer(features, [targets])
    layer.refresh()
    layer.aggregate(features[:batch], [targets[:batch]])  # copies of the posteriors in float32 are made once
    with LargestAllocation() as largest:
        layer.aggregate(features[:batch], [targets[:batch]])
    # With more examples than weights the batch's own precision is the largest, [T, P, P] in float64.
    allowed = 8 * tasks * (width + 1) ** 2 if batch > width and kind == "binary" else 4 * batch * tasks * width / 2
    assert 0 < largest.bytes <= allowed


@pytest.mark.parametrize("moments_of", ["exact", "sampled"])
def test_number_of_threads(moments_of: str) -> None:
    """The kernels give the same bits for any number of threads; BLAS splits its sums by it, so the whole is equal up to
    rounding."""
    m = problem(examples=200, moments=moments_of)
    m.see()
    m.layer.refresh()
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(m.aggregate())
    finally:
        torch.set_num_threads(before)
    assert_near(found[1], found[0], 1e-12)
    assert_near(found[2], found[0], 1e-12)
