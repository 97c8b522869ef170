"""What other people's loops do: clear by the module, drop layers, name their losses, evaluate with gradients."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mtlgrad import AlignedMTL, BayesAgg, Regression, task_backward
from mtlgrad.optim import AdaTaskAdagrad, AdaTaskAdam, AdaTaskAdamW, AdaTaskRMSprop, clip_task_grad_norm_
from tests.support.nets import Model

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIMIZERS = [AdaTaskAdam, AdaTaskAdamW, AdaTaskRMSprop, AdaTaskAdagrad]
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


class Branches(nn.Module):
    """A backbone of two layers, of which a batch may drop one; losses by name."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.dropped = nn.Linear(4, 8), nn.Linear(4, 8)
        self.heads = nn.ModuleDict({"a": nn.Linear(8, 1), "c": nn.Linear(8, 1)})

    @property
    def shared(self) -> list[Tensor]:
        return [*self.used.parameters(), *self.dropped.parameters()]

    def features(self, x: Tensor, drop: bool = False) -> Tensor:
        return (self.used(x) if drop else self.used(x) + self.dropped(x)).tanh()

    def losses(self, z: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Of different size, so that exchanged rows show."""
        return {"a": 30.0 * (self.heads["a"](z) - y).square().mean(), "c": (self.heads["c"](z) + y).square().mean()}


def start(seed: int = 0) -> tuple[Branches, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(seed)
    return Branches(), [(torch.randn(16, 4), torch.randn(16, 1)) for _ in range(6)]


def parameters(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def gradients(net: Branches, x: Tensor, y: Tensor, drop: bool = False) -> list[list[Tensor]]:
    """By autograd alone: of each task, of each shared parameter that the batch reaches."""
    losses = net.losses(net.features(x, drop), y)
    wanted = list(net.used.parameters()) if drop else net.shared
    return [list(torch.autograd.grad(loss, wanted, retain_graph=True)) for loss in losses.values()]


# ---- what the module's zero_grad does not know -----------------------------------------------------------------------


@every_optimizer
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_module_zero_grad_is_as_good_as_the_optimizers(optimizer: Callable[..., Any], micro_batches: int) -> None:
    ends = []
    for by_module in (True, False):
        net, batches = start()
        opt = optimizer(net.parameters(), lr=1e-2, num_tasks=2)
        for first in range(0, 6, micro_batches):
            net.zero_grad() if by_module else opt.zero_grad()
            for x, y in batches[first : first + micro_batches]:
                z = net.features(x)
                task_backward(net.losses(z, y), net.shared, features=z)
            opt.step()
        ends.append(parameters(net))
    assert torch.equal(*ends)


def test_jac_of_a_step_is_one_steps() -> None:
    net, batches = start()
    opt = AdaTaskAdam(net.parameters(), lr=1e-2, num_tasks=2)
    for x, y in batches:
        net.zero_grad()
        want = gradients(net, x, y)
        task_backward(net.losses(net.features(x), y), net.shared)
        for i, p in enumerate(net.shared):
            torch.testing.assert_close(p.jac, torch.stack([row[i] for row in want]))  # type: ignore[attr-defined]
        opt.step()


def test_merge_that_keeps_jac() -> None:
    net, batches = start()
    aligned, opt = AlignedMTL(2), torch.optim.SGD(net.parameters(), lr=1e-2)
    for x, y in batches[:3]:
        net.zero_grad()
        want = gradients(net, x, y)
        task_backward(net.losses(net.features(x), y), net.shared)
        aligned.merge(net.shared, retain_jac=True)
        torch.testing.assert_close(net.used.weight.jac, torch.stack([row[0] for row in want]))  # type: ignore[arg-type]
        opt.step()


def test_a_step_that_a_scaler_skips_leaves_nothing_behind() -> None:
    net, batches = start()
    opt = AdaTaskAdam(net.parameters(), lr=1e-2, num_tasks=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)  # overflows in the first step
    scales = []
    for x, y in batches:
        net.zero_grad()
        losses = {name: scaler.scale(loss) for name, loss in net.losses(net.features(x), y).items()}
        task_backward(losses, net.shared)
        scaler.step(opt)
        scaler.update()
        scales.append(scaler.get_scale())
    assert scales[0] == 2.0**125
    assert scales[-1] == scales[-2] > 2.0**100  # it has found its scale, and goes on
    assert bool(parameters(net).isfinite().all())


def test_a_parameter_that_is_shared_no_more_stays() -> None:
    """Its ``.jac`` of an earlier step is still there, for the module's zero_grad does not know it."""
    net, batches = start()
    opt = AdaTaskAdam(net.parameters(), lr=1e-2, num_tasks=2)
    for number, (x, y) in enumerate(batches):
        net.zero_grad()
        net.dropped.requires_grad_(number == 0)
        z = net.features(x)
        task_backward(net.losses(z, y), net.shared, features=z)
        opt.step()
        if number == 0:
            before = net.dropped.weight.clone()
    assert torch.equal(net.dropped.weight, before)


# ---- zero in the place of none ---------------------------------------------------------------------------------------


@every_optimizer
def test_what_no_task_reaches_stays(optimizer: Callable[..., Any]) -> None:
    net, batches = start()
    opt = optimizer(net.parameters(), lr=0.1, num_tasks=2, weight_decay=0.5)
    ordinary = copy.deepcopy(net)
    sgd = torch.optim.SGD(ordinary.parameters(), lr=0.1, weight_decay=0.5)
    for number, (x, y) in enumerate(batches):
        opt.zero_grad()
        sgd.zero_grad()
        task_backward(net.losses(net.features(x, drop=number > 0), y), net.shared)
        sum(ordinary.losses(ordinary.features(x, drop=number > 0), y).values()).backward()  # type: ignore[union-attr]
        assert [hasattr(p, "jac") for p in net.shared] == [p.grad is not None for p in ordinary.shared]
        opt.step()
        sgd.step()
        if number == 0:
            before = [p.clone() for p in net.dropped.parameters()]
    assert all(map(torch.equal, before, net.dropped.parameters()))


def test_jac_of_an_earlier_step_is_gone_where_no_task_reaches() -> None:
    net, ((x, y), (x2, y2), *_) = start()
    opt = AdaTaskAdam(net.parameters(), lr=0.1, num_tasks=2)
    task_backward(net.losses(net.features(x), y), net.shared)
    opt.step()
    net.zero_grad()
    task_backward(net.losses(net.features(x2, drop=True), y2), net.shared)
    assert [hasattr(p, "jac") for p in net.shared] == [True] * 2 + [False] * 2


def test_zeroed_jac_is_added_to_in_place() -> None:
    """For whoever keeps its memory, as captured graphs do."""
    net, ((x, y), (x2, y2), *_) = start()
    opt = AdaTaskAdam(net.parameters(), lr=0.1, num_tasks=2)
    task_backward(net.losses(net.features(x), y), net.shared)
    kept = [p.jac for p in net.shared]  # type: ignore[attr-defined]
    opt.step()
    opt.zero_grad(set_to_none=False)
    want = gradients(net, x2, y2)
    task_backward(net.losses(net.features(x2), y2), net.shared)
    for i, (p, before) in enumerate(zip(net.shared, kept)):
        assert p.jac is before  # type: ignore[attr-defined]
        torch.testing.assert_close(before, torch.stack([row[i] for row in want]))


def test_merge_leaves_alone_what_no_task_reaches() -> None:
    net, batches = start()
    aligned, opt = AlignedMTL(2), torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.5)
    for number, (x, y) in enumerate(batches):
        opt.zero_grad()
        z = net.features(x, drop=number > 0)
        task_backward(net.losses(z, y), net.shared, features=z)
        aligned.merge(net.shared)
        assert (net.dropped.weight.grad is None) == (number > 0)
        opt.step()
        if number == 0:
            before = net.dropped.weight.clone()
    assert torch.equal(net.dropped.weight, before)


def test_a_micro_batch_that_drops_a_layer_adds_nothing_to_it() -> None:
    net, ((x, y), (x2, y2), *_) = start()
    first, second = gradients(net, x, y), gradients(net, x2, y2, drop=True)
    task_backward(net.losses(net.features(x), y), net.shared)
    task_backward(net.losses(net.features(x2, drop=True), y2), net.shared)
    for i, p in enumerate(net.shared):
        want = [a[i] + b[i] if i < 2 else a[i] for a, b in zip(first, second)]
        torch.testing.assert_close(p.jac, torch.stack(want))  # type: ignore[attr-defined]


def test_a_list_that_no_loss_reaches_is_an_error() -> None:
    net, ((x, y), *_) = start()
    head = net.heads["a"]
    for given in ({}, {"features": True}):
        z = net.features(x, drop=True)
        with pytest.raises(
            ValueError, match=r"task_backward: shared: expected parameters that the losses were computed"
        ):
            task_backward(net.losses(z, y), net.dropped.parameters(), features=z if given else None)
        assert head.weight.grad is None
        assert not hasattr(net.dropped.weight, "jac")


# ---- rows belong to names --------------------------------------------------------------------------------------------


@every_optimizer
def test_losses_in_another_order(optimizer: Callable[..., Any]) -> None:
    """From micro-batch to micro-batch, and from step to step, where moments have an order, too."""
    ends = []
    for turned in (False, True):
        net, batches = start()
        opt = optimizer(net.parameters(), lr=1e-2, num_tasks=2, task_weights=[1.0, 3.0])
        for number, (x, y) in enumerate(batches):
            losses = net.losses(net.features(x), y)
            if turned and number in (1, 2, 5):
                losses = dict(reversed(losses.items()))
            task_backward(losses, net.shared)
            if number % 2:
                opt.step()
                opt.zero_grad()
        ends.append(parameters(net))
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)


def test_the_order_is_in_the_optimizers_state() -> None:
    ends = []
    for turned in (False, True):
        net, batches = start()
        opt = AdaTaskAdam(net.parameters(), lr=1e-2, num_tasks=2)
        for number, (x, y) in enumerate(batches):
            losses = net.losses(net.features(x), y)
            task_backward(dict(reversed(losses.items())) if turned and number >= 3 else losses, net.shared)
            opt.step()
            opt.zero_grad()
            if number == 2:
                saved = copy.deepcopy(opt.state_dict())
                opt = AdaTaskAdam(net.parameters(), lr=1e-2, num_tasks=2)
                opt.load_state_dict(saved)
        ends.append(parameters(net))
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-7)


def test_a_state_of_before_names_knows_no_order() -> None:
    net, ((x, y), *_) = start()
    opt = AdaTaskAdam(net.parameters(), lr=1e-2, num_tasks=2)
    saved = opt.state_dict()
    for group in saved["param_groups"]:
        del group["tasks"]
    opt.load_state_dict(saved)
    task_backward(net.losses(net.features(x), y), net.shared)
    opt.step()


def test_other_tasks_are_an_error_that_keeps_the_first_micro_batch() -> None:
    net, ((x, y), (x2, y2), *_) = start()
    first, second = gradients(net, x, y), gradients(net, x2, y2)
    task_backward(net.losses(net.features(x), y), net.shared)
    losses = net.losses(net.features(x2), y2)
    with pytest.raises(ValueError, match=r"expected the tasks of the \.jac that there is, a, c, found a, b; give None"):
        task_backward({"a": losses["a"], "b": losses["c"]}, net.shared)
    task_backward({"c": None, "a": losses["a"]}, net.shared)
    want = torch.stack([first[0][0] + second[0][0], first[1][0]])
    torch.testing.assert_close(net.used.weight.jac, want)  # type: ignore[arg-type]


def test_a_merges_preference_belongs_to_names() -> None:
    net, ((x, y), *_) = start()
    aligned = AlignedMTL(2, preference=[1.0, 5.0])
    found = []
    for turned in (False, True):
        net.zero_grad()
        losses = net.losses(net.features(x), y)
        task_backward(dict(reversed(losses.items())) if turned else losses, net.shared)
        aligned.merge(net.shared)
        found.append(net.used.weight.grad)
    torch.testing.assert_close(*found)
    losses = net.losses(net.features(x), y)
    weights = aligned.weigh(losses, net.shared)
    torch.testing.assert_close(aligned.weigh(dict(reversed(losses.items())), net.shared), weights.flip(0))
    with pytest.raises(
        ValueError, match=r"AlignedMTL.weigh: losses: expected the tasks of this module's first use, a, c"
    ):
        aligned.weigh({"a": losses["a"], "b": losses["c"]}, net.shared)


# ---- a second place for gradients ------------------------------------------------------------------------------------


@every_optimizer
@pytest.mark.parametrize("max_norm", [0.05, 1.0, 1e6])
def test_the_optimizer_clips_in_its_step(optimizer: Callable[..., Any], max_norm: float) -> None:
    """As clipping by hand does, tasks by clip_task_grad_norm_ and the heads by torch's; two groups are one."""
    ends = []
    for by_hand in (True, False):
        net, batches = start()
        groups = [{"params": net.used.parameters()}, {"params": [*net.dropped.parameters(), *net.heads.parameters()]}]
        opt = optimizer(groups, lr=1e-2, num_tasks=2, max_norm=None if by_hand else max_norm)
        for x, y in batches:
            opt.zero_grad()
            z = net.features(x)
            task_backward(net.losses(z, y), net.shared, features=z)
            if by_hand:
                clip_task_grad_norm_(net.shared, max_norm)
                nn.utils.clip_grad_norm_(net.heads.parameters(), max_norm)
            opt.step()
        ends.append(parameters(net))
    assert torch.equal(*ends)


def test_clipped_norms_are_what_was_asked_for() -> None:
    net, ((x, y), *_) = start()
    opt = AdaTaskAdam(net.parameters(), lr=1e-2, num_tasks=2, max_norm=0.1)
    want = [torch.cat([g.flatten() for g in row]) for row in gradients(net, x, 1e3 * y)]
    task_backward(net.losses(net.features(x), 1e3 * y), net.shared)
    opt.step()
    for t, gradient in enumerate(want):
        found = torch.cat([p.jac[t].flatten() for p in net.shared])  # type: ignore[attr-defined]
        torch.testing.assert_close(found, 0.1 * gradient / gradient.norm())
    heads = torch.cat([p.grad.flatten() for p in net.heads.parameters()])  # type: ignore[union-attr]
    torch.testing.assert_close(heads.norm(), torch.tensor(0.1))


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), "one"])
def test_a_norm_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"AdaTaskAdam: max_norm: expected a number above 0, or None, found"):
        AdaTaskAdam(Branches().parameters(), num_tasks=2, max_norm=value)
    net = Branches()
    opt = AdaTaskAdam(net.used.parameters(), num_tasks=2, max_norm=1.0)
    with pytest.raises(ValueError, match=r"max_norm: expected 1.0 as in the other groups, found 2.0"):
        opt.add_param_group({"params": net.dropped.parameters(), "max_norm": 2.0})


def test_sharpness_aware_steps_by_jac() -> None:
    """The guide's five lines: up by the sum of the tasks' gradients, the gradients there, back, and the step."""
    net, ((x, y), *_) = start()
    opt = AdaTaskAdam(net.parameters(), lr=1e-2, num_tasks=2)
    before = [p.detach().clone() for p in net.shared]
    rows = gradients(net, x, y)
    uphill = [0.05 * sum(parts) for parts in zip(*rows)]
    norm = torch.cat([u.flatten() for u in uphill]).norm() / 0.05
    with torch.no_grad():
        for p, u in zip(net.shared, uphill):
            p.add_(u / norm)
    want = gradients(net, x, y)
    with torch.no_grad():
        for p, b in zip(net.shared, before):
            p.copy_(b)
    task_backward(net.losses(net.features(x), y), net.shared)
    with torch.no_grad():
        ups = [p.jac.sum(0) for p in net.shared]  # type: ignore[attr-defined]
        scale = 0.05 / torch.cat([u.flatten() for u in ups]).norm()
        torch._foreach_add_(net.shared, ups, alpha=float(scale))
    opt.zero_grad()
    task_backward(net.losses(net.features(x), y), net.shared)
    with torch.no_grad():
        torch._foreach_sub_(net.shared, ups, alpha=float(scale))
    for i, p in enumerate(net.shared):
        torch.testing.assert_close(p.jac, torch.stack([row[i] for row in want]), rtol=1e-4, atol=1e-5)  # type: ignore[attr-defined]
    opt.step()


# ---- gradients that a backward adds by itself, or a hook takes -------------------------------------------------------


class AddGradient(torch.autograd.Function):
    """Passes on what comes, and has a loss of its own in every backward."""

    @staticmethod
    def forward(_: Any, z: Tensor, own: Tensor) -> Tensor:
        return z.view_as(z)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.ones(())


@pytest.mark.parametrize("through", ["layer", "features", "whole graph"])
def test_a_loss_of_the_backbones_own(through: str) -> None:
    """As the guide says: once in the layer form, in every row where the backbone is passed back for each task."""
    net, ((x, y), *_) = start()
    want = gradients(net, x, y)
    [own] = torch.autograd.grad(net.used(x).square().mean(), net.used.weight)
    inner = net.used(x)
    z = AddGradient.apply((inner + net.dropped(x)).tanh(), inner.square().mean())
    if through == "layer":
        aligned = AlignedMTL(2)
        u, v = aligned(z)
        (net.losses(u, y)["a"] + net.losses(v, y)["c"]).backward()
        weights = aligned.weights
        plain = sum(float(w) * row[0] for w, row in zip(weights, want))  # type: ignore[arg-type]
        torch.testing.assert_close(net.used.weight.grad, plain + own)
        return
    task_backward(net.losses(z, y), net.shared, features=z if through == "features" else None)
    torch.testing.assert_close(net.used.weight.jac, torch.stack([row[0] + own for row in want]))  # type: ignore[arg-type]


@pytest.mark.parametrize("through", ["features", "whole graph"])
def test_a_hook_that_takes_gradients_is_an_error(through: str) -> None:
    """An optimizer in the backward; one that looks at them is none."""
    net, ((x, y), (x2, y2), *_) = start()
    inside, seen = torch.optim.SGD([net.used.weight], lr=0.0), []

    def step(_: Tensor) -> None:
        inside.step()
        inside.zero_grad()

    net.dropped.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.norm()))  # type: ignore[union-attr]
    z = net.features(x)
    task_backward(net.losses(z, y), net.shared, features=z if through == "features" else None)
    assert len(seen) == 2
    before = [p.jac.clone() for p in net.shared]  # type: ignore[attr-defined]
    hook = net.used.weight.register_post_accumulate_grad_hook(step)
    z = net.features(x2)
    with pytest.raises(
        RuntimeError, match=r"task_backward: shared: expected gradients that stay .* found 1 that a hook"
    ):
        task_backward(net.losses(z, y2), net.shared, features=z if through == "features" else None)
    assert all(torch.equal(p.jac, b) for p, b in zip(net.shared, before))  # type: ignore[attr-defined]
    hook.remove()
    z = net.features(x2, drop=True)  # what no task reaches, the other hook did not take
    task_backward(net.losses(z, y2), net.shared, features=z)


# ---- one backward of one call ----------------------------------------------------------------------------------------


def views_and_losses(aligned: AlignedMTL, net: Branches, x: Tensor, y: Tensor) -> list[Tensor]:
    u, v = aligned(net.features(x))
    return [net.losses(u, y)["a"], net.losses(v, y)["c"]]


def test_losses_one_by_one_are_an_error() -> None:
    net, ((x, y), *_) = start()
    aligned = AlignedMTL(2)
    first, second = views_and_losses(aligned, net, x, y)
    first.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"expected one backward through a call of the layer, found a second"):
        second.backward()
    both = sum(views_and_losses(aligned, net, x, y))
    both.backward(retain_graph=True)  # type: ignore[union-attr]
    with pytest.raises(
        RuntimeError, match=r"add the losses and call backward\(\) once, or use task_backward and merge"
    ):
        both.backward()  # type: ignore[union-attr]


def test_who_only_looks_at_gradients_takes_no_backward() -> None:
    """Monitors ask for each loss's gradient at the features, or at a layer of the heads, and leave the graph."""
    net, ((x, y), *_) = start()
    aligned, found = AlignedMTL(2), []
    for looks in (False, True):
        net.zero_grad()
        z = net.features(x)
        u, v = aligned(z)
        losses = [net.losses(u, y)["a"], net.losses(v, y)["c"]]
        if looks:
            for loss in losses:
                torch.autograd.grad(loss, z, retain_graph=True)
                torch.autograd.grad(loss, [u, v], retain_graph=True, allow_unused=True)
        sum(losses).backward()  # type: ignore[union-attr]
        found.append(net.used.weight.grad)
    assert torch.equal(*found)  # type: ignore[arg-type]


def test_a_call_for_one_task_at_a_time_is_told_once() -> None:
    net, batches = start()
    aligned = AlignedMTL(2)

    def train() -> None:
        for x, y in batches:
            for t, name in enumerate(net.heads):
                net.losses(aligned(net.features(x))[t], y)[name].backward()

    with pytest.warns(UserWarning, match=r"found that of one alone, 3 times in a row: nothing is merged") as told:
        train()
    assert len(told) == 1


def test_a_batch_without_a_tasks_labels_is_nothing_to_tell() -> None:
    net, batches = start()
    aligned = AlignedMTL(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number, (x, y) in enumerate(batches):
            losses = views_and_losses(aligned, net, x, y)
            sum(losses if number % 3 == 2 else losses[:1]).backward()  # type: ignore[union-attr]


# ---- evaluation mode -------------------------------------------------------------------------------------------------


def test_gradients_in_evaluation_mode_are_the_plain_ones() -> None:
    net, ((x, y), *_) = start()
    aligned = AlignedMTL(2)
    sum(views_and_losses(aligned, net, x, y)).backward()  # type: ignore[union-attr]
    assert bool(aligned.weights.isfinite().all())  # type: ignore[union-attr]
    x.requires_grad_()
    z = net.features(x)
    want = torch.autograd.grad(sum(net.losses(z, y).values()), x)[0]  # type: ignore[arg-type]
    aligned.eval()
    for _ in range(2):
        first, second = views_and_losses(aligned, net, x, y)
        found = torch.autograd.grad(first, x, retain_graph=True)[0] + torch.autograd.grad(second, x)[0]
        torch.testing.assert_close(found, want)
    assert bool(aligned.weights.isnan().all())  # type: ignore[union-attr]


def steps(aligned: AlignedMTL, net: Branches, batches: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    opt = torch.optim.SGD(net.parameters(), lr=1e-3)
    for x, y in batches:
        opt.zero_grad()
        sum(views_and_losses(aligned, net, x, y)).backward()  # type: ignore[union-attr]
        opt.step()
        yield


def test_who_trains_in_evaluation_mode_is_told_once() -> None:
    net, batches = start()
    with pytest.warns(UserWarning, match=r"expected to be trained in training mode") as told:
        list(steps(AlignedMTL(2).eval(), net, batches))
    assert len(told) == 1


def test_who_looks_at_gradients_between_epochs_is_not() -> None:
    net, batches = start()
    aligned = AlignedMTL(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in steps(aligned, net, batches):
            aligned.eval()
            x, y = batches[0]
            torch.autograd.grad(sum(views_and_losses(aligned, net, x, y)), net.used.weight)  # type: ignore[arg-type]
            aligned.train()


class Views(Model):
    """Heads on the layer's views."""

    def __init__(self) -> None:
        super().__init__(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU()), heads=(1, 1))
        self.aligned = AlignedMTL(2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(head(z) for head, z in zip(self.heads, self.aligned(self.backbone(x))))


def test_tracing_and_export_in_evaluation_mode() -> None:
    torch.manual_seed(0)
    model, x = Views().eval(), torch.randn(5, 4)
    want = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of what it deprecates
        traced = torch.jit.trace(model, x)
    exported = torch.export.export(model, (x,)).module()
    for form in (traced, exported):
        for a, b in zip(form(x), want):
            torch.testing.assert_close(a, b)


# ---- what is no tensor -----------------------------------------------------------------------------------------------


@dataclass
class ModelOutput:
    """As transformers' backbones return."""

    last_hidden_state: Tensor


@pytest.mark.parametrize("train", [True, False])
def test_what_a_backbone_returns_in_the_place_of_a_tensor(train: bool) -> None:
    z = torch.randn(3, 8, requires_grad=True) * 1.0
    head = nn.Linear(8, 1)
    layers: list[Callable[..., Any]] = [AlignedMTL(2).train(train), BayesAgg([Regression(head)]).train(train)]
    for layer, name in zip(layers, ("AlignedMTL", "BayesAgg")):
        with pytest.raises(
            TypeError, match=f"{name}: features: expected a tensor, found ModelOutput; use features.last"
        ):
            layer(ModelOutput(z))
        with pytest.raises(TypeError, match=f"{name}: features: expected a tensor, found list; use one of its 2 parts"):
            layer([z, z])
    with pytest.raises(
        TypeError, match=r"task_backward: features: .* found ModelOutput; use features.last_hidden_state"
    ):
        task_backward([head(z).sum()], head.parameters(), features=ModelOutput(z))  # type: ignore[arg-type]


def test_other_traces_name_the_one_that_works() -> None:
    for layer in (AlignedMTL(2), BayesAgg([Regression(nn.Linear(8, 1))])):
        with pytest.raises(
            TypeError, match=r"expected a tensor, found Proxy; torch.fx cannot follow .* use torch.export"
        ):
            torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 8), Wrapped(layer)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, of what it deprecates
            with pytest.raises(RuntimeError, match=r"torch.jit.script can compile, .* use torch.export"):
                torch.jit.script(nn.Sequential(nn.Linear(4, 8), layer))


class Wrapped(nn.Module):
    """Torch.fx does not look into torch's own containers."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer.forward(x)


def test_copies_of_a_model_that_was_evaluated_with_gradients() -> None:
    """Averages of weights copy the model, and trainers pickle it."""
    net, ((x, y), *_) = start()
    aligned = AlignedMTL(2).eval()
    sum(views_and_losses(aligned, net, x, y)).backward()  # type: ignore[union-attr]
    for made in (copy.deepcopy(aligned), pickle.loads(pickle.dumps(aligned))):
        assert made.train()(net.features(x))[0].shape == (16, 8)


def test_who_only_looks_at_bayesaggs_gradients_takes_no_backward() -> None:
    torch.manual_seed(0)
    body, heads = nn.Linear(4, 8), [nn.Linear(8, 1), nn.Linear(8, 1)]
    x, ys = torch.randn(32, 4), [torch.randn(32, 1), torch.randn(32, 1)]
    bayes = BayesAgg([Regression(head) for head in heads])
    found = []
    for looks in (None, False, True):
        body.zero_grad()
        z = body(x)
        h = bayes(z, ys, count=looks is None)
        losses = [functional.mse_loss(head(h), y) for head, y in zip(heads, ys)]
        if looks:
            for loss in losses:
                torch.autograd.grad(loss, z, retain_graph=True)
        sum(losses).backward(retain_graph=True)  # type: ignore[union-attr]
        found.append(body.weight.grad)
        if looks is None:
            bayes.refresh()
    assert torch.equal(found[1], found[2])  # type: ignore[arg-type]
    assert not torch.equal(found[0], found[1])  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"expected one backward through a call of the layer, found a second"):
        sum(losses).backward()  # type: ignore[union-attr]
