"""The command ``mtlgrad``: ``info``, ``train``, ``recipe``, ``toy`` and ``bench``."""

from __future__ import annotations

import argparse
import contextlib
import difflib
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
import torch.distributed as dist

from .ops.align import SCALES
from .recipes.comparison import RATES, Comparison, Interrupted, Settings, checked, digest, packaged, recipe_class
from .recipes.methods import ALPHAVIL, METHODS, WITH_PREFERENCE
from .recipes.recipe import TrainError
from .recipes.toy import RULES
from .recipes.toy import WITH_PREFERENCE as PREFERRING_RULES

BAD_INPUT, STOPPED = 2, 130


def is_rank0() -> bool:
    """Return whether this process is the one, of those that torchrun started, that writes and prints."""
    return os.environ.get("RANK", "0") == "0"


class Stop:
    """Set by a signal, looked at between two steps."""

    requested = False


class _Parser(argparse.ArgumentParser):
    """argparse, with errors of one line: no usage in front."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message}\n" if is_rank0() else None)


def _one_of(names: Iterable[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            close = difflib.get_close_matches(text, list(names), 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(names)}, found {text!r}{hint}")
        return text

    return parse


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        with contextlib.suppress(ValueError):
            if low <= (value := int(text)) <= high:
                return value
        raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, found {text!r}")

    return parse


def _number(text: str, *, zero: bool) -> float:
    with contextlib.suppress(ValueError):
        if 0.0 <= (value := float(text)) < math.inf and (value or zero):
            return value
    raise argparse.ArgumentTypeError(f"expected a number {'from' if zero else 'above'} 0, found {text!r}")


def _positive(text: str) -> float:
    return _number(text, zero=False)


def _not_negative(text: str) -> float:
    return _number(text, zero=True)


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
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,train,recipe,toy,bench}")
    info = commands.add_parser("info", help="what was compiled, and which device is usable")
    info.add_argument("--json", dest="as_json", action="store_true", help="as JSON")
    _add_train(commands)
    commands.add_parser("recipe", help="print a recipe to begin yours with: mtlgrad recipe > my_recipe.py")
    _add_toy(commands)
    bench = "time everything against its reference and its peers (in the source tree; --help lists its options)"
    commands.add_parser("bench", add_help=False, help=bench)
    return parser


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="compare methods on a recipe: data, tasks and model of the package's, or yours",
        argument_default=argparse.SUPPRESS,  # only what was given is set: --resume takes nothing else
    )
    add = train.add_argument
    add(
        "--recipe", metavar="NAME", help=f"{', '.join(packaged())}; my_recipe.py; package.module:Class (default: river)"
    )
    several = f"{', '.join(METHODS)} (default: sum logsum bayesagg aligned-ub)"
    add("--methods", type=_one_of(METHODS), nargs="+", metavar="METHOD", help=several)
    add("--seeds", type=_whole(1, 1000), metavar="N", help="train everything N times (default: 3)")
    add("--epochs", type=_whole(1, 100_000), metavar="N", help="(default: the recipe's)")
    add("--batch-size", type=_whole(1, 1_000_000), metavar="N", help="of all processes (default: the recipe's)")
    rate = "learning rate, cosine schedule; of several each method's best on validation (default: 1e-3)"
    add("--lr", type=_positive, nargs="+", metavar="LR", help=rate)
    add("--tune-lr", action="store_true", help=f"the same as --lr {' '.join(f'{r:g}' for r in RATES)}")
    weights = "the tasks' weights, one number a task (default: all the same); for"
    add("--preference", type=_not_negative, nargs="+", metavar="P", help=f"{weights} {', '.join(WITH_PREFERENCE)}")
    add("--target", metavar="TASK", help="alphavil: the task for whose good all are trained")
    add("--device", type=_device, help="cpu, cuda or cuda:N (default: cpu, for models as small as the package's)")
    add("--threads", type=_whole(1, 1024), metavar="N", help="threads on the CPU (default: 1)")
    add("--out", type=Path, metavar="DIR", help="where the run's folder is made (default: runs)")
    add("--name", type=_name, help="name of the run's folder (default: date, time and recipe)")
    board = "losses, metrics and weights of each epoch for TensorBoard, in the run's folder"
    add("--tensorboard", action="store_true", help=board)
    add("--resume", type=Path, metavar="PATH", help="continue a run, given its folder; takes no other settings")


def _add_toy(commands: Any) -> None:
    toy = commands.add_parser("toy", help="two tasks on a landscape of two parameters: where methods end")
    add = toy.add_argument
    methods = f"which to draw, of {', '.join(RULES)} (default: sum aligned)"
    add("--methods", type=_one_of(RULES), nargs="+", default=("sum", "aligned"), metavar="METHOD", help=methods)
    preference = f"{', '.join(PREFERRING_RULES)}, each drawn without and with it: the tasks' weights (default: 0.7 0.3)"
    unset = argparse.SUPPRESS
    add("--preference", type=_not_negative, nargs=2, default=unset, metavar=("P1", "P2"), help=preference)
    add("--steps", type=_whole(1, 10_000_000), default=35_000, metavar="N", help="(default: %(default)s)")
    add("--lr", type=_positive, default=1e-3, help="Adam's learning rate, constant (default: %(default)s)")
    scale = f"aligned: the aligned gradients' length, {', '.join(SCALES)} (default: min)"
    add("--scale", type=_one_of(SCALES), default=unset, help=scale)
    add("--out", type=Path, default=Path("runs"), metavar="DIR", help="where the folder is made (default: %(default)s)")
    add("--name", type=_name, help="name of the folder (default: date, time and toy)")


def _settings(given: dict[str, Any]) -> Settings:
    """Return the settings that the options given stand for; a method named twice runs once."""
    name = given.get("recipe", "river")
    recipe = checked(recipe_class(name)(0))
    methods = tuple(dict.fromkeys(given.get("methods", ("sum", "logsum", "bayesagg", "aligned-ub"))))
    if given.get("tune_lr") and "lr" in given:
        raise TrainError("argument --tune-lr: expected it or --lr, found both; drop one")
    _check_option(given, "preference", methods, WITH_PREFERENCE)
    _check_option(given, "target", methods, (ALPHAVIL,))
    tasks = [task.name for task in recipe.tasks]
    if "preference" in given:
        _check_preference(given["preference"], tasks)
    target = given.get("target")
    if ALPHAVIL in methods and target not in tasks:
        found = "none" if target is None else repr(target)
        raise TrainError(f"argument --target: expected one of {', '.join(tasks)} with {ALPHAVIL}, found {found}")
    device = torch.device(given.get("device", "cpu"))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        raise TrainError(f"argument --device: expected a usable device, found {device} and {gpus} GPUs; take cpu")
    name = str(Path(name).resolve()) if name.endswith(".py") else name
    return Settings(
        recipe=name,
        methods=methods,
        seeds=given.get("seeds", 3),
        epochs=given.get("epochs", recipe.epochs),
        batch_size=given.get("batch_size", recipe.batch_size),
        rates=RATES if given.get("tune_lr") else tuple(dict.fromkeys(given.get("lr", ()))),
        preference=tuple(given["preference"]) if "preference" in given else None,
        target=target,
        device=str(device),
        threads=given.get("threads", 1),
        tensorboard=given.get("tensorboard", False),
        digest=digest(name),
    )


def _check_option(given: dict[str, Any], name: str, methods: Sequence[str], those: Sequence[str]) -> None:
    """Refuse an option that only some methods know, given with none of those."""
    if name in given and not set(those) & set(methods):
        found = ", ".join(methods)
        raise TrainError(f"argument --{name}: expected with {' or '.join(those)}, found {found}; drop it")


def _check_preference(preference: Sequence[float], tasks: Sequence[str]) -> None:
    expected = f"argument --preference: expected {len(tasks)} numbers, one a task ({', '.join(tasks)})"
    if len(preference) != len(tasks):
        raise TrainError(f"{expected}, found {len(preference)}")
    if not any(preference):
        raise TrainError(f"{expected}, not all 0; found zeros alone")


@contextlib.contextmanager
def _signals(stop: Stop) -> Iterator[None]:
    """Ask to stop after the step at hand at the first Ctrl-C or SIGTERM; no longer wait at a second one."""

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
    """Run what needs the extra `train` and takes a while: it can be stopped, and its errors are one line."""
    stop = Stop()
    with _signals(stop):
        try:
            _check_installed("rich", "matplotlib", extra="train")
            return work(given, stop)
        except TrainError as error:
            # What is wrong on one rank alone is said with its number; what is wrong everywhere, once.
            alone = dist.is_initialized() and error.__cause__ is not None
            if is_rank0() or alone:
                who = f"rank {dist.get_rank()}: " if alone else ""
                sys.stderr.write(f"mtlgrad {command}: {who}{error}\n")
            return BAD_INPUT


def _train(given: dict[str, Any], stop: Stop) -> int:
    resume = given.pop("resume", None)
    if resume is not None and given:
        option = "--" + next(iter(given)).replace("_", "-")
        raise TrainError(f"argument --resume: takes its settings from the run, found {option} as well; drop it")
    out, name = given.pop("out", Path("runs")), given.pop("name", None)
    settings = None if resume is not None else _settings(given)
    if settings is not None and settings.tensorboard:
        _check_installed("tensorboard", extra="tensorboard")
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several:
        # Numbers that the host reads travel on the host: no device waits for them.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    comparison = Comparison.start(settings, out, name) if settings is not None else Comparison.resume(resume)
    code = _run(comparison, stop)
    if several:
        dist.destroy_process_group()
    return code


def _run(comparison: Comparison, stop: Stop) -> int:
    """Run or continue a comparison under the eyes of the user, who sees rank 0's."""
    from .recipes import report
    from .recipes.progress import Board, Display, Watchers, console_for_output, say, show_table

    settings, folder = comparison.settings, comparison.folder
    if folder is None:
        return 0 if comparison.run(Watchers(), lambda: stop.requested) else STOPPED
    console = console_for_output()
    display = Display(console, comparison.total, settings.epochs, len(comparison.results))
    board = [Board(folder.path)] if settings.tensorboard else []
    what = f"{settings.recipe}: {', '.join(settings.methods)} and single-task nets"
    say(console, f"{what}; run folder {folder.path}")
    with display.bars:
        finished = comparison.run(Watchers(display, *board), lambda: stop.requested)
    if comparison.chosen():
        epochs = f"{settings.epochs} epoch{'s' * (settings.epochs > 1)}"
        seeds = f"{settings.seeds} seeds (mean ± sd)" if settings.seeds > 1 else "1 seed"
        rates = "; learning rates chosen on the validation split" if len(settings.rates) > 1 else ""
        head = f"{settings.recipe}, test split, {epochs}, {seeds}{rates}"
        say(console, head)
        show_table(console, report.table(comparison))
        if words := report.headline(comparison):
            say(console, words)
    if not finished:
        say(console, f"stopped; what was done is saved: mtlgrad train --resume {folder.path}")
        return STOPPED
    for file, drawn in report.figures(comparison).items():
        folder.write(file, drawn)
    say(console, f"results.csv, history.csv, figures: {folder.path}")
    return 0


def _toy(given: dict[str, Any], stop: Stop) -> int:
    from .recipes.toy_run import run

    given["methods"] = tuple(dict.fromkeys(given["methods"]))
    _check_option(given, "preference", given["methods"], PREFERRING_RULES)
    _check_option(given, "scale", given["methods"], ("aligned",))
    preference, scale = given.pop("preference", (0.7, 0.3)), given.pop("scale", "min")
    _check_preference(preference, ("task 1", "task 2"))
    try:
        run(**given, preference=preference, scale=scale, stop=lambda: stop.requested)
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


def _bench(argv: Sequence[str]) -> int:
    """Run the benchmarks, which lie in the source tree with their peers and results, and not in the package."""
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
    """Run the command line; return the exit code: 0, 2 for bad input (one line on stderr), 130 when stopped."""
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
        if command == "recipe":
            print(Path(__file__).with_name("recipes").joinpath("template.py").read_text(), end="")
            return 0
        return _with_figures(command, _train if command == "train" else _toy, given)
    except KeyboardInterrupt:
        return STOPPED
    except BrokenPipeError:  # `mtlgrad train | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
