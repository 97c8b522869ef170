"""The command line of the benchmarks: ``mtlgrad bench`` or, in the repository's root, ``python -m bench``."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from bench import memory
from bench.harness import BenchError, Case, Options, first_line
from bench.table import ROOT, Row, facts, slug, write_rows

STEMS = ("combine", "adatask", "moments", "host", "alphavil", "step")  # what runs when none is named
FAILED, BAD_INPUT, STOPPED = 1, 2, 130


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line: no usage in front."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {message}\n")


def positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(0)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"expected a positive number, found {text!r}")
        return value

    return parse


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="mtlgrad bench",
        description="Times every operation and whole training steps against their references and peers, after checking "
        "all of them against float64. Most of an hour on 2 cores. Tables and figures of it: python -m bench.report",
    )
    parser.add_argument("stems", nargs="*", metavar="STEM", help=f"some of {', '.join(STEMS)} (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda where there is one)")
    parser.add_argument("--threads", type=positive(int), default=2, metavar="N", help="on the CPU (default: 2)")
    parser.add_argument("--quick", action="store_true", help="toy shapes, a few rounds, no memory: does it run?")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument("--without", action="append", default=[], metavar="TEXT", help="no contenders named so")
    parser.add_argument("--list", action="store_true", help="name the cases, run none")
    parser.add_argument("--rounds", type=positive(int), metavar="N", help="runs per contender at most (default: 40)")
    parser.add_argument("--seconds", type=positive(float), help="of runs per contender and case, about (default: 4)")
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory measurements")
    where = "folder for the CSVs (default: bench/results; with --quick none is written)"
    parser.add_argument("--results", type=Path, metavar="DIR", help=where)
    parser.add_argument("--memory-of", nargs=2, metavar=("CASE", "CONTENDER"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for stem in args.stems:
        if stem not in STEMS:
            parser.error(f"argument STEM: expected some of {', '.join(STEMS)}, found {stem!r}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: expected cpu, since torch finds no CUDA device here, found 'cuda'")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.stems = list(dict.fromkeys(args.stems)) or list(STEMS)
    return args


def chosen(args: argparse.Namespace) -> dict[str, list[Case]]:
    """The cases to run by stem; stems without any are left out."""
    device, found = torch.device(args.device), {}
    for stem in args.stems:
        every: list[Case] = importlib.import_module(f"bench.bench_{stem}").cases(args.quick, device)
        found[stem] = [case for case in every if not args.only or any(text in case.title for text in args.only)]
    return {stem: cases for stem, cases in found.items() if cases}


def run_stem(stem: str, cases: Sequence[Case], options: Options, args: argparse.Namespace) -> bool:
    """Whether all went well. A case that is wrong or fails is named and gets no row; the others go on."""
    extra = ["--device", args.device, "--threads", str(args.threads), *(["--quick"] if args.quick else [])]
    shared = facts(options.device)
    folder = args.results or (None if args.quick else ROOT / "bench" / "results")
    path = None if folder is None else folder / f"{stem}_{slug(shared['device'])}.csv"
    rows: list[Row] = []
    failed = False
    for case in cases:
        try:
            rows += [shared | row for row in case.rows(stem, options, extra)]
        except Exception as error:
            reason = str(error) if isinstance(error, BenchError) else f"{case.title}: {first_line(error)}"
            print(f"mtlgrad bench: {stem}: {reason}", file=sys.stderr)
            failed = True
        if path is not None and rows:  # after each case: a run that is cut short keeps what it has, and the rows before
            write_rows(path, rows, keep=True)
    if path is not None and rows:
        write_rows(path, rows, keep=bool(args.only))
        print(f"\nwritten: {path}", flush=True)
    return not failed


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what `argv` asks for. Returns the exit code: 0, 1 where a result was wrong, 2 for bad input, 130 stopped."""
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    torch._logging.set_logs(dynamo=logging.CRITICAL, inductor=logging.CRITICAL)  # type: ignore[attr-defined]
    warnings.filterwarnings("ignore", module="torch")
    listed = chosen(args)
    if args.memory_of:
        title, name = args.memory_of
        every = (case for cases in listed.values() for case in cases)
        torch.manual_seed(0)
        print(memory.measure(next(case for case in every if case.title == title), name))
        return 0
    if not listed:
        print(f"mtlgrad bench: --only matches no case of {', '.join(args.stems)}; --list names them", file=sys.stderr)
        return BAD_INPUT
    if args.list:
        for stem, cases in listed.items():
            print("\n".join(f"{stem}: {case.title}" for case in cases))
        return 0
    options = Options(torch.device(args.device), with_memory=not (args.no_memory or args.quick), small=args.quick)
    options.without = args.without
    torch.backends.cudnn.allow_tf32 = False  # float32 is what all rows say
    if args.device == "cuda":
        options.flush_bytes = 512 << 20
    if args.quick:
        options.rounds, options.seconds, options.flush_bytes = 3, 0.2, 1 << 20
    options.rounds = args.rounds or options.rounds
    options.seconds = args.seconds or options.seconds
    failed = False
    try:
        for stem, cases in listed.items():
            failed |= not run_stem(stem, cases, options, args)
    except KeyboardInterrupt:
        print("stopped; what was done is written", file=sys.stderr)
        return STOPPED
    return FAILED if failed else 0


if __name__ == "__main__":
    sys.exit(main())
