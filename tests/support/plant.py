"""Plants the bugs of :mod:`tests.support.bugs` one by one, and says which no test caught.

``python -m tests.support.plant [NUMBERS...]``, by the Python of the developer environment; works in a copy of the
checkout in the folder for temporary files. A bug meets the tests that are named with it first and, if these pass, the
quick suite. Results go to planted.csv, a row a bug, written after each: a run that was stopped goes on where it was.
With numbers these bugs are planted, whether or not there is a result.
"""

from __future__ import annotations

import contextlib
import csv
import filecmp
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pybind11

from tests.support.bugs import BUGS, Bug

ROOT = Path(__file__).resolve().parents[2]
COPY = Path(tempfile.gettempdir(), f"mtlgrad-planted-{os.getuid()}")
RESULTS = Path(__file__).with_name("planted.csv")
ENOUGH = 78
SUITE = ("tests", "-m", "not slow", "-n", "2", "--dist", "worksteal")
NAMED_LIMIT, SUITE_LIMIT = 900, 7200  #: seconds; a bug may have tests wait for ever
#: Fails for every bug, for the text is not the file's any more.
LEFT_OUT = "tests/docs/test_planted_bugs.py"


class Copy:
    """A copy of the checkout, with compiled kernels and an environment whose ``import mtlgrad`` finds it."""

    def __init__(self) -> None:
        self._bring_up_to_date()
        packages, environment = Path(sysconfig.get_path("purelib")), COPY / "build/env"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
        # By a plain path, so that the .pth files that lie there are not read: one of them leads to the checkout.
        [site] = environment.glob("lib/python3*/site-packages")
        (site / "packages.pth").write_text(f"{packages}\n")
        self._python = str(environment / "bin/python")
        headers = packages / "nvidia/cu13"
        self._environment = {
            **({"CUDA_HOME": str(headers)} if headers.exists() else {}),
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([str(COPY / "python"), str(COPY)]),
            "OMP_NUM_THREADS": "1",
        }
        extension = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        with contextlib.suppress(FileExistsError):
            (COPY / "python/mtlgrad" / extension).symlink_to(COPY / "build/cpu" / extension)
        self._stale = True  # something is to be compiled

    def _bring_up_to_date(self) -> None:
        """Copy what differs, so that nothing else is compiled again; remove what the checkout does not have."""
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
        known = {name for name in names if (ROOT / name).is_file()}
        for name in known:
            source, target = ROOT / name, COPY / name
            if not target.is_file() or not filecmp.cmp(source, target, shallow=False):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)
        for folder in {name.partition("/")[0] for name in known if "/" in name}:
            for path in (COPY / folder).rglob("*.*"):
                made = path.name.startswith("_C.") or path.suffix == ".pyc"
                if path.is_file() and not made and str(path.relative_to(COPY)) not in known:
                    path.unlink()

    def _build(self) -> None:
        folder, python = COPY / "build/cpu", f"-DPython_EXECUTABLE={self._python}"
        options = (python, "-DMTLGRAD_CUDA=OFF", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
        for command in (
            ("cmake", "-S", COPY, "-B", folder, "-G", "Ninja", *options),
            ("cmake", "--build", folder, "--target", "_C"),
            (self._python, "-c", "from tests.simt.build import build; build('_C')"),
        ):
            done = subprocess.run(command, cwd=COPY, env=self._environment, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{done.stdout[-4000:]}{done.stderr[-4000:]}\nnot built")
        self._stale = False

    @contextlib.contextmanager
    def _planted(self, bug: Bug) -> Iterator[None]:
        path = COPY / bug.file
        before = path.read_text()
        assert before.count(bug.old) == 1, bug
        try:
            path.write_text(before.replace(bug.old, bug.new))
            self._stale = self._stale or bug.file.startswith("csrc/")
            yield
        finally:
            path.write_text(before)
            self._stale = self._stale or bug.file.startswith("csrc/")

    def failure(self, *tests: str, limit: int = NAMED_LIMIT) -> str:
        """Return the first test that fails, or what happened in its place; empty if all pass."""
        if self._stale:
            self._build()
        command = [self._python, "-m", "pytest", "-x", "-q", "--tb=no", f"--ignore={LEFT_OUT}", *tests]
        with tempfile.TemporaryFile("w+") as output:
            # A session of its own, of which nothing is left behind: ranks may wait for one that died.
            process = subprocess.Popen(
                command, cwd=COPY, env=self._environment, stdout=output, stderr=output, start_new_session=True
            )
            code: int | None = None
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(limit)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            output.seek(0)
            said = output.read()
        if code in (4, 5):  # pytest's: there are no such tests
            raise SystemExit(f"{said[-2000:]}\nno tests: {shlex.join(tests)}")
        found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", said, re.MULTILINE)
        happened = f"no end in {limit} s" if code is None else f"Python ends with {code}"
        return "" if code == 0 else found[1] if found else f"{happened}: {shlex.join(tests)}"

    def find(self, bug: Bug, broken: list[str]) -> str:
        """Return what catches the bug, or "nothing". What fails without it, too, is added to ``broken``."""
        with self._planted(bug):
            if found := self.failure("-n", "0", *shlex.split(bug.tests)):
                return found
        while True:
            with self._planted(bug):
                found = self.failure(*SUITE, *(f"--deselect={test}" for test in broken), limit=SUITE_LIMIT)
            if not found.startswith("tests/") or not self.failure("-n", "0", found):
                return found or "nothing"
            broken.append(found)


def read_results() -> dict[str, dict[str, str]]:
    """Return the rows by the bugs' marks."""
    if not RESULTS.exists():
        return {}
    with RESULTS.open(newline="") as file:
        return {row["mark"]: row for row in csv.DictReader(file)}


def write_results(rows: dict[str, dict[str, str]]) -> None:
    with RESULTS.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("number", "file", "what", "caught_by", "seconds", "mark"))
        for number, bug in enumerate(BUGS, 1):
            if row := rows.get(bug.mark):
                table.writerow((number, bug.file, bug.what, row["caught_by"], row["seconds"], bug.mark))


def main(numbers: list[int]) -> int:
    rows, broken = read_results(), list[str]()
    if chosen := numbers or [n for n, bug in enumerate(BUGS, 1) if bug.mark not in rows]:
        copy = Copy()
        for tests in dict.fromkeys(BUGS[n - 1].tests for n in chosen):
            if found := copy.failure("-n", "0", *shlex.split(tests)):
                raise SystemExit(f"without any bug: {found}")
    for n in chosen:
        bug, start = BUGS[n - 1], time.monotonic()
        caught = copy.find(bug, broken)
        rows[bug.mark] = {"caught_by": caught, "seconds": f"{time.monotonic() - start:.0f}"}
        write_results(rows)
        print(f"{n} {bug.file}: {bug.what}: {caught}", flush=True)
    results = {n: rows[bug.mark]["caught_by"] for n, bug in enumerate(BUGS, 1) if bug.mark in rows}
    missed = [n for n, caught in results.items() if caught == "nothing"]
    count = len(results) - len(missed)
    print(f"caught {count} of {len(BUGS)}; {len(BUGS) - len(results)} were not planted")
    for n in missed:
        print(f"not caught: {n} {BUGS[n - 1].file}: {BUGS[n - 1].what}")
    if broken:
        print(f"fail without a bug, too: {' '.join(broken)}")
    return int(count < ENOUGH)


if __name__ == "__main__":
    raise SystemExit(main(list(map(int, sys.argv[1:]))))
