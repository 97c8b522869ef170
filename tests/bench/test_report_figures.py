"""The figures show the CSVs' rows, and the same rows give the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import figures, report
from tests.bench.report_cases import measured, readme, row, write


def swept() -> list[dict]:
    rows = []
    for shape, scale in (
        *((f"T={t} N=1e+07", t) for t in (2, 3, 8, 20)),
        *((f"T=3 N={n:.0e}", n / 1e7) for n in (1e4, 1e5, 1e6)),
        ("T=8 N=1e+07 bfloat16", 1),
        ("T=3 N=1e+07 in 10 tensors", 1),
    ):
        rows.append(row("gram", shape, "mtlgrad", 2.0 * scale, 1.0))
        rows.append(row("gram", shape, "mtlgrad out=", 1.0 * scale, 0.5))
        rows.append(row("gram", shape, "reference", 7.0 * scale, 3.5))
        rows.append(row("gram", shape, "torchjd", 4.0 * scale, 2.0, checked_error="1.0e-03"))
    return rows


def test_sweeps_are_found(tmp_path: Path) -> None:
    found = figures.sweeps(measured(tmp_path, *swept()).cases)
    assert [(sweep.key, sweep.rest, [value for value, _ in sweep.cases]) for sweep in found] == [
        ("T", "N=1e+07", [2, 3, 8, 20]),
        ("N", "T=3", [1e4, 1e5, 1e6, 1e7]),
    ]
    assert [case.shape for _, case in found[1].cases][-1] == "T=3 N=1e+07"
    assert figures.sweeps(measured(tmp_path, *swept()[4:16]).cases) == []  # three values are no sweep


def test_figures_are_written_and_the_same_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path, "combine_cpu.csv", swept())
    steps = [
        row("step net", "B=8", name, 9.0) for name in ("plain", "mtlgrad adatask", "published adatask", "published")
    ]
    write(tmp_path, "step_cpu.csv", steps)
    arguments = ["--results", str(tmp_path), "--page", str(readme(tmp_path, "machine"))]
    assert report.main(arguments) == 0
    first = {path.name: path.read_bytes() for path in tmp_path.glob("*.svg")}
    assert sorted(first) == ["roofline_cpu.svg", "scaling_cpu.svg", "speedup_cpu.svg"]
    for path in tmp_path.glob("*.svg"):
        path.unlink()
    assert report.main(arguments) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.svg")} == first
    for name, drawn in first.items():
        assert b"dc:date" not in drawn, name
        assert len(drawn) < 500_000
        assert b"TorchJD" in drawn
    assert b"step net  B 8: adatask" in first["speedup_cpu.svg"]
    write(tmp_path, "combine_cpu.csv", [r | {"median_ms": "55.0"} if "reference" in r.values() else r for r in swept()])
    report.main(arguments)
    assert (tmp_path / "roofline_cpu.svg").read_bytes() != first["roofline_cpu.svg"]


def test_points_of_the_figures_are_rows(tmp_path: Path) -> None:
    results = measured(tmp_path, *swept())

    def points(figure: Any, title: str) -> set[tuple[float, float]]:
        axes = next(a for a in figure.axes if a.get_title() == title)
        lines = [line for line in axes.lines if line.get_linestyle() == "None"]
        return {(round(x, 6), round(y, 6)) for line in lines for x, y in zip(line.get_xdata(), line.get_ydata())}

    floors = [line for line in figures.scaling(results, "cpu").axes[0].lines if line.get_linestyle() == "--"]
    assert [list(line.get_ydata()) for line in floors] == [[1.0] * 4]
    expected = {(float(t), rate * t) for t in (2, 3, 8, 20) for rate in (2.0, 7.0, 4.0)}
    assert points(figures.scaling(results, "cpu"), "gram\nN 1e7") == expected
    every = {float(r["median_ms"]) for r in swept()}
    assert points(figures.roofline(results, "cpu"), "gram") == {(2.0, round(20.0 / ms, 6)) for ms in every}
    drawn = points(figures.speedup(results, "cpu"), "")
    assert {x for x, _ in drawn} == {3.5, 2.0}
    assert len(drawn) == 2 * 9
