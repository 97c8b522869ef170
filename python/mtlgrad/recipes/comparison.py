"""Several trainings, one after another, in one run folder: methods x seeds, and single-task nets as the yardstick."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from . import report
from .base import Interrupted, Job, Result, Settings, TrainError
from .clothing import Clothing
from .folder import CHECKPOINT, ElsewhereFolder, Files, RunFolder
from .multimnist import Digits
from .parts import Recipe
from .river import River
from .rounds import training
from .team import any_rank, broadcast_from_rank0, lost, one_line, place, words_for_lost
from .training import Training

RECIPES: dict[str, type[Recipe]] = {recipe.name: recipe for recipe in (Clothing, River, Digits)}


_Opened = tuple[Files, "dict[str, Any] | None"]


class Stop:
    """Set by a signal, looked at between two steps."""

    requested = False


class Watcher(Protocol):
    """What the trainings tell while they run; see progress.py."""

    def start(self, number: int, trainer: Training) -> None: ...
    def step(self, epoch: int, step: int, losses: Tensor) -> None: ...
    def epoch_done(self, trainer: Training) -> None: ...
    def done(self, number: int, result: Result) -> None: ...


class Watchers:
    """Several, or none, in place of one."""

    def __init__(self, *watchers: Watcher):
        self.watchers = watchers

    def start(self, number: int, trainer: Training) -> None:
        for watcher in self.watchers:
            watcher.start(number, trainer)

    def step(self, epoch: int, step: int, losses: Tensor) -> None:
        for watcher in self.watchers:
            watcher.step(epoch, step, losses)

    def epoch_done(self, trainer: Training) -> None:
        for watcher in self.watchers:
            watcher.epoch_done(trainer)

    def done(self, number: int, result: Result) -> None:
        for watcher in self.watchers:
            watcher.done(number, result)


def jobs_of(settings: Settings, recipe: Recipe) -> list[Job]:
    """Seed by seed, so that what is complete when somebody stops the run can be compared."""
    jobs = []
    for seed in range(settings.seeds):
        jobs += [Job("sum", seed, task) for task in range(len(recipe.tasks))]
        jobs += [Job(method, seed, optimizer=optimizer) for method, optimizer in settings.trainings]
    return jobs


class Comparison:
    """A run: what is done, what is in progress, and where it is kept."""

    def __init__(self, settings: Settings, recipe: Recipe, folder: Files, state: dict[str, Any] | None = None):
        self.settings, self.recipe, self.folder = settings, recipe, folder
        self.jobs = jobs_of(settings, recipe)
        self.results: list[Result] = [] if state is None else [Result.from_dict(r) for r in state["done"]]
        self.current: dict[str, Any] | None = None if state is None else state["current"]

    @staticmethod
    def start(settings: Settings, out: Path, name: str | None) -> Comparison:
        recipe = _recipe(settings)

        def create() -> _Opened:
            state = _state(settings, [], None)
            return RunFolder.create(out, name, settings.data, state), None

        folder, _ = broadcast_from_rank0(create, _elsewhere)
        return Comparison(settings, recipe, folder)

    @staticmethod
    def resume(path: Path) -> Comparison:
        folder, state = broadcast_from_rank0(lambda: RunFolder.open(path), _elsewhere)
        assert state is not None
        try:
            settings = Settings.from_dict(state["settings"])
            return Comparison(settings, _recipe(settings), folder, state)
        except (TypeError, KeyError) as error:
            folder.close()
            raise TrainError(
                f"argument --resume: expected a checkpoint of this version, found {folder.path / CHECKPOINT} "
                f"of another ({error}); start anew without --resume"
            ) from None

    def run(self, watcher: Watcher, stop: Stop) -> bool:
        """Trains what is left. True when all is done, False when it was stopped; the files are complete either way."""
        try:
            for number in range(len(self.results), len(self.jobs)):
                self._train(number, watcher, stop)
        except Interrupted:
            self.write_tables()
            return False
        except BaseException as error:
            if not self.results and self.current is None:
                self.folder.discard()
            elif isinstance(error, TrainError):
                saved = f"what was done is saved: --resume {self.folder.path}"
                raise TrainError(f"{error}; {saved}") from error.__cause__
            raise
        return True

    def _train(self, number: int, watcher: Watcher, stop: Stop) -> None:
        job = self.jobs[number]
        try:
            trainer = training(self.recipe, job, self.settings)
            if self.current is not None:
                trainer.load_state_dict(self.current)
            watcher.start(number, trainer)

            def watch(epoch: int, step: int, losses: Tensor) -> None:
                if any_rank(stop.requested):
                    raise Interrupted
                watcher.step(epoch, step, losses)

            while trainer.epoch < self.settings.epochs:
                trainer.run_epoch(watch)
                state = trainer.state_dict()
                self._checkpoint(state)
                self.current = state
                watcher.epoch_done(trainer)
            result = trainer.finish()
        except (RuntimeError, ValueError) as error:  # of a method that refuses what the training came to, or of torch
            what = words_for_lost(error) if lost(error) else one_line(error)
            raise TrainError(f"{job.title(self.recipe.tasks)}: {what}") from error
        if job.task is None:
            name = "-".join(job.label.split(" + "))
            self.folder.save(f"model-{name}-{job.seed}.pt", _final(trainer))
        self.results.append(result)
        self.current = None
        self._checkpoint(None)
        self.write_tables()
        watcher.done(number, result)

    def _checkpoint(self, current: dict[str, Any] | None) -> None:
        self.folder.save_checkpoint(_state(self.settings, self.results, current))

    def write_tables(self) -> None:
        """results.csv; history.csv, dominance.csv and alphavil.csv, with the epochs of a training stopped halfway."""
        started = [] if self.current is None else [Result.from_dict(self.current["result"])]
        self.folder.write("results.csv", report.results_csv(self.results, self.recipe.tasks))
        self.folder.write("history.csv", report.history_csv([*self.results, *started]))
        for name, table in (("dominance.csv", report.dominance_csv), ("alphavil.csv", report.rounds_csv)):
            text = table([*self.results, *started])
            if text is not None:
                self.folder.write(name, text)


def _state(settings: Settings, results: list[Result], current: dict[str, Any] | None) -> dict[str, Any]:
    return {"settings": settings.to_dict(), "done": [r.to_dict() for r in results], "current": current}


def _final(trainer: Training) -> dict[str, Any]:
    """What is needed to use a trained net: its weights and, for bayesagg, the posterior that predicts."""
    job = {"method": trainer.job.method, "optimizer": trainer.job.optimizer, "seed": trainer.job.seed}
    return {**job, "net": trainer.net.state_dict(), "weighting": trainer.weighting.state_dict()}


def _recipe(settings: Settings) -> Recipe:
    torch.set_num_threads(settings.threads)
    device = device_of(settings)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise TrainError(f"argument --device: expected a usable device, found {device} and {found} GPUs; take cpu")
    return RECIPES[settings.data](device)


def device_of(settings: Settings) -> torch.device:
    """This process's. Of several each has a GPU of its own, and rows."""
    device, here = torch.device(settings.device), place()
    if here is None:
        return device
    if settings.batch_size < here.size:
        expected = f"at least {here.size}, a row for each process"
        raise TrainError(f"argument --batch-size: expected {expected}, found {settings.batch_size}")
    if device.type == "cpu":
        return device
    if device.index is not None:
        raise TrainError(
            f"argument --device: expected cpu or cuda, since each of {here.size} processes takes the GPU of its "
            f"LOCAL_RANK, found {device}; take cuda"
        )
    if here.local_size > torch.cuda.device_count():
        raise TrainError(
            f"argument --device: expected a GPU for each of {here.local_size} processes, found "
            f"{torch.cuda.device_count()}; lower --nproc-per-node, or take cpu"
        )
    device = torch.device("cuda", here.local_rank)
    torch.cuda.set_device(device)  # NCCL's, too
    return device


def _elsewhere(opened: _Opened) -> _Opened:
    return ElsewhereFolder(opened[0].path), opened[1]
