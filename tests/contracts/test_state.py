"""State: runs of every method that are saved, copied, killed and go on in the same bits; states that do not fit."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

import mtlgrad
from mtlgrad import AlphaVIL, BayesAgg, Binary, Multiclass, PCGrad, Regression
from mtlgrad.distributed import global_means
from mtlgrad.optim import AdaTaskAdam, AdaTaskAdamW
from mtlgrad.posterior import Posterior
from tests.support.bounds import (
    alike,
    contents,
    hushed,
    near,
    one_line,
    random_state,
    same,
    same_random_state,
    same_values,
    seed_everything,
    set_random_state,
    state_tensors,
    values,
)
from tests.support.nets import (
    ADAM,
    ALPHA,
    HEAD_WIDTH,
    METHODS,
    MOMENTUM,
    OPTIMIZER_CASES,
    PAIRS,
    SETTINGS,
    SGD,
    BayesNet,
    Case,
    Model,
    Net,
    backward,
    batch,
    epoch,
    fill,
    fill_grad,
    inputs,
    make_adatask,
    new,
    packed,
    several,
    train,
    unpacked,
)
from tests.support.ranks import (
    Pool,
    give_grad,
    give_jac,
    narrow_net,
    sharded_net,
    shared_and_heads,
    unsharded,
    unsharded_state,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- runs ------------------------------------------------------------------------------------------------------------


class Run:
    """Parts that have a state_dict, and steps whose data depend on their number and the random state alone."""

    own = "optimizer"  #: the part with the method's state
    last = 6  #: steps of a whole run
    said: Any = None  #: by the latest step

    def __init__(self, **parts: Any):
        self.done, self.parts = 0, parts

    def step(self) -> None:
        raise NotImplementedError

    def go(self, until: int | None = None) -> None:
        while self.done < (self.last if until is None else until):
            self.step()
            self.done += 1

    def numbers(self) -> dict[str, Any]:
        """Copies of all that another run must have alike."""
        return copy.deepcopy(self.state())

    def state(self) -> dict[str, Any]:
        return {"done": self.done, **{name: part.state_dict() for name, part in self.parts.items()}}

    def take(self, state: dict[str, Any]) -> None:
        self.done = state["done"]
        for name in self.parts.keys() & state.keys():
            # torch.optim takes the tensors that it loads for its own.
            self.parts[name].load_state_dict(state[name] if name == self.own else copy.deepcopy(state[name]))


def as_a_new_process(model: nn.Module, seed: int) -> None:
    """Other parameters, buffers and random numbers than those that are loaded; seed 0: as a run begins."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()) if seed else ():
            tensor.add_(1)
    seed_everything(seed)


#: alphaVIL's options: data in every form, alpha optimizers with states of every kind, deltas in every storage.
VIL_RUNS: dict[str, dict[str, Any]] = {
    "lists": {"subset": 0.5},
    "loaders": {"subset": 2},
    "everything": {"subset": 2, "make_optimizer": ADAM, "alpha_optimizer": ALPHA["adam"], "clip_alpha": (0.5, 1.5)},
    "lbfgs": {"delta_storage": "bfloat16", "include_heads": "none", "alpha_optimizer": ALPHA["lbfgs"]},
    "momentum": {"delta_storage": "host", "include_heads": "all", "alpha_optimizer": MOMENTUM},
}


class VilRun(Run):
    """Dropout, BatchNorm, noise of torch, numpy and Python in the losses, data that is shuffled. A step is a stage."""

    own, last = "vil", 21

    def __init__(self, kind: str = "everything", seed: int = 0, **options: Any):
        self.case = Case(norm=True, dropout=0.3, noise=0.1, seed=0, also=True)

        def generator(number: int) -> torch.Generator | None:
            return None if kind == "loaders" else torch.Generator().manual_seed(seed + number)

        if kind in ("loaders", "everything"):
            for i, (name, task) in enumerate(list(self.case.tasks.items())):
                rows: Any = task.train
                loader: Any = DataLoader(rows, batch_size=None, shuffle=True, generator=generator(i))
                self.case.change(name, train=loader)
            dev: Any = self.case.tasks["size"].dev
            sampler = BatchSampler(RandomSampler(dev, generator=generator(9)), 1, False)
            self.case.change("size", dev=DataLoader(dev, batch_sampler=sampler, collate_fn=only))
        self.vil = self.case.vil(**VIL_RUNS[kind], **options)
        super().__init__(model=self.case.model, vil=self.vil)
        as_a_new_process(self.case.model, seed)

    def step(self) -> None:
        with hushed():
            self.said = next(self.vil.stages())

    def numbers(self) -> dict[str, Any]:
        """Without deltas: there are none yet of the tasks to come."""
        state = {name: value for name, value in self.vil.state_dict().items() if name != "deltas"}
        return copy.deepcopy({"values": contents(self.case.model), "alphas": self.vil.alphas, **state})


def only(found: list[Any]) -> Any:
    (one,) = found
    return one


class AlignedRun(Run):
    own = "rule"

    def __init__(self, form: str, rule: Any = None, seed: int = 0):
        make: Any = METHODS[f"aligned {form}"]
        self.trainer = make(Model())
        self.trainer.aligned = self.trainer.aligned if rule is None else rule()
        super().__init__(model=self.trainer.model, optimizer=self.trainer.optimizer, rule=self.trainer.aligned)
        as_a_new_process(self.trainer.model, seed)

    def step(self) -> None:
        self.trainer.step(batch(seed=self.done))


class BayesRun(Run):
    """Four steps, and a refresh; thrice."""

    own, last, epoch = "layer", 12, 4

    def __init__(self, seed: int = 0, **options: Any):
        self.net = BayesNet(**options)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.02)
        super().__init__(net=self.net, layer=self.net.layer, optimizer=self.optimizer)
        as_a_new_process(self.net, seed)

    def step(self) -> None:
        at = 6 * (self.done % self.epoch)
        self.optimizer.zero_grad()
        self.net.loss(slice(at, at + 6)).backward()
        self.optimizer.step()
        if at == 6 * (self.epoch - 1):
            self.net.layer.refresh()

    def numbers(self) -> dict[str, Any]:
        state = self.net.layer.get_extra_state()
        parts = self.parts["optimizer"].state_dict(), unpacked(state) if state.numel() else None
        return copy.deepcopy({"net": contents(self.net), "parts": parts})


class AdaTaskRun(Run):
    """Parameters with one number, none, and as many as tasks; one has no gradient at first, one is frozen, the last two
    are heads. Checkpoints bring the settings of both groups along: a new process's optimizer has others."""

    def __init__(
        self, name: str, case: int = 0, dtype: torch.dtype = torch.float32, moments: str | None = None, seed: int = 0
    ):
        self.net = nn.ParameterList(several(dtype, [(3, 4), (7,), (), (3,), (2, 0), (1,), (5,), (3, 4), (3,)]))
        self.net[1].requires_grad_(False)
        early, later = (list(self.net[some]) for some in (slice(4), slice(4, None)))
        if seed:
            self.optimizer = make_adatask(name, [{"params": early}, {"params": later}], lr=9.0)
        else:
            settings: dict[str, Any] = {"task_weights": [1.0, 0.5, 2.0], **SETTINGS[name][case], "lr": 0.123}
            self.optimizer = make_adatask(name, early, **settings, moments_dtype=moments)
            self.optimizer.add_param_group({"params": later, "lr": 0.3, "missing": "still"})
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 20)
        super().__init__(net=self.net, optimizer=self.optimizer, schedule=schedule)
        as_a_new_process(self.net, seed)

    def step(self) -> None:
        parameters = list(self.net)
        self.optimizer.zero_grad()
        fill([*parameters[: int(self.done > 1)], *parameters[2:-2]], self.done)
        fill_grad(parameters[-2:], self.done)
        self.optimizer.step()
        self.parts["schedule"].step()

    def numbers(self) -> dict[str, Any]:
        return {**super().numbers(), "dominance": self.optimizer.dominance()}


F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
SHORT = {F32: "f32", F64: "f64", BF16: "bf16"}
#: Types of parameters and of moments; the settings of each optimizer take turns with them.
STORED: list[tuple[torch.dtype, str | None]] = [
    *((F32, None), (F32, "bfloat16"), (F64, None), (F64, "bfloat16"), (BF16, None), (BF16, "bfloat16"))
]
#: Of full data there are sums by the covariance, or the examples themselves.
BAYES_ROWS = [
    ("exact", "full", ("stored", "streaming", "moving")),
    ("exact", "kron", ("streaming",)),
    ("sampled", "block", ("streaming", "moving")),
    ("sampled", "diag", ("stored", "streaming")),
]
ROWS: dict[str, Callable[..., Run]] = {
    **{f"aligned-{form}": partial(AlignedRun, form) for form in ("layer", "merge", "weigh")},
    "aligned-pcgrad": partial(AlignedRun, "merge", partial(PCGrad, 3, 5)),
    **{
        f"bayesagg-{moments}-{covariance}-{statistics}": partial(
            BayesRun, moments=moments, covariance=covariance, statistics=statistics, num_samples=32
        )
        for moments, covariance, some in BAYES_ROWS
        for statistics in some
    },
    **{
        f"adatask-{name}-{i % len(SETTINGS[name])}-{SHORT[dtype]}-{moments}": partial(
            AdaTaskRun, name, i % len(SETTINGS[name]), dtype, moments
        )
        for name in PAIRS
        for i, (dtype, moments) in enumerate(STORED)
    },
    **{f"alphavil-{kind}": partial(VilRun, kind) for kind in VIL_RUNS},
}
#: A row for each kind of state, where types make no difference.
KINDS_OF_STATE = [row for row in ROWS if "adatask" not in row or "-f32-" in row]
QUICK = ("bayesagg-exact-full-moving", "alphavil-everything")


def each(rows: Iterable[str], at_length: bool = False) -> pytest.MarkDecorator:
    """What takes long, a row of BayesAgg and one of alphaVIL show in the quick tests."""
    slow = [row for row in rows if at_length and row.startswith(("bayesagg", "alphavil")) and row not in QUICK]
    return pytest.mark.parametrize("row", [pytest.param(row, marks=[pytest.mark.slow] * (row in slow)) for row in rows])


def stops(row: str) -> Sequence[int]:
    """Where to save: before anything, within an epoch or round, at its end and after."""
    if row == "alphavil-everything":
        return 0, 2, 6, 7
    if "sampled" in row:
        return (6,)
    return {"alphavil": (5,), "bayesagg": (2, 6), "aligned": (0, 2), "adatask": (3,)}[row.split("-")[0]]


def from_file(thing: Any, weights_only: bool = True) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def through_pickle(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


# ---- carried over ----------------------------------------------------------------------------------------------------


@each([row for row in ROWS if row != "alphavil-lbfgs"], at_length=True)  # torch cannot copy an LBFGS
def test_every_way_to_carry_a_run_over(row: str) -> None:
    """States and copies of the whole: each goes on in the same bits, and none writes where it came from."""
    for stop in stops(row):
        run = ROWS[row]()
        run.go(stop)
        state, numbers, drawn = run.state(), run.numbers(), random_state()
        kept, ends = copy.deepcopy(state), list[Any]()

        def goes_on(other: Run, stop: int = stop, numbers: Any = numbers, ends: list[Any] = ends) -> None:
            assert alike(other.numbers(), numbers)
            other.go(stop + 2)
            ends.append(other.numbers())

        for carry in (lambda state: state, from_file, copy.deepcopy, through_pickle):
            other = ROWS[row](seed=1 + len(ends))
            other.take(carry(state))
            goes_on(other)
        for copied in (copy.deepcopy, through_pickle, partial(from_file, weights_only=False)):
            set_random_state(drawn)
            goes_on(copied(run))
        set_random_state(drawn)
        assert alike(run.numbers(), numbers)
        assert alike(state, kept)
        run.go(stop + 2)
        assert all(alike(end, run.numbers()) for end in ends)


@each(KINDS_OF_STATE, at_length=True)
def test_resumed_after_any_step(row: str) -> None:
    """From files: every step by a run of its own, in a random state that is none of theirs, and the rest in one."""
    run, trace = ROWS[row](), []
    while run.done < run.last:
        run.go(run.done + 1)
        trace.append((run.said, run.numbers()))
    if isinstance(run, VilRun):
        assert {said.kind for said, _ in trace} == {"train", "evaluate", "alpha", "move"}
        assert "search" in {numbers["last"]["kept"] for _, numbers in trace if numbers["last"]}
    saved = from_file(ROWS[row]().state())
    for stop, want in enumerate(trace):
        other = ROWS[row](seed=100 + stop)
        other.take(saved)
        other.go(stop + 1)
        assert alike((other.said, other.numbers()), want), stop
        saved = from_file(other.state())
        if stop % (3 if run.last <= 12 else 5) == 0:
            other.go()
            assert alike(other.numbers(), trace[-1][1]), stop


@each(KINDS_OF_STATE)
def test_back_to_a_saved_state(row: str) -> None:
    """Twice, from where later steps have led. What the method itself gives for a state is not written by these steps:
    a copy is made of the rest alone, and of alphaVIL's in the middle of a round."""
    for stop in (0, 3) if row.startswith("adatask") else stops(row):
        run = ROWS[row]()
        run.go(stop)
        itself = isinstance(run, BayesRun) or (isinstance(run, VilRun) and stop == 7)
        state = {k: v if itself and k == run.own else copy.deepcopy(v) for k, v in run.state().items()}
        run.go(stop + 5)
        end = run.numbers()
        for _ in range(2):
            run.take(state)
            run.go(stop + 5)
            assert alike(run.numbers(), end)


DEPENDENT = ["bayesagg-exact-full-stored", "bayesagg-exact-full-streaming", "alphavil-everything"]


@pytest.mark.parametrize("row", ["aligned-layer", "aligned-pcgrad", *DEPENDENT, *(r for r in ROWS if "f32-None" in r)])
def test_the_run_depends_on_what_is_saved(row: str) -> None:
    """The tests above could not fail if the methods did nothing: without its state a run is another. AlignedMTL, which
    has none, is the exception."""
    for stop in (1, 4):
        run, other = ROWS[row](), ROWS[row]()
        run.go(stop)
        state, drawn = copy.deepcopy(run.state()), random_state()
        run.go(stop + 8)
        first = next(iter(run.parts))
        state[first] = {name: value for name, value in state[first].items() if "_extra_state" not in name}
        other.take({part: value for part, value in state.items() if part != run.own})
        set_random_state(drawn)
        other.go(stop + 8)
        stateless = row == "aligned-layer"
        assert (not state[run.own]) == stateless
        assert alike(*(contents(each.parts[first]) for each in (run, other))) == stateless


# ---- killed ----------------------------------------------------------------------------------------------------------

KILLED = {
    "aligned": ["aligned-layer", "aligned-pcgrad"],
    "bayesagg": [f"bayesagg-exact-full-{statistics}" for statistics in ("stored", "streaming", "moving")],
    "adatask": [row for row in ROWS if row.startswith("adatask") and "-f32-" in row],
    "alphavil": ["alphavil-everything"],
}


def main(method: str, path: str, shown: bool = False) -> dict[str, Any]:
    """Trains from the checkpoint if there is one, and writes one after every step."""
    runs = {row: ROWS[row]() for row in KILLED[method]}
    if os.path.exists(path):
        saved = torch.load(path, weights_only=True)
        for row, run in runs.items():
            run.take(saved[row])
    while any(run.done < run.last for run in runs.values()):
        for run in runs.values():
            run.go(run.done + 1)
        torch.save({row: run.state() for row, run in runs.items()}, path + ".new")
        os.replace(path + ".new", path)
        if shown:
            print("saved", flush=True)
    return {row: run.numbers() for row, run in runs.items()}


@pytest.mark.slow
@pytest.mark.parametrize("method", KILLED)
def test_killed_and_resumed(method: str, tmp_path: Path) -> None:
    """SIGKILL at any moment, in a step or in writing; another process goes on from the last file, and ends where one
    left alone does."""
    path = str(tmp_path / "killed.pt")
    command = [sys.executable, "-m", "tests.contracts.test_state", method, path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        at = 1 + os.urandom(1)[0] % 3
        assert [process.stdout.readline() for _ in range(at)] == ["saved\n"] * at
        time.sleep(os.urandom(1)[0] / 5000)
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    for row, state in torch.load(path, weights_only=True).items():
        assert at <= state["done"] < ROWS[row]().last
    assert alike(main(method, path), main(method, str(tmp_path / "whole.pt")))


# ---- states that do not fit ------------------------------------------------------------------------------------------


def state_of_bayesagg(order: Sequence[int] = (0, 1, 2), change: dict[str, Any] | None = None, **options: Any) -> Any:
    """After a batch."""
    net = BayesNet()
    layer = BayesAgg([[Regression, Binary, Multiclass][i](net.heads[i]) for i in order], **options)
    layer(net.data[0].features.clone().requires_grad_(), [net.data[i].targets for i in order])
    return {"_extra_state": packed({**unpacked(layer.get_extra_state()), **(change or {})})}


def state_of_optimizer(kind: Any, groups: int = 2, extra: int = 0, steps: int = 1, **options: Any) -> Any:
    """Of parameters like those of :class:`AdaTaskRun`, and more."""
    parameters = [*AdaTaskRun("adam").net, *several(shapes=[(2,)] * extra)]
    optimizer = kind([{"params": p} for p in (parameters[:4], parameters[4:])[:groups]], **options)
    for _ in range(steps):
        fill(parameters, 1, options.get("num_tasks", 1))
        fill_grad(parameters if "num_tasks" not in options else [], 1)
        optimizer.step()
    return optimizer.state_dict()


def state_of_vil(how: str) -> Any:
    """After a stage of another model or other tasks."""
    case = Case(norm=True, target="kind" if how == "another target" else None, heads=how != "no heads")
    tasks = case.tasks
    if how == "fewer":
        del tasks["marks"]
    elif how == "another order":
        tasks = dict(reversed(tasks.items()))
    elif how == "another name":
        tasks = {"weight" if name == "marks" else name: task for name, task in tasks.items()}
    elif how == "another model":
        case.model.unseen = nn.Parameter(torch.zeros(3))
    elif how == "a loader":
        train: Any = tasks["kind"].train
        loader: Any = DataLoader(train, generator=torch.Generator(), shuffle=True, batch_size=None)
        case.change("kind", train=loader)
    elif how == "other buffers":
        case.model.dropout = nn.BatchNorm1d(8, affine=False)
    vil = AlphaVIL(case.model, tasks, case.target, make_optimizer=SGD, alpha_epochs=2)
    next(vil.stages())
    return vil.state_dict()


def without_random_numbers() -> Any:
    return {key: value for key, value in VilRun("lists").vil.state_dict().items() if key != "random"}


OWN_HEADS = "regression 4 -> 3, noise estimated, bias, binary 4 -> 3, multiclass 4 -> 3, covariance block, statistics"
BAYES = f"BayesAgg.load_state_dict: expected a state of {OWN_HEADS} streaming; found one of"
VIL = "AlphaVIL: load_state_dict:"
ANOTHER = f"{VIL} expected what AlphaVIL.state_dict() gave, found something else"
#: The method's row, what makes the state, and what the message must have.
REFUSED: dict[str, tuple[str, Callable[[], Any], list[str]]] = {
    **{
        f"bayesagg: {how}": ("bayesagg-sampled-block-streaming", partial(state_of_bayesagg, **options), words)
        for how, options, words in (
            (
                "fewer heads",
                {"order": (0, 1)},
                [f"{BAYES} regression 4 -> 3, noise estimated, bias, binary 4 -> 3, cov"],
            ),
            ("heads in another order", {"order": (1, 0, 2)}, [f"{BAYES} binary 4 -> 3, regression 4 -> 3"]),
            ("other statistics", {"statistics": "stored"}, [BAYES, "statistics stored"]),
            ("another covariance", {"covariance": "full"}, [BAYES, "covariance full"]),
            ("the future", {"change": {"version": 7}}, ["BayesAgg.load_state_dict: expected version 3, found 7"]),
        )
    },
    **{
        f"adatask: {name} of {how}": (
            f"adatask-{name}-0-f32-None",
            partial(state_of_optimizer, kind, **options),
            [f"{PAIRS[name][0].__name__}.load_state_dict", *words],
        )
        for name, how, kind, options, words in (
            ("adam", "2 tasks", AdaTaskAdam, {"num_tasks": 2}, ["num_tasks=3", "found 2"]),
            ("adamw", "4 tasks", AdaTaskAdamW, {"num_tasks": 4}, ["num_tasks=3", "found 4"]),
            *((name, "torch", PAIRS[name][1], {}, ["num_tasks"]) for name in ("adam", "rmsprop", "adagrad")),
            ("adam", "rmsprop", PAIRS["rmsprop"][0], {"num_tasks": 3}, []),
            ("adam", "rmsprop before a step", PAIRS["rmsprop"][0], {"num_tasks": 3, "steps": 0}, []),
            *((name, "adam", AdaTaskAdam, {"num_tasks": 3}, []) for name in ("rmsprop", "adagrad")),
        )
    },
    **{
        f"adatask: another number of {how}": (
            "adatask-adam-0-f32-None",
            partial(state_of_optimizer, AdaTaskAdam, num_tasks=3, **options),
            ["group"],
        )
        for how, options in (("parameters", {"extra": 1}), ("groups", {"groups": 1}))
    },
    **{
        f"alphavil: {how}": ("alphavil-lists", partial(state_of_vil, how), [f"{VIL} {what}: expected", "found"])
        for what, some in (
            ("tasks", ["fewer", "another order", "another name"]),
            ("target", ["another target"]),
            ("deltas", ["another model", "no heads"]),
            ("random", ["a loader"]),
            ("buffers", ["other buffers"]),
        )
        for how in some
    },
    **{f"alphavil: {some}": ("alphavil-lists", partial(eval, some), [ANOTHER]) for some in ("{}", "[]", "None")},
    "alphavil: a model": ("alphavil-lists", lambda: Case().model.state_dict(), [ANOTHER]),
    "alphavil: no random numbers": ("alphavil-lists", without_random_numbers, [ANOTHER]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_state_that_does_not_fit_is_refused(case: str) -> None:
    """One line, and nothing has changed: what was begun goes on in the bits it would have had."""
    row, make, words = REFUSED[case]
    state, run = make(), ROWS[row]()
    run.go(2)
    twin, numbers, drawn = copy.deepcopy(run), run.numbers(), random_state()
    with pytest.raises((ValueError, TypeError), match=" ") as error:
        run.parts[run.own].load_state_dict(state)
    one_line(error.value, *words)
    assert same_random_state(random_state(), drawn)
    assert alike(run.numbers(), numbers)
    assert not getattr(run.parts[run.own], "_optimizer_load_state_dict_pre_hooks", None)
    for each in (run, twin):
        set_random_state(drawn)
        each.go(4)
    assert alike(run.numbers(), twin.numbers())


# ---- Aligned-MTL -----------------------------------------------------------------------------------------------------


def test_aligned_copies_show_what_the_original_showed() -> None:
    """Copies of the module have its weights, whether it trained or was evaluated with gradients."""
    for evaluated in (False, True):
        run = ROWS["aligned-layer"]()
        rule: Any = run.parts["rule"].train(not evaluated)
        run.go(1)
        assert not list(rule.buffers())
        for other in (copy.deepcopy(rule), through_pickle(rule), from_file(rule, False)):
            assert alike(other.weights, rule.weights)
            assert len(other.train()(torch.randn(4, 3, requires_grad=True))) == 3


# ---- BayesAgg --------------------------------------------------------------------------------------------------------

SMALL = [2, 1, 3, 2, 9, 4, 1, 2]  # examples in a batch: fewer than weights, but for one; the last waits for others


def small_batches(net: BayesNet, first: int = 0, last: int = len(SMALL)) -> Iterator[slice]:
    """The rows of one batch after the other, between which the heads move."""
    for step in range(first, last):
        at = sum(SMALL[:step])
        with torch.no_grad():
            for i, p in enumerate(net.heads.parameters()):
                p.add_(0.05 * torch.sin(torch.arange(p.numel()) + step + i).view_as(p))
        yield slice(at, at + SMALL[step])


def parts(posteriors: Sequence[Posterior]) -> list[Tensor]:
    found = [(p.mean, *(p.precision if isinstance(p.precision, tuple) else [p.precision])) for p in posteriors]
    return [part for some in found for part in some]


def refreshed(net: BayesNet) -> list[Tensor]:
    net.layer.refresh()
    assert net.layer.posteriors is not None
    return parts(net.layer.posteriors)


@pytest.mark.parametrize("covariance", ["full", "block", "diag"])  # a Kronecker mean depends on what came first
def test_bayesagg_batches_of_few_examples(covariance: str) -> None:
    """They are added to the statistics several at a time: all are in the posterior, at the weights that they met, as
    in one that is updated batch by batch; a run that stops anywhere goes on to the same bits."""
    net, other = BayesNet(covariance=covariance), BayesNet(covariance=covariance)
    expected = [full_data.empty(full_data.anchor()) for full_data in other.layer._full_data]
    for rows, same_rows in zip(small_batches(net), small_batches(other), strict=True):
        net.loss(rows).backward()
        features = other.backbone(other.data[0].rows(same_rows).features).detach().double()
        for head, posterior, data in zip(other.layer.heads, expected, other.data, strict=True):
            at = None if head.likelihood.is_exact else head.weight(features)
            posterior.add(features, data.rows(same_rows).targets, at)
    for posterior in expected:
        posterior.add_prior()
    whole = refreshed(net)
    torch.testing.assert_close(whole, parts(expected), rtol=1e-9, atol=1e-9)
    for stop in range(1, len(SMALL)):
        net, again = BayesNet(covariance=covariance), BayesNet(covariance=covariance)
        for rows in small_batches(net, 0, stop):
            net.loss(rows).backward()
        again.load_state_dict(copy.deepcopy(net.state_dict()))
        for rows in small_batches(again, stop):
            again.loss(rows).backward()
        assert same(refreshed(again), whole)


def test_bayesagg_stored_statistics_are_copies() -> None:
    """Features may be a view of something large, and labels a buffer that the next batch overwrites."""
    net = BayesNet(statistics="stored")
    sequence = torch.randn(24, 50, HEAD_WIDTH, requires_grad=True)
    targets = [data.targets.clone() for data in net.data]
    net.layer(sequence[:, 0], targets)
    state = unpacked(net.layer.get_extra_state())
    for target in targets:
        target.zero_()
    for part, data in zip(state["full_data"], net.data):
        assert part["features"][0].untyped_storage().nbytes() == 24 * HEAD_WIDTH * 4
        assert alike(part["targets"][0], data.targets)


def test_bayesagg_state_is_tensors_and_may_be_missing() -> None:
    """What averages of a model, savers of tensors and older checkpoints want of it. The layer has no parameters, and
    no state before the first batch; a copy of the model has the copy's heads."""
    run = BayesRun()
    net = run.net
    assert not list(net.layer.parameters())
    assert not net.layer.state_dict()
    net.layer(net.data[0].features.clone().requires_grad_(), [data.targets for data in net.data])
    assert set(net.layer.state_dict()) == {"_extra_state"}
    run.go(4)
    twin = copy.deepcopy(net)
    assert [head.layers[0] for head in twin.layer.heads] == list(twin.heads)
    batch = net.data[0].features, [data.targets for data in net.data]
    before, state = net.layer.aggregate(*batch), net.state_dict()
    for value in state.values():
        assert isinstance(value.numpy(), np.ndarray)
        if value.dtype.is_floating_point:
            value.mul_(1.0)
    net.load_state_dict({name: value for name, value in state.items() if "layer" not in name})
    assert torch.equal(net.layer.aggregate(*batch), before)
    assert torch.equal(through_pickle(net).layer.aggregate(*batch), before)


def test_bayesagg_follows_a_model_into_another_dtype() -> None:
    run = BayesRun()
    run.go(4)
    features, targets = run.net.data[0].features, [data.targets for data in run.net.data]
    narrow = run.net.layer.aggregate(features, targets)
    run.net.double()
    wide = run.net.layer.aggregate(features.double(), targets)
    assert wide.dtype == torch.float64
    assert (wide - narrow).abs().max() < 1e-5 * wide.abs().max()
    assert torch.equal(run.net.layer.aggregate(features, targets), narrow)


# ---- AdaTask's optimizers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRS)
def test_adatask_moments_keep_their_type(name: str) -> None:
    """That of moments_dtype, or float32's precision at least: not the parameters', which torch.optim gives them."""
    for i, (dtype, moments) in enumerate(STORED):
        run, other = (AdaTaskRun(name, i % len(SETTINGS[name]), dtype, moments, seed) for seed in (0, 1))
        run.go(1)
        other.take(from_file(run.state()))
        expected = dtype if dtype == F64 else BF16 if moments else F32
        for each in (run, other):
            kept = state_tensors(each.optimizer).items()
            assert {v.dtype for k, v in kept if "avg" in k or "sum" in k or "buffer" in k} == {expected}


def test_adatask_hooks_around_state_dicts() -> None:
    """They may change what is saved and loaded, and make a state fit; the last of them sees what training goes on
    with."""
    p = new(1, 40, dtype=BF16)
    optimizer = AdaTaskAdam([p], num_tasks=2)
    fill([p], 1, 2)
    optimizer.step()
    seen: list[Any] = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("saving"))
    optimizer.register_state_dict_post_hook(lambda o, s: {**s, "mine": 7})
    saved = optimizer.state_dict()
    assert seen == ["saving"]
    assert saved["mine"] == 7
    other = AdaTaskAdam([p], num_tasks=2)

    def halve(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        assert state["mine"] == 7
        changed = {k: {n: v / 2 if n.startswith("exp") else v for n, v in s.items()} for k, s in state["state"].items()}
        return {**state, "state": changed}

    other.register_load_state_dict_pre_hook(halve)
    other.register_load_state_dict_post_hook(lambda o: seen.append(o.state[p]["exp_avg_1"].clone()))
    other.load_state_dict(saved)
    want = optimizer.state[p]["exp_avg_1"] / 2
    assert torch.equal(other.state[p]["exp_avg_1"], want)
    assert same([seen[1]], [want])
    forget = AdaTaskAdam([p], num_tasks=2)
    forget.register_load_state_dict_post_hook(lambda o: o.state.clear())
    forget.load_state_dict(optimizer.state_dict())
    assert not forget.state
    fits = AdaTaskAdam([p], num_tasks=3)
    groups = [{**group, "num_tasks": 3} for group in saved["param_groups"]]
    fits.register_load_state_dict_pre_hook(lambda o, s: {"state": {}, "param_groups": groups})
    fits.load_state_dict(saved)
    fill([p], 1)
    fits.step()


def test_adatask_other_settings_after_loading_hold_from_then_on() -> None:
    """In a net of bfloat16 parameters."""
    net = Net().bfloat16()
    optimizer = AdaTaskAdamW(net.parameters(), num_tasks=3)
    train(net, optimizer, 3)
    other_net = copy.deepcopy(net)
    other = AdaTaskAdamW(other_net.parameters(), num_tasks=3)
    other.load_state_dict(from_file(optimizer.state_dict()))
    for n, o in ((net, optimizer), (other_net, other)):
        o.param_groups[0].update(lr=0.1, betas=(0.5, 0.5), task_weights=[1.0, 0.0, 0.0], dominance_decay=0.1)
        train(n, o, range(3, 6))
    assert same(net.parameters(), other_net.parameters())
    assert torch.equal(optimizer.dominance(), other.dominance())


def trained() -> list[Any]:
    """Each rank with its part of the batch."""
    found = []
    for name in PAIRS:
        net = Net().double()
        optimizer = make_adatask(name, net.parameters(), lr=1e-3)
        for seed in range(5):
            optimizer.zero_grad()
            x = inputs(16, seed).double()
            backward(net, x.chunk(dist.get_world_size())[dist.get_rank()] if dist.is_initialized() else x)
            optimizer.step()
        found.append((values(net.parameters()), state_tensors(optimizer), optimizer.dominance()))
    return found


def test_adatask_states_are_alike_on_all_ranks(two_ranks: Pool) -> None:
    """And the parameters as one process with the whole batch has them."""
    first, second = two_ranks(trained)
    assert alike(first, second)
    for (found, _, _), (want, _, _) in zip(first, trained(), strict=True):
        assert all(torch.allclose(p, q, rtol=0.0, atol=1e-9) for p, q in zip(want, found, strict=True))


# ---- AdaTask: state before the first step ----------------------------------------------------------------------------


def started(optimizer: Any, shared: list[Any], heads: list[Any], tasks: int) -> dict[str, Tensor]:
    """The state that init_state makes; it runs no hooks, and leaves all else as it is."""
    give_jac(shared, 7, tasks)
    heads[0].grad = torch.ones_like(heads[0])
    hook = optimizer.register_step_pre_hook(lambda *_: pytest.fail("no step was asked for"))
    kept = values([*shared, *heads, *(p.jac for p in shared), heads[0].grad])
    groups = str(optimizer.param_groups)
    optimizer.init_state(iter(shared))
    hook.remove()
    for a, b in zip(kept, [*shared, *heads, *(p.jac for p in shared), heads[0].grad], strict=True):
        assert torch.equal(a.view(torch.int32), b.detach().view(torch.int32))  # the sign of zero, too
    assert str(optimizer.param_groups) == groups
    assert heads[1].grad is None
    first = state_tensors(optimizer)
    assert all(not value.any() for key, value in first.items() if "sum" not in key)
    optimizer.init_state(shared)  # what there is stays
    assert same(state_tensors(optimizer), first)
    return first


@pytest.mark.parametrize(("name", "case"), OPTIMIZER_CASES)
def test_adatask_init_state(name: str, case: int) -> None:
    """All of it, and nothing else has changed: training from there is what it is without, bit for bit."""
    for extra in ({}, {"moments_dtype": "bfloat16"}, {"num_tasks": 1}, {"dominance_decay": None, "eps": 0.0}):
        settings = {"num_tasks": 3, **SETTINGS[name][case], **extra}
        tasks = settings.pop("num_tasks")
        runs = list[Any]()
        for early in (False, True):
            shared, heads = shared_and_heads()
            heads[1].data.fill_(-0.0)
            heads += [new(30, 3)]
            heads[2].requires_grad_(False)
            optimizer = make_adatask(
                name, [{"params": shared}, {"params": heads, "lr": torch.tensor(0.3)}], tasks, **settings
            )
            if early:
                assert started(optimizer, shared, heads, tasks).keys() == runs[0][1].keys()
            for seed in range(2):
                give_jac(shared, seed, tasks)
                give_grad(heads[:2], seed)
                optimizer.step()
            runs.append((shared + heads, state_tensors(optimizer)))
        if settings.get("eps") != 0.0:
            assert same(runs[0][0], runs[1][0])
            assert same(runs[0][1], runs[1][1])


def test_adatask_init_state_of_other_parameters() -> None:
    optimizer = AdaTaskAdam([new(1, 3)], num_tasks=2)
    with pytest.raises(ValueError, match="shared") as error:
        optimizer.init_state([new(1, 3), new(2, 3)])
    one_line(error.value, "AdaTaskAdam.init_state: shared: expected parameters of this optimizer, found 2 others")


def test_adatask_names_state_that_torch_made() -> None:
    """Without init_state get_optimizer_state_dict takes all parameters for heads; the step says what to do."""
    net = narrow_net()
    optimizer = AdaTaskAdam(net.parameters(), num_tasks=3)
    get_optimizer_state_dict(net, optimizer)
    mtlgrad.task_backward([loss.mean() for loss in net(inputs())[1]], net.shared)
    with pytest.raises(ValueError, match=r"found \.jac") as error:
        optimizer.step()
    one_line(error.value, "call init_state(shared) before it")


# ---- AdaTask: distributed checkpoints --------------------------------------------------------------------------------

FLAT = {"flat": StateDictOptions(flatten_optimizer_state_dict=True)}


def states(net: nn.Module, optimizer: Any, kind: str) -> dict[str, Any]:
    if kind == "optimizer":
        return {"net": net.state_dict(), "optimizer": get_optimizer_state_dict(net, optimizer)}
    return dict(zip(("net", "optimizer"), get_state_dict(net, optimizer, options=FLAT.get(kind))))


def load(net: Any, optimizer: Any, kind: str, path: str) -> None:
    optimizer.init_state(net.shared)
    state = states(net, optimizer, kind)
    dcp_load(state, checkpoint_id=path)
    if kind == "optimizer":
        net.load_state_dict(state["net"])
        set_optimizer_state_dict(net, optimizer, state["optimizer"])
    else:
        both = {"model_state_dict": state["net"], "optim_state_dict": state["optimizer"]}
        set_state_dict(net, optimizer, **both, options=FLAT.get(kind))


ADAM_SETTINGS = {"amsgrad": True, "eps": 1e-3, "task_weights": [1.0, 0.5, 2.0], "missing": "still"}
CHECKPOINTED: list[tuple[str, dict[str, Any], str]] = [
    ("adam", ADAM_SETTINGS, "optimizer"),
    ("adam", ADAM_SETTINGS, "both"),
    ("adam", ADAM_SETTINGS, "flat"),
    ("adamw", {"eps": 1e-3, "betas": (0.8, 0.99)}, "flat"),
    ("rmsprop", {"momentum": 0.9, "centered": True, "eps": 1e-2, "lr": 1e-3}, "flat"),
    ("adagrad", {"initial_accumulator_value": 0.1, "lr_decay": 0.1}, "both"),
]


def part_of_a_run(number: int, path: str, first: int, last: int) -> Any:
    """Trains one of them from the checkpoint at `path`, if it does not begin, and writes one if it does not end."""
    name, settings, kind = CHECKPOINTED[number]
    cut = dist.is_initialized()
    net = sharded_net(first) if cut else narrow_net(first)  # what is loaded is not what it begins with
    groups = [{"params": net.shared}, {"params": net.heads.parameters(), "lr": 0.02}]
    optimizer = make_adatask(name, groups, **(settings if first == 0 else {**settings, "lr": 9.0}))
    if first:
        load(net, optimizer, kind, path)
    for i in range(first, last):
        x = inputs(8, 100 + i)
        if cut:
            x = x.chunk(dist.get_world_size())[dist.get_rank()]
        mtlgrad.task_backward(global_means(net(x)[1]), net.shared)
        optimizer.step()
        optimizer.zero_grad()
    if last < 4:
        dcp_save(states(net, optimizer, kind), checkpoint_id=path)
    return [unsharded(p) for p in net.parameters()], unsharded_state(optimizer), optimizer.dominance([net.shared])


def parts_of_runs(work: list[tuple[Any, ...]]) -> list[Any]:
    return [part_of_a_run(*arguments) for arguments in work]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process reads and writes, too
def test_adatask_checkpoints_across_world_sizes(tmp_path: Path, two_ranks: Pool, four_ranks: Pool) -> None:
    """Written by two ranks, one process or four, read by the others; no run differs from an uninterrupted one."""
    worlds: dict[int, Any] = {1: lambda function, work: [function(work)], 2: two_ranks, 4: four_ranks}
    writing: dict[int, list[Any]] = {1: [], 2: [], 4: []}
    reading: dict[int, list[Any]] = {1: [], 2: [], 4: []}
    for number, (_, _, kind) in enumerate(CHECKPOINTED):
        ways = [(4, [2]), (2, [1])] if kind == "flat" else [(2, [4, 1]), (1, [2])]
        for writer, readers in ways:
            path = str(tmp_path / f"{number} from {writer}")
            writing[writer].append((number, path, 0, 2))
            for reader in readers:
                reading[reader].append((number, path, 2, 4))
    for size, work in writing.items():
        worlds[size](parts_of_runs, work)
    whole = [part_of_a_run(number, "", 0, 4) for number in range(len(CHECKPOINTED))]
    for size, work in reading.items():
        for found in worlds[size](parts_of_runs, work):
            for (number, path, *_), (own, kept, shares) in zip(work, found, strict=True):
                parameters, state, dominance = whole[number]
                assert all(near(p, q, 1e-6) for p, q in zip(own, parameters, strict=True)), (path, size)
                assert kept.keys() == state.keys()
                assert all(near(kept[key], state[key], 1e-5) for key in state), (path, size)
                assert near(shares, dominance, 1e-5)


# ---- AdaTask: what a step keeps for the next one ---------------------------------------------------------------------


def change(what: str, optimizer: Any) -> None:
    (group,), states = optimizer.param_groups, optimizer.state.values()
    square, *_ = group["params"]
    if what == "parameters moved":
        for p in group["params"]:
            p.data = p.data.clone()
    elif what == "a parameter turned":  # the same shape, address and size
        square.data = square.data.t()
    elif what == "state replaced":
        for state in states:
            state.update({key: value.clone() for key, value in state.items()})
    elif what == "state moved in place":
        for value in [value for state in states for value in state.values()]:
            value.data = value.data.clone()
    elif what == "state loaded":
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif what == "narrow moments":
        group.update(moments_dtype="bfloat16", stochastic_rounding=False)
    elif what == "other settings":
        group.update(lr=0.3, weight_decay=0.1, task_weights=[1.0, 0.0, 2.0])
    elif what == "a missing task":
        group["missing"] = "still"
        for p in group["params"]:
            p.jac[1] = 0.0
    elif what == "a Jacobian turned":
        square.jac = square.jac.mT.contiguous().mT
    else:
        del square.jac


CHANGES = [
    *("parameters moved", "a parameter turned", "state replaced", "state moved in place", "state loaded"),
    *("narrow moments", "other settings", "a missing task", "a Jacobian turned", "a Jacobian gone"),
]


@pytest.mark.parametrize("what", CHANGES)
def test_adatask_steps_as_if_nothing_had_been_kept(what: str) -> None:
    """What a step keeps for the next one is made anew when it no longer fits."""
    for name in PAIRS:
        found = []
        for forgetful in (False, True):
            parameters = [new(1, 4, 4), new(2, 7), new(3, 5)]
            optimizer = make_adatask(name, parameters)
            for step in range(6):
                fill(parameters, step)
                if step == 3:
                    change(what, optimizer)
                if forgetful:
                    optimizer._kept.clear()
                optimizer.step()
            found.append([*values(parameters), *state_tensors(optimizer).values()])
        assert same(*found), name


def test_adatask_two_optimizers_of_the_same_shapes() -> None:
    found = []
    for together in (False, True):
        parameters = [new(1, 9), new(2, 9)]
        optimizers = [AdaTaskAdam([p], num_tasks=3) for p in parameters]
        turns = [(i, step) for i in range(2) for step in range(3)]
        for i, step in sorted(turns, key=lambda pair: pair[1]) if together else turns:
            fill([parameters[i]], step)
            optimizers[i].step()
        found.append(values(parameters))
    assert same(*found)


def test_adatask_keeps_no_tensor_alive() -> None:
    """State that a user has put elsewhere is free at once."""
    p = new(1, 9)
    optimizer = AdaTaskAdam([p], num_tasks=2)
    fill([p], 1, 2)
    optimizer.step()
    seen = [weakref.ref(tensor) for tensor in optimizer.state[p].values()]
    optimizer.state[p] = {key: tensor.clone() for key, tensor in optimizer.state[p].items()}
    gc.collect()
    assert all(tensor() is None for tensor in seen)
    assert "_kept" not in through_pickle(optimizer).__getstate__()


def test_adatask_refuses_memory_that_was_freed() -> None:
    p = new(1, 9)
    optimizer = AdaTaskAdam([p], num_tasks=2)
    for step in range(2):
        fill([p], step, 2)
        optimizer.step()
    optimizer.state[p]["exp_avg_1"].untyped_storage().resize_(0)
    fill([p], 2, 2)
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match="adatask_adam: expected tensors with memory, found one"):
        optimizer.step()
    assert torch.equal(p, before)


# ---- alphaVIL: stages ------------------------------------------------------------------------------------------------


def test_alphavil_stages_go_on_with_their_numbers() -> None:
    """Their iterators may be left: by break, close or an error of the loop's own. epoch() does what is left."""
    want = VilRun()
    epoch(want.vil)
    numbers, run = want.numbers(), VilRun()
    for stage in run.vil.stages():
        if stage.number == 2:
            break
    iterator: Any = run.vil.stages()
    assert next(iterator).number == 3
    iterator.close()
    with pytest.raises(OSError, match="mine"):  # noqa: PT012
        for stage in run.vil.stages():
            assert (stage.number, stage.total) == (4, 3 + 2 + 2)
            raise OSError("mine")
    epoch(run.vil)
    assert alike(run.numbers(), numbers)
    iterator = run.vil.stages()
    assert run.vil.rounds == 1  # nothing yet
    assert next(iterator).number == 1


def test_alphavil_another_number_of_alpha_epochs() -> None:
    """Fewer than are done already end the search; more go on with it."""
    for before, then, more in ((5, 2, 0), (5, 3, 0), (5, 4, 1), (3, 6, 3)):
        run = VilRun(alpha_epochs=before)
        run.go(3 + 1 + 3)
        other = VilRun(alpha_epochs=then)
        other.take(from_file(run.state()))
        with hushed():
            kinds = [stage.kind for stage in itertools.islice(other.vil.stages(), 20)]
        assert kinds == ["alpha"] * more + ["move"]


class Bomb:
    """Raises when it is asked the n-th time: before and after calls and batches."""

    def __init__(self) -> None:
        self.count, self.at = 0, -1
        self.error: type[BaseException] = Exception

    def tick(self) -> None:
        self.count += 1
        if self.count == self.at:
            raise self.error("bomb")

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.tick()
            found = function(*arguments)
            self.tick()
            return found

        return call

    def making(self, make: Callable[..., Any], parameters: list[Tensor]) -> Any:
        optimizer = self.around(make)(parameters)
        optimizer.step = self.around(optimizer.step)
        return optimizer


@dataclass
class Ticking:
    of: Any
    bomb: Bomb

    def __iter__(self) -> Iterator[Any]:
        self.bomb.tick()
        for each in self.of:
            self.bomb.tick()
            yield each


def with_bomb(bomb: Bomb) -> tuple[Case, AlphaVIL]:
    """In losses, data and optimizers of two tasks."""
    case = Case(tasks=["size", "kind"], count=2, norm=True, dropout=0.3, noise=0.1)
    for name, task in list(case.tasks.items()):
        dev = None if task.dev is None else Ticking(task.dev, bomb)
        case.change(name, loss=bomb.around(task.loss), train=Ticking(task.train, bomb), dev=dev)
    vil = case.vil(make_optimizer=partial(bomb.making, ADAM), alpha_optimizer=partial(bomb.making, ALPHA["adam"]))
    vil.task_weights += torch.tensor([0.25, -0.5])
    return case, vil


ERRORS = [KeyboardInterrupt, RuntimeError, SystemExit, MemoryError, StopIteration, GeneratorExit]


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_alphavil_an_error_anywhere_in_a_stage(every: int) -> None:
    """Model, weights and random state are as before the stage; the stage done over ends where it would have."""

    def now() -> tuple[Any, ...]:
        return contents(case.model), vil.task_weights.clone(), random_state()

    bomb = Bomb()
    case, vil = with_bomb(bomb)
    epoch(vil)
    calls, end = bomb.count, now()
    assert calls > 50
    for at in range(1, calls + 1, every):
        bomb = Bomb()
        case, vil = with_bomb(bomb)
        bomb.at, bomb.error = at, ERRORS[at % len(ERRORS)]
        before = now()
        with pytest.raises((bomb.error, RuntimeError)), hushed():  # noqa: PT012
            for _ in vil.stages():
                before = now()
        assert alike(now()[:2], before[:2]), at
        assert same_random_state(random_state(), before[2]), at
        assert all(module.training for module in case.model.modules())
        assert not any(p.grad is not None for p in case.model.parameters())
        epoch(vil)
        assert vil.rounds == 1
        assert alike(now()[:2], end[:2]), at
        assert same_random_state(random_state(), end[2]), at


def test_alphavil_warnings_that_are_errors() -> None:
    """The stage that warns is done all the same, and is not done twice."""
    ends = []
    for strict in (False, True):
        case = Case()
        loss = case.tasks["kind"].loss
        case.change("kind", loss=lambda m, b, of=loss: of(m, b) * (float("nan") if m.training else 1.0))
        vil = case.vil(clip_alpha=(1.0, 1.0))
        raised = 0
        with warnings.catch_warnings():
            warnings.simplefilter("error" if strict else "ignore", RuntimeWarning)
            while vil.rounds < 2:
                try:
                    vil.epoch()
                except RuntimeWarning:  # noqa: PERF203
                    raised += 1
        ends.append((contents(case.model), vil.task_weights, random_state(), raised))
    assert same_values(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])
    assert same_random_state(ends[0][2], ends[1][2])
    assert (ends[0][3], ends[1][3]) == (0, 4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    register_optimizer_step_pre_hook(lambda *_: time.sleep(0.05))
    main(sys.argv[1], sys.argv[2], shown=True)
