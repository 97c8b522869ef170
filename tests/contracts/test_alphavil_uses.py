"""alphaVIL where users put it: loaders with workers, compiled models, autocast, schedules, copies."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import mtlgrad
from mtlgrad import AlphaVIL
from mtlgrad.alphavil import Round, Stage, Task
from tests.conftest import HAS_GPU
from tests.support.bounds import (
    contents,
    hushed,
    near,
    one_line,
    random_state,
    same_random_state,
    same_values,
    seed_everything,
    set_random_state,
)
from tests.support.nets import ALPHA, SGD, Case, NamedBatch, case_on, epoch, named_batches
from tests.support.oracles import development_loss

pytestmark = pytest.mark.usefixtures("one_thread")

needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="no usable GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


def test_names() -> None:
    assert "AlphaVIL" in mtlgrad.__all__
    assert mtlgrad.AlphaVIL is mtlgrad.alphavil.AlphaVIL is AlphaVIL


# ---- loaders --------------------------------------------------------------------------------------------------------


class Rows(Dataset[NamedBatch]):
    """Each read with noise from the worker's own random state."""

    def __init__(self, task: str, seed: int):
        self.rows = [NamedBatch(i, b.x[0], b.y[0]) for i, b in enumerate(named_batches(task, seed, 12))]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> NamedBatch:
        row = self.rows[i]
        return row._replace(x=row.x + 0.1 * torch.randn(5))


class Mean:
    def __init__(self, task: str):
        self.task = task

    def __call__(self, model: Any, batch: Any) -> Tensor:
        out = model.heads[self.task](model(batch.x))
        return nn.functional.cross_entropy(out, batch.y) if self.task == "kind" else (out[:, 0] - batch.y).abs().mean()


def with_workers(workers: int, own: bool) -> Case:
    case = Case(tasks=["size", "kind"], dropout=0.2)
    for i, name in enumerate(case.tasks):
        generator = torch.Generator().manual_seed(i) if own else None
        loader = DataLoader(Rows(name, i), 4, shuffle=True, num_workers=workers, generator=generator)
        dev = DataLoader(Rows(name, 9), 6, num_workers=workers) if i == 0 else None
        case.change(name, train=loader, dev=dev, loss=Mean(name))
    return case


@pytest.mark.parametrize("own", [False, True])
def test_loaders_with_workers(own: bool) -> None:
    """Their random numbers come from the loader's: after a stop in the middle the bits are the same."""
    ends = []
    for stop in (None, 0, 2):
        case = with_workers(1, own)
        vil = case.vil(subset=2, alpha_epochs=1)
        seed_everything(1)
        if stop is not None:
            for _ in zip(range(stop + 1), vil.stages()):
                pass
            state, model = copy.deepcopy(vil.state_dict()), copy.deepcopy(case.model.state_dict())
            case = with_workers(1, own)
            vil = case.vil(subset=2, alpha_epochs=1)
            case.model.load_state_dict(model)
            vil.load_state_dict(state)
        epoch(vil)
        ends.append((contents(case.model), random_state()))
    for theta, state in ends[1:]:
        assert same_values(theta, ends[0][0])
        assert same_random_state(state, ends[0][1])


# ---- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at it
@pytest.mark.parametrize("how", ["model", "loss", "module"])
def test_compiled_models(how: str) -> None:
    """The compiled model handed over; a compiled one in the loss of a plain one; compiled in place. Parameters that
    others stand in for do not have it compiled over and over."""
    torch.compiler.reset()
    results, graphs = [], list[Any]()

    def eager(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    for compiled in (False, True):
        case = Case(tasks=["size", "kind"], dtype=torch.float64, norm=True)
        model = case.model
        if compiled and how == "model":
            case.model = torch.compile(model, backend=eager)
        elif compiled and how == "module":
            model.compile(backend=eager)
        elif compiled:
            called = torch.compile(model, backend=eager)
            case.change(
                "size", loss=lambda m, b, to=called: (m.heads["size"](to(b.x)).squeeze(1) - b.y).square().mean()
            )
        vil = case.vil(alpha_epochs=1)
        for number in range(2):
            torch.manual_seed(number)
            assert epoch(vil).kept == "search"
        results.append(contents(model))
    assert all(near(value, results[0][name], 1e-12) for name, value in results[1].items())
    assert 1 <= len(graphs) <= 8
    torch.compiler.reset()


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_in_the_loss(device: str) -> None:
    """bfloat16 products: the search sees what the model then has, not a weight that autocast has kept."""
    case = case_on(Case(), device)
    for name, task in list(case.tasks.items()):

        def loss(model: Any, batch: NamedBatch, of: Any = task.loss) -> Tensor:
            with torch.autocast(device, dtype=torch.bfloat16):
                return of(model, batch)

        case.change(name, loss=loss)
    for _ in range(2):
        before = development_loss(case.model, case.tasks["size"])
        found = epoch(case.vil(make_optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1)))
        assert found.kept == "search"
        assert development_loss(case.model, case.tasks["size"]) == found.after < before == found.before
    assert all(p.dtype == torch.float32 for p in case.model.parameters())


def test_losses_as_methods_of_a_module_around_the_model() -> None:
    """One module with backbone, heads and losses, called through forward, as Lightning's are."""

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Case(dtype=torch.float64).model
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, task: str, batch: NamedBatch) -> Tensor:
            return self.scale * case.tasks[task].loss(self.net, batch)

    case = Case(dtype=torch.float64)
    whole = Whole()
    tasks = {
        name: Task(task.train, lambda m, b, n=name: m(n, b), task.dev, whole.net.heads[name])
        for name, task in case.tasks.items()
    }
    assert AlphaVIL(whole, tasks, "size", make_optimizer=SGD).epoch().kept == "search"
    assert whole.scale.item() < 1.0


def test_sparse_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(20, 4, sparse=True), nn.Linear(4, 1))
    data = [torch.randint(0, 20, (5, 3)) for _ in range(3)]
    task = Task(data, lambda m, x: m(x).square().mean(), data)
    assert AlphaVIL(model, [task], 0, make_optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1)).epoch().kept == "search"


def test_fused_optimizers() -> None:
    ends = []
    for fused in (False, True):
        case = Case(dtype=torch.float64)
        epoch(case.vil(make_optimizer=lambda ps, fused=fused: torch.optim.Adam(ps, lr=1e-3, eps=1e-3, fused=fused)))
        ends.append(contents(case.model))
    assert all(near(value, ends[0][name], 1e-9) for name, value in ends[1].items())


# ---- what users build of it -----------------------------------------------------------------------------------------


def test_stages_drive_a_progress_bar() -> None:
    vil, shown = Case().vil(alpha_epochs=3), list[Stage]()
    with hushed():
        for stage in vil.stages():
            assert isinstance(stage, Stage)
            assert vil.rounds == (stage.kind == "move")
            shown.append(stage)
    assert [s.number for s in shown] == list(range(1, 9))
    assert {s.total for s in shown} == {8}
    assert [s.kind for s in shown] == ["train"] * 3 + ["evaluate"] + ["alpha"] * 3 + ["move"]
    assert [s.task for s in shown] == ["size", "kind", "marks"] + ["size"] * 5
    assert all(math.isfinite(s.loss) for s in shown)
    with pytest.raises((AttributeError, TypeError)):
        shown[0].loss = 0.0  # type: ignore[misc]
    assert isinstance(vil.last, Round)
    assert "size" in repr(shown[0])
    assert next(iter(vil.stages())).number == 1


def test_schedules_read_the_round() -> None:
    """make_optimizer is asked once a task and round, and may look at `rounds`, which are those that are done."""
    rates: list[float] = []

    def make(parameters: list[Tensor]) -> torch.optim.Optimizer:
        rates.append(0.1 * 0.5**vil.rounds)
        return torch.optim.SGD(parameters, lr=rates[-1])

    case = Case(tasks=["size", "kind"])
    vil = case.vil(make_optimizer=make)
    for _ in range(3):
        epoch(vil)
    assert rates == [0.1, 0.1, 0.05, 0.05, 0.025, 0.025]


def test_a_search_for_a_learning_rate() -> None:
    """Each rate from the same start: the model and the vil put back in memory, the random state with them."""
    rate = 0.0
    case = Case(norm=True, dropout=0.3)
    vil = case.vil(make_optimizer=lambda ps: torch.optim.SGD(ps, lr=rate))
    start, model = vil.state_dict(), copy.deepcopy(case.model.state_dict())
    found: dict[float, list[float]] = {}
    for rate in (1e-3, 1e-2, 1e9, 1e-1, 1e-3, 1e-2, 1e-1):
        case.model.load_state_dict(model)
        vil.load_state_dict(start)
        found.setdefault(rate, []).append(epoch(vil).after)
    assert all(len(set(losses)) == 1 for losses in found.values())
    assert found[1e-3] > found[1e-2] > found[1e-1]


def test_weights_set_by_the_user() -> None:
    """In place or whole, between rounds, as a list would not do."""
    case = Case(dtype=torch.float64)
    vil = case.vil(make_optimizer=lambda ps: torch.optim.SGD(ps, lr=0.03), clip_alpha=(1.0, 1.0))
    before = contents(case.model)
    vil.task_weights = torch.tensor([1.0, 0.0, 0.0])
    epoch(vil)
    after = contents(case.model)
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == {"first.weight", "first.bias", "second.weight", "second.bias", *case.heads["size"]}
    vil.task_weights.mul_(2.0)
    epoch(vil)
    assert vil.task_weights.tolist() == [2.0, 0.0, 0.0]
    mine = torch.ones(3, dtype=torch.float64)
    vil.task_weights = mine
    mine.zero_()
    assert vil.task_weights.tolist() == [1.0, 1.0, 1.0]


WEIGHTS: list[Any] = [[1.0, 0.5, 0.25], torch.ones(2), torch.ones(4), torch.ones(60), torch.ones(1), torch.tensor(1.0)]
WEIGHTS += [torch.ones(3, 1), [1.0, math.nan, 1.0], [1.0, math.inf, 1.0], "111", None]


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda v: str(v)[:12])
def test_weights_that_do_not_fit(weights: Any) -> None:
    """Taken for what they are, or refused in words before anything is trained."""
    case = Case()
    vil, before = case.vil(), contents(case.model)
    try:
        vil.task_weights = weights
        epoch(vil)
    except (TypeError, ValueError) as error:
        one_line(error, "AlphaVIL: ", "task_weights", "expected", "found")
        assert not case.diary
        assert same_values(contents(case.model), before)
    else:
        assert weights is WEIGHTS[0]
        assert vil.task_weights.shape == (3,)


def test_warnings_point_at_who_called() -> None:
    for staged in (False, True):
        vil = Case(tasks=["size"]).vil(clip_alpha=(1.0, 1.0))
        with pytest.warns(RuntimeWarning, match="alpha = 1") as warned:
            _ = list(vil.stages()) if staged else vil.epoch()
        assert warned[0].filename == __file__


def test_forty_tasks() -> None:
    """More than the kernels take at a time."""

    def loss(model: Any, batch: tuple[Tensor, float]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    torch.manual_seed(0)
    data = [[(torch.randn(6, 5), float(torch.randn(())))] for _ in range(40)]
    model = nn.Linear(5, 1)
    theta, rate = contents(model), 0.001
    want = {name: value.double() for name, value in theta.items()}
    for ((x, y),) in data:
        slopes = torch.autograd.grad(loss(model, (x, y)), list(model.parameters()))
        for name, slope in zip(want, slopes):
            want[name] += ((theta[name] - rate * slope) - theta[name]).double()
    tasks = [Task(each, loss, data[7]) for each in data]
    vil = AlphaVIL(model, tasks, "7", make_optimizer=lambda ps: torch.optim.SGD(ps, lr=rate), clip_alpha=(1.0, 1.0))
    found = epoch(vil)
    assert (found.kept, len(found.losses), found.alphas.tolist()) == ("start", 40, [1.0] * 40)
    assert all(near(value.double(), want[name], 2.0**-23) for name, value in contents(model).items())


def test_pickles_of_a_vil() -> None:
    """To another process, with its model; it goes on there as here."""
    case = Case(norm=True)
    vil = case.vil(alpha_optimizer=ALPHA["adam"])
    epoch(vil)
    other = pickle.loads(pickle.dumps(vil))
    assert other.model is not case.model
    state = random_state()
    epoch(other)
    set_random_state(state)
    epoch(vil)
    assert same_values(contents(other.model), contents(case.model))
    assert torch.equal(other.alphas, vil.alphas)


def test_two_vils_on_one_model() -> None:
    """Each with its own target, in turns."""
    case = Case(dtype=torch.float64)
    tasks = {
        name: Task(t.train, t.loss, named_batches(name, 70, 2, 32, torch.float64)) for name, t in case.tasks.items()
    }
    vils = [AlphaVIL(case.model, tasks, name, make_optimizer=SGD) for name in tasks]
    for _ in range(2):
        for vil in vils:
            before = development_loss(case.model, tasks[vil.names[vil.target]])
            epoch(vil)
            assert development_loss(case.model, tasks[vil.names[vil.target]]) <= before


@pytest.mark.parametrize("device", DEVICES)
def test_on_a_device(device: str) -> None:
    """The same numbers as on the host, as far as its sums are the same; weights and alphas are on the host."""
    case, other = Case(norm=True), case_on(Case(norm=True), device)
    for vil in (case.vil(), other.vil()):
        seed_everything(4)
        found = epoch(vil)
        assert found.alphas.device.type == vil.task_weights.device.type == "cpu"
    theirs = contents(other.model)
    assert all(near(theirs[name].cpu(), value, 1e-4) for name, value in contents(case.model).items())
