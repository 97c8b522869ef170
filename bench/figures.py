"""The figures beside the CSVs, for each device: roofline, speed-up and scaling.

Every point is a row, or the quotient of two. SVGs without dates and with fixed ids: the same CSVs give the same files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from bench.measured import KINDS, CaseRows, Measurement, Results, faster
from bench.readme_tables import power, spoken

# Colours that stay apart in colour blindness (Okabe and Ito), and a marker each, in the order of KINDS.
STYLES = {
    "mtlgrad": ("#0072B2", "o", "mtlgrad"),
    "reference": ("#7F7F7F", "s", "reference, eager"),
    "compiled": ("#E69F00", "D", "torch.compile"),
    "published": ("#D55E00", "^", "published, transcribed"),
    "torchjd": ("#009E73", "v", "TorchJD"),
    "libmtl": ("#56B4E9", "p", "LibMTL-style loop"),
    "torch": ("#CC79A7", "<", "torch's own"),
    "other": ("#000000", "X", "network without a method"),
}
STYLE: Any = {
    "svg.hashsalt": "mtlgrad",
    "svg.fonttype": "none",  # text, not outlines: a third of the size
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],  # the first measures; the others are as wide or narrower
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}
POINTS = 4  # a sweep has as many values of a size at least


def scatter(axes: Axes, points: Sequence[tuple[float, float, Measurement]]) -> None:
    """Ours above the others; hollow where the error is larger than ours may be."""
    groups: dict[tuple[int, bool], list[tuple[float, float]]] = {}
    for x, y, m in points:
        groups.setdefault((-KINDS.index(m.kind), m.wrong), []).append((x, y))
    for (place, hollow), listed in sorted(groups.items()):
        colour, marker, _ = STYLES[KINDS[-place]]
        face = "white" if hollow else colour
        axes.plot(*zip(*listed), marker, color=colour, markerfacecolor=face, markersize=4, markeredgewidth=0.8)


def legend(figure: Figure, listed: Sequence[Measurement], extra: Sequence[Line2D], y: float) -> None:
    """Kinds that occur, in the order of all figures, in one row `y` inches below the top."""
    kinds = {m.kind for m in listed}
    handles = []
    for kind in KINDS:
        if kind in kinds:
            colour, marker, label = STYLES[kind]
            handles.append(Line2D([], [], color=colour, marker=marker, linestyle="none", label=label))
    if any(m.wrong for m in listed):
        label = "hollow: error larger than ours may be"
        handles.append(
            Line2D([], [], color="black", marker="o", markerfacecolor="white", linestyle="none", label=label)
        )
    where = (0.5, 1 - y / figure.get_figheight())
    figure.legend(
        handles=[*handles, *extra], loc="upper center", bbox_to_anchor=where, ncols=5, frameon=False, fontsize=8
    )


def panels(count: int, columns: int, width: float, height: float, top: float) -> tuple[Figure, list[Axes]]:
    """Axes of equal size in rows, inches each, with `top` inches for title and legend above them."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows + top), layout=None)
    total_w, total_h = width * columns, height * rows + top
    axes = []
    for i in range(count):
        row, column = divmod(i, columns)
        box = (column * width + 0.55, total_h - top - (row + 1) * height + 0.45, width - 0.7, height - 0.8)
        axes.append(figure.add_axes((box[0] / total_w, box[1] / total_h, box[2] / total_w, box[3] / total_h)))
    return figure, axes


def plain_number(value: float, _: Any = None) -> str:
    """3 or 0.25 or 1,000; with an exponent where that is long."""
    if value >= 1e4 or value < 1e-3:
        return power(f"{value:g}" if value != round(value, -4) else f"{value:.0e}")
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def log_axes(axis: Any, low: float, high: float) -> None:
    """Ticks where they can be read: at each power of ten, or every few; at 1, 2, 5 if the range is short."""
    decades = math.log10(high / low)
    many = decades < 1.3
    axis.set_major_locator(LogLocator(10, (1.0, 2.0, 5.0) if many else (1.0,), numticks=5 if not many else 10))
    axis.set_major_formatter(FuncFormatter(plain_number))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def limits(values: Sequence[float], least: float = 10.0) -> tuple[float, float]:
    """Around the values with a margin, `least` from end to end at least."""
    low, high = min(values), max(values)
    widen = max(1.0, math.sqrt(least / (high / low)))
    return low / widen / 1.25, high * widen * 1.25


def apart(values: Sequence[float]) -> list[float]:
    """Those whose labels do not run into each other on a log axis."""
    span, kept = math.log(values[-1] / values[0]), [values[0]]
    for value in values[1:]:
        if math.log(value / kept[-1]) > 0.09 * span:
            kept.append(value)
    return kept


def by_operation(cases: Sequence[CaseRows]) -> dict[str, list[CaseRows]]:
    found: dict[str, list[CaseRows]] = {}
    for case in cases:
        if any(m.timed for m in case.contenders.values()):
            found.setdefault(case.operation, []).append(case)
    return found


def timed(cases: Sequence[CaseRows]) -> list[Measurement]:
    return [m for case in cases for m in case.contenders.values() if m.timed]


def in_order(case: CaseRows) -> list[Measurement]:
    """Timed contenders by KINDS, ours first."""
    return sorted((m for m in case.contenders.values() if m.timed), key=lambda m: KINDS.index(m.kind))


# Roofline ------------------------------------------------------------------------------------------------------------


def roofline(results: Results, device: str) -> Figure | None:
    """A panel an operation. The roofs' bands reach from the lowest to the highest of its cases."""
    operations = by_operation(results.of(device))
    if not operations:
        return None
    figure, every = panels(len(operations), 5, 2.5, 2.3, 1.1)
    for axes, (operation, cases) in zip(every, operations.items()):
        listed = timed(cases)
        points = [(m.number("flops") / m.number("bytes"), m.number("flops") / m.ms / 1e6, m) for m in listed]
        copies = [m.number("copy_gb_per_s") for m in listed]
        gemms = [m.number("gemm_gflop_per_s") for m in listed]
        left, right = limits([x for x, _, _ in points] + [min(gemms) / max(copies)], 100)
        knees = [min(gemms) / min(copies), max(gemms) / max(copies)]
        grid = sorted([left, right, *(x for x in knees if left < x < right)])
        low = [min(min(copies) * x, min(gemms)) for x in grid]
        high = [min(max(copies) * x, max(gemms)) for x in grid]
        axes.fill_between(grid, low, high, color="#D9D9D9", linewidth=0)
        axes.plot(grid, high, color="black", linewidth=0.8)
        scatter(axes, points)
        axes.set(xscale="log", yscale="log", title=operation, xlim=(left, right))
        axes.set_ylim(limits([y for _, y, _ in points] + high, 100))
        log_axes(axes.xaxis, *axes.get_xlim())
        log_axes(axes.yaxis, *axes.get_ylim())
        axes.grid(color="#EEEEEE")
    heading(figure, f"Roofline, {where(results, device)}: operations and bytes by formula, over the time taken")
    roof = Line2D([], [], color="black", linewidth=0.8, label="roof: copy bandwidth, matrix rate of the same runs")
    legend(figure, timed(results.of(device)), [roof], 0.35)
    figure.supxlabel("arithmetic intensity (FLOP/byte)", fontsize=9, y=0.1 / figure.get_figheight())
    figure.supylabel("GFLOP/s", fontsize=9, x=0.08 / figure.get_figwidth())
    return figure


# Speed-up ------------------------------------------------------------------------------------------------------------


def pairs(case: CaseRows) -> Iterator[tuple[str, list[tuple[float, Measurement]]]]:
    """(label, how many times as fast as each other contender ours is).

    Where a case's first contender is not ours, as in training steps, names say what belongs together: ``mtlgrad
    adatask`` and ``published adatask``."""
    label = f"{case.operation}  {spoken(case.shape)}"
    others = [m for m in in_order(case) if m.kind not in ("mtlgrad", "other")]
    ours = case.ours
    if ours is not None and case.first.kind == "mtlgrad":
        yield label, [(faster(ours, m), m) for m in others]
        return
    for m in in_order(case):
        what = m.contender.partition(" ")[2]
        if m.kind == "mtlgrad":
            yield f"{label}: {what}", [(faster(m, n), n) for n in others if n.contender.partition(" ")[2] == what]


def speedup(results: Results, device: str) -> Figure | None:
    """A line a case, by the strongest competitor: those that ours leaves furthest behind on top."""
    listed = [(label, found) for case in results.of(device) for label, found in pairs(case) if found]
    if not listed:
        return None
    listed.sort(key=lambda line: (min(ratio for ratio, _ in line[1]), line[0]))
    step, top, bottom, left, right = 0.17, 1.2, 0.6, 4.3, 5.2
    height = step * len(listed) + top + bottom
    figure = Figure(figsize=(left + right, height), layout=None)
    box = (left / (left + right), bottom / height, (right - 0.2) / (left + right), step * len(listed) / height)
    axes = figure.add_axes(box)
    ratios = [ratio for _, found in listed for ratio, _ in found]
    axes.set(xscale="log", xlim=limits([*ratios, 1.0]), ylim=(-0.6, len(listed) - 0.4))
    axes.axvline(1.0, color="black", linewidth=0.8)
    for y, (_, found) in enumerate(listed):
        axes.plot([min(r for r, _ in found), max(r for r, _ in found)], [y, y], color="#D9D9D9", linewidth=0.8)
    scatter(axes, [(ratio, y, m) for y, (_, found) in enumerate(listed) for ratio, m in found])
    axes.yaxis.set_major_locator(FixedLocator(list(range(len(listed)))))
    axes.set_yticklabels([label for label, _ in listed], fontsize=6.5)
    axes.tick_params(axis="y", length=0)
    log_axes(axes.xaxis, *axes.get_xlim())
    axes.grid(axis="x", color="#EEEEEE")
    axes.set_xlabel("time of the other over time of mtlgrad (right of 1: mtlgrad is faster)", fontsize=9)
    heading(figure, f"Speed-up of mtlgrad, {where(results, device)}; sorted by the strongest competitor")
    legend(figure, [m for _, found in listed for _, m in found], [], 0.35)
    return figure


# Scaling -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """Cases of one operation that differ in one size only, in its order."""

    operation: str
    key: str  #: the size that changes: T, N, D, B or S
    rest: str  #: the rest of the shape
    cases: tuple[tuple[float, CaseRows], ...]


def sweeps(cases: Sequence[CaseRows]) -> list[Sweep]:
    """All there are with `POINTS` values or more, by operation as they come."""
    groups: dict[tuple[str, str, str, str], dict[float, CaseRows]] = {}
    for case in cases:
        for key, value in case.sizes.items():
            rest = " ".join(re.sub(rf"\b{key}=\S+", "", case.shape).split())
            groups.setdefault((case.operation, key, rest, case.dtype), {})[value] = case
    order = list(dict.fromkeys(case.operation for case in cases))
    found = [
        Sweep(operation, key, rest, tuple(sorted(points.items(), key=lambda point: point[0])))
        for (operation, key, rest, _), points in groups.items()
        if len(points) >= POINTS
    ]
    return sorted(found, key=lambda sweep: (order.index(sweep.operation), "TNDBS".find(sweep.key), sweep.rest))


def scaling(results: Results, device: str) -> Figure | None:
    """A panel a sweep: times of ours and of all others, and the floor."""
    found = sweeps(results.of(device))
    if not found:
        return None
    figure, every = panels(len(found), 4, 2.9, 2.4, 1.1)
    shown: list[Measurement] = []
    for axes, sweep in zip(every, found):
        lines: dict[str, list[tuple[float, Measurement]]] = {}
        for value, case in sweep.cases:
            for m in in_order(case):
                if m.kind != "mtlgrad" or m is case.ours:
                    lines.setdefault(m.contender, []).append((value, m))
        for name, line in sorted(lines.items(), key=lambda item: -KINDS.index(item[1][0][1].kind)):
            colour = STYLES[line[0][1].kind][0]
            form = "-" if name in (*KINDS, "mtlgrad out=", "mtlgrad merge") else ":"  # dotted: a variant of its kind
            axes.plot([v for v, _ in line], [m.ms for _, m in line], form, color=colour, linewidth=0.9)
            shown += [m for _, m in line]
        scatter(axes, [(value, m.ms, m) for line in lines.values() for value, m in line])
        floors = [(value, case.first.floor_ms) for value, case in sweep.cases]
        axes.plot(*zip(*floors), "--", color="black", linewidth=0.9)
        values = [value for value, _ in sweep.cases]
        title = f"{sweep.operation}" + (f"\n{spoken(sweep.rest)}" if sweep.rest else "")
        axes.set(xscale="log", yscale="log", xlim=(min(values) / 1.3, max(values) * 1.3))
        axes.set_title(title, fontsize=8)
        axes.set_ylim(limits([m.ms for line in lines.values() for _, m in line] + [t for _, t in floors]))
        axes.xaxis.set_major_locator(FixedLocator(apart(values)))
        axes.xaxis.set_major_formatter(FuncFormatter(plain_number))
        axes.xaxis.set_minor_locator(NullLocator())
        log_axes(axes.yaxis, *axes.get_ylim())
        axes.grid(color="#EEEEEE")
        axes.set_xlabel(sweep.key, fontsize=8, labelpad=1)
    heading(figure, f"Cost against sizes, {where(results, device)} (lines join what was measured)")
    floor = Line2D(
        [],
        [],
        color="black",
        linestyle="--",
        linewidth=0.9,
        label="floor: bytes at copy speed or FLOP at the matrix rate",
    )
    legend(figure, shown, [floor], 0.35)
    figure.supylabel("ms a call", fontsize=9, x=0.08 / figure.get_figwidth())
    return figure


# Files ---------------------------------------------------------------------------------------------------------------


def where(results: Results, device: str) -> str:
    """The device; for the CPU its model and the threads."""
    if device != "cpu":
        return results.devices[device]
    rows = [row for row in results.rows if row["device"] == device]
    threads = "/".join(results.distinct("threads", [row for row in rows if row["median_ms"]]))
    return f"{'/'.join(results.distinct('cpu', rows))}, {threads} threads"


def heading(figure: Figure, text: str) -> None:
    figure.suptitle(text, fontsize=10, y=1 - 0.12 / figure.get_figheight(), va="top")


FIGURES: dict[str, Callable[[Results, str], Figure | None]] = {
    "roofline": roofline,
    "speedup": speedup,
    "scaling": scaling,
}


def write_all(results: Results, folder: Path) -> list[Path]:
    """NAME_DEVICE.svg for each; one without anything to show is not written. Returns what was."""
    written = []
    with matplotlib.rc_context(STYLE):
        for device in results.devices:
            for name, make in FIGURES.items():
                figure = make(results, device)
                if figure is not None:
                    path = folder / f"{name}_{device}.svg"
                    draft = path.with_suffix(".part")
                    FigureCanvasSVG(figure).print_svg(draft, metadata={"Date": None, "Creator": "bench/report.py"})
                    draft.replace(path)
                    written.append(path)
    return written
