"""The command ``mtlgrad``: ``info`` and ``train``."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from .recipes.base import Settings, TrainError
from .recipes.clothing import RECIPES
from .recipes.comparison import Comparison, Stop
from .recipes.weighting import METHODS

COVARIANCES = ("full", "block", "kron", "diag")
BAD_INPUT, STOPPED = 2, 130


class _Parser(argparse.ArgumentParser):
    """argparse, with errors of one line: no usage in front."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message}\n")


def _one_of(names: Iterable[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(names)}, found {text!r}")
        return text

    return parse


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        with contextlib.suppress(ValueError):
            if low <= (value := int(text)) <= high:
                return value
        raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, found {text!r}")

    return parse


def _positive(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0.0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")


def _not_negative(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0.0 <= (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"expected a number from 0, found {text!r}")


def _name(text: str) -> str:
    if not text or text != os.path.basename(text) or text.startswith("."):
        raise argparse.ArgumentTypeError(f"expected the plain name of a folder, found {text!r}")
    return text


def _device(text: str) -> str:
    kind, _, index = text.partition(":")
    if kind not in ("cpu", "cuda") or (index and (kind == "cpu" or not index.isdecimal())) or text.endswith(":"):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, found {text!r}")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mtlgrad", description="Multi-task learning for PyTorch: gradients of several tasks, merged.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,train}")
    info = commands.add_parser("info", help="what was compiled, and which device is usable")
    info.add_argument("--json", action="store_true", help="as JSON")

    train = commands.add_parser(
        "train",
        help="train a real multi-task model and compare methods",
        argument_default=argparse.SUPPRESS,  # only what was given is set: --resume takes nothing else
    )
    add, default = train.add_argument, Settings()
    add("--data", type=_one_of(RECIPES), metavar="NAME", help=f"{', '.join(RECIPES)} (default: {default.data})")
    which, methods = train.add_mutually_exclusive_group(), ", ".join(METHODS)
    which.add_argument("--method", type=_one_of(METHODS), help=f"{methods} (default: {', '.join(default.methods)})")
    several = "several of them, in one run and table"
    which.add_argument("--compare", type=_one_of(METHODS), nargs="+", metavar="METHOD", help=several)
    add("--seeds", type=_whole(1, 1000), metavar="N", help=f"train everything N times (default: {default.seeds})")
    add("--epochs", type=_whole(1, 100_000), metavar="N", help=f"(default: {default.epochs})")
    add("--batch-size", type=_whole(1, 1_000_000), metavar="N", help=f"(default: {default.batch_size})")
    add("--lr", type=_positive, help=f"Adam's learning rate, cosine schedule (default: {default.lr})")
    add("--gamma", type=_positive, help=f"bayesagg: the last layers' prior (default: {default.gamma})")
    power = "bayesagg: exponents of the precisions, regression and classification tasks (default: {} {})"
    add("--power", type=_not_negative, nargs=2, metavar=("R", "C"), help=power.format(*default.power))
    warmup = f"bayesagg: epochs of plain sum first (default: half of all, at most {default.warmup})"
    add("--warmup", type=_whole(1, 100_000), metavar="N", help=warmup)
    structures = ", ".join(COVARIANCES)
    covariance = f"bayesagg: structure of the multiclass posterior, {structures} (default: {default.covariance})"
    add("--covariance", type=_one_of(COVARIANCES), help=covariance)
    add("--device", type=_device, help=f"cpu, cuda or cuda:N (default: {default.device}: the model is small)")
    add("--threads", type=_whole(1, 1024), metavar="N", help=f"threads on the CPU (default: {default.threads})")
    add("--out", type=Path, metavar="DIR", help="where the run's folder is made (default: runs)")
    add("--name", type=_name, help="name of the run's folder (default: date, time and data set)")
    add("--resume", type=Path, metavar="PATH", help="continue a run, given its folder; takes no other settings")
    return parser


def _settings(given: dict[str, Any]) -> Settings:
    """The settings that the options given stand for; a method named twice runs once."""
    if "method" in given or "compare" in given:
        methods = given.pop("compare", None) or [given.pop("method")]
        given["methods"] = tuple(dict.fromkeys(methods))
    if "power" in given:
        given["power"] = tuple(given["power"])
    # A short run is not all warm-up, unless that is asked for.
    given.setdefault("warmup", max(1, min(Settings.warmup, given.get("epochs", Settings.epochs) // 2)))
    return Settings(**given)


@contextlib.contextmanager
def _signals(stop: Stop) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM asks to stop after the step at hand; a second one no longer waits."""

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _train(arguments: argparse.Namespace) -> int:
    missing = [name for name in ("rich", "matplotlib") if not _installed(name)]
    if missing:
        sys.stderr.write(f"mtlgrad train: needs {' and '.join(missing)}, not found; pip install 'mtlgrad[train]'\n")
        return BAD_INPUT
    stop = Stop()
    with _signals(stop):
        try:
            given = {k: v for k, v in vars(arguments).items() if k != "command"}
            resume = given.pop("resume", None)
            if resume is not None and given:
                option = "--" + next(iter(given)).replace("_", "-")
                raise TrainError(f"argument --resume: takes its settings from the run, found {option} as well; drop it")
            if resume is not None:
                comparison = Comparison.resume(resume)
            else:
                out, name = given.pop("out", Path("runs")), given.pop("name", None)
                comparison = Comparison.start(_settings(given), out, name)
            return _run(comparison, stop)
        except TrainError as error:
            sys.stderr.write(f"mtlgrad train: {error}\n")
            return BAD_INPUT


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # a stand-in without a spec
        return False


def _run(comparison: Comparison, stop: Stop) -> int:
    """Runs or continues a comparison under the eyes of the user."""
    from rich.console import Console

    from .recipes import figures, report
    from .recipes.progress import LineProgress, LiveProgress, say, show_table

    settings, tasks, folder = comparison.settings, comparison.recipe.tasks, comparison.folder
    console = Console()
    progress: LiveProgress | LineProgress
    if console.is_terminal:
        progress = LiveProgress(console, settings, comparison.jobs, tasks, len(comparison.results))
    else:
        console = Console(width=max(console.width, 110))
        progress = LineProgress(console, comparison.jobs, tasks)
    say(console, f"{settings.data}: {', '.join(settings.methods)} and single-task nets; run folder {folder.path}")
    with progress:
        finished = comparison.run(progress, stop)
    columns = report.summaries(comparison.results, settings.methods, tasks)
    if columns:
        done, count = len(comparison.results), len(comparison.jobs)
        part = f"; stopped after {done} of {count} trainings" if done < count else ""
        plural = "s" if settings.seeds > 1 else ""
        what = f"{settings.data}, test split, {settings.epochs} epochs, {settings.seeds} seed{plural} (mean ± sd)"
        say(console, what + part)
        show_table(console, report.rows(columns, tasks))
    if "bayesagg" in settings.methods and settings.epochs <= settings.warmup:
        say(
            console,
            f"bayesagg: all {settings.epochs} epochs were warm-up, that is, the plain sum; give it more --epochs",
        )
    if not finished:
        say(console, f"stopped; what was done is saved: mtlgrad train --resume {folder.path}")
        return STOPPED
    figures.write(comparison.results, settings, tasks, folder)
    say(console, f"results.csv, history.csv, figures and checkpoints: {folder.path}")
    return STOPPED if stop.requested else 0


def _info(arguments: argparse.Namespace) -> int:
    from . import build_info

    info = build_info()
    if arguments.json:
        print(json.dumps(info, indent=2, default=str))
        return 0
    width = max(len(str(key)) for key in info)
    for key, value in info.items():
        print(f"{key:<{width}}  {'-' if value in (None, '') else value}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 2 for bad input (one line on stderr), 130 when stopped."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # an ASCII terminal gets "?" for the arrows, not a traceback
    try:
        arguments = _parser().parse_args(argv)
        return _info(arguments) if arguments.command == "info" else _train(arguments)
    except KeyboardInterrupt:
        return STOPPED
    except BrokenPipeError:  # `mtlgrad train | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
