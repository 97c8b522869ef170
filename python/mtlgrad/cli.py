"""The command ``mtlgrad``: ``info``, ``train``, ``toy`` and ``bench``."""

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

import torch

from .ops.align import SCALES
from .recipes import team
from .recipes.base import ADAM, Interrupted, Settings, TrainError
from .recipes.comparison import RECIPES, Comparison, Stop, Watcher, Watchers, device_of
from .recipes.optimizers import ADATASK, OPTIMIZERS, RATES
from .recipes.rounds import ROUNDS
from .recipes.toy import RULES, WITH_PREFERENCE
from .recipes.weighting import METHODS as WEIGHTINGS
from .recipes.weighting import SUMS, methods_with

METHODS = (*WEIGHTINGS, *ROUNDS)
#: Options of `train` that only some methods know, and these.
WHOSE = {
    "preference": methods_with("preference"), "scale": methods_with("scale"),
    "target": tuple(ROUNDS), "subset": tuple(ROUNDS), "alpha_epochs": ("alphavil",),
}  # fmt: skip
COVARIANCES = ("full", "block", "kron", "diag")
BAD_INPUT, STOPPED = 2, 130


class _Parser(argparse.ArgumentParser):
    """argparse, with errors of one line: no usage in front."""

    def error(self, message: str) -> NoReturn:
        who = _speaker(own=False)
        self.exit(BAD_INPUT, None if who is None else f"{self.prog}: {who}{message}\n")


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


def _fraction(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0.0 < (value := float(text)) <= 1.0:
            return value
    raise argparse.ArgumentTypeError(f"expected a number above 0 and up to 1, found {text!r}")


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
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,train,toy,bench}")
    info = commands.add_parser("info", help="what was compiled, and which device is usable")
    info.add_argument("--json", dest="as_json", action="store_true", help="as JSON")

    _add_train(commands)
    _add_toy(commands)
    bench = "time everything against its reference and its peers (in the source tree; --help lists its options)"
    commands.add_parser("bench", add_help=False, help=bench)
    return parser


def _add_train(commands: Any) -> None:
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
    apart = f"{', '.join(ADATASK)} go with {', '.join(SUMS)}, and take {SUMS[0]} if no method is given"
    optimizers = f"{', '.join(OPTIMIZERS)}, several for each in turn (default: {default.optimizers[0]}); {apart}"
    add("--optimizer", type=_one_of(OPTIMIZERS), nargs="+", metavar="NAME", help=optimizers)
    add("--seeds", type=_whole(1, 1000), metavar="N", help=f"train everything N times (default: {default.seeds})")
    epochs = ", ".join(f"{recipe.epochs} for {name}" for name, recipe in RECIPES.items())
    add("--epochs", type=_whole(1, 100_000), metavar="N", help=f"(default: {epochs})")
    add("--batch-size", type=_whole(1, 1_000_000), metavar="N", help=f"(default: {default.batch_size})")
    rates = f"{RATES[ADAM]}; adatask-adagrad: {RATES['adatask-adagrad']}"
    add("--lr", type=_positive, help=f"learning rate, cosine schedule (default: {rates})")
    add("--gamma", type=_positive, help=f"bayesagg: the last layers' prior (default: {default.gamma})")
    power = "bayesagg: exponents of the precisions, regression and classification tasks (default: {} {})"
    add("--power", type=_not_negative, nargs=2, metavar=("R", "C"), help=power.format(*default.power))
    warmup = f"bayesagg: epochs of plain sum first (default: half of all, at most {default.warmup})"
    add("--warmup", type=_whole(1, 100_000), metavar="N", help=warmup)
    structures = ", ".join(COVARIANCES)
    covariance = f"bayesagg: structure of the multiclass posterior, {structures} (default: {default.covariance})"
    add("--covariance", type=_one_of(COVARIANCES), help=covariance)
    preference = f"{', '.join(WHOSE['preference'])}: the tasks' weights, one number a task (default: all the same)"
    add("--preference", type=_not_negative, nargs="+", metavar="P", help=preference)
    scale = (
        f"{', '.join(WHOSE['scale'])}: the aligned gradients' length, {', '.join(SCALES)} (default: {default.scale})"
    )
    add("--scale", type=_one_of(SCALES), help=scale)
    add("--target", metavar="NAME", help=f"{', '.join(ROUNDS)}: the task for whose good all are trained")
    subset = f"{', '.join(ROUNDS)}: the part of an epoch's batches that a task is trained on in a round"
    add("--subset", type=_fraction, metavar="PART", help=f"{subset} (default: {default.subset})")
    alpha = "alphavil: steps of LBFGS in each round's search for alpha"
    add("--alpha-epochs", type=_whole(1, 10_000), metavar="N", help=f"{alpha} (default: {default.alpha_epochs})")
    add("--device", type=_device, help=f"cpu, cuda or cuda:N (default: {default.device}: the model is small)")
    add("--threads", type=_whole(1, 1024), metavar="N", help=f"threads on the CPU (default: {default.threads})")
    add("--out", type=Path, metavar="DIR", help="where the run's folder is made (default: runs)")
    add("--name", type=_name, help="name of the run's folder (default: date, time and data set)")
    board = "losses, metrics and weights of each epoch for TensorBoard, in the run's folder"
    add("--tensorboard", action="store_true", help=board)
    add("--resume", type=Path, metavar="PATH", help="continue a run, given its folder; takes no other settings")


def _add_toy(commands: Any) -> None:
    toy = commands.add_parser("toy", help="two tasks on a landscape of two parameters: where methods end")
    add = toy.add_argument
    methods = f"which to draw, of {', '.join(RULES)} (default: sum aligned)"
    add("--methods", type=_one_of(RULES), nargs="+", default=("sum", "aligned"), metavar="METHOD", help=methods)
    preference = f"{', '.join(WITH_PREFERENCE)}, each drawn without and with it: the tasks' weights (default: 0.7 0.3)"
    unset = argparse.SUPPRESS
    add("--preference", type=_not_negative, nargs=2, default=unset, metavar=("P1", "P2"), help=preference)
    add("--steps", type=_whole(1, 10_000_000), default=35_000, metavar="N", help="(default: %(default)s)")
    add("--lr", type=_positive, default=1e-3, help="Adam's learning rate, constant (default: %(default)s)")
    scale = f"aligned: the aligned gradients' length, {', '.join(SCALES)} (default: min)"
    add("--scale", type=_one_of(SCALES), default=unset, help=scale)
    add("--out", type=Path, default=Path("runs"), metavar="DIR", help="where the folder is made (default: %(default)s)")
    add("--name", type=_name, help="name of the folder (default: date, time and toy)")


def _settings(given: dict[str, Any]) -> Settings:
    """The settings that the options given stand for; a method or optimizer named twice runs once."""
    if "method" in given or "compare" in given:
        methods = given.pop("compare", None) or [given.pop("method")]
        given["methods"] = tuple(dict.fromkeys(methods))
    if "optimizer" in given:
        given["optimizers"] = tuple(dict.fromkeys(given.pop("optimizer")))
        if set(ADATASK) & set(given["optimizers"]):
            given.setdefault("methods", (SUMS[0],))
    for name in {"power", "preference"} & given.keys():
        given[name] = tuple(given[name])
    recipe = RECIPES[given.get("data", Settings.data)]
    given.setdefault("epochs", recipe.epochs)
    # A short run is not all warm-up, unless that is asked for.
    given.setdefault("warmup", max(1, min(Settings.warmup, given["epochs"] // 2)))
    settings = Settings(**given)
    _check_options(given, settings.methods, WHOSE)
    rounds = [method for method in settings.methods if method in ROUNDS]
    merging = [method for method in settings.methods if method not in (*SUMS, *ROUNDS)]
    if (merging or rounds) and (apart := [name for name in settings.optimizers if name in ADATASK]):
        why = "whose one merged gradient leaves" if merging else "which train one task at a time and leave"
        raise TrainError(
            f"argument --optimizer: expected {ADAM} with {', '.join(merging or rounds)}, {why} nothing to keep apart, "
            f"found {', '.join(apart)}; take methods among {', '.join(SUMS)}"
        )
    tasks = [task.name for task in recipe.tasks]
    if settings.preference is not None:
        _check_preference(settings.preference, tasks)
    if rounds and settings.target not in tasks:
        found = "none" if settings.target is None else repr(settings.target)
        which = f"one of {', '.join(tasks)} with {', '.join(rounds)}"
        raise TrainError(f"argument --target: expected {which}, found {found}")
    return settings


def _check_options(given: dict[str, Any], methods: Sequence[str], whose: dict[str, tuple[str, ...]]) -> None:
    """Options that only some methods know (`whose` they are), given with none of those."""
    for name, those in whose.items():
        if name in given and not set(those) & set(methods):
            option, found = name.replace("_", "-"), ", ".join(methods)
            raise TrainError(f"argument --{option}: expected with {' or '.join(those)}, found {found}; drop it")


def _check_preference(preference: Sequence[float], tasks: Sequence[str]) -> None:
    expected = f"argument --preference: expected {len(tasks)} numbers, one a task ({', '.join(tasks)})"
    if len(preference) != len(tasks):
        raise TrainError(f"{expected}, found {len(preference)}")
    if not any(preference):
        raise TrainError(f"{expected}, not all 0; found zeros alone")


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


def _with_figures(command: str, work: Callable[[dict[str, Any], Stop], int], given: dict[str, Any]) -> int:
    """Runs what needs the extra `train` and takes a while: it can be stopped, and its errors are one line."""
    stop = Stop()
    with _signals(stop):
        try:
            _check_installed("rich", "matplotlib", extra="train")
            return work(given, stop)
        except TrainError as error:
            who = _speaker(error.__cause__ is not None)
            if who is not None and not isinstance(error, team.ElsewhereError):
                sys.stderr.write(f"mtlgrad {command}: {who}{error}\n")
            return BAD_INPUT


def _speaker(own: bool) -> str | None:
    """How an error begins, one of this process's `own` or one that all find; None where another process says it."""
    try:
        here = team.place()
    except TrainError:
        return ""
    if here is None or here.rank == 0:
        return ""
    return f"rank {here.rank}: " if own or here.local_rank == 0 else None


def _train(given: dict[str, Any], stop: Stop) -> int:
    resume = given.pop("resume", None)
    if resume is not None and given:
        option = "--" + next(iter(given)).replace("_", "-")
        raise TrainError(f"argument --resume: takes its settings from the run, found {option} as well; drop it")
    out, name = given.pop("out", Path("runs")), given.pop("name", None)
    settings = None if resume is not None else _settings(given)
    if settings is not None:
        device_of(settings)  # says what is wrong before any process waits for the others
        if settings.tensorboard:
            _check_installed("tensorboard", extra="tensorboard")
    wants_cuda = settings is None or settings.device != "cpu"
    with team.joined(team.place(), cuda=wants_cuda and torch.cuda.is_available()):
        comparison = Comparison.start(settings, out, name) if settings is not None else Comparison.resume(resume)
        return team.from_rank0(_run(comparison, stop))


def _toy(given: dict[str, Any], stop: Stop) -> int:
    from .recipes.toy_run import run

    given["methods"] = tuple(dict.fromkeys(given["methods"]))
    _check_options(given, given["methods"], {"preference": WITH_PREFERENCE, "scale": ("aligned",)})
    preference, scale = given.pop("preference", (0.7, 0.3)), given.pop("scale", "min")
    _check_preference(preference, ("task 1", "task 2"))
    try:
        run(**given, preference=preference, scale=scale, stop=stop)
    except Interrupted:
        print("stopped; nothing was written")
        return STOPPED
    return 0


def _check_installed(*names: str, extra: str) -> None:
    missing = [name for name in names if not _installed(name)]
    if missing:
        raise TrainError(f"needs {' and '.join(missing)}, not found; pip install 'mtlgrad[{extra}]'")


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # a stand-in without a spec
        return False


def _run(comparison: Comparison, stop: Stop) -> int:
    """Runs or continues a comparison under the eyes of the user, who sees rank 0's."""
    if not team.is_rank0():
        comparison.run(Watchers(), stop)
        return 0
    from .recipes import figures, report
    from .recipes.progress import LineProgress, LiveProgress, console_for_output, say, show_table

    settings, tasks, folder = comparison.settings, comparison.recipe.tasks, comparison.folder
    watchers: list[Watcher] = []
    if settings.tensorboard:
        _check_installed("tensorboard", extra="tensorboard")
        from .recipes.board import Board

        watchers.append(Board(folder.path, tasks, comparison.results))
    console = console_for_output()
    progress: LiveProgress | LineProgress
    if console.is_terminal:
        progress = LiveProgress(console, settings, comparison.jobs, tasks, len(comparison.results))
    else:
        progress = LineProgress(console, comparison.jobs, tasks)
    say(console, f"{settings.data}: {', '.join(settings.labels)} and single-task nets; run folder {folder.path}")
    with progress:
        finished = comparison.run(Watchers(progress, *watchers), stop)
    columns = report.summaries(comparison.results, settings.labels, tasks)
    if columns:
        done, count = len(comparison.results), len(comparison.jobs)
        part = f"; stopped after {done} of {count} trainings" if done < count else ""
        plural = "s" if settings.seeds > 1 else ""
        what = f"{settings.data}, test split, {settings.epochs} epochs, {settings.seeds} seed{plural} (mean ± sd)"
        say(console, what + part)
        show_table(console, report.rows(columns, tasks, settings.target))
    if "bayesagg" in settings.methods and settings.epochs <= settings.warmup:
        say(
            console,
            f"bayesagg: all {settings.epochs} epochs were warm-up, that is, the plain sum; give it more --epochs",
        )
    systems = report.systems(comparison.results, settings.labels, len(tasks))
    for line in [*systems, *report.searches(comparison.results, settings.labels)]:
        say(console, line)
    if not finished:
        say(console, f"stopped; what was done is saved: mtlgrad train --resume {folder.path}")
        return STOPPED
    figures.write(comparison.results, settings, tasks, folder)
    say(console, f"results.csv, history.csv, figures and checkpoints: {folder.path}")
    return STOPPED if stop.requested else 0


def _bench(argv: Sequence[str]) -> int:
    """The benchmarks lie in the source tree, with their peers and results; they are no part of the package."""
    places = (Path(__file__).resolve().parents[2], Path.cwd())
    root = next((place for place in places if (place / "bench" / "bench_moments.py").is_file()), None)
    if root is None:
        where = f"expected mtlgrad's source tree, where the benchmarks lie, found none in {places[1]}"
        sys.stderr.write(f"mtlgrad bench: {where}; clone it and run this there\n")
        return BAD_INPUT
    sys.path.insert(0, str(root))
    from bench.__main__ import main as run

    return run(argv)


def _info(as_json: bool) -> int:
    from . import build_info

    info = build_info()
    if as_json:
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
        words = list(sys.argv[1:] if argv is None else argv)
        if words[:1] == ["bench"]:
            return _bench(words[1:])
        given = vars(_parser().parse_args(words))
        command = given.pop("command")
        if command == "info":
            return _info(**given)
        return _with_figures(command, _train if command == "train" else _toy, given)
    except KeyboardInterrupt:
        return STOPPED
    except BrokenPipeError:  # `mtlgrad train | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
