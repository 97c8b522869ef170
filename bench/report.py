"""The tables of README and docs/benchmarks.md, and the figures, from the CSVs of bench/results/ alone.

``python -m bench.report`` replaces what stands between ``<!-- bench: NAME -->`` and ``<!-- /bench -->``;
readme_tables.py has the names. The figures go beside the CSVs. Nothing is interpolated or extrapolated: a cell or
point is a row of a CSV, or the quotient of two of its columns or rows. A CSV that does not say where it comes from is
refused.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.measured import ReportError, Results, read_results
from bench.readme_tables import BLOCKS
from bench.table import ROOT

PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
STALE, BAD_INPUT = 1, 2
OPEN, CLOSE = re.compile(r"<!-- bench: ([\w-]+) -->"), "<!-- /bench -->"
MARKER = re.compile(r"<!--\s*/?\s*bench\b")  # also those that are not quite right
UNITS = (
    r"x(?![\w]|\s*\d)|\u00d7|%|percent\b|times\b|floors?\b|(?:[mun]|µ)?s\b|(?:milli|micro)?seconds?\b|min(?:utes?)?\b|hours?\b|"
    r"[KMGT]i?B\b|[KMG]?Hz\b|[KMGT]FLOPS?\b|(?:examples|images|steps)\b(?= a second|/s)|±"
)
FIGURE = re.compile(rf"(?<![\w.,])[+-]?\d[\d,.]*(?:e[+-]?\d+)?\s*-?(?:{UNITS})")


def blocks(text: str, name: str) -> list[tuple[int, int, str]]:
    """(first line inside, closing line, block's name) of each block, lines from 0; `name` is the file's for errors."""
    found: list[tuple[int, int, str]] = []
    opened: tuple[int, str] | None = None
    for i, line in enumerate(text.splitlines()):
        if not MARKER.search(line):
            continue
        where, match = f"{name}:{i + 1}", OPEN.fullmatch(line)
        if opened is None and match:
            opened = (i + 1, match.group(1))
            if opened[1] not in BLOCKS:
                raise ReportError(f"{where}: expected a block of {', '.join(BLOCKS)}, found {opened[1]!r}; rename it")
        elif opened is not None and line == CLOSE:
            found.append((opened[0], i, opened[1]))
            opened = None
        else:
            wanted = "<!-- bench: NAME -->" if opened is None else f"{CLOSE} for the block {opened[1]!r}"
            raise ReportError(f"{where}: expected {wanted}, alone in its line, found {line.strip()!r}; change it")
    if opened is not None:
        raise ReportError(f"{name}:{opened[0]}: expected {CLOSE} for the block {opened[1]!r}, found none; add it")
    return found


def filled(text: str, results: Results, name: str = "README.md") -> tuple[str, list[str]]:
    """The text with all blocks as they should be, and the names of those that were not."""
    lines, stale = text.splitlines(), []
    listed = blocks(text, name)
    if not listed:
        raise ReportError(f"{name}: expected blocks (<!-- bench: NAME -->), found none; names: {', '.join(BLOCKS)}")
    for start, end, block in reversed(listed):
        made = ["", *BLOCKS[block](results).splitlines(), ""]
        if lines[start:end] != made:
            stale.append(block)
            lines[start:end] = made
    return "\n".join(lines) + "\n", list(reversed(stale))


def unmeasured(text: str) -> list[str]:
    """``line: figure`` of each number with a unit, factor or share that stands outside of the blocks, code and links.

    Such a one need not be in any CSV."""
    inside = {i for start, end, _ in blocks(text, "README.md") for i in range(start, end)}
    found, fenced = [], False
    for i, line in enumerate(text.splitlines()):
        fenced ^= line.startswith("```")
        if not fenced and i not in inside:
            shown = re.sub(r"\]\([^)]*\)|`[^`]*`", "]", line)
            found += [f"{i + 1}: {match.group().strip()}" for match in FIGURE.finditer(shown)]
    return found


def replace(path: Path, text: str) -> None:
    """Writes beside the target, then renames: nobody sees half a file."""
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.chmod(draft, path.stat().st_mode & 0o777)
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise


def warn_of_changes(results: Results) -> None:
    for path in results.paths:
        dirty = [row for row in results.rows if row.path == path and row["commit"].endswith("+")]
        if dirty:
            where, commit = f"{path}:{dirty[0].line}", dirty[0]["commit"]
            print(f"bench.report: {where}: commit {commit}: measured with uncommitted changes", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 where `--check` finds a stale block, 2 for input that is refused."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where blocks are stale")
    parser.add_argument("--no-figures", action="store_true", help="tables only")
    add = parser.add_argument
    add("--results", type=Path, default=ROOT / "bench" / "results", metavar="DIR", help="(default: bench/results)")
    add("--page", type=Path, nargs="+", default=PAGES, metavar="FILE", help="(default: README.md, docs/benchmarks.md)")
    args = parser.parse_args(argv)
    try:
        results = read_results(args.results)
        warn_of_changes(results)
        pages = {path: filled(path.read_text(encoding="utf-8"), results, path.name) for path in args.page}
        if args.check:
            for path, (_, stale) in pages.items():
                if stale:
                    names = ", ".join(stale)
                    print(f"bench.report: {path}: stale: {names}; run python -m bench.report", file=sys.stderr)
            return STALE if any(stale for _, stale in pages.values()) else 0
        if not args.no_figures:
            draw(results, args.results)
        for path, (new, stale) in pages.items():
            if stale:
                replace(path, new)
            print(f"{path}: {', '.join(stale) or 'nothing'} changed")
    except (ReportError, OSError, UnicodeDecodeError) as error:
        print(f"bench.report: {error}", file=sys.stderr)
        return BAD_INPUT
    return 0


def draw(results: Results, folder: Path) -> None:
    try:
        from bench import figures
    except ImportError as error:
        raise ReportError(
            f"expected matplotlib for the figures, found none ({error}); pip install 'mtlgrad[bench]', or --no-figures"
        ) from error
    for path in figures.write_all(results, folder):
        print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main())
