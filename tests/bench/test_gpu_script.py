"""bench/gpu.sh, driven with stand-ins for Python, nvidia-smi and compute-sanitizer: no GPU, no build."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not shutil.which("bash") or not shutil.which("timeout"), reason="no bash, no timeout")
# What it is called with is written down; what contains $FAIL fails, what contains $HANG hangs, deaf to a polite signal.
STAND_IN = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >>"$CALLS"
if [[ -n ${HANG:-} && "$*" == *"$HANG"* ]]; then trap '' TERM; for _ in {1..600}; do sleep 0.1; done; fi
if [[ -n ${FAIL:-} && "$*" == *"$FAIL"* ]]; then echo "as planted"; exit 3; fi
if [[ "$*" == *--results* ]]; then touch "$OUT/${3/bench.resources/resources}_card.csv"; fi
echo "${CARD-90}"
"""
STEMS = ("moments", "combine", "adatask", "host", "step", "alphavil")
PARTS = ["card", "torch", "build", "info", "parity", "graphs", "streams", "resources"]
BENCHES = [f"bench {stem}" for stem in STEMS]
SANITIZERS = [f"{tool} {stem}" for tool in ("memcheck", "racecheck", "synccheck") for stem in STEMS[:3]]


class Done(NamedTuple):
    code: int
    output: str
    calls: list[str]
    files: list[str]
    seconds: float

    def parts(self) -> dict[str, str]:
        """What became of each part, in order."""
        return dict(re.findall(r"^== ([\w ]+): (ok|FAILED[\w: ]*|not run[\w, -]*)", self.output, re.MULTILINE))


def run(tmp_path: Path, *, seconds: int = 60, sanitizer: bool = True, **environment: str) -> Done:
    tools, out, calls = tmp_path / "tools", tmp_path / "out", tmp_path / "calls"
    tools.mkdir()
    calls.touch()
    for name in ["python", "nvidia-smi", *(["compute-sanitizer"] if sanitizer else [])]:
        (tools / name).write_text(STAND_IN)
        (tools / name).chmod(0o755)
    known = {"PATH": f"{tools}:/usr/bin:/bin", "PYTHON": str(tools / "python"), "CALLS": str(calls), "OUT": str(out)}
    start = time.monotonic()
    done = subprocess.run(
        [str(ROOT / "bench" / "gpu.sh")],
        env={"HOME": os.environ.get("HOME", "/"), **known, "GPU_SECONDS": str(seconds), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    taken = time.monotonic() - start
    return Done(
        *(done.returncode, done.stdout + done.stderr, calls.read_text().splitlines()),
        *(sorted(path.name for path in out.rglob("*")), taken),
    )


def test_all_parts_in_order(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.code == 0, done.output
    assert list(done.parts()) == [*PARTS, *BENCHES, *SANITIZERS, "report"]
    assert set(done.parts().values()) == {"ok"}
    assert "not run: nothing" in done.output
    python = [call.split(" ", 1)[1] for call in done.calls if call.startswith("python")]
    assert "pip install" in python[1]
    assert "-k cuda and not emulated" in python[3]
    assert [call.split()[2] for call in python if "--results" in call] == ["--arch", *STEMS]
    assert sum(call.startswith("compute-sanitizer --tool racecheck --error-exitcode 1") for call in done.calls) == 3


def test_leaves_no_more_files_than_come_back(tmp_path: Path) -> None:
    """From a lent machine: 8 files at most."""
    done = run(tmp_path, FAIL="racecheck")
    assert len(done.files) <= 8
    assert "gpu.log" in done.files
    assert len([name for name in done.files if name.endswith(".csv")]) == 7
    log = (tmp_path / "out" / "gpu.log").read_text()
    assert [line for line in log.splitlines() if "as planted" in line] == ["as planted"] * 3
    assert re.findall(r"^== ([\w ]+):", log, re.MULTILINE) == list(done.parts())


@pytest.mark.parametrize(
    ("what", "part"),
    [("pip", "build"), ("test_graphs.py -k stream", "streams"), ("bench step", "bench step")],
)
def test_goes_on_after_a_failure(tmp_path: Path, what: str, part: str) -> None:
    done = run(tmp_path, FAIL=what)
    assert done.code == 1
    found = done.parts()
    assert found[part] == "FAILED: exit code 3"
    assert list(found) == [*PARTS, *BENCHES, *SANITIZERS, "report"]
    others = [name for name in found if name != part]
    assert all(found[name] == "ok" or (part == "bench step" and name.endswith("step")) for name in others)


def test_the_report_may_fail(tmp_path: Path) -> None:
    done = run(tmp_path, FAIL="bench.report")
    assert done.code == 0
    assert done.parts()["report"] == "FAILED: exit code 3"


@pytest.mark.slow
def test_what_hangs_is_stopped_and_costs_the_others_nothing(tmp_path: Path) -> None:
    done = run(tmp_path, seconds=26, HANG="bench adatask --device")
    assert done.code == 1
    assert done.parts()["bench adatask"] == "FAILED: stopped at its limit"
    assert all(done.parts()[name] == "ok" for name in [*PARTS, *BENCHES, "memcheck combine"] if name != "bench adatask")
    assert done.seconds < 26


@pytest.mark.slow
def test_ends_in_time_whatever_hangs(tmp_path: Path) -> None:
    """Every command of Python's hangs but the first."""
    done = run(tmp_path, seconds=20, HANG="-m ")
    assert done.code == 1
    assert done.seconds < 20 * 535 / 525 + 1  # of 9 minutes, with 525 s
    assert all(done.parts()[name].startswith("FAILED: stopped") for name in ["build", "parity", *BENCHES[:2]])
    left_out = re.findall(r"^not run: ([\w ]+) \(no time left\)$", done.output, re.MULTILINE)
    assert left_out == [name for name, verdict in done.parts().items() if verdict.startswith("not run")]


def test_says_what_was_not_run(tmp_path: Path) -> None:
    done = run(tmp_path, sanitizer=False, GPU_STEMS="moments step")
    if Path("/usr/local/cuda/bin/compute-sanitizer").exists():
        pytest.skip("this machine has a compute-sanitizer")
    assert done.code == 0
    assert re.findall(r"^not run: (.+)$", done.output, re.MULTILINE) == [
        f"{tool} moments (no compute-sanitizer here)" for tool in ("memcheck", "racecheck", "synccheck")
    ]
    assert [call.split()[3] for call in done.calls if "--device cuda" in call] == ["moments", "step"]


def test_no_gpu(tmp_path: Path) -> None:
    done = run(tmp_path, CARD="no device")
    assert done.code == 2
    assert "expected a CUDA device" in done.output
    assert not any("pip" in call for call in done.calls)
