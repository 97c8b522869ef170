"""What the CSVs of results/ say, for tables and figures: read whole, or refused in one line with file and line."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.table import COLUMNS, slug

# Without these nobody can tell what a figure means, or get it again.
NEEDED = (
    *("date", "machine", "cpu", "threads", "device", "python", "torch", "mtlgrad", "commit"),
    *("operation", "shape", "contender"),
)
NUMBERS = COLUMNS[COLUMNS.index("checked_error") :]
OLD = COLUMNS[: COLUMNS.index("host_us")]  # of files from before there were more
# Whose a contender is, by its name's first word, in the order of all tables and figures.
KINDS = ("mtlgrad", "reference", "compiled", "published", "torchjd", "libmtl", "torch", "other")
UNTIMED = ("failed", "wrong, not timed")


class ReportError(Exception):
    """Why no report was made, in one line."""


@dataclass(frozen=True)
class Measurement:
    """One row: its texts by column, and where they stand."""

    path: Path
    line: int
    row: dict[str, str]

    def __getitem__(self, column: str) -> str:
        return self.row[column]

    def number(self, column: str) -> float:
        """NaN where the field is empty: it does not apply, or was not measured."""
        return float(self.row[column] or "nan")

    @property
    def contender(self) -> str:
        return self.row["contender"]

    @property
    def kind(self) -> str:
        word = self.contender.split()[0]
        return word if word in KINDS else "other"

    @property
    def ms(self) -> float:
        return self.number("median_ms")

    @property
    def timed(self) -> bool:
        return math.isfinite(self.ms)

    @property
    def wrong(self) -> bool:
        """Its error is larger than allowed to ours, whether it was timed all the same or not."""
        noted = any(part.startswith("wrong") for part in self["note"].split("; "))
        return noted or self.number("checked_error") > self.number("allowed_error")

    @property
    def trouble(self) -> str:
        """Why it was not timed: ``failed`` or ``wrong``; empty for others."""
        return next((text.split(",")[0] for text in UNTIMED if self["note"].startswith(text)), "")

    @property
    def floor_ms(self) -> float:
        """What no implementation is expected to beat: the formula's bytes at the copy bandwidth, or its operations at
        the matrix rate, whichever takes longer, both measured in the same minutes."""
        copying = self.number("bytes") / self.number("copy_gb_per_s")
        computing = self.number("flops") / self.number("gemm_gflop_per_s")
        return max(copying, computing) / 1e6


@dataclass
class CaseRows:
    """An operation at a shape on a device: its contenders in the order of the run."""

    device: str
    stem: str
    operation: str
    shape: str
    dtype: str
    contenders: dict[str, Measurement] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, float]:
        """The ``KEY=number`` of the shape."""
        return {key: float(value) for key, value in re.findall(r"\b([A-Z])=(\d\S*)", self.shape)}

    @property
    def first(self) -> Measurement:
        return next(iter(self.contenders.values()))

    def get(self, *names: str) -> Measurement | None:
        """The first of these contenders that took part."""
        return next((self.contenders[name] for name in names if name in self.contenders), None)

    @property
    def ours(self) -> Measurement | None:
        """As a user calls it: the first of mtlgrad's that was timed."""
        return next((m for m in self.contenders.values() if m.kind == "mtlgrad" and m.timed), None)


def faster(ours: Measurement, peer: Measurement) -> float:
    """How many times as long as ours the peer takes: its ``times_first`` over ours.

    ``times_first`` is the median, over the rounds that both ran in, of a contender's time over that of the case's first
    one. Where ours is the first, this is the median of the peer's ratios to ours; else the quotient of two medians."""
    return peer.number("times_first") / ours.number("times_first")


@dataclass
class Results:
    """All CSVs of a folder."""

    paths: list[Path]
    rows: list[Measurement]  #: all of them, by file and line
    cases: list[CaseRows]

    @property
    def devices(self) -> dict[str, str]:
        """Names by slug, the CPU first."""
        found = {slug(row["device"]): row["device"] for row in self.rows}
        return dict(sorted(found.items(), key=lambda item: (item[0] != "cpu", item[0])))

    def of(self, device: str, stem: str | None = None) -> list[CaseRows]:
        """Cases by a device's slug; those of the host's time, whose sizes mean nothing, where `stem` asks for them."""
        return [c for c in self.cases if c.device == device and (c.stem == stem if stem else c.stem != "host")]

    def distinct(self, column: str, rows: Sequence[Measurement] | None = None) -> list[str]:
        """Values in the order of the files, without empty ones."""
        found = dict.fromkeys(row[column] for row in (self.rows if rows is None else rows))
        return [value for value in found if value not in ("", "none")]


def rows_in(path: Path) -> Iterator[Measurement]:
    """Checks every row on the way."""
    stem, _, device = path.stem.partition("_")
    with path.open(newline="") as file:
        reader = csv.reader(file)
        columns = tuple(next(reader, []))
        if columns not in (COLUMNS, OLD):
            missing, unknown = [c for c in COLUMNS if c not in columns], [c for c in columns if c not in COLUMNS]
            lists = [f"{word} {', '.join(names)}" for word, names in (("without", missing), ("with", unknown)) if names]
            found = "; ".join(lists) or "another order"
            raise ReportError(
                f"{path}:1: expected the columns of bench/table.py, found them {found}; "
                f"measure again: python -m bench {stem}"
            )
        for values in reader:
            where = f"{path}:{reader.line_num}"
            if len(values) != len(columns):
                raise ReportError(f"{where}: expected {len(columns)} fields, found {len(values)}; measure it again")
            row = dict.fromkeys(COLUMNS, "") | dict(zip(columns, values))
            check(row, where)
            if slug(row["device"]) != device:
                raise ReportError(
                    f"{where}: expected the device that the file's name ends in ({device}), found {row['device']!r}; "
                    "rename the file"
                )
            yield Measurement(path, reader.line_num, row)


def check(row: dict[str, str], where: str) -> None:
    for column in NEEDED:
        if row[column] in ("", "none"):
            raise ReportError(f"{where}: expected a value in the column {column}, found none; measure it again")
    for column in NUMBERS:
        try:
            value = float(row[column] or "0")
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ReportError(
                f"{where}: expected a finite number or nothing in the column {column}, found {row[column]!r}; "
                "measure it again"
            )
    needed: tuple[str, ...] = ()
    if row["host_us"]:
        needed = ("host_us_p20", "host_us_p80", "times_first")
    elif not row["note"].startswith(UNTIMED):
        needed = ("median_ms", "times_first", "bytes", "flops", "copy_gb_per_s", "gemm_gflop_per_s")
    for column in needed:
        if not row[column]:
            raise ReportError(
                f"{where}: expected a number in the column {column} or a note of what failed, found neither; "
                "measure it again"
            )


def read_results(folder: Path) -> Results:
    """Every CSV of the folder; one that cannot be trusted ends it with a `ReportError`."""
    paths = sorted(folder.glob("*.csv"))
    if not paths:
        raise ReportError(f"{folder}: expected CSVs, found none; measure: python -m bench")
    rows: list[Measurement] = []
    cases: dict[tuple[str, ...], CaseRows] = {}
    for path in paths:
        stem, _, device = path.stem.partition("_")
        before = len(rows)
        for measurement in rows_in(path):
            rows.append(measurement)
            what = (measurement["operation"], measurement["shape"], measurement["dtype"])
            case = cases.setdefault((device, stem, *what), CaseRows(device, stem, *what))
            known = case.contenders.setdefault(measurement.contender, measurement)
            if known is not measurement:
                raise ReportError(
                    f"{path}:{measurement.line}: expected each contender once, found {measurement.contender!r} of line "
                    f"{known.line} of {known.path.name} again; delete one of them"
                )
        if len(rows) == before:
            raise ReportError(f"{path}:1: expected rows below the columns, found none; measure again")
    return Results(paths, rows, list(cases.values()))
