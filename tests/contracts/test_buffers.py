"""alphaVIL over models whose forward moves more than what is trained: spectral norm, teachers, queues, caches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtlgrad import AlphaVIL
from mtlgrad.alphavil import Task
from tests.support.bounds import contents, same

pytestmark = pytest.mark.usefixtures("one_thread")


def vil_of(
    model: nn.Module, losses: dict[str, Callable[[Any, Any], Tensor]], batches: int = 5, **options: Any
) -> AlphaVIL:
    """The first task is the target."""
    target = next(iter(losses))
    tasks = {name: Task([0] * batches, loss, [0] if name == target else None) for name, loss in losses.items()}
    options = {"make_optimizer": lambda p: torch.optim.SGD(p, lr=0.05), "alpha_epochs": 1, **options}
    return AlphaVIL(model, tasks, target, **options)


def check_rounds(model: nn.Module, vil: AlphaVIL) -> None:
    """Before the last stage of a round all is as before it."""
    for _ in range(2):
        before = contents(model)
        for stage in vil.stages():
            if stage.kind != "move":
                assert same(contents(model), before), stage


def trained_alone(
    model: Any, loss: Any, parts: Sequence[str], steps: int = 5, lr: float = 0.05, weight: float = 1.0
) -> Any:
    """A copy of the model after a task's own training of some of its parts."""
    alone = copy.deepcopy(model).train()
    opt = torch.optim.SGD([p for part in parts for p in alone.get_submodule(part).parameters()], lr=lr)
    for _ in range(steps):
        opt.zero_grad()
        (weight * loss(alone, 0)).backward()
        opt.step()
    return alone


def test_alphavil_spectral_norm() -> None:
    """The loss at alpha = 1 is that at theta plus the sum of the deltas with the vectors of the target's training,
    which the next one's power iteration brings up to date; with a mean of vectors it is many times as large."""
    torch.manual_seed(0)
    x, out = torch.randn(64, 16), {h: torch.randn(16, 4) for h in "acd"}

    def layer() -> nn.Module:
        linear = nn.Linear(16, 16, bias=False)
        nn.init.orthogonal_(linear.weight)
        return nn.utils.parametrizations.spectral_norm(linear, n_power_iterations=4)

    model = nn.ModuleDict({"b": nn.Sequential(*[layer() for _ in range(8)]), **{h: nn.Linear(16, 4) for h in "acd"}})

    def loss(h: str) -> Callable[[Any, Any], Tensor]:
        return lambda m, _: (m[h](m["b"](x)) - x @ out[h]).square().mean()

    start = contents(model)
    vil = vil_of(model, {h: loss(h) for h in "acd"}, make_optimizer=lambda p: torch.optim.SGD(p, lr=0.02), batches=20)
    seen = {}
    for stage in vil.stages():
        seen[stage.kind] = stage.loss
        if stage.kind == "evaluate":
            break
    exact = copy.deepcopy(model)
    model.load_state_dict(start)
    ends = [contents(trained_alone(model, loss(h), "b" + h, 20, 0.02)) for h in "acd"]
    with torch.no_grad():
        for name, p in exact.named_parameters():
            p.copy_(start[name] + sum(end[name] - start[name] for end in ends))
        for name, b in exact.named_buffers():
            b.copy_(ends[0][name])
        want = float(loss("a")(exact.eval(), 0))
        exact.train()
        for _ in range(50):
            exact["b"](x)
        iterated = float(loss("a")(exact.eval(), 0))
    assert seen["evaluate"] == pytest.approx(want, rel=1e-4)
    assert want == pytest.approx(iterated, rel=0.3)


class Teacher(nn.Module):
    """Moves an average of its parameters, by assignment to ``.data``, as many do, or in place."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(6, 5), nn.Linear(6, 5).requires_grad_(False)
        self.a, self.c = nn.Linear(5, 1), nn.Linear(5, 1)
        self.in_place = in_place

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.training:
            with torch.no_grad():
                if self.in_place:
                    self.k.weight.lerp_(self.q.weight, 0.1)
                else:
                    self.k.weight.data = torch.lerp(self.k.weight.data, self.q.weight.data, 0.1)
        return self.q(x), self.k(x)


@pytest.mark.parametrize("in_place", [True, False])
def test_alphavil_a_teacher(in_place: bool) -> None:
    torch.manual_seed(0)
    model, x, y = Teacher(in_place), torch.randn(32, 6), torch.randn(32, 1)

    def loss(h: str) -> Callable[[Any, Any], Tensor]:
        def of(m: Any, _: Any) -> Tensor:
            z, t = m(x)
            return (getattr(m, h)(z) - y).square().mean() + (z - t).square().mean()

        return of

    check_rounds(model, vil_of(model, {h: loss(h) for h in "ac"}))
    start = model.k.weight.clone()
    vil = vil_of(model, {h: loss(h) for h in "ac"})
    alone = trained_alone(model, loss("a"), "qa")
    if vil.epoch().kept != "none":  # the teacher is then that of the target's own training
        torch.testing.assert_close(model.k.weight, alone.k.weight)
        assert not torch.equal(model.k.weight, start)


class Queue(nn.Module):
    """A bank of the last features, and where the next ones go: of one training, or neither makes sense."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.heads = nn.Linear(4, 3), nn.ModuleDict({"a": nn.Linear(3, 1), "c": nn.Linear(3, 1)})
        self.register_buffer("bank", torch.zeros(16, 3))
        self.register_buffer("at", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.line(x)
        if self.training:
            rows = (int(self.at) + torch.arange(len(z))) % len(self.bank)
            self.bank[rows] = z.detach()
            self.at.copy_((self.at + len(z)) % len(self.bank))
        return z


def test_alphavil_a_queue_and_its_pointer_are_of_one_training() -> None:
    torch.manual_seed(0)
    model, xs, y = Queue(), {"a": torch.randn(3, 4), "c": torch.randn(5, 4)}, 1.0

    def loss(h: str) -> Callable[[Any, Any], Tensor]:
        return lambda m, _: (m.heads[h](m(xs[h])) - y).square().mean()

    alone = trained_alone(model, loss("a"), ["line", "heads.a"])
    vil = vil_of(model, {h: loss(h) for h in "ac"})
    assert vil.epoch().kept != "none"
    torch.testing.assert_close(model.bank, alone.bank)
    assert int(model.at) == int(alone.at) == 15
    check_rounds(model, vil)


class Positions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if getattr(self, "pe", None) is None or len(self.pe) < x.shape[1]:
            made = torch.arange(x.shape[1] * 4.0).view(-1, 4).sin()
            self.register_buffer("pe", made, persistent=False)
        return x + self.pe[: x.shape[1]]


@pytest.mark.parametrize("lengths", [(3, 7), (7, 3)])
def test_alphavil_a_buffer_that_forward_makes_and_grows(lengths: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"p": Positions(), "l": nn.Linear(4, 8), "a": nn.Linear(8, 1), "c": nn.Linear(8, 1)})
    xs = {h: torch.randn(8, n, 4) for h, n in zip("ac", lengths)}

    def loss(h: str) -> Callable[[Any, Any], Tensor]:
        return lambda m, _: (m[h](m["l"](m["p"](xs[h])).mean(1)) - xs[h][:, 0, :1]).square().mean()

    vil = vil_of(model, {h: loss(h) for h in "ac"})
    losses = [vil.epoch().after for _ in range(3)]
    assert losses[2] < losses[0]
    assert float(loss("a")(model, 0).detach()) == pytest.approx(losses[2], rel=1e-5)


def test_alphavil_an_embedding_that_forward_scales_down() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"e": nn.Embedding(9, 4, max_norm=0.5), "a": nn.Linear(4, 1), "c": nn.Linear(4, 1)})
    words = torch.arange(9)

    def loss(h: str) -> Callable[[Any, Any], Tensor]:
        return lambda m, _: (m[h](m["e"](words)) - 1.0).square().mean()

    check_rounds(model, vil_of(model, {h: loss(h) for h in "ac"}))


class Codebook(nn.Module):
    """Vector quantisation, its codes moved by running means (no gradients), which go with the counts."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(6, 3))
        self.register_buffer("counts", torch.ones(6))
        self.register_buffer("sums", self.codes.clone())

    def forward(self, z: Tensor) -> Tensor:
        chosen = torch.cdist(z, self.codes).argmin(1)
        if self.training:
            hot = nn.functional.one_hot(chosen, 6).to(z.dtype)
            self.counts.mul_(0.9).add_(hot.sum(0), alpha=0.1)
            self.sums.mul_(0.9).add_(hot.T @ z.detach(), alpha=0.1)
            self.codes.copy_(self.sums / (self.counts + 1e-5).unsqueeze(1))
        return z + (self.codes[chosen] - z).detach()


class Observer(nn.Module):
    """The range of what passes, as quantisation-aware training notes it: of no size before the first forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.empty(0))
        self.register_buffer("high", torch.empty(0))

    def forward(self, z: Tensor) -> Tensor:
        if self.training:
            low, high = z.detach().amin(0), z.detach().amax(0)
            seen = self.low.numel() > 0
            self.low = torch.minimum(self.low, low) if seen else low
            self.high = torch.maximum(self.high, high) if seen else high
        return z.clamp(self.low, self.high) if self.low.numel() else z


@pytest.mark.filterwarnings("ignore:AlphaVIL. target 'a'. expected the search to lower")
@pytest.mark.parametrize("make", [Codebook, Observer])
def test_alphavil_statistics_that_go_together_are_of_the_targets_training(make: Callable[[], nn.Module]) -> None:
    """In every round: those that its own training from the same start comes to."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"l": nn.Linear(4, 3), "v": make(), "a": nn.Linear(3, 1), "c": nn.Linear(3, 1)})
    xs = {"a": torch.randn(16, 4), "c": 3.0 * torch.randn(16, 4)}

    def loss(h: str) -> Callable[[Any, Any], Tensor]:
        return lambda m, _: (m[h](m["v"](m["l"](xs[h]))) - xs[h][:, :1]).square().mean()

    model["v"].train()(model["l"](xs["a"]))  # what has no size yet is no statistic yet
    vil = vil_of(model, {h: loss(h) for h in "ac"})
    for _ in range(2):
        alone = trained_alone(model, loss("a"), "la", weight=vil.task_weights[0].item())
        assert vil.epoch().kept != "none"
        for (name, found), expected in zip(model["v"].named_buffers(), alone["v"].buffers(), strict=True):
            torch.testing.assert_close(found, expected, msg=lambda text: f"{name}: {text}")  # noqa: B023
    check_rounds(model, vil)
