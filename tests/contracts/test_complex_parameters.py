"""Complex parameters are two reals, as in torch.optim: against twins that hold the two, and torch's own optimizers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtlgrad import AlignedMTL, AlphaVIL, ops, task_backward
from mtlgrad.alphavil import Task
from mtlgrad.metrics import Dominance, gradient_statistics
from mtlgrad.optim import AdaTaskAdagrad, AdaTaskAdam, AdaTaskAdamW, AdaTaskRMSprop, clip_task_grad_norm_
from tests.support.ranks import Pool

pytestmark = pytest.mark.usefixtures("one_thread")

RULES: dict[str, tuple[type, dict[str, Any]]] = {
    "adam": (AdaTaskAdam, {}),
    "amsgrad": (AdaTaskAdam, {"amsgrad": True, "maximize": True}),
    "adamw": (AdaTaskAdamW, {"weight_decay": 0.1}),
    "rmsprop": (AdaTaskRMSprop, {"centered": True, "momentum": 0.9}),
    "adagrad": (AdaTaskAdagrad, {"initial_accumulator_value": 0.5, "lr_decay": 0.1}),
}
every_rule = pytest.mark.parametrize("rule", RULES)


class Waves(nn.Module):
    """A filter in the frequency domain, and an embedding of phases; `twin`: the same, held as two reals."""

    def __init__(self, twin: bool = False, dtype: torch.dtype = torch.complex64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        parameters = [
            torch.randn(5, dtype=dtype, generator=generator),
            torch.randn(8, 3, dtype=dtype, generator=generator),
        ]
        self.filter, self.phases = (nn.Parameter(torch.view_as_real(p).clone() if twin else p) for p in parameters)
        real = parameters[0].real.dtype
        self.heads = nn.ModuleList(nn.Linear(6, 1, dtype=real) for _ in range(2))
        with torch.no_grad():
            for p in self.heads.parameters():
                p.normal_(generator=generator)
        self.twin = twin

    @property
    def shared(self) -> list[nn.Parameter]:
        return [self.filter, self.phases]

    def waves(self, x: Tensor) -> Tensor:
        f, phases = (torch.view_as_complex(p) if self.twin else p for p in self.shared)
        return torch.fft.irfft(torch.fft.rfft(x) * f, n=8).to(phases.dtype) @ phases

    def features(self, x: Tensor) -> Tensor:
        z = self.waves(x)
        return torch.cat([z.real, z.imag], 1).tanh()

    def losses(self, *views: Tensor) -> list[Tensor]:
        return [scale * (head(z) - 1.0).square().mean() for scale, head, z in zip((20.0, 0.1), self.heads, views)]


def batches(count: int = 8, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 8, dtype=dtype, generator=generator) for _ in range(count)]


def same(net: Waves, twin: Waves, **tolerance: float) -> None:
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        found = torch.view_as_real(p) if p.is_complex() else p
        torch.testing.assert_close(found, q, msg=lambda text: f"{name}: {text}", **tolerance)  # noqa: B023


def both(dtype: torch.dtype = torch.complex64) -> tuple[Waves, Waves]:
    return Waves(dtype=dtype), Waves(twin=True, dtype=dtype)


# ---- optimizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@every_rule
def test_training_equals_that_of_two_reals(rule: str, dtype: torch.dtype) -> None:
    kind, options = RULES[rule]
    shares = []
    for net in both(dtype):
        opt = kind(
            net.parameters(),
            lr=1e-2,
            num_tasks=2,
            task_weights=[1.0, 2.0],
            max_norm=3.0,
            missing="still",
            check_finite=True,
            **options,
        )
        for i, x in enumerate(batches(dtype=dtype.to_real())):
            opt.zero_grad()
            losses: list[Any] = net.losses(*[net.features(x)] * 2)
            task_backward([losses[0], None] if i == 3 else losses, net.shared)
            opt.step()
            if i == 4:
                saved = copy.deepcopy(opt.state_dict())
                opt = kind(net.parameters(), num_tasks=2, max_norm=3.0, **options)
                opt.load_state_dict(saved)
        shares.append((net, opt.dominance()))
    (net, ours), (twin, expected) = shares
    same(net, twin, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours, expected)


@every_rule
def test_a_step_is_the_sum_of_torchs_own(rule: str) -> None:
    """Of torch.optim on complex parameters, a copy a task, with the same gradients."""
    kind, options = RULES[rule]
    options = {name: value for name, value in options.items() if name != "weight_decay"}
    torch.manual_seed(0)
    start, rows = torch.randn(3, 4, dtype=torch.complex64), torch.randn(6, 2, 3, 4, dtype=torch.complex64)
    p = nn.Parameter(start.clone())
    opt = kind([p], lr=1e-2, num_tasks=2, weight_decay=0.0, **options)
    alone = [nn.Parameter(start.clone()) for _ in range(2)]
    theirs = [kind.ordinary([q], lr=1e-2, weight_decay=0.0, **options) for q in alone]
    for row in rows:
        p.jac = row.clone()  # type: ignore[attr-defined]
        opt.step()
        for q, own, gradient in zip(alone, theirs, row):
            q.grad = gradient.clone()
            own.step()
    torch.testing.assert_close(p.detach(), start + sum(q.detach() - start for q in alone), rtol=1e-5, atol=1e-6)
    assert all(
        opt.state[p][name].dtype == torch.complex64 for name in opt.state[p] if name not in ("step", "update_square")
    )


def test_a_scaler() -> None:
    for net, by_scaler in ((Waves(), True), (Waves(), False)):
        opt, scaler = (
            AdaTaskAdam(net.parameters(), lr=1e-2, num_tasks=2),
            torch.amp.GradScaler("cpu", enabled=by_scaler),
        )
        for x in batches(3):
            opt.zero_grad()
            task_backward([scaler.scale(loss) for loss in net.losses(*[net.features(x)] * 2)], net.shared)
            scaler.step(opt)
            scaler.update()
        if by_scaler:
            first = net
    torch.testing.assert_close(
        [p.detach() for p in first.shared], [p.detach() for p in net.shared], rtol=1e-6, atol=1e-7
    )


def test_numbers_whose_squares_overflow_are_finite_and_there() -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.complex128))
    opt = AdaTaskAdam([p], num_tasks=2, check_finite=True, missing="still")
    for size in (1e200, 1e-200):
        p.jac = torch.full((2, 3), size * (1 - 1j), dtype=torch.complex128)  # type: ignore[attr-defined]
        opt.step()
    assert opt.state[p]["step"].tolist() == [2.0, 2.0]


def test_norms_and_clipping() -> None:
    found = []
    for net in both():
        task_backward(net.losses(*[net.features(batches()[0])] * 2), net.shared)
        found.append((clip_task_grad_norm_(net.shared, 0.01), clip_task_grad_norm_(net.shared, float("inf"))))
    for ours, expected in zip(*found):
        torch.testing.assert_close(ours, expected)
    assert all(0.0 < norm <= 0.0101 for norm in found[0][1])


def test_dominance_under_an_ordinary_optimizer() -> None:
    found = []
    for net in both():
        opt = torch.optim.Adam(net.parameters(), lr=1e-2, amsgrad=True)
        watch, aligned = Dominance(opt, 2), AlignedMTL(2)
        for x in batches(4):
            opt.zero_grad()
            task_backward(net.losses(*[net.features(x)] * 2), net.shared)
            jacobians = {p: p.jac for p in net.shared}  # type: ignore[attr-defined]
            aligned.merge(net.shared, retain_jac=True)
            opt.step()
            watch.update(jacobians)
        found.append(watch.shares([net.shared]))
    torch.testing.assert_close(*found)


# ---- Aligned-MTL -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["merge", "weigh", "layer"])
def test_alignment_equals_that_of_two_reals(form: str) -> None:
    weights = []
    for net in both():
        opt, aligned = torch.optim.SGD(net.parameters(), lr=1e-2), AlignedMTL(2)
        for x in batches():
            opt.zero_grad()
            if form == "layer":
                sum(net.losses(*aligned(net.features(x)))).backward()  # type: ignore[union-attr]
            elif form == "merge":
                task_backward(net.losses(*[net.features(x)] * 2), net.shared)
                aligned.merge(net.shared)
            else:
                losses = net.losses(*[net.features(x)] * 2)
                (aligned.weigh(losses, net.shared) * torch.stack(losses)).sum().backward()
            opt.step()
        weights.append((net, aligned.weights))
    (net, ours), (twin, expected) = weights
    same(net, twin, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_a_layer_on_complex_features() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 3, dtype=torch.complex64, requires_grad=True)
    y = torch.view_as_real(x.detach()).clone().requires_grad_()
    weights = []
    for given in (x, y):
        aligned = AlignedMTL(2)
        u, v = (view if given is x else torch.view_as_complex(view) for view in aligned(given))
        (30.0 * (u - 1.0).abs().square().mean() + (v * (1 + 2j)).real.square().mean()).backward()
        weights.append(aligned.weights)
    torch.testing.assert_close(torch.view_as_real(x.grad), y.grad)  # type: ignore[arg-type]
    torch.testing.assert_close(*weights)


# ---- operations ------------------------------------------------------------------------------------------------------


def rows_of(kind: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Three gradients of a complex and a real parameter, and the same as reals; `lazy`: conjugated, not in memory."""
    torch.manual_seed(0)
    shapes = [(4, 5), (7,)]
    parts = [torch.randn(3, *shapes[0], dtype=dtype), torch.randn(3, *shapes[1], dtype=dtype.to_real())]
    if kind == "lazy":
        parts[0] = parts[0].conj()
    if kind == "apart":
        parts = [torch.randn(6, *p.shape[1:], dtype=p.dtype)[::2] for p in parts]
    reals = [torch.view_as_real(parts[0].resolve_conj()), parts[1]]
    if kind == "stacked":
        return ops.Stacked(parts), ops.Stacked(reals)
    return [[p[t] for p in parts] for t in range(3)], [[p[t] for p in reals] for t in range(3)]


def real(parts: Any) -> list[Tensor]:
    return [torch.view_as_real(p) if p.is_complex() else p for p in parts]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("kind", ["listed", "stacked", "lazy", "apart"])
def test_operations(kind: str, dtype: torch.dtype, device: str) -> None:
    ours, reals = rows_of(kind, dtype)
    assert torch.equal(ops.gram(ours), ops.gram(reals))
    if kind == "listed":
        for i in range(3):
            for j in range(3):
                product = sum(
                    (a.to(torch.complex128).conj() * b.to(torch.complex128)).real.sum()
                    for a, b in zip(ours[i], ours[j])
                )
                torch.testing.assert_close(ops.gram(ours)[i, j], product)
    weights = torch.tensor([1.0, -2.0, 0.5])
    combined = ops.combine(ours, weights)
    assert [p.dtype for p in combined] == [dtype, dtype.to_real()]
    for found, expected in zip(real(combined), ops.combine(reals, weights)):
        assert torch.equal(found, expected)
    assert torch.equal(ops.dots(ours, combined), ops.dots(reals, real(combined)))
    for out in (None, [torch.empty_like(p) for p in combined]):
        merged, result = ops.merge(ours, out=out)
        expected, wanted = ops.merge(reals)
        assert all(map(torch.equal, real(merged), expected))
        assert all(map(torch.equal, result, wanted))
        assert out is None or all(a is b for a, b in zip(merged, out))
    base = [torch.ones_like(p) for p in combined]
    expected = ops.displace(real(base), reals, weights)
    assert all(map(torch.equal, real(ops.displace(base, ours, weights)), expected))
    assert all(a is b for a, b in zip(ops.displace(base, ours, weights, out=base), base))
    assert all(map(torch.equal, real(base), expected))
    for mine, theirs in zip(gradient_statistics(ours, weights), gradient_statistics(reals, weights)):
        assert torch.equal(mine, theirs)


def test_derivatives() -> None:
    torch.manual_seed(0)
    rows = torch.randn(2, 3, dtype=torch.complex128, requires_grad=True)
    base = torch.randn(3, dtype=torch.complex128, requires_grad=True)
    weights = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.gram, (rows,))
    assert torch.autograd.gradcheck(ops.combine, (rows, weights))
    assert torch.autograd.gradcheck(lambda b, r, w: ops.displace(b, [r[0], r[1]], w), (base, rows, weights))


# ---- alphaVIL --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["parameters", "host"])
def test_alphavil_equals_that_of_two_reals(storage: Any) -> None:
    alphas = []
    for net in both():
        data = batches()
        torch.manual_seed(0)  # the order of batches

        def loss(t: int) -> Callable[[Any, Tensor], Tensor]:
            return lambda model, x: model.losses(*[model.features(x)] * 2)[t]

        tasks = {str(t): Task(data[:4], loss(t), data[4:] if t == 0 else None) for t in range(2)}
        make = lambda parameters: torch.optim.SGD(parameters, lr=1e-3)  # noqa: E731
        alpha = lambda alphas: torch.optim.Adam(alphas, lr=0.1)  # noqa: E731
        vil = AlphaVIL(net, tasks, "0", make_optimizer=make, alpha_optimizer=alpha, delta_storage=storage)
        vil.epoch()
        vil.epoch()
        alphas.append((net, vil.alphas))
    (net, ours), (twin, expected) = alphas
    same(net, twin, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(expected), rtol=1e-5, atol=1e-6)


# ---- ranks -----------------------------------------------------------------------------------------------------------


def on_a_rank(form: str, whole: bool) -> list[Tensor]:
    rank, size = (0, 1) if whole else (torch.distributed.get_rank(), torch.distributed.get_world_size())
    net = Waves()
    opt = (
        AdaTaskAdam(net.parameters(), lr=1e-2, num_tasks=2)
        if form == "adatask"
        else torch.optim.SGD(net.parameters(), lr=1e-2)
    )
    aligned = AlignedMTL(2)
    for x in batches():
        opt.zero_grad()
        losses = net.losses(*[net.features(x[rank::size])] * 2)
        if form == "weigh":
            (aligned.weigh(losses, net.shared) * torch.stack(losses)).sum().backward()
            for p in net.parameters() if size > 1 else ():
                torch.distributed.all_reduce(p.grad)
                p.grad /= size
        else:
            task_backward(losses, net.shared)
            if form == "merge":
                aligned.merge(net.shared)
        opt.step()
    return [p.detach() for p in net.parameters()]


@pytest.mark.parametrize("form", ["adatask", "merge", "weigh"])
def test_two_ranks_equal_one_process(form: str, two_ranks: Pool) -> None:
    expected = on_a_rank(form, True)
    for found in two_ranks(on_a_rank, form, False):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
