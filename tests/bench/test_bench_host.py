"""The benchmark of host time measures what it says, with one thread, and finds what is slow or wrong."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import __main__ as command
from bench import bench_host, figures
from bench.bench_host import NET, HostCase
from bench.bench_moments import toy
from bench.harness import BenchError, Options, Work
from bench.measured import read_results

CPU = torch.device("cpu")
QUICK = Options(CPU, rounds=4, seconds=0.5, with_memory=False, flush_bytes=1 << 16)
BUILDS: dict[str, tuple[Callable[[], Work], Callable[[Any], Any]]] = {  # with an error of a hundredth
    "step": (
        lambda: bench_host.build_step("adam", [(4,)] * 8, 3, CPU, False),
        lambda problem: (problem.bare[-1].mul_(1.01), problem)[1],
    ),
    "stacked": (lambda: bench_host.build_stacked(8, 3, CPU, False), lambda parts: [1.01 * part for part in parts]),
    "layer": (lambda: bench_host.build_layer(CPU, False), lambda output: (1.01 * output[0], output[1])),
    "bayesagg": (lambda: bench_host.build_bayesagg(toy(NET), CPU, False), lambda output: (1.01 * output[0], output[1])),
}


def rows_of(work: Work) -> dict[str, dict[str, Any]]:
    return {row["contender"]: row for row in HostCase("host x", "s", lambda small: work).rows("", QUICK, [])}


def test_quick_run_of_the_host_benchmark(tmp_path: Path) -> None:
    assert command.main(["host", "--quick", "--device", "cpu", "--threads", "2", "--results", str(tmp_path)]) == 0
    assert torch.get_num_threads() == 2
    results = read_results(tmp_path)
    cases = {case.operation: case for case in results.of("cpu", "host")}
    for rule in "adam", "rmsprop", "adagrad":
        assert list(cases[f"host adatask {rule}"].contenders) == ["torch fused adam", "mtlgrad"]
        assert cases[f"host adatask {rule}"].contenders["mtlgrad"]["note"].endswith(" us a parameter")
    for layer in "aligned", "bayesagg":
        assert list(cases[f"host {layer} layer"].contenders) == ["plain", "mtlgrad"]
    assert {f"host {name}" for name in ("merge", "gram", "combine", "dots", "displace", "align")} < set(cases)
    for m in results.rows:
        if not m["note"].startswith("failed"):  # TorchJD need not be there
            assert 0 < m.number("host_us_p20") <= m.number("host_us") <= m.number("host_us_p80")
            assert m.number("times_first_p20") <= m.number("times_first") <= m.number("times_first_p80")
            assert (m["threads"], m["median_ms"]) == ("1", "")
    assert results.of("cpu") == []  # nor in the tables and figures of the other stems
    assert figures.write_all(results, tmp_path) == []


def test_a_slower_host_shows_in_time_and_ratio() -> None:
    work = BUILDS["step"][0]()
    before, contender = rows_of(work)["mtlgrad"], work.contenders["mtlgrad"]
    step = contender.call

    def slower() -> Any:
        end = time.thread_time() + 20e-3
        while time.thread_time() < end:
            pass
        return step()

    contender.call = slower
    after = rows_of(work)["mtlgrad"]
    assert float(after["host_us"]) > 20e3
    assert float(after["times_first"]) > 2 * float(before["times_first"])


@pytest.mark.parametrize("name", list(BUILDS))
def test_what_is_wrong_by_a_hundredth_is_not_timed(name: str) -> None:
    build, spoil = BUILDS[name]
    work = build()
    contender = work.contenders["mtlgrad"]
    call = contender.call
    contender.call = lambda: spoil(call())
    with pytest.raises(BenchError, match="mtlgrad is wrong, so nothing was timed"):
        rows_of(work)
