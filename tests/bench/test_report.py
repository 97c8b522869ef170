"""README's tables and the figures come from the CSVs alone, and what cannot be trusted is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from bench import figures, report, table
from bench.measured import ReportError, Results, faster, read_results
from bench.readme_tables import BLOCKS, digits, milliseconds, percent, power, spoken, times

ROOT = Path(__file__).resolve().parents[2]


WHERE = {
    "date": "2026-01-02T03:04Z",
    "machine": "Linux x86_64, 2 cores, 8 GiB",
    "cpu": "Abacus 9000",
    "threads": "2",
    "device": "cpu",
    "python": "3.11.7",
    "torch": "2.13.0",
    "numpy": "2.0.0",
    "torchjd": "0.18.0",
    "mtlgrad": "0.1.0",
    "compiler": "g++ 12.2.0",
    "commit": "abc1234",
}
# 10 GB/s and 100 GFLOP/s: the floor of these is 1 ms of copying, or 0.2 of arithmetic.
WORK = {"bytes": 10_000_000, "flops": 20_000_000, "copy_gb_per_s": "10.00", "gemm_gflop_per_s": "100.00"}
TIMED = WORK | {"checked_error": "1.2e-07", "allowed_error": "1.0e-05", "runs": 20, "dtype": "float32"}


def row(operation: str, shape: str, contender: str, ms: float | None, ratio: float | None = 1.0, **more: Any) -> dict:
    times_of = {} if ms is None else {"median_ms": f"{ms:.4f}", "times_first": f"{ratio:.4f}"}
    return WHERE | TIMED | times_of | {"operation": operation, "shape": shape, "contender": contender} | more


def write(folder: Path, name: str, rows: list[dict]) -> Path:
    table.write_rows(folder / name, rows, keep=False)
    return folder / name


def measured(folder: Path, *rows: dict, name: str = "combine_cpu.csv") -> Results:
    write(folder, name, list(rows))
    return read_results(folder)


def readme(folder: Path, *names: str) -> Path:
    path = folder / "README.md"
    parts = [f"<!-- bench: {name} -->\nold\n<!-- /bench -->\n" for name in names]
    path.write_text("# A title\n\n" + "\nbetween\n\n".join(parts) + "\nafter\n")
    return path


def cells(block: str, first: str) -> list[str]:
    """Of the table's line that starts with this."""
    line = next(line for line in block.splitlines() if line.startswith(f"| {first} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


# Blocks --------------------------------------------------------------------------------------------------------------


def test_numbers() -> None:
    assert [milliseconds(v) for v in (0.12345, 9.996, 12.34, 3598.2)] == ["0.123 ms", "10.0 ms", "12.3 ms", "3,598 ms"]
    assert [times(v) for v in (0.034, 0.994, 1.044, 2.44)] == ["0.034x", "0.99x", "1.04x", "2.4x"]
    assert [times(v) for v in (10.4, 5969.0)] == ["10x", "5,969x"]
    assert times(2.376, fine=True) == "2.38x"
    assert [percent(v) for v in (-0.033, 0.0994, 0.576)] == ["-3.3 %", "9.9 %", "58 %"]
    assert [power(v) for v in ("6.3e-08", "1e+07", "1.2e-11")] == ["6.3e-8", "1e7", "1.2e-11"]
    assert digits(0.0, 3) == "0"


def test_shapes_in_words() -> None:
    assert spoken("T=3 N=1e+07 in 1000 tensors") == "T 3, N 1e7 in 1000 tensors"
    assert spoken("utkface B=128 D=256 regression1 S=1024") == "utkface, B 128, D 256, regression1, S 1024"
    assert spoken("B=32 3x64x64 width 64, 3 heads") == "B 32, 3x64x64 width 64, 3 heads"


def test_faster_goes_by_ratios_within_rounds(tmp_path: Path) -> None:
    results = measured(
        tmp_path,
        row("gram", "T=2", "mtlgrad", 4.0, 1.0),
        row("gram", "T=2", "mtlgrad out=", 2.0, 0.6),
        row("gram", "T=2", "torchjd", 8.0, 3.0),
    )
    ours, other, peer = results.cases[0].contenders.values()
    assert faster(ours, peer) == 3.0  # not 8 / 4
    assert faster(other, peer) == pytest.approx(5.0)


def test_block_of_aligned_mtl(tmp_path: Path) -> None:
    wrong = {"checked_error": "1.2e-04", "note": "TorchJD; wrong: its error is 1.2e-04, 1e-05 is allowed"}
    shape = "T=3 161 parameters"
    results = measured(
        tmp_path,
        row("aligned matrix", "T=2 N=1e+06", "mtlgrad", 1.0),
        row("aligned matrix", "T=2 N=1e+07", "mtlgrad", 24.1, 1.0),
        row("aligned matrix", "T=2 N=1e+07", "mtlgrad out=", 10.5, 0.5),
        row("aligned matrix", "T=2 N=1e+07", "torchjd", 24.9, 1.2, **wrong),
        row("aligned resnet-50", shape, "mtlgrad merge", 30.1, 1.0),
        row("aligned resnet-50", shape, "torchjd", None, note="failed: ModuleNotFoundError: torchjd"),
        row("aligned resnet-50", shape, "torchjd per tensor", 81.3, 2.7),
        row("aligned resnet-50", shape, "libmtl", 90.3, 3.0),
        row("gram", "T=2 N=1e+07", "mtlgrad", 77.7),
    )
    block = BLOCKS["aligned"](results)
    line = ["24.1 ms", "10.5 ms", "24.9 ms*", "1.20x*", "-", "-", "10x", "1.2e-7, 1.2e-4"]
    assert cells(block, "T 2, N 1e7, one matrix")[1:] == line
    line = ["30.1 ms", "-", "failed", "failed", "81.3 ms, 2.7x", "90.3 ms, 3.0x", "30x", "1.2e-7, 1.2e-7"]
    assert cells(block, "T 3, 161 parameters of a ResNet-50")[1:] == line
    assert cells(block, "T 2, N 1e6, one matrix")[1:] == ["1.00 ms", *"------", "1.2e-7, -"]
    assert block.index("N 1e7") < block.index("N 1e6")
    assert "\\* Its error is larger" in block
    assert "torchjd, failed: ModuleNotFoundError: torchjd (aligned resnet-50 T 3, 161 parameters)." in block
    assert "77.7" not in block
    assert "CUDA graph" not in block  # nobody ran it


def test_block_of_training_steps(tmp_path: Path) -> None:
    more = {"examples_per_s": "83.20", "peak_extra_mb": "95.7"}
    fast = {"examples_per_s": "34.90", "method_share": "0.5797", "peak_extra_mb": "186.0"}
    results = measured(
        tmp_path,
        row("step resnet-18", "B=32, 3 heads", "plain", 384.6, 1.0, method_share="0.0000", **more),
        row("step resnet-18", "B=32, 3 heads", "mtlgrad merge", 917.0, 2.3794, **fast),
        row("step resnet-18", "B=32, 3 heads", "somebody's own", None, note="wrong, not timed: its error is 3"),
        row("step transformer", "B=8, 20 heads", "plain", 12.0, **more),
        name="step_cpu.csv",
    )
    block = BLOCKS["step"](results)
    assert "**resnet-18**, B 32, 3 heads:" in block
    assert "**transformer**, B 8, 20 heads:" in block
    assert cells(block, "plain") == ["plain", "385 ms", "-", "-", "95.7 MB", "83.2"]
    assert cells(block, "mtlgrad merge") == ["mtlgrad merge", "917 ms", "2.38x", "58 %", "186 MB", "34.9"]
    assert cells(block, "somebody's own") == ["somebody's own", "wrong", "-", "-", "-", "-"]
    assert "somebody's own, wrong, not timed: its error is 3 (step resnet-18 B 32, 3 heads)." in block


def test_block_of_adatask(tmp_path: Path) -> None:
    results = measured(
        tmp_path,
        row("adatask adam", "T=3 N=1e+07", "mtlgrad", 0.5, 1.0),
        row("adatask adam", "T=3 N=1e+07", "published", 4.0, 8.9, note="step; wrong: a hair over what is allowed"),
        row("adatask adam", "T=3 N=1e+07", "compiled published", 1.0, 1.6),
        row("adatask rmsprop", "T=3 N=1e+07", "mtlgrad", 0.6, 1.0),
        name="adatask_cpu.csv",
    )
    block = BLOCKS["adatask"](results)
    titles = ["gradients", "mtlgrad", "over the floor", "faster than published", "than compiled published"]
    assert cells(block, "gradients") == titles
    assert cells(block, "T 3, N 1e7") == ["T 3, N 1e7", "0.500 ms", "0.50x", "8.9x*", "1.60x"]
    assert cells(block, "T 3, N 1e7, rmsprop")[1:] == ["0.600 ms", "0.60x", "-", "-"]


def test_block_of_alphavil(tmp_path: Path) -> None:
    results = measured(
        tmp_path,
        row("alpha step resnet-18", "T=3 B=32", "forward, backward", 25.0),
        row("alpha step resnet-18", "T=3 B=32", "mtlgrad alpha step", 27.0, 1.092),
        row("alpha step resnet-18", "T=3 B=32", "torch alpha step", 30.0, 1.26),
        name="alphavil_cpu.csv",
    )
    line = ["resnet-18, T 3, B 32", "25.0 ms", "1.09x", "1.26x", "4.0 %"]
    assert cells(BLOCKS["alphavil"](results), "resnet-18, T 3, B 32") == line


def test_blocks_of_bayesagg_and_its_operations(tmp_path: Path) -> None:
    slow = {"runs": 1, "peak_extra_mb": "13010.0"}
    results = measured(
        tmp_path,
        row("aggregate", "regression B=128", "mtlgrad", 11.7, 1.0, peak_extra_mb="7.5"),
        row("aggregate", "regression B=128", "published", 69667.0, 5969.0, **slow),
        row("aggregate binary", "B=32 T=2", "mtlgrad", 88.8),
        row("binary_moments", "B=128 O=20", "mtlgrad", 3.0, 1.0),
        row("binary_moments", "B=128 O=20", "reference", 9.0, 3.1),
        name="moments_cpu.csv",
    )
    block = BLOCKS["bayesagg"](results)
    line = ["11.7 ms", "69,667 ms (one call)", "5,969x", "7.5 against 13,010 MB", "12x"]
    assert cells(block, "regression, B 128")[1:] == line
    assert "88.8" not in block
    block = BLOCKS["moments"](results)
    assert cells(block, "`binary_moments`")[1:] == ["B 128, O 20", "3.00 ms", "3.0x", "9.00 ms, 3.1x"]
    assert "aggregate" not in block


def test_block_of_the_machine(tmp_path: Path) -> None:
    measured(tmp_path, row("gram", "T=2", "mtlgrad", 4.0))
    later = {"commit": "def5678+", "date": "2026-01-05T00:00Z"}
    results = measured(tmp_path, row("adatask adam", "T=2", "mtlgrad", 4.0, **later), name="adatask_cpu.csv")
    block = BLOCKS["machine"](results)
    for text in (
        *("Abacus 9000 (Linux x86_64, 2 cores, 8 GiB)", "threads: 2", "torch 2.13.0", "Python 3.11.7"),
        *("TorchJD 0.18.0", "mtlgrad 0.1.0", "g++ 12.2.0", "2026-01-02 to 2026-01-05"),
        *("abc1234 (combine)", "def5678+ (adatask)", "with uncommitted changes"),
    ):
        assert text in block


def test_several_devices_get_a_table_each(tmp_path: Path) -> None:
    card = {"device": "NVIDIA H200", "driver": "CUDA 13.0, driver 580"}
    measured(tmp_path, row("aligned matrix", "T=2 N=1e+07", "mtlgrad out=", 10.5))
    graph = row("aligned matrix", "T=2 N=1e+07", "mtlgrad graph", 0.3, 0.9, **card)
    results = measured(
        tmp_path,
        row("aligned matrix", "T=2 N=1e+07", "mtlgrad out=", 0.4, **card),
        graph,
        name="combine_nvidia_h200.csv",
    )
    cpu, gpu = BLOCKS["aligned"](results).split("On NVIDIA H200:")
    assert cpu.startswith("On the CPU:")
    assert cells(cpu, "T 2, N 1e7, one matrix")[1] == "10.5 ms"
    assert cells(gpu, "T 2, N 1e7, one matrix")[1:3] == ["0.400 ms", "0.300 ms"]
    assert "CUDA 13.0, driver 580" in BLOCKS["machine"](results)
    assert BLOCKS["adatask"](results) == "Not measured yet."


# README --------------------------------------------------------------------------------------------------------------


def test_blocks_are_filled_and_stale_ones_found(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path, "adatask_cpu.csv", [row("adatask adam", "T=3 N=1e+07", "mtlgrad", 18.0)])
    path = readme(tmp_path, "machine", "adatask")
    arguments = ["--results", str(tmp_path), "--page", str(path)]
    before = path.read_bytes()
    assert report.main([*arguments, "--check"]) == 1
    assert capsys.readouterr().err == (f"bench.report: {path}: stale: machine, adatask; run python -m bench.report\n")
    assert path.read_bytes() == before
    assert report.main([*arguments, "--no-figures"]) == 0
    text = path.read_text()
    assert "old" not in text
    assert text.startswith("# A title\n\n<!-- bench: machine -->\n\nAbacus")
    assert "\nbetween\n" in text
    assert text.endswith("<!-- /bench -->\n\nafter\n")
    assert not list(tmp_path.glob("*.svg"))
    assert report.main([*arguments, "--check"]) == 0
    capsys.readouterr()
    path.write_text(text.replace("18.0 ms", "17.9 ms"))
    assert report.main([*arguments, "--check"]) == 1
    assert "stale: adatask;" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "adatask_cpu.csv"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- bench: speed -->\n<!-- /bench -->\n", r"README.md:1: expected a block of summary, .*found 'speed'"),
        ("\n<!-- bench: step -->\n", r"README.md:2: expected <!-- /bench --> for the block 'step', found none"),
        ("<!-- bench: step -->\n<!-- bench: step -->\n<!-- /bench -->\n", "README.md:2: expected <!-- /bench -->"),
        ("<!-- /bench -->\n", "README.md:1: expected <!-- bench: NAME -->, alone in its line"),
        ("<!-- bench:step -->\n<!-- /bench -->\n", "README.md:1: expected <!-- bench: NAME -->"),
        ("no blocks\n", "expected blocks .*found none"),
    ],
)
def test_blocks_that_are_not_right(tmp_path: Path, capsys: pytest.CaptureFixture, text: str, message: str) -> None:
    write(tmp_path, "adatask_cpu.csv", [row("adatask adam", "T=3 N=1e+07", "mtlgrad", 18.0)])
    path = tmp_path / "README.md"
    path.write_text(text)
    assert report.main(["--results", str(tmp_path), "--page", str(path)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1
    assert path.read_text() == text
    assert not list(tmp_path.glob("*.svg"))


def test_figures_outside_of_blocks_are_found() -> None:
    text = (
        "It takes long.\n## Measured\nSome 12.5 ms, 3x, 1,024 MB, 58 %, 3.1 ± 0.2, 1e-3 s, 2.80 GHz and 5 times.\n"
        "<!-- bench: step -->\n99 ms\n<!-- /bench -->\n"
        "T 3, N 1e7, 64 x 64 images, 3x64x64, 20 heads, [78 %](a_5ms.svg), (5 T + 2) N, ResNet-50's 161 parameters.\n"
        "```python\nsleep()  # 4 ms\n```\nand `4 ms`\n"
    )
    found = ["3: 12.5 ms", "3: 3x", "3: 1,024 MB", "3: 58 %", "3: 3.1 ±", "3: 1e-3 s", "3: 2.80 GHz", "3: 5 times"]
    assert report.unmeasured(text) == [*found, "7: 78 %"]


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "column", ["machine", "cpu", "date", "python", "torch", "mtlgrad", "commit", "threads", "operation", "contender"]
)
@pytest.mark.parametrize("value", ["", "none"])
def test_rows_without_origin_are_refused(tmp_path: Path, column: str, value: str) -> None:
    rows = [row("gram", "T=2", "mtlgrad", 4.0), row("gram", "T=2", "reference", 4.0) | {column: value}]
    with pytest.raises(ReportError, match=rf"combine_cpu.csv:3: expected a value in the column {column}, found none"):
        measured(tmp_path, *rows)


def test_other_columns_are_refused(tmp_path: Path) -> None:
    names = [name for name in table.COLUMNS if name != "commit"]
    path = tmp_path / "gram_cpu.csv"
    path.write_text(",".join([*names, "guess"]) + "\n")
    with pytest.raises(ReportError, match=r"gram_cpu.csv:1: expected the columns .*without commit; with guess"):
        read_results(tmp_path)
    path.write_text(",".join(reversed(table.COLUMNS)) + "\n")
    with pytest.raises(ReportError, match="another order"):
        read_results(tmp_path)


def test_files_from_before_host_time_are_read_and_kept(tmp_path: Path) -> None:
    path = write(tmp_path, "combine_cpu.csv", [row("gram", "T=2", "mtlgrad", 4.0)])
    newer = ",host_us,host_us_p20,host_us_p80"
    path.write_text(path.read_text().replace(newer, "").replace(",,,\n", "\n"))
    (measurement,) = read_results(tmp_path).rows
    assert (measurement.ms, measurement["host_us"]) == (4.0, "")
    table.write_rows(path, [row("dots", "T=2", "mtlgrad", 2.0)], keep=True)
    assert [m.ms for m in read_results(tmp_path).rows] == [4.0, 2.0]
    path.write_text(path.read_text().replace(",host_us_p80", ""))
    with pytest.raises(ReportError, match="without host_us_p80"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"median_ms": "fast"}, "expected a finite number or nothing in the column median_ms, found 'fast'"),
        ({"checked_error": "nan"}, "in the column checked_error, found 'nan'"),
        ({"median_ms": ""}, "expected a number in the column median_ms or a note of what failed"),
        ({"copy_gb_per_s": ""}, "expected a number in the column copy_gb_per_s"),
        ({"host_us": "4.0"}, "expected a number in the column host_us_p20"),
        ({"device": "NVIDIA H200"}, r"expected the device that the file's name ends in \(cpu\), found 'NVIDIA H200'"),
    ],
)
def test_rows_that_say_nothing_are_refused(tmp_path: Path, more: dict, message: str) -> None:
    with pytest.raises(ReportError, match=f"combine_cpu.csv:2: .*{message}"):
        measured(tmp_path, row("gram", "T=2", "mtlgrad", 4.0, **more))


def test_files_that_say_nothing_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert report.main(["--results", str(tmp_path), "--page", str(readme(tmp_path, "step"))]) == 2
    assert re.fullmatch(r"bench.report: .*: expected CSVs, found none; .*\n", capsys.readouterr().err)
    path = write(tmp_path, "combine_cpu.csv", [])
    with pytest.raises(ReportError, match=r"combine_cpu.csv:1: expected rows"):
        read_results(tmp_path)
    path.write_text(path.read_text() + "2026,Linux\n")
    with pytest.raises(ReportError, match=r"combine_cpu.csv:2: expected \d+ fields, found 2"):
        read_results(tmp_path)
    again = [row("gram", "T=2", "mtlgrad", 4.0)] * 2
    with pytest.raises(
        ReportError, match=r"combine_cpu.csv:3: expected each contender once, found 'mtlgrad' of line 2"
    ):
        measured(tmp_path, *again)


def test_uncommitted_changes_are_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write(tmp_path, "gram_cpu.csv", [row("gram", "T=2", "mtlgrad", 4.0, commit="abc1234+")])
    path = readme(tmp_path, "machine")
    assert report.main(["--results", str(tmp_path), "--page", str(path), "--no-figures"]) == 0
    message = f"bench.report: {tmp_path / 'gram_cpu.csv'}:2: commit abc1234+: measured with uncommitted changes\n"
    assert capsys.readouterr().err == message
    assert "with uncommitted changes" in path.read_text()


# This repository -----------------------------------------------------------------------------------------------------


def test_this_repository_every_csv_says_where_it_comes_from() -> None:
    assert read_results(ROOT / "bench" / "results").rows


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.name)
def test_this_repository_pages_are_what_the_csvs_say(page: Path) -> None:
    text = page.read_text()
    _, stale = report.filled(text, read_results(ROOT / "bench" / "results"))
    assert stale == []
    assert report.unmeasured(text) == []


# Figures: they show the CSVs' rows, and the same rows give the same files ---------------------------------------------


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
