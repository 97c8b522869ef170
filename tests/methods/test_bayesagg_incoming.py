"""What arrives at BayesAgg from above: loss weights, penalties, other heads and losses. Nothing may vanish."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from mtlgrad import BayesAgg, Binary, Multiclass, Regression
from tests.support.bounds import all_near
from tests.support.nets import KINDS, POWERS, Problem, mean_loss, problem, published_layer, published_regression
from tests.support.oracles import moments

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("error")]
ROWS = slice(0, 15)


def ready(kinds: Sequence[str] = KINDS, **options: Any) -> Problem:
    m = problem(kinds, **options)
    m.see()
    m.layer.refresh()
    return m


def arrives(m: Problem, loss: Callable[[Tensor, list[Tensor]], Tensor], rows: slice = ROWS) -> Tensor:
    """The gradient that goes on, of a loss of the layer's output and the heads' plain losses."""
    features = m.data[0].features[rows].clone().requires_grad_()
    out = m.layer(features, m.targets(rows))
    loss(out, m.losses(out, rows)).backward()
    assert features.grad is not None
    return features.grad


def expected(m: Problem, scales: Sequence[float], without: Sequence[int] = (), rows: slice = ROWS) -> Tensor:
    """sum_t lambda_t s_t E_t / sum_t lambda_t / B, from the explicit moments; ``scales`` one a head."""
    numerator = denominator = torch.zeros(())
    for i, (data, scale) in enumerate(zip(m.data, scales)):
        if i not in without:
            mean, variance = moments(data.rows(rows), data)
            weight = variance.clamp(min=1e-8) ** -POWERS[data.kind]
            numerator = numerator + (scale * weight * mean).sum(1)
            denominator = denominator + weight.sum(1)
    return (numerator / denominator / (rows.stop - rows.start)).to(m.data[0].features)


# ---- what tasks' losses are multiplied by


@pytest.mark.parametrize("weights", [(10.0, 0.1, 2.0), (0.0, 1.0, 1.0), (1.0, -1.0, 0.5), (1024.0,) * 3, (0.2,) * 3])
@pytest.mark.parametrize("by_total", [False, True])
def test_loss_weights(weights: Sequence[float], by_total: bool) -> None:
    m = ready()

    def loss(_: Tensor, losses: list[Tensor]) -> Tensor:
        weighted = [w * one for w, one in zip(weights, losses)]
        return m.layer.total(weighted) if by_total else torch.stack(weighted).sum()

    all_near(arrives(m, loss), expected(m, weights), 1e-6)
    assert m.layer.loss_weights is not None
    repeated = [w for w, head in zip(weights, m.layer.heads) for _ in range(head.num_tasks)]
    by_task = torch.tensor(repeated, dtype=torch.float64)
    assert (m.layer.loss_weights - by_task).abs().max() <= 1e-9 * max(map(abs, weights))


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


@pytest.mark.parametrize("how", ["reversal", "detach", "hook"])
def test_between_the_layer_and_a_head(how: str) -> None:
    m = ready()
    change: Callable[[Tensor], Tensor] = Reverse.apply if how == "reversal" else Tensor.detach  # type: ignore[assignment]

    def loss(out: Tensor, losses: list[Tensor]) -> Tensor:
        if how == "hook":
            out.register_hook(lambda gradient: 3 * gradient)
            return torch.stack(losses).sum()
        return losses[0] + mean_loss(m.data[1].rows(ROWS), m.heads[1](change(out))) + losses[2]

    scales = {"reversal": (1.0, -1.0, 1.0), "detach": (1.0, 0.0, 1.0), "hook": (3.0, 3.0, 3.0)}[how]
    all_near(arrives(m, loss), expected(m, scales), 1e-8)


def test_means_of_the_labelled() -> None:
    m = ready(missing=0.4)

    def loss(out: Tensor, losses: list[Tensor]) -> Tensor:
        del losses
        total = torch.zeros(())
        for data, head in zip(m.data, m.heads):
            part = data.rows(ROWS)
            total = total + mean_loss(part, head(out)) * len(part.features) / part.labelled.sum()
        return total

    scales = [15 / int(data.rows(ROWS).labelled.sum()) for data in m.data]
    all_near(arrives(m, loss), expected(m, scales), 1e-8)


@pytest.mark.parametrize("by_total", [False, True])
def test_a_mean_over_the_outputs_is_the_published_loss_with_total(by_total: bool) -> None:
    m = ready(("regression",))
    found = arrives(m, lambda _, losses: m.layer.total([losses[0] / 3]) if by_total else losses[0] / 3)
    all_near(found, expected(m, [1.0 if by_total else 1 / 3]), 1e-8)


def test_a_scale_that_overflowed_goes_on() -> None:
    """For GradScaler to see, and to skip the step."""
    m = ready()
    found = arrives(m, lambda _, losses: torch.stack(losses).sum() * torch.inf)
    assert not found.isfinite().any()


# ---- what is not a registered task's


@pytest.mark.parametrize("scale", [1.0, 2.0**16, 0.25])
@pytest.mark.parametrize("by_total", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_penalty_adds_its_own_gradient(dtype: torch.dtype, by_total: bool, scale: float) -> None:
    m = ready()
    for data, head in zip(m.data, m.heads):
        head.to(dtype)
        data.features = data.features.to(dtype)
        data.targets = data.targets if data.kind == "multiclass" else data.targets.to(dtype)

    def loss(strength: float) -> Callable[[Tensor, list[Tensor]], Tensor]:
        def added(out: Tensor, losses: list[Tensor]) -> Tensor:
            tasks = m.layer.total(losses) if by_total else torch.stack([one.to(dtype) for one in losses]).sum()
            return scale * (tasks + strength * out.square().mean())

        return added

    # Without total the scale is read beside the penalty's gradient: a weak one does not hide a power of two.
    for strength in (1e-3, 1e-2, 0.1, 10.0) if by_total else (1e-3, 1e-2):
        change = arrives(m, loss(strength)) - arrives(m, loss(0.0))
        features = m.data[0].features[ROWS]
        own = scale * strength * 2 * features / features.numel()
        leaf = features.clone().requires_grad_()
        (plain,) = torch.autograd.grad(scale * torch.stack(m.losses(leaf, ROWS)).sum(), leaf)
        error = 1e-5 * own.abs().max() + 4e-7 * plain.abs().max()  # float32 holds no more of their sum
        assert (change - own).abs().max() <= (error if dtype == torch.float32 else 1e-9 * scale)


def test_a_strong_penalty_without_total_does_not_vanish() -> None:
    m = ready(("regression", "binary"), reduction="sum")
    change = arrives(m, lambda out, losses: torch.stack(losses).sum() + 3 * out.square().mean())
    change = change - arrives(m, lambda _, losses: torch.stack(losses).sum())
    features = m.data[0].features[ROWS]
    all_near(change, 3 * 2 * features / features.numel(), 1e-8)


@pytest.mark.parametrize("by_total", [False, True])
def test_a_head_that_is_not_registered_adds_its_own_gradient(by_total: bool) -> None:
    m = ready(("binary", "multiclass"), examples=40)
    other = nn.Linear(4, 1, dtype=torch.float64)

    def loss(out: Tensor, losses: list[Tensor], strength: float) -> Tensor:
        tasks = m.layer.total(losses) if by_total else torch.stack(losses).sum()
        return tasks + strength * other(out).square().mean()

    change = arrives(m, lambda out, losses: loss(out, losses, 0.05)) - arrives(m, lambda o, ls: loss(o, ls, 0.0))
    features = m.data[0].features[ROWS].clone().requires_grad_()
    (own,) = torch.autograd.grad(0.05 * other(features).square().mean(), features)
    all_near(change, own, 1e-8 if by_total else 1e-6)


def test_a_second_layer_above() -> None:
    """What its heads send back through it is an addition to the first layer's."""
    below, above = ready(("regression",)), ready(("multiclass",), examples=40)
    block = nn.Sequential(nn.Linear(4, 4, dtype=torch.float64), nn.Tanh())
    data = above.data[0]
    data.features = below.data[0].features
    features = below.data[0].features[ROWS].clone().requires_grad_()
    out = below.layer(features, below.targets(ROWS))
    between = block(out)
    between.retain_grad()
    top = above.layer(between, above.targets(ROWS))
    (below.layer.total(below.losses(out, ROWS)) + mean_loss(data.rows(ROWS), above.heads[0](top))).backward()
    inputs = below.data[0].features[ROWS].clone().requires_grad_()
    (own,) = torch.autograd.grad(block(inputs), inputs, between.grad)
    assert features.grad is not None
    all_near(features.grad, expected(below, [1.0]) + own, 1e-8)


def test_under_autocast() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(20, 64), nn.ReLU())
    age, kind, flag = nn.Linear(64, 1), nn.Linear(64, 5), nn.Linear(64, 2)
    layer = BayesAgg([Regression(age, power=0.3), Multiclass(kind), Binary(flag)], covariance="kron")
    x, y, c = torch.randn(128, 20), torch.randn(128, 1), torch.randint(0, 5, (128,))
    b = (torch.rand(128, 2) > 0.5).float()

    def gradient(strength: float, weights: Sequence[float] = (1.0, 1.0, 1.0)) -> Tensor:
        backbone.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            z = layer(backbone(x), [y, c, b])
            losses = [
                functional.mse_loss(age(z).float(), y),
                functional.cross_entropy(kind(z).float(), c),
                2 * functional.binary_cross_entropy_with_logits(flag(z).float(), b),
            ]
        tasks = layer.total([w * one for w, one in zip(weights, losses)])
        (tasks + strength * z.float().square().mean()).backward()
        grad = backbone[0].weight.grad
        assert isinstance(grad, Tensor)
        return grad.clone()

    gradient(0.0)
    layer.refresh()
    features = backbone(x)
    (own,) = torch.autograd.grad(10 * features.square().mean(), backbone[0].weight)
    assert (gradient(10.0) - gradient(0.0) - own).norm() < 0.02 * own.norm()
    gradient(0.0, (10.0, 0.1, 2.0))
    assert layer.loss_weights is not None
    wanted = torch.tensor([10.0, 0.1, 2.0, 2.0]).double()
    assert ((layer.loss_weights - wanted).abs() <= 0.02 * wanted + 0.01).all()


# ---- heads that are not what was registered


def focal(logits: Tensor, targets: Tensor) -> Tensor:
    plain = functional.cross_entropy(logits, targets, reduction="none")
    return ((1 - (-plain).exp()) ** 2 * plain).mean()


OTHER_LOSSES: dict[str, tuple[int, Callable[[Tensor, Tensor], Tensor]]] = {
    "huber": (0, lambda z, y: functional.huber_loss(z, y, delta=0.3, reduction="sum") / len(y)),
    "smoothing": (2, lambda z, y: functional.cross_entropy(z, y, label_smoothing=0.2)),
    "class weights": (2, lambda z, y: functional.cross_entropy(z, y, weight=torch.tensor([3.0, 1.0, 0.2]).double())),
    "focal": (2, focal),
    "positive weight": (
        1,
        lambda z, y: (
            functional.binary_cross_entropy_with_logits(z, y, pos_weight=torch.tensor(5.0).double(), reduction="sum")
            / len(y)
        ),
    ),
}
WIDE = 20


def wide(width: int = WIDE, **options: Any) -> tuple[Tensor, list[Tensor], list[nn.Linear], BayesAgg]:
    """More features than rows of weights."""
    torch.manual_seed(1)
    features = torch.randn(40, width).double()
    heads = [nn.Linear(width, 3).double() for _ in range(3)]
    targets = [torch.randn(40, 3).double(), (torch.rand(40, 3) > 0.5).double(), torch.randint(0, 3, (40,))]
    registered = [published_regression(heads[0], power=0.5), Binary(heads[1]), Multiclass(heads[2])]
    layer = published_layer(registered, **options)
    layer(features.clone().requires_grad_(), targets)
    layer.refresh()
    return features, targets, heads, layer


PLAIN: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda z, y: (z - y).square().sum() / len(y),
    lambda z, y: functional.binary_cross_entropy_with_logits(z, y, reduction="sum") / len(y),
    functional.cross_entropy,
]


@pytest.mark.parametrize("name", OTHER_LOSSES)
def test_another_loss_goes_on_as_it_is_and_is_named_once(name: str) -> None:
    features, targets, heads, layer = wide()
    index, other = OTHER_LOSSES[name]
    losses = list(PLAIN)
    losses[index] = other

    def gradient(chosen: Sequence[Callable[[Tensor, Tensor], Tensor]], rows: slice = ROWS) -> Tensor:
        leaf = features[rows].clone().requires_grad_()
        out = layer(leaf, [t[rows] for t in targets], count=False)
        layer.total([f(head(out), t[rows]) for f, head, t in zip(chosen, heads, targets)]).backward()
        assert leaf.grad is not None
        return leaf.grad

    kind = layer.heads[index].likelihood
    words = rf"heads\[{index}\] \({kind}\): expected the gradient of its plain loss, found that of another loss"
    with pytest.warns(UserWarning, match=words) as caught:
        first = gradient(losses)
    assert len(caught) == 1
    all_near(gradient(losses), first, 1e-12)  # and without another warning
    # The others' aggregate, and the head's own gradient.
    others = [i for i in range(3) if i != index]
    alone = published_layer([layer.heads[i] for i in others])
    alone(features.clone().requires_grad_(), [targets[i] for i in others])
    alone.refresh()
    leaf = features[ROWS].clone().requires_grad_()
    (own,) = torch.autograd.grad(other(heads[index](leaf), targets[index][ROWS]), leaf)
    all_near(first, alone.aggregate(features[ROWS], [targets[i][ROWS] for i in others]) + own, 1e-8)
    assert layer.loss_weights is not None
    weights = torch.cat([torch.full((h.num_tasks,), float(i != index)) for i, h in enumerate(layer.heads)]).double()
    all_near(layer.loss_weights, weights, 1e-8)


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("how", ["replaced", "adapted"])
def test_another_layer_is_named(index: int, how: str) -> None:
    features, targets, heads, layer = wide()
    other = nn.Linear(WIDE, 3).double()
    used = list[Callable[[Tensor], Tensor]](heads)
    used[index] = other if how == "replaced" else lambda x: heads[index](x) + other(x)
    leaf = features.clone().requires_grad_()
    out = layer(leaf, targets)
    words = rf"heads\[{index}\] .* found that of another layer; .*register the one that is used"
    with pytest.warns(UserWarning, match=words) as caught:
        torch.stack([f(z(out), t) for f, z, t in zip(PLAIN, used, targets)]).sum().backward()
    assert len(caught) == 1
    leaf_plain = features.clone().requires_grad_()
    (own,) = torch.autograd.grad(PLAIN[index](used[index](leaf_plain), targets[index]), leaf_plain)
    assert leaf.grad is not None
    left = leaf.grad - own  # the others' aggregate, up to a scale that the other layer's gradient tilts
    assert left.norm() < 3 * own.norm()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    weights=st.tuples(*[st.sampled_from([0.0, 1.0, 0.01, 30.0, -1.0])] * 3),
    examples=st.sampled_from([1, 2, 7, 40]),
    penalty=st.sampled_from([0.0, 0.0, 0.01, 0.1, 10.0]),
    width=st.sampled_from([6, 10, WIDE]),
    by_total=st.booleans(),
    relu=st.booleans(),
    single=st.booleans(),
)
def test_plain_losses_are_never_taken_for_others(
    weights: tuple[float, float, float],
    examples: int,
    penalty: float,
    width: int,
    by_total: bool,
    relu: bool,
    single: bool,
) -> None:
    features, targets, heads, layer = wide(width)
    features = features.relu() if relu else features
    if single:
        features, heads = features.float(), [head.float() for head in heads]
        targets = [targets[0].float(), targets[1].float(), targets[2]]
    leaf = features[:examples].clone().requires_grad_()
    out = layer(leaf, [t[:examples] for t in targets])
    losses = [w * f(head(out), t[:examples]) for w, f, head, t in zip(weights, PLAIN, heads, targets)]
    tasks = layer.total(losses) if by_total else torch.stack(losses).sum()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (tasks + penalty * out.square().mean()).backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


# ---- passes


def test_a_pass_that_does_not_count() -> None:
    once, twice = problem(), problem()
    for m in (once, twice):
        for rows in (slice(0, 20), slice(20, 40)):
            arrives(m, lambda _, losses: torch.stack(losses).sum(), rows)
            if m is twice:
                features = m.data[0].features[rows].clone().requires_grad_()
                m.layer(features, m.targets(rows), count=False)
        m.layer.refresh()
    for a, b in zip(once.layer.posteriors or [], twice.layer.posteriors or [], strict=True):
        assert torch.equal(a.mean, b.mean)


def test_a_call_a_task() -> None:
    """Each task with inputs of its own: the others have no labels there."""
    m = ready(("regression", "multiclass"))
    for index in range(2):
        features = m.data[0].features[ROWS].clone().requires_grad_()
        targets: list[Tensor | None] = [None, None]
        targets[index] = m.targets(ROWS)[index]
        out = m.layer(features, targets)
        m.losses(out, ROWS)[index].backward()
        alone = Problem([m.data[index]], [m.heads[index]], m.layer)
        assert features.grad is not None
        all_near(features.grad, expected(alone, [1.0]), 1e-8)


@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4), (1, 7)])
def test_positions_are_examples(shape: tuple[int, ...]) -> None:
    """[B, L, D] and [B, D, H, W], whose padding has no labels."""
    torch.manual_seed(0)
    count = torch.Size(shape).numel()
    heads = [nn.Linear(4, 2).double(), nn.Linear(4, 1).double(), nn.Linear(4, 3).double()]
    conv = nn.Conv2d(4, 3, 1).double()
    if len(shape) == 3:
        with torch.no_grad():
            conv.weight.copy_(heads[2].weight[:, :, None, None])
            conv.bias.copy_(heads[2].bias)  # type: ignore[union-attr]
    last = conv if len(shape) == 3 else heads[2]
    flat = BayesAgg([Regression(heads[0], power=0.5), Binary(heads[1]), Multiclass(heads[2])])
    deep = BayesAgg([Regression(heads[0], power=0.5), Binary(heads[1]), Multiclass(last)])
    features = torch.randn(count, 4).double()
    targets = [torch.randn(count, 2).double(), (torch.rand(count, 1) > 0.5).double(), torch.randint(0, 3, (count,))]
    targets[0][0], targets[1][1], targets[2][2] = torch.nan, torch.nan, -100

    def folded(x: Tensor) -> Tensor:
        x = x.reshape(*shape, *x.shape[1:])
        return x.movedim(-1, 1) if len(shape) == 3 and x.dim() == 4 else x

    def gradient(layer: BayesAgg, fold: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = fold(features).clone().requires_grad_()
        given = [
            fold(targets[0]),
            fold(targets[1])[:, 0] if fold is not folded else targets[1].reshape(shape),
            fold(targets[2]),
        ]
        out = layer(leaf, given)
        assert out.shape == leaf.shape
        rows = out.movedim(1, -1) if out.dim() == 4 else out
        rows = rows.reshape(-1, 4)
        there = [t.isfinite() for t in targets[:2]]
        losses = [
            (heads[0](rows) - targets[0])[there[0]].square().sum() / count,
            functional.binary_cross_entropy_with_logits(heads[1](rows)[there[1]], targets[1][there[1]], reduction="sum")
            / count,
            functional.cross_entropy(heads[2](rows), targets[2], reduction="sum") / count,
        ]
        layer.total(losses).backward()
        assert leaf.grad is not None
        return leaf.grad

    for layer, fold in ((flat, lambda x: x), (deep, folded)):
        gradient(layer, fold)
        layer.refresh()
    all_near(gradient(deep, folded), folded(gradient(flat, lambda x: x)), 1e-12)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "lazy": (
        lambda: Regression(nn.LazyLinear(3)),
        "Regression: layers: expected weights, found a LazyLinear without any; run a forward first",
    ),
    "a large kernel": (
        lambda: Multiclass(nn.Conv2d(4, 3, 3)),
        "expected nn.Linear or a convolution of 1 x 1, found Conv2d",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_are_refused(name: str) -> None:
    call, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        call()


class Adapted(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 0.5 * input[..., :3]


def test_a_forward_of_another_kind_is_refused() -> None:
    words = r"expected a forward of x W' \+ b, found a Adapted with another one; merge the adapter"
    with pytest.raises(ValueError, match=words):
        Multiclass(Adapted(4, 3))
    plain = nn.Linear(4, 3)
    head = Multiclass(plain)
    layer = BayesAgg([head])
    layer(torch.randn(5, 4).requires_grad_(), [torch.tensor([0, 1, 2, 0, 1])])
    layer.refresh()
    plain.register_forward_hook(lambda module, inputs, out: 2 * out)  # since
    with pytest.raises(ValueError, match=r"BayesAgg: heads\[0\]: layers: expected a forward of x W' \+ b"):
        again(layer)


def again(layer: BayesAgg) -> None:
    layer(torch.randn(5, 4).requires_grad_(), [torch.tensor([0, 1, 2, 0, 1])])
    layer.refresh()


@pytest.mark.parametrize(
    ("head", "targets", "words"),
    [
        (Regression, torch.tensor([[1], [2]]), r"expected float32, .* found torch.int64; use targets.float\(\)"),
        (Binary, torch.tensor([[True], [False]]), r"expected float32, .* found torch.bool; use targets.float\(\)"),
        (Multiclass, torch.tensor([[0.3, 0.7], [0.5, 0.5]]), r"of soft labels there is no posterior .*argmax\(1\)"),
        (Multiclass, torch.tensor([1, 0], dtype=torch.int32), r"expected int64 .* use targets.long\(\)"),
    ],
)
def test_targets_of_another_kind(head: Any, targets: Tensor, words: str) -> None:
    outputs = 2 if head is Multiclass else 1
    layer = BayesAgg([head(nn.Linear(4, outputs))])
    with pytest.raises(RuntimeError, match=words):
        layer(torch.randn(2, 4).requires_grad_(), [targets])


# ---- refresh


@pytest.mark.parametrize("how", ["evaluation mode", "no_grad", "a frozen backbone"])
def test_an_epoch_that_left_nothing_says_why(how: str) -> None:
    m = problem()
    features = m.data[0].features.clone().requires_grad_(how != "a frozen backbone")
    m.layer.train(how != "evaluation mode")
    with torch.set_grad_enabled(how != "no_grad"):
        for _ in range(3):
            m.layer(features, m.targets())
    with pytest.raises(RuntimeError, match=rf"found none, but calls of the layer: 3 .*{how}"):
        m.layer.refresh()


def test_never_refreshing_is_told_once() -> None:
    m = problem()
    for epoch in range(4):
        m.layer.train()
        m.see()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            m.layer.eval()
        assert len(caught) == (epoch == 1)


@pytest.mark.parametrize("gamma", [1.0, 100.0])
def test_logits_in_the_hundreds_with_a_weak_prior(gamma: float) -> None:
    torch.manual_seed(0)
    head = nn.Linear(8, 2)
    features = 10 * torch.randn(64, 8)
    with torch.no_grad():
        head.weight.mul_(100)
    targets = (head(features).detach() > 0).float()
    targets[:3] = 1 - targets[:3]
    layer = BayesAgg([Binary(head, gamma=gamma)])
    for _ in range(2):
        leaf = features.clone().requires_grad_()
        functional.binary_cross_entropy_with_logits(head(layer(leaf, [targets])), targets).backward()
        layer.refresh()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
