"""AlignedMTL: its three forms against the explicit matrix of gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mtlgrad import AlignedMTL, ops, task_backward
from tests.support.bounds import all_near, flat, gradients, near, normal
from tests.support.nets import Net, inputs, step
from tests.support.oracles import at_features, jacobian, procrustes, pushed

OPTIONS: list[dict[str, Any]] = [
    {},
    {"preference": [0.5, 0.0, 2.0], "scale": "median"},
    {"preference": torch.tensor([1 / 3] * 3), "scale": "rmse"},
    {"scale": "rmse", "rtol": 1e-9},
]


def expected(rows: Tensor, options: dict[str, Any]) -> Any:
    preference = options.get("preference")
    p = None if preference is None else torch.as_tensor(preference)
    return procrustes(rows, p, options.get("scale", "min"), options.get("rtol"))


# ---- the three forms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "default")
def test_layer(options: dict[str, Any]) -> None:
    net, x = Net(), inputs()
    features, rows = at_features(net, x)
    want = expected(rows, options)
    heads = jacobian(net.from_features(features), list(net.heads.parameters()))
    backbone = pushed(net, features, want.update)
    aligned = AlignedMTL(3, **options)
    assert aligned.weights is None
    assert aligned.rank is None
    step(net, aligned, x)
    all_near(gradients(net.shared), backbone)
    all_near(gradients(net.heads.parameters()), [h.sum(0) for h in heads])  # heads: as if there were no layer
    assert near(aligned.weights, want.weights, 1e-5)
    assert near(aligned.singular_values, want.singular_values, 1e-6)
    assert int(aligned.rank) == want.rank
    values = want.singular_values
    assert float(aligned.condition_number) == pytest.approx(float(values[0] / values[-1]), rel=1e-4)
    step(net, aligned, x)  # accumulates
    all_near(gradients(net.shared), [2 * g for g in backbone])


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "default")
def test_merge(options: dict[str, Any]) -> None:
    net, x = Net(), inputs()
    rows = jacobian(net.from_features(net.backbone(x)), net.shared)
    want = expected(flat(rows, 3), options)
    aligned = AlignedMTL(3, **options)
    features = net.backbone(x)
    task_backward(net.from_features(features), net.shared, features=features)
    aligned.merge(net.shared, retain_jac=True)
    assert all(hasattr(p, "jac") for p in net.shared)
    assert near(flat(gradients(net.shared)), want.update, 1e-6)
    assert near(aligned.weights, want.weights, 1e-6)
    held = [p.grad for p in net.shared]
    aligned.merge(net.shared)
    assert not any(hasattr(p, "jac") for p in net.shared)
    assert all(p.grad is g for p, g in zip(net.shared, held))
    assert near(flat(gradients(net.shared)), 2 * want.update, 1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "default")
def test_weigh(options: dict[str, Any]) -> None:
    net, x = Net(), inputs()
    aligned = AlignedMTL(3, **options)
    losses = net.from_features(net.backbone(x))
    rows = jacobian(losses, net.shared)
    want = expected(flat(rows, 3), options)
    weights = aligned.weigh(losses, net.shared)
    assert weights.dtype == torch.float32
    assert not weights.requires_grad
    assert near(weights, want.weights, 1e-6)
    assert all(p.grad is None and not hasattr(p, "jac") for p in net.parameters())
    heads = jacobian(losses, list(net.heads.parameters()))
    (weights * torch.stack(losses)).sum().backward()
    assert near(flat(gradients(net.shared)), want.update, 1e-5)
    all_near(gradients(net.heads.parameters()), [torch.tensordot(weights, h, 1) for h in heads])


def test_the_forms_agree() -> None:
    """weigh and a backward is merge; weigh at the features is the layer."""
    net, x = Net(), inputs()
    aligned = AlignedMTL(3)
    losses = net.from_features(net.backbone(x))
    weights = aligned.weigh(dict(zip("abc", losses)), net.shared)
    assert torch.equal(weights, aligned.weigh(losses, [*net.shared, *net.shared]))  # each parameter counts once
    by_weights = torch.autograd.grad((weights * torch.stack(losses)).sum(), net.shared, retain_graph=True)
    task_backward(losses, net.shared)
    aligned.merge(net.shared)
    all_near(gradients(net.shared), list(by_weights))
    net.zero_grad()
    features = net.backbone(x)
    weights = aligned.weigh(net.from_features(features), features)
    step(net, aligned, x)
    assert near(aligned.weights, weights, 1e-6)


def test_absent_tasks() -> None:
    """A view that no loss uses, a constant loss, None: a zero gradient, the weight 0, and the others are aligned."""
    net, x = Net(), inputs()
    features, rows = at_features(net, x)
    rows[1] = 0
    want = procrustes(rows)
    backbone = pushed(net, features, want.update)
    aligned = AlignedMTL(3)
    losses = net.losses(aligned(net.backbone(x)))
    (losses[0] + losses[2]).backward()
    all_near(gradients(net.shared), backbone)
    assert int(aligned.rank) == 2
    assert float(aligned.weights[1]) == 0.0
    features = net.backbone(x)
    first, _, last = net.from_features(features)
    for missing in (None, torch.tensor(1.0), torch.tensor(1.0, requires_grad=True)):
        assert near(aligned.weigh([first, missing, last], features), want.weights, 1e-5)
    assert aligned.weigh([None, None, None], features).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("heads_first", [False, True])
def test_heads_can_be_scaled_by_their_weights(heads_first: bool) -> None:
    net, x = Net(), inputs()
    aligned = AlignedMTL(3, scale_heads=True)
    losses = net.from_features(net.backbone(x))
    if heads_first:
        net.heads[1].requires_grad_(False)  # a frozen head has no gradient to scale
        losses = net.from_features(net.backbone(x))
    task_backward(losses, net.shared)
    before = gradients(net.heads.parameters())
    aligned.merge(net.shared, heads=[head.parameters() for head in net.heads])
    each = len(before) // 3
    weights = aligned.weights
    want = [None if g is None else g * float(weights[i // each]) for i, g in enumerate(before)]
    all_near(gradients(net.heads.parameters()), want, 1e-6)
    with pytest.raises(RuntimeError, match="AlignedMTL: scale_heads: expected False in the layer"):
        aligned(net.backbone(x))


@pytest.mark.parametrize("factor", [2.0**-30, 7e9])
def test_a_loss_scale_goes_through(factor: float) -> None:
    net, x = Net(), inputs()
    aligned = AlignedMTL(3)
    step(net, aligned, x)
    want, weights = gradients(net.shared), aligned.weights
    net.zero_grad()
    (factor * sum(net.losses(aligned(net.backbone(x))))).backward()
    all_near([g / factor for g in gradients(net.shared)], want)
    assert near(aligned.weights, weights, 1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", ["layer", "merge", "weigh"])
def test_nan_and_infinity(form: str, bad: float) -> None:
    """One entry of one gradient; its preference may be 0. Named on request, NaN otherwise."""
    for check_finite in (True, False):
        net, x = Net(), inputs()
        aligned = AlignedMTL(3, [1.0, 0.0, 1.0], check_finite=check_finite)
        z = net.backbone(x)
        z = aligned(z) if form == "layer" else [z] * 3
        poison = torch.ones_like(z[1])
        poison[3, 2] = bad
        losses = net.losses(z)
        losses[1] = losses[1] + (z[1] * poison).sum()
        if form == "merge":
            for p in net.shared:
                p.jac = normal(3, 3, *p.shape).float()
            net.shared[1].jac[1, 3] = bad
        call: dict[str, Callable[[], Any]] = {
            "layer": lambda losses=losses: sum(losses).backward(),
            "merge": lambda net=net, aligned=aligned: aligned.merge(net.shared),
            "weigh": lambda net=net, aligned=aligned, losses=losses: aligned.weigh(losses, net.shared),
        }
        if check_finite:
            with pytest.raises(ValueError, match=r"finite gradients, found NaN or infinity in task 1\b") as error:
                call[form]()
            assert "\n" not in str(error.value)
            assert all(p.grad is None for p in net.shared)
            assert all(hasattr(p, "jac") for p in net.shared) == (form == "merge")
            continue
        result = call[form]()
        if form == "weigh":
            assert result.isnan().all()
        else:
            assert all(p.grad is not None and p.grad.isnan().all() for p in net.shared)
        assert aligned.weights.isnan().all()
        assert aligned.singular_values.isnan().all()
        assert int(aligned.rank) == -1


# ---- step after step: what the layer keeps from one to the next ------------------------------------------------------


def forms_of_gradients() -> dict[str, list[Tensor]]:
    """As they may follow one another."""
    rows = list(normal(1, 3, 6, 8))
    strided = [g.mT.contiguous().mT for g in normal(2, 3, 6, 8)]
    return {
        "first": rows,
        "again": list(normal(3, 3, 6, 8)),
        "more examples": list(normal(4, 3, 9, 8)),
        "as many numbers": list(normal(5, 3, 8, 9)),
        "float32": [g.float() for g in normal(6, 3, 8, 9)],
        "bfloat16": [g.bfloat16() for g in normal(6, 3, 8, 9)],
        "strided": strided,
        "expanded": [g.expand(6, 8) for g in normal(7, 3, 6, 1)],
        "one strided": [rows[0], strided[1], rows[2]],
        "none": [g[:0] for g in rows],
        "long": list(normal(8, 3, 4096)),
        "first again": rows,
    }


@pytest.mark.parametrize("preference", [None, [0.5, 0.0, 2.0]])
def test_the_layer_again_and_again(preference: list[float] | None, device: str) -> None:
    aligned = AlignedMTL(3, preference).to(device)
    settings: list[dict[str, Any]] = [{"scale": "min", "rtol": None}, {"scale": "rmse", "rtol": 0.3}]
    for i, (form, rows) in enumerate(forms_of_gradients().items()):
        for j in range(4):  # a second time with all as it was, then with other settings
            own = settings[j // 2]
            aligned.scale, aligned.rtol = own["scale"], own["rtol"]
            given = [(g * (1.0 + i + j)).to(g.dtype) if g.is_contiguous() else g for g in rows]
            given = [g.to(device) for g in given]
            features = torch.zeros(given[0].shape, dtype=given[0].dtype, device=device, requires_grad=True)
            torch.autograd.backward(aligned(features), given)
            want, result = ops.merge(given, preference, **own)
            assert torch.equal(features.grad, want), (form, j)
            for name in ("weights", "singular_values", "rank"):
                assert torch.equal(getattr(aligned, name), getattr(result, name)), (form, j, name)


def test_a_task_more_than_a_kernel_takes() -> None:
    aligned, rows = AlignedMTL(65), list(normal(1, 65, 2, 40))
    for _ in range(3):
        features = torch.zeros(2, 40, dtype=torch.float64, requires_grad=True)
        torch.autograd.backward(aligned(features), rows)
        assert torch.equal(features.grad, ops.merge(rows)[0])


def test_gradients_of_a_refused_dtype_are_refused_each_time() -> None:
    result = ops.align(torch.eye(2))
    merge, rows = ops.TaskMerge(result, None), [torch.ones(3, dtype=torch.int32)] * 2
    for _ in range(2):
        with pytest.raises(RuntimeError, match="merge: rows: expected float32"):
            merge(rows, "min", None)
    for bad in ({"scale": "max"}, {"rtol": 2.0}):
        for _ in range(2):
            with pytest.raises(ValueError, match="merge: "):
                merge([torch.ones(3)] * 2, **{"scale": "min", "rtol": None, **bad})
    with pytest.raises(RuntimeError, match="in row 1"):
        merge([torch.ones(3), torch.ones(4)], "min", None)


def test_what_was_saved_of_a_result_is_known_to_be_written() -> None:
    aligned, rows = AlignedMTL(2), list(normal(1, 2, 5))
    for _ in range(2):
        features = torch.zeros(5, dtype=torch.float64, requires_grad=True)
        torch.autograd.backward(aligned(features), rows)
    factor = torch.ones(2, dtype=torch.float64, requires_grad=True)
    total = (factor * aligned._result.weights).sum()
    features = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    torch.autograd.backward(aligned(features), rows)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_a_refused_merge_changes_nothing() -> None:
    net = Net()
    task_backward(net.from_features(net.backbone(inputs())), net.shared)
    before = [p.jac.clone() for p in net.shared]
    heads = gradients(net.heads.parameters())
    with pytest.raises(ValueError, match="expected 3, found 2"):
        AlignedMTL(3, scale_heads=True).merge(net.shared, heads=[h.parameters() for h in net.heads][:2])
    assert all(torch.equal(p.jac, b) and p.grad is None for p, b in zip(net.shared, before))
    all_near(gradients(net.heads.parameters()), heads)
