"""alphaVIL's state: rounds that stop after any stage, or in the middle of one, and go on in the same bits."""

from __future__ import annotations

import copy
import io
import itertools
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from mtlgrad import AlphaVIL
from mtlgrad.alphavil import Task
from tests.support.bounds import (
    contents,
    hushed,
    one_line,
    random_state,
    same_random_state,
    same_values,
    seed_everything,
    set_random_state,
)
from tests.support.nets import ADAM, ALPHA, SGD, Case, epoch

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS: dict[str, dict[str, Any]] = {
    "lists": {"subset": 0.5},
    "loaders": {"subset": 2},
    "generators": {"subset": 0.5},
    "everything": {"subset": 2, "make_optimizer": ADAM, "alpha_optimizer": ALPHA["adam"], "clip_alpha": (0.5, 1.5)},
    "lbfgs": {"alpha_optimizer": ALPHA["lbfgs"]},
    "momentum": {"alpha_optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)},
    "bfloat16": {"delta_storage": "bfloat16", "include_heads": "none"},
    "host": {"delta_storage": "host", "include_heads": "all"},
    "pickled": {"subset": 2, "alpha_optimizer": ALPHA["adam"]},
}


class Run:
    """Dropout, BatchNorm, noise of torch, numpy and Python in the losses, data that is shuffled."""

    def __init__(self, kind: str, seed: int = 0, **options: Any):
        self.case = Case(norm=True, dropout=0.3, noise=0.1, seed=0, also=True)
        if kind in ("loaders", "everything", "generators", "pickled"):
            for i, (name, task) in enumerate(list(self.case.tasks.items())):
                generator = None if kind == "loaders" else torch.Generator().manual_seed(seed + i)
                rows: Any = task.train
                loader: Any = DataLoader(rows, batch_size=None, shuffle=True, generator=generator)
                self.case.change(name, train=loader)
            dev: Any = self.case.tasks["size"].dev
            generator = None if kind == "loaders" else torch.Generator().manual_seed(seed + 9)
            sampler = BatchSampler(RandomSampler(dev, generator=generator), 1, False)
            self.case.change("size", dev=DataLoader(dev, batch_sampler=sampler, collate_fn=first))
        self.vil = self.case.vil(**KINDS[kind], **options)
        if seed:  # as a process is that starts anew
            with torch.no_grad():
                for tensor in (*self.case.model.parameters(), *self.case.model.buffers()):
                    tensor.add_(1)
        seed_everything(seed)

    def save(self) -> bytes:
        file = io.BytesIO()
        torch.save({"model": self.case.model.state_dict(), "vil": self.vil.state_dict()}, file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        self.case.model.load_state_dict(state["model"])
        self.vil.load_state_dict(state["vil"])

    def fingerprint(self) -> dict[str, Any]:
        last, sources = self.vil.last, [s for task in self.case.tasks.values() for s in (task.train, task.dev)]
        batch_samplers = [getattr(source, "batch_sampler", None) for source in sources]
        generators = [
            getattr(s, "generator", None) for s in (*sources, *(getattr(b, "sampler", None) for b in batch_samplers))
        ]
        return {
            "values": contents(self.case.model),
            "weights": self.vil.task_weights.clone(),
            "alphas": self.vil.alphas.clone(),
            "rounds": self.vil.rounds,
            "kept": None if last is None else last.kept,
            "losses": None if last is None else [last.before, last.start, last.after, *last.searched, *last.losses],
            "random": random_state(),
            "loaders": [g.get_state() for g in generators if g is not None],
        }

    @staticmethod
    def equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
        plain = ("rounds", "kept", "losses")
        loaders = list(zip(first["loaders"], second["loaders"], strict=True))
        numbers = [each["random"] for each in (first, second)]
        return (
            all(first[name] == second[name] for name in plain)
            and same_values(first["values"], second["values"])
            and torch.equal(first["weights"], second["weights"])
            and torch.equal(first["alphas"], second["alphas"])
            and (numbers == [0, 0] or same_random_state(*numbers))
            and all(torch.equal(a, b) for a, b in loaders)
        )

    def same(self, other: dict[str, Any]) -> bool:
        return self.equal(self.fingerprint(), other)

    set_random_state = staticmethod(set_random_state)


def first(batches: list[Any]) -> Any:
    return batches[0]


def from_file(thing: Any, *, weights_only: bool = True) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def finished(run: Run, rounds: int) -> None:
    while run.vil.rounds < rounds:
        epoch(run.vil)


def main(path: str, rounds: int, slow: Iterable[str]) -> None:
    torch.set_num_threads(1)
    run, number = Run("everything", seed=0), 0
    if os.path.exists(path):
        run.load(Path(path).read_bytes())
        number = int(Path(path + ".number").read_text())
    if slow:
        loss = run.case.tasks["kind"].loss
        object.__setattr__(run.vil._tasks["kind"], "loss", lambda *a: (time.sleep(0.02), loss(*a))[1])
    with hushed():
        while run.vil.rounds < rounds:
            for _ in run.vil.stages():
                number += 1
                for name, content in ((path, run.save()), (path + ".number", str(number).encode())):
                    Path(name + ".new").write_bytes(content)
                    os.replace(name + ".new", name)
                print(number, "stages", flush=True)


ROUNDS = 3


# ---- between stages -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_start_after_every_stage(kind: str) -> None:
    """Each stage by another model and AlphaVIL, from a file, in a random state that is none of theirs."""
    run, trace = Run(kind), []
    with hushed():
        while run.vil.rounds < ROUNDS:
            trace.extend((stage, run.fingerprint()) for stage in run.vil.stages())
    assert {stage.kind for stage, _ in trace} == {"train", "evaluate", "alpha", "move"}
    assert "search" in {state["kept"] for _, state in trace}
    saved = Run(kind).save()
    for number, (want, state) in enumerate(trace):
        other = Run(kind, seed=number + 100)
        other.load(saved)
        with hushed():
            assert next(other.vil.stages()) == want
        assert other.same(state), (number, want)
        saved = other.save()


@pytest.mark.parametrize("after", [1, 5, 6])
def test_one_state_for_two(after: int) -> None:
    """Loading copies: what was loaded from stays as it was, and so does what it came from."""
    run = Run("everything")
    for _ in zip(range(after), run.vil.stages()):
        pass
    states = copy.deepcopy(run.vil.state_dict()), copy.deepcopy(run.case.model.state_dict())
    ends = []
    for _ in range(2):
        other = Run("everything", seed=5)
        other.case.model.load_state_dict(states[1])
        other.vil.load_state_dict(states[0])
        epoch(other.vil)
        epoch(other.vil)
        ends.append(other)
    assert ends[0].same(ends[1].fingerprint())
    run.vil.load_state_dict(states[0])
    epoch(run.vil)
    epoch(run.vil)
    assert run.same(ends[0].fingerprint())


def test_back_to_the_end_of_a_round() -> None:
    """As a search for a learning rate does: what state_dict gave there is not written by the rounds that follow."""
    run = Run("everything")
    epoch(run.vil)
    saved, theta = run.vil.state_dict(), copy.deepcopy(run.case.model.state_dict())
    ends = []
    for _ in range(3):
        epoch(run.vil)
        epoch(run.vil)
        ends.append(run.fingerprint())
        run.case.model.load_state_dict(theta)
        run.vil.load_state_dict(saved)
        assert run.vil.rounds == 1
    assert run.same(run.fingerprint())
    assert all(Run.equal(end, ends[0]) for end in ends)
    for _ in zip(range(4), run.vil.stages()):
        pass
    run.vil.load_state_dict(saved)  # from the middle of a round
    epoch(run.vil)
    epoch(run.vil)
    assert run.same(ends[0])


def test_stages_go_on_with_their_numbers() -> None:
    run = Run("everything")
    stages = list(itertools.islice(run.vil.stages(), 3))
    stages += itertools.islice(run.vil.stages(), 2)
    with hushed():
        run.vil.epoch()
    assert [stage.number for stage in stages] == [1, 2, 3, 4, 5]
    assert run.vil.rounds == 1
    assert {stage.total for stage in stages} == {3 + 2 + 2}
    iterator = run.vil.stages()
    assert run.vil.rounds == 1  # nothing yet
    assert next(iterator).number == 1


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "file"])
@pytest.mark.parametrize("after", [0, 2, 6, 7])
def test_copies(after: int, copied: str) -> None:
    """With the model, at any stage: each goes its way in the same bits, and none in the other's memory."""
    run = Run("pickled")
    for _ in zip(range(after), run.vil.stages()):
        pass
    if copied == "deepcopy":
        other = copy.deepcopy(run)
    elif copied == "pickle":
        other = pickle.loads(pickle.dumps(run))
    else:
        other = from_file(run, weights_only=False)
    before, state = run.fingerprint(), random_state()
    epoch(other.vil)
    assert Run.equal({**run.fingerprint(), "random": 0}, {**before, "random": 0})
    end = other.fingerprint()
    run.set_random_state(state)
    epoch(run.vil)
    assert run.same(end)


def test_another_number_of_alpha_epochs() -> None:
    """Fewer than are done already end the search; more go on with it."""
    for before, then, more in ((5, 2, 0), (5, 3, 0), (5, 4, 1), (3, 6, 3)):
        run = Run("everything", alpha_epochs=before)
        for _ in zip(range(3 + 1 + 3), run.vil.stages()):
            pass
        other = Run("everything", alpha_epochs=then)
        other.load(run.save())
        with hushed():
            kinds = [stage.kind for stage in itertools.islice(other.vil.stages(), 20)]
        assert kinds == ["alpha"] * more + ["move"]


def test_killed_in_the_middle_of_a_stage(tmp_path: Path) -> None:
    """SIGKILL; another process goes on from the last file, and ends where an undisturbed run does."""
    path, stages = tmp_path / "state.pt", 11
    command = [sys.executable, "-m", "tests.contracts.test_alphavil_state", str(path), str(ROUNDS)]
    with subprocess.Popen([*command, "slow"], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        lines = [first.stdout.readline() for _ in range(stages)]
        first.send_signal(signal.SIGKILL)
    assert lines[-1].split()[0] == str(stages)
    assert first.wait() == -signal.SIGKILL
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > stages
    run = Run("everything")
    finished(run, ROUNDS)
    ended = Run("everything", seed=8)
    ended.load(path.read_bytes())
    assert ended.same(run.fingerprint())


# ---- in the middle of a stage ---------------------------------------------------------------------------------------


class Bomb:
    """Raises when it is asked the n-th time."""

    def __init__(self) -> None:
        self.count, self.at, self.error = 0, -1, Exception

    def tick(self) -> None:
        self.count += 1
        if self.count == self.at:
            raise self.error("bomb")


class Ticking:
    def __init__(self, of: Any, bomb: Bomb):
        self.of, self.bomb = of, bomb

    def __iter__(self) -> Iterator[Any]:
        self.bomb.tick()
        for each in self.of:
            self.bomb.tick()
            yield each


def with_bomb(bomb: Bomb) -> tuple[Case, AlphaVIL]:
    """In losses, data and optimizers of two tasks: before and after each of their steps."""
    case = Case(tasks=["size", "kind"], count=2, norm=True, dropout=0.3, noise=0.1)

    def spied(loss: Any) -> Any:
        def call(model: Any, batch: Any) -> Tensor:
            bomb.tick()
            value: Tensor = loss(model, batch)
            bomb.tick()
            return value

        return call

    def maker(make: Any) -> Any:
        def call(parameters: list[Tensor]) -> Any:
            bomb.tick()
            optimizer = make(parameters)
            step = optimizer.step

            def ticking(*arguments: Any) -> Any:
                bomb.tick()
                result = step(*arguments)
                bomb.tick()
                return result

            optimizer.step = ticking
            return optimizer

        return call

    for name, task in list(case.tasks.items()):
        dev = None if task.dev is None else Ticking(task.dev, bomb)
        case.change(name, loss=spied(task.loss), train=Ticking(task.train, bomb), dev=dev)
    vil = case.vil(make_optimizer=maker(ADAM), alpha_optimizer=maker(ALPHA["adam"]))
    vil.task_weights += torch.tensor([0.25, -0.5])
    return case, vil


ERRORS = [KeyboardInterrupt, RuntimeError, SystemExit, MemoryError, StopIteration, GeneratorExit]


def test_an_error_anywhere_in_a_stage() -> None:
    """Model, weights and random state are as before the stage; the stage done over ends where it would have."""
    bomb = Bomb()
    case, vil = with_bomb(bomb)
    epoch(vil)
    calls, theta, weights, state = bomb.count, contents(case.model), vil.task_weights.clone(), random_state()
    assert calls > 50
    for at in range(1, calls + 1):
        bomb = Bomb()
        case, vil = with_bomb(bomb)
        bomb.at, bomb.error = at, ERRORS[at % len(ERRORS)]
        before = (contents(case.model), vil.task_weights.clone(), random_state())
        with pytest.raises((bomb.error, RuntimeError)), hushed():  # noqa: PT012
            for _ in vil.stages():
                before = (contents(case.model), vil.task_weights.clone(), random_state())
        assert same_values(contents(case.model), before[0]), at
        assert torch.equal(vil.task_weights, before[1]), at
        assert same_random_state(random_state(), before[2]), at
        assert all(module.training for module in case.model.modules())
        assert not any(p.grad is not None for p in case.model.parameters())
        epoch(vil)
        assert vil.rounds == 1
        assert same_values(contents(case.model), theta), at
        assert torch.equal(vil.task_weights, weights), at
        assert same_random_state(random_state(), state), at


def test_warnings_that_are_errors() -> None:
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


def test_a_generator_that_is_dropped() -> None:
    """Left in the middle by break, close or an error of the loop's own: epoch() goes on."""
    want = Run("everything")
    epoch(want.vil)
    run = Run("everything")
    for stage in run.vil.stages():
        if stage.number == 2:
            break
    iterator = run.vil.stages()
    next(iterator)
    iterator.close()
    with pytest.raises(OSError, match="mine"):  # noqa: PT012
        for _ in run.vil.stages():
            raise OSError("mine")
    epoch(run.vil)
    assert run.same(want.fingerprint())


# ---- states that do not fit -----------------------------------------------------------------------------------------


def other_tasks(how: str) -> AlphaVIL:
    case = Case()
    if how == "fewer":
        del case.tasks["marks"]
    elif how == "another order":
        case.tasks = dict(reversed(case.tasks.items()))
    elif how == "another name":
        case.tasks = {"weight" if name == "marks" else name: task for name, task in case.tasks.items()}
    elif how == "another target":
        case = Case(target="kind")
    elif how == "another model":
        case.model.unseen = torch.nn.Parameter(torch.zeros(3))
    elif how == "no heads":
        case = Case(heads=False)
    elif how == "a loader":
        task = case.tasks["kind"]
        loader = torch.utils.data.DataLoader(task.train, generator=torch.Generator(), shuffle=True, batch_size=None)  # type: ignore[arg-type,var-annotated]
        case.change("kind", train=loader)
    elif how == "other buffers":
        case.model.dropout = torch.nn.BatchNorm1d(8, affine=False)
    vil = AlphaVIL(case.model, case.tasks, case.target, make_optimizer=SGD, alpha_epochs=2)
    next(vil.stages())
    return vil


OTHERS = {
    "fewer": "tasks",
    "another order": "tasks",
    "another name": "tasks",
    "another target": "target",
    "another model": "deltas",
    "no heads": "deltas",
    "a loader": "random",
    "other buffers": "buffers",
}


@pytest.mark.parametrize("how", OTHERS)
def test_states_of_others(how: str) -> None:
    """One line, and nothing has changed: what was begun goes on in the bits it would have had."""
    state = other_tasks(how).state_dict()
    case = Case()
    vil = case.vil()
    for _ in zip(range(2), vil.stages()):
        pass
    before, numbers = contents(case.model), random_state()
    want = copy.deepcopy(vil)
    with pytest.raises(ValueError, match=r"AlphaVIL: load_state_dict: ") as error:
        vil.load_state_dict(state)
    one_line(error.value, OTHERS[how], "expected", "found")
    assert same_values(contents(case.model), before)
    assert same_random_state(random_state(), numbers)
    epoch(vil)
    Run.set_random_state(numbers)
    epoch(want)
    assert same_values(contents(case.model), contents(want.model))
    assert torch.equal(vil.task_weights, want.task_weights)


@pytest.mark.parametrize("what", ["model", "nothing", "list", "none"])
def test_no_states_at_all(what: str) -> None:
    case = Case()
    vil = case.vil()
    state: Any = {"model": case.model.state_dict(), "nothing": {}, "list": [], "none": None}[what]
    with pytest.raises((ValueError, TypeError), match="AlphaVIL: load_state_dict: ") as error:
        vil.load_state_dict(state)
    one_line(error.value, "expected", "found")


def test_states_without_random_numbers() -> None:
    """As a user makes who wants new ones, or in words."""
    run = Run("everything")
    epoch(run.vil)
    state = {key: value for key, value in run.vil.state_dict().items() if key != "random"}
    before = random_state()
    with pytest.raises(ValueError, match="AlphaVIL: load_state_dict: ") as error:
        run.vil.load_state_dict(state)
    one_line(error.value, "expected", "found")
    assert same_random_state(random_state(), before)
    assert isinstance(run.case.tasks["size"], Task)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
