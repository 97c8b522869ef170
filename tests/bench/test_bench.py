"""The benchmarks run, check before they time, and leave whole files."""

from __future__ import annotations

import csv
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import bench_adatask, bench_moments, harness, memory, table
from bench.bench_combine import RULES, uneven
from bench.harness import Case, Contender, Options, Result, Work
from mtlgrad import cli
from tests.support.ranks import Program

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
QUICK = Options(CPU, rounds=4, seconds=0.05, with_memory=False, flush_bytes=1 << 16)


def doubled(**contenders: Contender) -> Case:
    """A case whose right answer is 2."""
    work = Work(contenders, lambda value: harness.relative_error(value, torch.tensor(2.0)), bytes=8, flops=1)
    return Case("double", "of one", lambda small: work)


def right(**options) -> Contender:
    return Contender(lambda: torch.tensor(2.0), 1e-6, **options)


def raises() -> torch.Tensor:
    raise RuntimeError("no compiler\nat all")


def run_quick(stem: str, tmp_path: Path) -> list[dict[str, str]]:
    options = ["--quick", "--device", "cpu", "--results", str(tmp_path)]
    code, _, err = Program("-m", "mtlgrad", "bench", stem, *options, folder=ROOT).end()
    assert code == 0, err
    with (tmp_path / f"{stem}_cpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == table.COLUMNS
    facts = ("date", "machine", "cpu", "threads", "device", "python", "torch", "numpy", "mtlgrad", "compiler", "commit")
    assert all(row[name] for row in rows for name in facts)
    return rows


def quick_rows(stem: str, tmp_path: Path) -> list[dict[str, str]]:
    rows = run_quick(stem, tmp_path)
    for row in rows:
        if row["contender"].startswith("torchjd") and row["note"].startswith(
            ("failed: ModuleNotFoundError", "failed: ImportError")
        ):
            continue
        assert float(row["median_ms"]) > 0
        assert float(row["times_first"]) > 0
        assert math.isfinite(float(row["checked_error"]))
    return rows


def contenders(rows: list[dict[str, str]], operation: str) -> set[str]:
    return {row["contender"] for row in rows if row["operation"] == operation}


@pytest.mark.slow
def test_quick_run_of_the_moments_benchmark(tmp_path: Path) -> None:
    start = time.monotonic()
    rows = quick_rows("moments", tmp_path)
    assert time.monotonic() - start < 60  # 20 s on an idle machine
    steps = [row for row in rows if row["operation"] == "aggregate"]
    assert {row["shape"].split()[0] for row in steps} == {"cifar-mtl", "utkface", "regression-2048"}
    assert {"mtlgrad", "reference", "published"} <= contenders(rows, "aggregate")


@pytest.mark.slow
def test_quick_run_of_the_combine_benchmark(tmp_path: Path) -> None:
    rows = quick_rows("combine", tmp_path)
    assert contenders(rows, "aligned matrix") == {"mtlgrad", "mtlgrad out=", "reference", "torchjd"}
    peers = {"torchjd", "torchjd per tensor", "libmtl"}
    assert contenders(rows, "aligned resnet-50") == {
        *("mtlgrad merge", "mtlgrad stacked", "mtlgrad lists", "reference"),
        *peers,
    }
    for operation in "gram", "dots", "combine", "align":
        assert {"mtlgrad", "reference"} <= contenders(rows, operation)
    assert {row["dtype"] for row in rows if row["operation"] == "gram"} == {"float32", "bfloat16"}
    for rule in RULES:
        assert {"mtlgrad", "reference", "torchjd"} >= contenders(rows, rule) >= {"mtlgrad", "reference"}


@pytest.mark.slow
def test_quick_run_of_the_adatask_benchmark(tmp_path: Path) -> None:
    rows = quick_rows("adatask", tmp_path)
    ours, peers = {"mtlgrad", "mtlgrad op"}, {"published", "torch foreach", "reference"}
    assert contenders(rows, "adatask adam") == {*ours, *peers, "torch fused"}
    assert contenders(rows, "adatask adagrad") == {*ours, *peers, "torch fused"}
    assert contenders(rows, "adatask rmsprop") == {*ours, *peers}
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16/float32", "float32/bfloat16"}
    assert any("161 parameters" in row["shape"] for row in rows)


@pytest.mark.parametrize("rule", list(bench_adatask.RULES))
def test_a_wrong_adatask_step_is_found(rule: str) -> None:
    problem = bench_adatask.Problem(rule, [(40, 3), (7,)], 3, (torch.float32, torch.float32), False, CPU)
    for contender in (problem.ours() | problem.peers(compiled=False)).values():
        contender.prepare()
        contender.call()
        assert problem.error() < 2e-6
    right = problem.bound()
    assert right < 2e-6
    for tensor in problem.changing[0], problem.changing[1], problem.changing[-1]:  # parameters, a moment
        problem.restore()
        assert problem.error() > 0.1  # no step at all
        step = problem.ours()["mtlgrad op"]
        step.call()
        tensor.view(-1)[-1] *= 1.001
        assert problem.error() > right


def test_a_bound_may_be_found_out_after_the_first_call() -> None:
    order = []

    def call() -> torch.Tensor:
        order.append("call")
        return torch.tensor(2.1)

    def bound() -> float:
        order.append("bound")
        return 1e-3

    with pytest.raises(harness.BenchError, match=r"its error is 5\.00e-02"):
        doubled(late=Contender(call, bound)).rows("", QUICK, [])
    assert order == ["call", "bound"]


def test_a_wrong_contender_ends_the_run_before_anything_is_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def wrong() -> torch.Tensor:
        calls.append(None)
        return torch.tensor(2.1)

    case = doubled(fine=right(), wrong=Contender(wrong, 1e-3))
    with pytest.raises(harness.BenchError, match="wrong is wrong, so nothing was timed"):
        case.rows("", QUICK, [])
    assert len(calls) == 1
    monkeypatch.setattr(bench_moments, "cases", lambda quick, device: [case])
    assert command.main(["moments", "--quick", "--device", "cpu", "--results", str(tmp_path)]) == 1
    assert "mtlgrad bench: moments: double of one: wrong is wrong" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_are_wrong(value: float) -> None:
    assert harness.relative_error(torch.tensor([1.0, value]), torch.ones(2)) == math.inf


def test_an_optional_contender_may_fail_and_says_why() -> None:
    rows = doubled(fine=right(), broken=Contender(raises, 1e-6, optional=True)).rows("", QUICK, [])
    broken = next(row for row in rows if row["contender"] == "broken")
    assert broken["note"] == "failed: RuntimeError: no compiler"
    assert "median_ms" not in broken
    with pytest.raises(harness.BenchError, match="broken failed: no compiler"):
        doubled(broken=Contender(raises, 1e-6)).rows("", QUICK, [])


def test_an_optional_contender_that_is_wrong_is_not_timed() -> None:
    wrong = Contender(lambda: torch.tensor(3.0), 1e-6, optional=True)
    rows = doubled(fine=right(), wrong=wrong).rows("", QUICK, [])
    row = next(row for row in rows if row["contender"] == "wrong")
    assert row["note"].startswith("wrong, not timed")
    assert "median_ms" not in row


def test_a_peer_known_to_be_wrong_is_timed_and_its_row_says_how_wrong() -> None:
    wrong = Contender(lambda: torch.tensor(3.0), 1e-6, "a peer", tolerated=True)
    rows = doubled(fine=right(), wrong=wrong).rows("", QUICK, [])
    row = next(row for row in rows if row["contender"] == "wrong")
    assert row["note"].startswith("a peer; wrong: its error is 5.00e-01, 1e-06 is allowed")
    assert float(row["median_ms"]) > 0


def test_prepare_comes_before_every_call() -> None:
    seen = []

    def call() -> torch.Tensor:
        seen.append("call")
        return torch.tensor(2.0)

    doubled(x=Contender(call, 1e-6, prepare=lambda: seen.append("prepare"))).rows("", QUICK, [])
    assert len(seen) >= 8
    assert seen == ["prepare", "call"] * (len(seen) // 2)


def test_a_slow_contender_is_called_once() -> None:
    calls = []

    def slow() -> torch.Tensor:
        calls.append(None)
        return torch.tensor(2.0)

    rows = doubled(fine=right(), slow=Contender(slow, 1e-6, once=True)).rows("", QUICK, [])
    assert len(calls) == 2  # to check, and to time
    assert next(row for row in rows if row["contender"] == "slow")["runs"] == 1


def test_times_are_compared_within_rounds() -> None:
    first = Result(times={0: 1.0, 1: 10.0, 2: 1.0})
    assert table.times_first(Result(times={1: 20.0, 2: 2.0}), first) == 2.0
    assert table.times_first(Result(times={-1: 3.0}), first) == 3.0
    assert math.isnan(table.times_first(Result(times={-1: 3.0}), first, 20))
    spread = Result(times={i: float(i) for i in range(1, 12)})
    assert table.times_first(spread, Result(times=dict.fromkeys(range(20), 1.0)), 20) == 3.0
    assert math.isnan(table.times_first(Result(), first))


def test_turns_are_spread_evenly() -> None:
    order = list(harness.turns({"often": 6, "seldom": 2}))
    assert [i for i, name in order if name == "often"] == list(range(6))
    assert [i for i, name in order if name == "seldom"] == [2, 5]
    assert order[-2:] == [(5, "seldom"), (5, "often")]  # every other round goes backwards
    assert list(harness.turns({})) == []


@pytest.mark.parametrize("count", [1, 10, 1000])
def test_uneven_sizes(count: int) -> None:
    sizes = uneven(1_000_000, count)
    assert len(sizes) == count
    assert sum(sizes) == 1_000_000
    assert min(sizes) > 0
    assert count == 1 or max(sizes) > 30 * min(sizes)


def test_rows_of_other_cases_are_kept_on_request(tmp_path: Path) -> None:
    path = tmp_path / "new" / "moments_cpu.csv"
    table.write_rows(path, [{"operation": "a", "shape": "s", "note": "old"}, {"operation": "b", "shape": "s"}], False)
    table.write_rows(path, [{"operation": "a", "shape": "s", "note": "new"}], True)
    with path.open(newline="") as file:
        assert [(row["operation"], row["note"]) for row in csv.DictReader(file)] == [("b", ""), ("a", "new")]
    with pytest.raises(ValueError, match="not in fieldnames"):
        table.write_rows(path, [{"no such column": 1}], False)
    assert os.listdir(path.parent) == [path.name]
    assert len(path.read_text().splitlines()) == 3


LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")


@pytest.mark.slow
@LINUX
def test_memory_is_measured_in_a_fresh_process() -> None:
    title = next(case.title for case in bench_moments.cases(True, CPU) if case.operation == "precision_mean")
    peak = memory.in_fresh_process("moments", title, "mtlgrad", ["--quick", "--device", "cpu"])
    assert 0 <= peak < 50
    assert math.isnan(memory.in_fresh_process("moments", "no such case", "mtlgrad", ["--quick"]))


@LINUX
def test_peak_memory_counts_what_is_freed_within_the_call() -> None:
    script = """
import torch
from bench import memory
from bench.harness import Case, Contender, Work
def call():
    torch.ones(10_000_000)
    return torch.ones(1_000_000)
work = Work({"x": Contender(call, 1.0)}, lambda value: 0.0, 0, 0)
print(memory.measure(Case("o", "s", lambda small: work), "x"))
"""
    environment = os.environ | memory.ALLOCATOR | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert 39 < float(done.stdout) < 46  # 40 MB and a little


@pytest.mark.slow
def test_quick_run_of_the_alphavil_benchmark(tmp_path: Path) -> None:
    rows = quick_rows("alphavil", tmp_path)
    expected = {"forward, backward", "mtlgrad alpha step", "torch alpha step"}
    assert contenders(rows, "alpha step resnet-18") == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "argument STEM: expected some of combine, adatask, .*found 'nonsense'"),
        (["combine", "--only", "nothing like it"], "--only matches no case of combine; --list names them"),
        (["--threads", "0"], "argument --threads: expected a positive number, found '0'"),
        (["--seconds", "nan"], "argument --seconds: expected a positive number, found 'nan'"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        code = command.main(arguments)
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    found = capsys.readouterr().err
    assert re.search(message, found)
    assert len(found.splitlines()) == 1


def test_an_installed_package_says_where_the_benchmarks_are(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "mtlgrad" / "cli.py"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "--quick"]) == 2
    found = capsys.readouterr().err
    assert found.startswith("mtlgrad bench: expected mtlgrad's source tree")
    assert len(found.splitlines()) == 1
    monkeypatch.chdir(ROOT)
    assert cli.main(["bench", "alphavil", "--list"]) == 0
    assert "alpha step" in capsys.readouterr().out


def test_results_do_not_make_the_work_tree_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        who = ["-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "kept").write_text("a")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "one")
    monkeypatch.setattr(table, "ROOT", tmp_path)
    clean = table.commit()
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    (tmp_path / "bench" / "results" / "new.csv").write_text("a")
    assert table.commit() == clean
    (tmp_path / "kept").write_text("b")
    assert table.commit() == clean + "+"


def two_cases(*broken: str) -> list[Case]:
    """Cases named a and b, of which some raise what no benchmark expects."""

    def build(name: str) -> Work:
        if name in broken:
            raise MemoryError("no room\nat all")
        return doubled(fine=right()).build(False)

    return [Case(name, "s", lambda small, name=name: build(name)) for name in "ab"]


def test_one_case_that_fails_does_not_end_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, arguments = (
        tmp_path / "moments_cpu.csv",
        ["moments", "--quick", "--device", "cpu", "--results", str(tmp_path)],
    )

    def operations() -> list[str]:
        with path.open(newline="") as file:
            return [row["operation"] for row in csv.DictReader(file)]

    monkeypatch.setattr(bench_moments, "cases", lambda quick, device: two_cases("a"))
    assert command.main(arguments) == 1
    assert capsys.readouterr().err == "mtlgrad bench: moments: a s: MemoryError: no room\n"
    assert operations() == ["b"]

    def stopped(quick: bool, device: torch.device) -> list[Case]:
        first, second = two_cases()

        def stop(small: bool) -> Work:
            raise KeyboardInterrupt

        return [first, Case(second.operation, second.shape, stop)]

    monkeypatch.setattr(bench_moments, "cases", stopped)
    assert command.main(arguments) == 130
    assert operations() == ["b", "a"]  # what was measured before stays until a whole run takes its place
    monkeypatch.setattr(bench_moments, "cases", lambda quick, device: two_cases()[:1])
    assert command.main(arguments) == 0
    assert operations() == ["a"]


def test_contenders_can_be_left_out() -> None:
    options = Options(CPU, rounds=3, seconds=0.05, with_memory=False, flush_bytes=1 << 16, without=["comp"])
    rows = doubled(fine=right(), compiled=Contender(raises, 1e-6)).rows("", options, [])
    assert [row["contender"] for row in rows] == ["fine"]


def test_throughput_and_share_of_a_step() -> None:
    case = doubled(plain=right(), other=right(), long=right(examples=30))
    work = case.build(False)
    work.examples = 10
    rows = {row["contender"]: row for row in case.rows("", QUICK, [])}
    for name, examples in ("plain", 10), ("other", 10), ("long", 30):
        found = float(rows[name]["examples_per_s"]) * float(rows[name]["median_ms"]) / 1e3
        assert found == pytest.approx(examples, rel=0.1)
    assert float(rows["other"]["method_share"]) == pytest.approx(1 - 1 / float(rows["other"]["times_first"]), abs=1e-3)
    assert rows["long"]["method_share"] == ""


def test_the_commit_can_be_told_where_there_is_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "ROOT", tmp_path)
    monkeypatch.delenv("MTLGRAD_COMMIT", raising=False)
    assert table.commit() == "none"
    monkeypatch.setenv("MTLGRAD_COMMIT", "abc1234")
    assert table.commit() == "abc1234"
