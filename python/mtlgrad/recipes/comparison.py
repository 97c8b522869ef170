"""A run: methods on one recipe, at learning rates chosen on the validation split, over seeds; stopped and resumed."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import math
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from .. import data
from ..world.ranks import world_of
from . import report
from .alphavil import AlphaVILTraining
from .folder import RunFolder, read_checkpoint
from .methods import ALPHAVIL, default_lr
from .recipe import Recipe, TrainError
from .tasks import Task
from .training import SINGLE, Job, Result, Training, features_of, moved

#: What `--tune-lr` tries on seed 0; the two best go on to the other seeds.
RATES = (1e-3, 3e-3, 8e-3, 2e-2)


class Interrupted(Exception):
    """Ctrl-C or SIGTERM arrived; raised between two steps, never inside one."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a run computes; kept in its checkpoint, so that resuming needs no arguments."""

    recipe: str
    methods: tuple[str, ...]
    seeds: int
    epochs: int
    batch_size: int
    rates: tuple[float, ...]  #: several: the best on the validation split; none: the method's own
    preference: tuple[float, ...] | None
    target: str | None  #: alphaVIL's
    device: str
    threads: int
    tensorboard: bool
    digest: str = ""  #: of the recipe's file

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Settings:
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in values.items()}
        return Settings(**known)


@functools.cache
def packaged() -> dict[str, type[Recipe]]:
    """Find the recipes that come with the package, by name: the classes in files of `mtlgrad.data` that have one."""
    found: dict[str, type[Recipe]] = {}
    for module in pkgutil.iter_modules(data.__path__):
        values = vars(importlib.import_module(f"{data.__name__}.{module.name}")).values()
        found |= {v.name: v for v in values if isinstance(v, type) and issubclass(v, Recipe) and v.name}
    return dict(sorted(found.items()))


def recipe_class(name: str) -> type[Recipe]:
    """Find a recipe: one of `packaged`, a file, or package.module:Class."""
    where = "argument --recipe"
    known = packaged()
    if name in known:
        return known[name]
    path, _, attribute = name.rpartition(":") if ":" in name else (name, "", "")
    if path.endswith(".py"):
        spec = importlib.util.spec_from_file_location("mtlgrad_recipe", path)
        if spec is None or spec.loader is None or not Path(path).is_file():
            raise TrainError(
                f"{where}: expected a file, found none at {path}; `mtlgrad recipe > my_recipe.py` makes one"
            )
        module_object = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module_object  # for workers and dataclasses
        spec.loader.exec_module(module_object)
    elif attribute:
        try:
            module_object = importlib.import_module(path)
        except ModuleNotFoundError as error:
            raise TrainError(f"{where}: {name}: {error}") from None
    else:
        names = ", ".join(known)
        raise TrainError(f"{where}: expected one of {names}, a file.py or package.module:Class, found {name!r}")
    own = [value for value in vars(module_object).values() if _is_recipe(value, module_object.__name__)]
    classes = [c for c in own if attribute in ("", c.__name__)]
    if len(classes) != 1:
        names = ", ".join(c.__name__ for c in own) or "none"
        raise TrainError(f"{where}: expected one class derived from mtlgrad.recipes.Recipe in {path}, found {names}")
    return classes[0]


def _is_recipe(value: Any, module: str) -> bool:
    return isinstance(value, type) and issubclass(value, Recipe) and value.__module__ == module


def digest(name: str) -> str:
    """Return a digest of the recipe's file; "" where it is no file."""
    return hashlib.sha256(Path(name).read_bytes()).hexdigest() if name.endswith(".py") else ""


def checked(recipe: Recipe) -> Recipe:
    """Return the recipe, or say what it lacks: before a training begins, not in its first step."""
    kind = type(recipe).__name__
    for name in ("tasks", "train", "validation", "test"):
        if not hasattr(recipe, name):
            raise TrainError(f"{kind}.__init__: expected it to set self.{name}, found it unset")
    for name in ("train", "validation", "test"):
        data = getattr(recipe, name)
        if not (hasattr(data, "__getitem__") and hasattr(data, "__len__") and len(data)):
            raise TrainError(f"{kind}.{name}: expected a Dataset with items and a length, found {type(data).__name__}")
    names = [task.name for task in recipe.tasks]
    if not names or len(set(names)) < len(names):
        raise TrainError(f"{kind}.tasks: expected different names, at least one, found {names}")
    inputs_and_targets = recipe.train[0]
    if not isinstance(inputs_and_targets, tuple) or len(inputs_and_targets) != 2:
        raise TrainError(f"{kind}.train: expected items (inputs, targets), found {type(inputs_and_targets).__name__}")
    missing = [name for name in names if name not in inputs_and_targets[1]]
    if missing:
        raise TrainError(f"{kind}.train: expected a target a task, found none for {', '.join(missing)}")
    return recipe


def check_first_batch(recipe: Recipe, device: torch.device) -> None:
    """Send a batch through model, losses and metrics: what does not fit is said by task, before any training."""
    training = Training(recipe, Job(SINGLE, 0, 1e-3), 1, recipe.batch_size, device)
    inputs, targets = moved(next(iter(training.loader)), device)
    try:
        features = features_of(training.model, inputs)
    except Exception as error:
        raise TrainError(f"{type(recipe).__name__}.model: backbone: {one_line(error)}") from error
    heads: Any = training.model.heads
    for task in recipe.tasks:
        where, found = f"{type(recipe).__name__}: task {task.name!r}", ""
        try:
            output, target = heads[task.name](features), targets[task.name]
            found = f" (outputs {[*output.shape]} {output.dtype}, labels {[*target.shape]} {target.dtype})"
            loss = task.loss(output, target)
            task.metric().update(output.detach(), target)
        except Exception as error:
            classes = "; classes count from 0, and -100 is no label" if task.kind == "multiclass" else ""
            raise TrainError(f"{where}: {one_line(error)}{found}{classes}") from error
        if not loss.isfinite().all():
            what = "NaN in the inputs, or in labels that the loss does not leave out?"
            raise TrainError(
                f"{where}: expected a finite loss of the first batch, found {float(loss.detach().sum())}; {what}"
            )


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


class Watcher(Protocol):
    """What the trainings tell while they run; see progress.py."""

    def start(self, number: int, training: Training) -> None: ...
    def step(self, epoch: int, step: int, losses: torch.Tensor) -> None: ...
    def epoch_done(self, training: Training) -> None: ...
    def done(self, number: int, result: Result) -> None: ...


class Comparison:
    """A run: what is done, what is in progress, and where it is kept (None on all ranks but the first)."""

    def __init__(self, settings: Settings, folder: RunFolder | None, state: dict[str, Any]):
        self.settings, self.folder = settings, folder
        self.results = [Result.from_dict(values) for values in state["done"]]
        self.current: dict[str, Any] | None = state["current"]
        torch.set_num_threads(settings.threads)
        self.device = torch.device(settings.device)
        if self.device.type == "cuda" and dist.is_initialized():
            self.device = torch.device("cuda", dist.get_node_local_rank(0))
            torch.cuda.set_device(self.device)
        self.make_recipe = recipe_class(settings.recipe)
        self._recipes: dict[int, Recipe] = {}
        self.tasks: list[Task] = list(self.recipe(0).tasks)
        self.names = [task.name for task in self.tasks]
        self.contenders = [f"{name} alone" for name in self.names] + list(settings.methods)
        rates = max(len(settings.rates), 1)
        self.total = len(self.contenders) * (rates + (settings.seeds - 1) * min(rates, 2))  #: trainings

    @staticmethod
    def start(settings: Settings, out: Path, name: str | None) -> Comparison:
        state: dict[str, Any] = {"settings": asdict(settings), "done": [], "current": None}
        folders: list[RunFolder] = []
        stem = Path(settings.recipe).stem.replace(":", "-")
        from_rank0(lambda: folders.append(RunFolder.create(out, name, stem, state)))
        return Comparison(settings, folders[0] if folders else None, state)

    @staticmethod
    def resume(path: Path) -> Comparison:
        folders: list[RunFolder] = []

        def read() -> dict[str, Any]:
            folders.append(RunFolder.open(path))
            return read_checkpoint(folders[0].path)

        state = from_rank0(read)
        try:
            settings = Settings.from_dict(state["settings"])
        except TypeError as error:
            raise TrainError(
                f"argument --resume: expected one of this version, found {path} of another ({error}); start anew"
            ) from None
        if settings.digest != digest(settings.recipe):
            raise TrainError(f"argument --resume: {settings.recipe} has changed since the run began; start anew")
        return Comparison(settings, folders[0] if folders else None, state)

    def recipe(self, seed: int) -> Recipe:
        if seed not in self._recipes:
            torch.manual_seed(seed)  # for what a recipe draws without a generator: the same on all ranks
            self._recipes = {seed: checked(self.make_recipe(seed))}  # one at a time: memory
        return self._recipes[seed]

    def rates(self, method: str) -> tuple[float, ...]:
        return self.settings.rates or (default_lr(method),)

    def next_job(self) -> Job | None:
        """Return what is to be trained now: seed by seed, so that what is complete at any time can be compared."""
        done = {(r.job.contender, r.job.seed, r.job.lr) for r in self.results}
        for seed in range(self.settings.seeds):
            for contender in self.contenders:
                task = contender.removesuffix(" alone") if contender.endswith(" alone") else None
                method = SINGLE if task is not None else contender
                for lr in self.finalists(contender) if seed else self.rates(method):
                    if (contender, seed, lr) not in done:
                        return Job(method, seed, lr, task)
        return None

    def _scores(self, contender: str, lr: float) -> dict[int, float]:
        """Return, a seed, what is less for better validation metrics at the end of a training at this rate."""
        own = [r for r in self.results if r.job.contender == contender and r.job.lr == lr]
        return {r.job.seed: math.inf if r.error else self._score(r) for r in own}

    def _score(self, result: Result) -> float:
        tasks = [self.tasks[self.names.index(name)] for name in result.tasks]
        if result.job.method == ALPHAVIL:  # by what it is for
            at = self.names.index(self.settings.target or "")
            return report.score(result.history[-1]["metric"][at : at + 1], report.higher(tasks[at : at + 1]))
        return report.score(result.history[-1]["metric"], report.higher(tasks))

    def finalists(self, contender: str) -> list[float]:
        """Return the two rates with the best validation metrics of seed 0, which are run on the other seeds."""
        tried = dict.fromkeys(r.job.lr for r in self.results if r.job.contender == contender and not r.job.seed)
        failed = [r.job.lr for r in self.results if r.job.contender == contender and not r.job.seed and r.error]
        if len(failed) == len(tried):
            raise TrainError(f"{contender}: no learning rate of {', '.join(f'{lr:g}' for lr in tried)} worked")
        return sorted((lr for lr in tried if lr not in failed), key=lambda lr: self._scores(contender, lr)[0])[:2]

    def best_rate(self, contender: str) -> float:
        """Return the finalist with the best validation metrics, the mean over the seeds that all finalists have."""
        scores = {lr: self._scores(contender, lr) for lr in self.finalists(contender)}
        seeds = set.intersection(*(set(found) for found in scores.values()))
        return min(scores, key=lambda lr: sum(scores[lr][seed] for seed in seeds))

    def chosen(self) -> list[Result]:
        """Return the finished trainings that are compared: at each contender's best rate."""
        at_hand = []
        for contender in self.contenders:
            own = [r for r in self.results if r.job.contender == contender]
            if any(not r.error for r in own if r.job.seed == 0):
                rate = self.best_rate(contender)
                at_hand += [r for r in own if r.job.lr == rate and not r.error]
        return at_hand

    def check(self) -> None:
        """Say what would end a training later: a batch that does not fit, a method that does not take the tasks."""
        check_first_batch(self.recipe(0), self.device)
        for method in self.settings.methods:
            self._training(Job(method, 0, 1e-3))

    def run(self, watcher: Watcher, stop: Callable[[], bool]) -> bool:
        """Train what is left. True when all is done, False when it was stopped; the files are complete either way."""
        try:
            if not self.results and self.current is None:
                self.check()
            while (job := self.next_job()) is not None:
                self._train(job, watcher, stop)
        except Interrupted:
            self.write_tables()
            return False
        except BaseException as error:
            if self.folder is not None and not self.results and self.current is None:
                self.folder.discard()
            elif self.folder is not None and isinstance(error, TrainError):
                raise TrainError(f"{error}; what was done is saved: --resume {self.folder.path}") from error.__cause__
            raise
        return True

    def _training(self, job: Job) -> Training:
        settings, recipe = self.settings, self.recipe(job.seed)
        arguments = (recipe, job, settings.epochs, settings.batch_size, self.device)
        if job.method == ALPHAVIL:
            assert settings.target is not None
            return AlphaVILTraining(*arguments, settings.target)
        return Training(*arguments, settings.preference)

    def _train(self, job: Job, watcher: Watcher, stop: Callable[[], bool]) -> None:
        number = len(self.results)

        def watch(epoch: int, step: int, losses: torch.Tensor) -> None:
            if any_rank(stop, step):
                raise Interrupted
            watcher.step(epoch, step, losses)

        training = None
        try:
            training = self._training(job)
            if self.current is not None:
                training.load_state_dict(self.current)
            watcher.start(number, training)
            while training.epoch < self.settings.epochs:
                training.run_epoch(watch)
                self.current = training.state_dict()
                self._checkpoint()
                watcher.epoch_done(training)
            result = training.finish()
        except (RuntimeError, ValueError, IndexError, TrainError) as error:  # of a method, of torch, of a recipe
            words = f"{job.title}: {one_line(error)}"
            others = [lr for lr in self.rates(job.method) if lr != job.lr]
            if training is None or not (others and isinstance(error, TrainError)):
                raise TrainError(words) from error
            result = training.result
            result.error = words
        self.results.append(result)
        self.current = None
        self._checkpoint()
        self.write_tables()
        watcher.done(number, result)

    def _checkpoint(self) -> None:
        if self.folder is not None:
            done = [result.to_dict() for result in self.results]
            state = {"settings": asdict(self.settings), "done": done, "current": self.current}
            self.folder.save_checkpoint(state)

    def write_tables(self) -> None:
        """Write results.csv, and history.csv, with the epochs of a training stopped halfway."""
        if self.folder is not None:
            started = [] if self.current is None else [Result.from_dict(self.current["result"])]
            self.folder.write("results.csv", report.results_csv(self.results, self.chosen(), self.tasks))
            self.folder.write("history.csv", report.history_csv([*self.results, *started]))


def from_rank0(make: Callable[[], Any]) -> Any:
    """Return what rank 0 makes, on all ranks; where it cannot, the others end without a word."""
    if not dist.is_initialized():
        return make()
    parcel: list[Any] = [None, ""]
    if dist.get_rank() == 0:
        try:
            parcel = [make(), ""]
        except TrainError as error:
            parcel = [None, str(error)]
    dist.broadcast_object_list(parcel, 0, device=torch.device("cpu"))
    if parcel[1]:
        raise TrainError(parcel[1] if dist.get_rank() == 0 else "")
    return parcel[0]


def any_rank(stop: Callable[[], bool], step: int) -> bool:
    """Return whether to stop; several ranks ask one another now and then, in the same step."""
    world = world_of(None)
    if world.size == 1:
        return stop()
    return step % 10 == 0 and any(row[0] for row in world.gather_numbers([stop()], torch.device("cpu")))
