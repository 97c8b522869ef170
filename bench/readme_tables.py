"""The blocks of the README by name, each as Markdown, made from `Results` alone.

Cells: ``-`` where nobody ran that, ``failed`` or ``wrong`` where the row says so (and why, below the table), ``*`` at a
time whose contender is off by more than ours may be. "Faster" is `measured.faster`, "floor" `Measurement.floor_ms`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence

from bench.measured import KINDS, CaseRows, Measurement, Results, faster

NOTHING = "Not measured yet."
NONE = "-"
Cell = Callable[[CaseRows], str]

# Numbers -------------------------------------------------------------------------------------------------------------


def digits(value: float, significant: int) -> str:
    """Rounded to so many digits, never with an exponent, thousands apart."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else NONE
    decimals = significant - 1 - math.floor(math.log10(float(f"{abs(value):.{significant - 1}e}")))
    return f"{value:,.{max(0, decimals)}f}"


def milliseconds(value: float) -> str:
    return f"{digits(value, 3)} ms"


def times(value: float, fine: bool = False) -> str:
    """A ratio to some two digits, `fine` to three."""
    if not math.isfinite(value):
        return NONE
    decimals = sum(value < limit for limit in ((100, 10) if fine else (10, 2)))
    return f"{value:,.{decimals}f}x" if value >= 0.1 else f"{digits(value, 2)}x"


def megabytes(*values: float) -> str:
    """Of several with the unit once; nothing where none was measured."""
    if not any(math.isfinite(value) for value in values):
        return NONE
    return " against ".join(NONE if math.isnan(v) else f"{v:,.0f}" if v >= 100 else f"{v:.1f}" for v in values) + " MB"


def percent(share: float) -> str:
    return f"{100 * share:.{0 if abs(share) >= 0.0995 else 1}f} %" if math.isfinite(share) else NONE


def power(text: str) -> str:
    """6.3e-08 as 6.3e-8, 1e+07 as 1e7."""
    return re.sub(r"e\+?(-?)0*(\d)", r"e\1\2", text)


def spoken(shape: str) -> str:
    """T=3 N=1e+07 in 10 tensors as T 3, N 1e7 in 10 tensors."""
    parts: list[str] = []
    joins = False  # to the part before
    for word in shape.split():
        match = re.fullmatch(r"([A-Z])=([^,]+),?", word)
        if match:
            parts.append(f"{match[1]} {power(match[2])}")
            joins = False
        elif joins or (parts and word == "in"):
            parts[-1] += f" {word}"
            joins = True
        else:
            parts.append(word)
            joins = True
    return ", ".join(parts)


def time_cell(m: Measurement | None) -> str:
    if m is None or not m.timed:
        return NONE if m is None else m.trouble
    once = " (one call)" if m["runs"] == "1" else ""
    return milliseconds(m.ms) + "*" * m.wrong + once


def faster_cell(ours: Measurement | None, peer: Measurement | None) -> str:
    if peer is not None and not peer.timed:
        return peer.trouble
    return NONE if ours is None or peer is None or not ours.timed else times(faster(ours, peer)) + "*" * peer.wrong


def both_cell(ours: Measurement | None, peer: Measurement | None) -> str:
    """Time and ratio."""
    time, ratio = time_cell(peer), faster_cell(ours, peer)
    return time if ratio in (time, NONE) else f"{time}, {ratio.rstrip('*')}"


def floor_cell(m: Measurement | None) -> str:
    return NONE if m is None or not m.timed else times(m.ms / m.floor_ms)


def error_cell(*listed: Measurement | None) -> str:
    return ", ".join(NONE if m is None else power(m["checked_error"]) or NONE for m in listed)


def memory_cell(*listed: Measurement | None) -> str:
    return megabytes(*(math.nan if m is None else m.number("peak_extra_mb") for m in listed))


# Tables --------------------------------------------------------------------------------------------------------------


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def remarks(cases: Iterable[CaseRows], shown: Callable[[str], bool] = lambda name: True) -> str:
    """What the cells could not say: one line for what is marked with a star, one for each kind of failure."""
    listed = [(case, m) for case in cases for m in case.contenders.values() if shown(m.contender)]
    lines = []
    if any(m.timed and m.wrong for _, m in listed):
        lines.append(r"\* Its error is larger than ours may be (columns `checked_error`, `allowed_error`).")
    reasons: dict[str, list[str]] = {}
    for case, m in listed:
        if not m.timed and m.trouble:
            reasons.setdefault(f"{m.contender}, {m['note']}", []).append(f"{case.operation} {spoken(case.shape)}")
    lines += [f"{reason} ({'; '.join(where)})." for reason, where in reasons.items()]
    return "".join(f"\n\n{line}" for line in lines)


def by_device(results: Results, make: Callable[[str], str]) -> str:
    """`make` of each device's slug; with a heading where there are several."""
    parts = {name: make(device) for device, name in results.devices.items()}
    parts = {name: text for name, text in parts.items() if text}
    if len(results.devices) < 2:
        return next(iter(parts.values()), NOTHING)
    headed = [f"On {'the CPU' if name == 'cpu' else name}:\n\n{text}" for name, text in parts.items()]
    return "\n\n".join(headed) or NOTHING


def table(cases: Sequence[CaseRows], columns: dict[str, Cell], names: Sequence[str] = ()) -> str:
    """Cells by title; a column without anything is left out. `names`: of the contenders that the table shows."""
    if not cases:
        return ""
    rows = [[cell(case) for cell in columns.values()] for case in cases]
    kept = [i for i in range(len(columns)) if any(row[i] != NONE for row in rows)]
    titles = list(columns)
    text = markdown([titles[i] for i in kept], [[row[i] for i in kept] for row in rows])
    return text + remarks(cases, lambda name: not names or name in names)


def ordered(cases: Iterable[CaseRows]) -> list[CaseRows]:
    """By operation and what surrounds the sizes as they come, then by N and T: largest N first, as most cases have."""
    listed = list(cases)
    places = {key: i for i, key in enumerate(dict.fromkeys((c.operation, without_sizes(c)) for c in listed))}
    sizes = {id(c): c.sizes for c in listed}
    return sorted(
        listed,
        key=lambda c: (places[c.operation, without_sizes(c)], -sizes[id(c)].get("N", 0), sizes[id(c)].get("T", 0)),
    )


def without_sizes(case: CaseRows) -> str:
    return " ".join(re.sub(r"\b[A-Z]=\S+", "", case.shape).split())


def aligned(results: Results) -> str:
    """Whole Aligned-MTL aggregations: of a matrix, of the ResNet-50's parameters in .jac. Ratios are of those that make
    their output anew, as TorchJD does."""

    def ours(case: CaseRows) -> Measurement | None:
        return case.get("mtlgrad", "mtlgrad merge")

    columns: dict[str, Cell] = {
        "gradients": lambda c: spoken(c.shape) + (", one matrix" if "matrix" in c.operation else " of a ResNet-50"),
        "mtlgrad": lambda c: time_cell(ours(c)),
        "with `out=`": lambda c: time_cell(c.get("mtlgrad out=")),
        "CUDA graph": lambda c: time_cell(c.get("mtlgrad graph")),
        "TorchJD": lambda c: time_cell(c.get("torchjd")),
        "faster": lambda c: faster_cell(ours(c), c.get("torchjd")),
        "TorchJD, tensor by tensor": lambda c: both_cell(ours(c), c.get("torchjd per tensor")),
        "LibMTL's way": lambda c: both_cell(ours(c), c.get("libmtl")),
        "over the floor": lambda c: floor_cell(c.get("mtlgrad out=", "mtlgrad merge")),
        "error: mtlgrad, TorchJD": lambda c: error_cell(ours(c), c.get("torchjd")),
    }
    names = ("mtlgrad", "mtlgrad out=", "mtlgrad merge", "mtlgrad graph", "torchjd", "torchjd per tensor", "libmtl")
    return by_device(
        results,
        lambda d: table(ordered(c for c in results.of(d) if c.operation.startswith("aligned ")), columns, names),
    )


def step(results: Results) -> str:
    """A table for each backbone and number of heads: all contenders beside the first, the plain sum."""

    def one(case: CaseRows) -> str:
        rows = []
        for m in case.contenders.values():
            ratio = NONE if m is case.first else times(m.number("times_first"), fine=True)
            low, high = m.number("times_first_p20"), m.number("times_first_p80")
            if m is not case.first and low < high:  # not of a single round
                ratio += f" ({times(low, fine=True)} to {times(high, fine=True)})"
            share = NONE if m is case.first or not m["method_share"] else percent(m.number("method_share"))
            examples = digits(m.number("examples_per_s"), 3)
            rows.append([m.contender, time_cell(m), ratio, share, memory_cell(m), examples])
        first = case.first.contender
        titles = ["method", "a step", f"times {first}", "the method's share", "extra memory", "examples/s"]
        title = f"**{case.operation.removeprefix('step ')}**, {spoken(case.shape)}:"
        return f"{title}\n\n{markdown(titles, rows)}{remarks([case])}"

    return by_device(results, lambda d: "\n\n".join(one(c) for c in results.of(d) if c.operation.startswith("step ")))


def adatask(results: Results) -> str:
    def ratio(name: str) -> Cell:
        return lambda c: faster_cell(c.get("mtlgrad"), c.get(name))

    columns: dict[str, Cell] = {
        "gradients": lambda c: spoken(c.shape) + (", " + c.operation.split()[-1]) * (c.operation != "adatask adam"),
        "mtlgrad": lambda c: time_cell(c.get("mtlgrad")),
        "CUDA graph": lambda c: time_cell(c.get("mtlgrad graph")),
        "over the floor": lambda c: floor_cell(c.get("mtlgrad")),
        "faster than published": ratio("published"),
        "than torch foreach": ratio("torch foreach"),
        "than torch fused": ratio("torch fused"),
        "than compiled reference": ratio("compiled"),
        "than compiled published": ratio("compiled published"),
    }
    names = ("mtlgrad", "mtlgrad graph", "published", "torch foreach", "torch fused", "compiled", "compiled published")
    return by_device(
        results,
        lambda d: table(ordered(c for c in results.of(d) if c.operation.startswith("adatask ")), columns, names),
    )


def alphavil(results: Results) -> str:
    """A step of alpha beside the first contender, the network's own forward and backward."""

    def relative(name: str) -> Cell:
        def cell(case: CaseRows) -> str:
            m = case.get(name)
            return (
                time_cell(m) if m is None or not m.timed else times(m.number("times_first"), fine=True) + "*" * m.wrong
            )

        return cell

    def reading(case: CaseRows) -> str:
        """Two readings of the T deltas at copy speed, beside the network's own passes."""
        copying = case.first.number("bytes") / case.first.number("copy_gb_per_s") / 1e6
        return percent(copying / case.first.ms)

    columns: dict[str, Cell] = {
        "network": lambda c: f"{c.operation.removeprefix('alpha step ')}, {spoken(c.shape)}",
        "forward, backward": lambda c: time_cell(c.first),
        "mtlgrad: times that": relative("mtlgrad alpha step"),
        "with torch's operations": relative("torch alpha step"),
        "reading T deltas twice": reading,
    }
    return by_device(results, lambda d: table([c for c in results.of(d) if c.operation.startswith("alpha ")], columns))


def bayesagg(results: Results) -> str:
    columns: dict[str, Cell] = {
        "shape": lambda c: spoken(c.shape),
        "mtlgrad": lambda c: time_cell(c.get("mtlgrad")),
        "CUDA graph": lambda c: time_cell(c.get("mtlgrad graph")),
        "sampled": lambda c: time_cell(c.get("mtlgrad sampled")),
        "published": lambda c: time_cell(c.get("published")),
        "faster": lambda c: faster_cell(c.get("mtlgrad"), c.get("published")),
        "extra memory": lambda c: memory_cell(c.get("mtlgrad"), c.get("published")),
        "over the floor": lambda c: floor_cell(c.get("mtlgrad")),
    }
    names = ("mtlgrad", "mtlgrad graph", "mtlgrad sampled", "published")
    return by_device(results, lambda d: table([c for c in results.of(d) if c.operation == "aggregate"], columns, names))


def operations(results: Results, stem: str, whole: str) -> str:
    """Each operation of a stem by itself, without its whole aggregations: time, and that of all others beside it."""

    def one(device: str) -> str:
        cases = [case for case in results.of(device, stem) if not case.operation.startswith(whole)]
        listed = {m.contender: m.kind for c in cases for m in c.contenders.values() if m is not c.ours}
        others = sorted(listed, key=lambda name: KINDS.index(listed[name]))

        def other(name: str) -> Cell:
            def cell(case: CaseRows) -> str:
                m = case.get(name)
                return NONE if m is case.ours else both_cell(case.ours, m)

            return cell

        columns: dict[str, Cell] = {
            "operation": lambda c: f"`{c.operation}`",
            "shape": lambda c: spoken(c.shape),
            "mtlgrad": lambda c: time_cell(c.ours),
            "over the floor": lambda c: floor_cell(c.ours),
        }
        return table(ordered(cases), columns | {name: other(name) for name in others})

    return by_device(results, one)


def machine(results: Results) -> str:
    """Where the figures come from, a sentence a device."""

    def one(device: str) -> str:
        rows = [row for row in results.rows if row["device"] == results.devices[device]]

        def listed(column: str, before: str = "") -> str:
            values = results.distinct(column, rows)
            return f"{before}{' and '.join(values)}" if values else ""

        def files(column: str) -> str:
            """Values with the files that have them, where there are several."""
            named = {v: dict.fromkeys(r.path.stem.split("_")[0] for r in rows if r[column] == v) for v in every(column)}
            return ", ".join(v + f" ({', '.join(stems)})" * (len(named) > 1) for v, stems in named.items())

        def every(column: str) -> list[str]:
            return sorted(results.distinct(column, rows))

        days = sorted({date[:10] for date in every("date")})
        facts = [
            f"{listed('cpu')} ({listed('machine')})",
            f"threads: {files('threads')}" if device == "cpu" else listed("device"),
            listed("driver"),
            listed("torch", "torch "),
            listed("python", "Python "),
            listed("torchjd", "TorchJD "),
            listed("mtlgrad", "mtlgrad "),
            listed("compiler"),
            f"commit {files('commit')}",
            " to ".join(dict.fromkeys([days[0], days[-1]])),
        ]
        text = ", ".join(filter(None, facts)) + "."
        dirty = any(commit.endswith("+") for commit in every("commit"))
        return text + "\n\n+ after a commit: with uncommitted changes." * dirty

    return by_device(results, one)


#: Operation and a part of the shape of a case, its contender of ours, the peer, and what to call case and peer.
SUMMARY = (
    ("aligned resnet-50", "T=8", "mtlgrad merge", "torchjd", "Aligned-MTL: 8 gradients of a ResNet-50", "TorchJD"),
    ("adatask adam", "T=3 N=1e+07", "mtlgrad", "published", "AdaTask: a step, 3 tasks, N 1e7", "published step"),
    ("aggregate", "cifar-mtl", "mtlgrad", "published", "BayesAgg: B 128, 20 binary tasks", "published estimator"),
    ("step resnet-18", "20 heads", "mtlgrad aligned layer", "torchjd aligned merge",
     "Aligned-MTL's layer: a training step, ResNet-18, 20 heads", "TorchJD on the parameters"),
    ("alpha step resnet-18", "T=8", "mtlgrad alpha step", "torch alpha step",
     "alphaVIL: a step of alpha, 8 tasks, ResNet-18", "torch's operations"),
)  # fmt: skip


def summary(results: Results) -> str:
    """One row a method, of one device: what a reader of the README wants to know first."""

    def one(device: str) -> str:
        rows = []
        for operation, shape, ours, peer, title, against in SUMMARY:
            for case in results.of(device):
                if case.operation == operation and shape in case.shape:
                    mine, other = case.get(ours), case.get(peer)
                    rows.append([title, time_cell(mine), f"{against}: {time_cell(other)}", faster_cell(mine, other)])
                    break
        return markdown(["what", "mtlgrad", "against", "faster"], rows) if rows else NOTHING

    return by_device(results, one)


BLOCKS: dict[str, Callable[[Results], str]] = {
    "summary": summary,
    "machine": machine,
    "aligned": aligned,
    "step": step,
    "adatask": adatask,
    "alphavil": alphavil,
    "bayesagg": bayesagg,
    "moments": lambda results: operations(results, "moments", "aggregate"),
    "combine": lambda results: operations(results, "combine", "aligned "),
}
