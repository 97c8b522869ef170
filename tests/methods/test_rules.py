"""The three forms of every rule over the Gram matrix against the explicit computation: the gradients as one float64
matrix, the weights of its products, the weighed sum."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import mtlgrad
from mtlgrad import GramRule, ops, reference, task_backward
from tests.support.bounds import all_near, flat, gradients, near, normal
from tests.support.nets import Net, inputs, step
from tests.support.oracles import at_features, jacobian, pushed


def inverse_norms(gram: Tensor) -> Tensor:
    """A rule of a user's own: every gradient gets the length one."""
    return gram.diagonal().rsqrt()


P = [0.2, 0.5, 0.3]

P64 = torch.tensor(P, dtype=torch.float64)

RULES: dict[str, tuple[Callable[..., GramRule], Callable[[Tensor], Tensor]]] = {
    "UPGrad": (mtlgrad.UPGrad, reference.upgrad),
    "UPGrad preference": (lambda n, **o: mtlgrad.UPGrad(n, P, **o), lambda m: reference.upgrad(m, P64)),
    "DualProj": (mtlgrad.DualProj, reference.dualproj),
    "DualProj preference": (
        lambda n, **o: mtlgrad.DualProj(n, P, **o),
        lambda m: reference.dualproj(m, P64),
    ),
    "MGDA": (mtlgrad.MGDA, reference.mgda),
    "CAGrad": (mtlgrad.CAGrad, reference.cagrad),
    "CAGrad 0.2": (lambda n, **o: mtlgrad.CAGrad(n, 0.2, **o), lambda m: reference.cagrad(m, 0.2)),
    "NashMTL": (mtlgrad.NashMTL, reference.fairgrad),
    "NashMTL published": (
        lambda n, **o: mtlgrad.NashMTL(n, normalize=False, **o),
        lambda m: reference.fairgrad(m, 1.0, False),
    ),
    "FairGrad": (mtlgrad.FairGrad, lambda m: reference.fairgrad(m, 2.0)),
    "FairGrad 0.5": (lambda n, **o: mtlgrad.FairGrad(n, 0.5, **o), lambda m: reference.fairgrad(m, 0.5)),
    "IMTLG": (mtlgrad.IMTLG, reference.imtlg),
    "PCGrad": (mtlgrad.PCGrad, lambda m: reference.pcgrad(m, 0, torch.tensor(0))),
    "of one's own": (lambda n, **o: GramRule(n, inverse_norms, **o), inverse_norms),
}

every_rule = pytest.mark.parametrize("name", list(RULES))
#: One that prefers, one that does not, one that draws, one in Python: what does not depend on the rule.
several = pytest.mark.parametrize("name", ["UPGrad preference", "IMTLG", "PCGrad", "of one's own"])
COMMUTING = [name for name in RULES if name not in ("NashMTL published", "of one's own")]  #: with a common factor


def made(name: str, **options: Any) -> GramRule:
    return RULES[name][0](3, **options)


def expected(name: str, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and update of a float64 matrix [T, N]."""
    weights = RULES[name][1](rows @ rows.mT)
    return weights, weights @ rows


# ---- the three forms -------------------------------------------------------------------------------------------------


@every_rule
def test_layer(name: str) -> None:
    net, x = Net(), inputs()
    features, rows = at_features(net, x)
    weights, update = expected(name, rows.double())
    heads = jacobian(net.from_features(features), list(net.heads.parameters()))
    backbone = pushed(net, features, update)
    rule = made(name)
    assert rule.weights is None
    step(net, rule, x)
    all_near(gradients(net.shared), backbone)
    all_near(gradients(net.heads.parameters()), [h.sum(0) for h in heads])
    assert near(rule.weights, weights, 1e-5)


@every_rule
def test_merge(name: str) -> None:
    net, x = Net(), inputs()
    rows = flat(jacobian(net.from_features(net.backbone(x)), net.shared), 3)
    weights, update = expected(name, rows)
    rule = made(name)
    task_backward(net.from_features(net.backbone(x)), net.shared)
    rule.merge(net.shared)
    assert near(flat(p.grad for p in net.shared if p.grad is not None), update, 1e-5)
    assert near(rule.weights, weights, 1e-5)
    assert not any(hasattr(p, "jac") for p in net.shared)


@several
def test_merge_scales_heads_where_it_is_told_them(name: str) -> None:
    net, x, rule = Net(), inputs(), made(name)
    task_backward(net.from_features(net.backbone(x)), net.shared)
    before = gradients(net.heads.parameters())
    rule.merge(net.shared, heads=[head.parameters() for head in net.heads])
    factors = [w for w, head in zip(rule.weights, net.heads) for _ in head.parameters()]
    all_near(gradients(net.heads.parameters()), [w.float() * b for w, b in zip(factors, before) if b is not None])


@pytest.mark.parametrize("shared", ["parameters", "features"])
@every_rule
def test_weigh(name: str, shared: str) -> None:
    net, x = Net(), inputs()
    features = net.backbone(x)
    losses = net.from_features(features)
    tensors = net.shared if shared == "parameters" else [features]
    weights, _ = expected(name, flat(jacobian(losses, tensors), 3))
    found = made(name).weigh(losses, tensors if shared == "parameters" else features)
    assert found.dtype == losses[0].dtype
    assert near(found, weights, 1e-5)


@several
def test_three_micro_batches_add_up(name: str) -> None:
    net, rule = Net(), made(name)
    want = [torch.zeros_like(p) for p in net.shared]
    for seed in range(3):
        other = made(name)
        if name == "PCGrad":
            other.draws += seed
        alone = Net()
        step(alone, other, inputs(seed=seed))
        for w, p in zip(want, alone.shared):
            w += p.grad
        step(net, rule, inputs(seed=seed))
    all_near(gradients(net.shared), want)


@pytest.mark.parametrize("name", [name for name in RULES if name != "of one's own"])  # that divides by its norm
def test_an_absent_task(name: str) -> None:
    """Its gradient is zero: what that does to each rule is the operation's to say."""
    net, x, rule = Net(), inputs(), made(name)
    features, rows = at_features(net, x)
    rows[1] = 0.0
    _, update = expected(name, rows.double())
    views = rule(features)
    losses = net.losses(views)
    (losses[0] + losses[2]).backward()
    alone = Net()
    features = alone.backbone(x)
    all_near(gradients(net.shared), pushed(alone, features, update))


# ---- what a training loop does ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMUTING)
def test_a_loss_scale_goes_through(name: str) -> None:
    x, found = inputs(), []
    for scale in (1.0, 2.0**16):
        net = Net()
        (sum(net.losses(made(name)(net.backbone(x)))) * scale).backward()
        found.append([p.grad / scale for p in net.shared])
    all_near(found[1], found[0])


@several
def test_evaluation_mode_gives_views(name: str) -> None:
    net, rule = Net(), made(name).eval()
    features = net.backbone(inputs())
    views = rule(features)
    assert all(view._base is features or view._base is features._base for view in views)
    sum(net.losses(views)).backward()
    plain = Net()
    sum(plain.from_features(plain.backbone(inputs()))).backward()
    all_near(gradients(net.shared), gradients(plain.shared))


@several
def test_complex_features_are_pairs_of_reals(name: str) -> None:
    rows = torch.view_as_complex(normal(2, 3, 10, 2))
    features = torch.zeros(10, dtype=torch.complex128, requires_grad=True)
    torch.autograd.backward(made(name)(features), list(rows))
    _, update = expected(name, torch.view_as_real(rows).flatten(1))
    assert near(torch.view_as_real(features.grad).flatten(), update, 1e-9)


@several
def test_made_under_another_default_device(name: str) -> None:
    net, x = Net(), inputs()
    torch.set_default_device("meta")
    try:
        rule = made(name)
        step(net, rule, x)
    finally:
        torch.set_default_device(None)
    want = Net()
    step(want, made(name), x)
    all_near(gradients(net.shared), gradients(want.shared), 0.0)
    assert rule.weights.device == x.device


@pytest.mark.parametrize("reentrant", [False, True])
@several
def test_under_checkpointing(name: str, reentrant: bool) -> None:
    """Of the backbone alone: a second forward of it does not count as a use."""
    net, rule, want = Net(), made(name), Net()
    x = inputs().requires_grad_()
    features = checkpoint(net.backbone, x, use_reentrant=reentrant)
    sum(net.losses(rule(features))).backward()
    step(want, made(name), inputs())
    all_near(gradients(net.shared), gradients(want.shared), 1e-6)


@several
def test_nan_is_named_where_asked_for(name: str) -> None:
    rows = normal(1, 3, 20)
    rows[2, 7] = torch.nan
    for check in (False, True):
        rule = made(name, check_finite=check)
        features = torch.zeros(20, dtype=torch.float64, requires_grad=True)
        if check:
            with pytest.raises(ValueError, match="found NaN or infinity in task 2"):
                torch.autograd.backward(rule(features), list(rows))
        else:
            torch.autograd.backward(rule(features), list(rows))
            assert features.grad.isnan().any()


@several
def test_copies_and_pickles_are_rules_of_their_own(name: str) -> None:
    x, rule = inputs(), made(name)
    step(Net(), rule, x)
    others = [copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))]
    want = Net()
    step(want, rule, x)
    for other in others:
        net = Net()
        step(net, other, x)
        all_near(gradients(net.shared), gradients(want.shared), 0.0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_a_compiled_copy_asks_its_own_weighting() -> None:
    rule = GramRule(2, lambda gram: gram.new_ones(2))
    other = copy.deepcopy(rule)
    other.weighting = lambda gram: 2.0 * gram.new_ones(2)
    for module, factor in ((rule, 2.0), (other, 4.0)):
        features = torch.ones(3, requires_grad=True)

        def through(z: Tensor, module: GramRule = module) -> Tensor:
            return sum(view.sum() for view in module(z))

        torch.compile(through, backend="aot_eager", fullgraph=True)(features).backward()
        assert features.grad.tolist() == [factor] * 3
    torch.compiler.reset()


# ---- PCGrad's draws --------------------------------------------------------------------------------------------------


def conflicts(seed: int) -> Tensor:
    rows = normal(seed, 5, 4)
    return rows - 1.5 * rows.mean(0)


def drawn(rule: mtlgrad.PCGrad, count: int) -> list[Tensor]:
    found = []
    for _ in range(count):
        features = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        torch.autograd.backward(rule(features), list(conflicts(7)))
        found.append(features.grad)
    return found


def test_pcgrad_draws_anew_each_time_and_a_resumed_run_repeats() -> None:
    whole = drawn(mtlgrad.PCGrad(5), 6)
    assert len({tuple(update.tolist()) for update in whole}) > 1
    first = mtlgrad.PCGrad(5)
    before = drawn(first, 2)
    second = mtlgrad.PCGrad(5)
    second.load_state_dict(first.state_dict())
    after = drawn(second, 4)
    assert all(map(torch.equal, [*before, *after], whole))
    assert not all(map(torch.equal, drawn(mtlgrad.PCGrad(5, seed=1), 6), whole))


def test_no_other_rule_has_state() -> None:
    for name in RULES:
        assert list(made(name).state_dict()) == (["draws"] if name == "PCGrad" else [])


# ---- a weighting of one's own ----------------------------------------------------------------------------------------


def test_what_is_no_weighting_is_refused() -> None:
    with pytest.raises(TypeError, match=r"GramRule: weighting: expected a function of the Gram matrix.* found list"):
        GramRule(2, [0.5, 0.5])
    for wrong in (lambda gram: gram, lambda gram: [1.0, 1.0]):
        with pytest.raises(ValueError, match=r"GramRule: weighting: expected to return a tensor \[2\], found"):
            GramRule(2, wrong).weigh([(x := torch.ones(2, requires_grad=True)).sum(), x.prod()], x)


def test_a_weighting_cannot_change_the_gram_matrix_it_is_given() -> None:
    rule = GramRule(2, lambda gram: gram.zero_().diagonal() + 1.0)
    features = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    torch.autograd.backward(rule(features), list(normal(1, 2, 3)))
    assert near(features.grad, normal(1, 2, 3).sum(0), 1e-15)


def ridged(gram: Tensor) -> Tensor:
    """What TorchJD's projections work with."""
    return gram / gram.trace() + 1e-4 * torch.eye(len(gram)).double()


def weightings() -> dict[str, Any]:
    aggregation = pytest.importorskip("torchjd.aggregation")
    return {
        "AlignedMTL": (aggregation.AlignedMTLWeighting(torch.ones(3).double()), lambda m: ops.align(m).weights, 1e-6),
        "UPGrad": (aggregation.UPGradWeighting(), lambda m: ops.upgrad(ridged(m)), 1e-6),
        "DualProj": (aggregation.DualProjWeighting(), lambda m: ops.dualproj(ridged(m)), 1e-6),
        "MGDA": (aggregation.MGDAWeighting(1e-6, 10_000), ops.mgda, 1e-2),  # theirs iterates
        "IMTLG": (aggregation.IMTLGWeighting(), ops.imtlg, 1e-6),
        "GradVac": (aggregation.GradVacWeighting(), None, 0.0),
        "Krum": (aggregation.KrumWeighting(0), None, 0.0),
        "Mean": (aggregation.MeanWeighting(), lambda m: m.new_full((3,), 1 / 3), 1e-6),
        "Constant": (aggregation.ConstantWeighting(torch.tensor(P)), lambda m: m.new_tensor(P), 1e-6),
    }


def test_torchjds_weightings_as_they_are() -> None:
    for name, (weighting, ours, tolerance) in weightings().items():
        net, x, rule = Net(), inputs(), GramRule(3, weighting)
        _, rows = at_features(net, x)
        gram = rows.double() @ rows.double().mT
        step(net, rule, x)
        if ours is None:
            assert rule.weights.isfinite().all(), name
        else:
            assert near(rule.weights, ours(gram), tolerance), name


def test_torchjds_weightings_over_the_gradients_are_refused() -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    for weighting in (aggregation.ExcessMTLWeighting(), aggregation.MoDoWeighting(), aggregation.SDMGradWeighting()):
        with pytest.raises(TypeError, match="expected one over the Gram matrix, found TorchJD's"):
            GramRule(3, weighting)


def test_options_that_cannot_be_are_refused() -> None:
    for make in (mtlgrad.UPGrad, mtlgrad.DualProj):
        op = make.__name__
        with pytest.raises(ValueError, match=rf"{op}: preference: expected 3 numbers, one a task, found 2"):
            make(3, [0.5, 0.5])
        with pytest.raises(ValueError, match=rf"{op}: preference: expected finite numbers from 0, not all 0"):
            make(3, [0.5, -0.5, 1.0])
    for c in (-0.1, torch.inf, torch.nan):
        with pytest.raises(ValueError, match="cagrad: c: expected a finite number from 0"):
            mtlgrad.CAGrad(3, c)
    for alpha in (0.0, -1.0, torch.inf):
        with pytest.raises(ValueError, match="fairgrad: alpha: expected a finite number above 0"):
            mtlgrad.FairGrad(3, alpha)
    for name in RULES:
        with pytest.raises(ValueError, match="num_tasks: expected at least 1, found 0"):
            RULES[name][0](0)
