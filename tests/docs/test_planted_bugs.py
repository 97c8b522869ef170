"""The list of bugs to plant is one that can be planted: it must follow the code as that changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.plant import BUGS, Bug

ROOT = Path(__file__).resolve().parents[2]


def test_there_are_eighty() -> None:
    assert len({bug.mark for bug in BUGS}) == len(BUGS) == 80


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.mark)
def test_a_bug_can_be_planted(bug: Bug) -> None:
    text = (ROOT / bug.file).read_text()
    assert text.count(bug.old) == 1, bug
    if bug.file.endswith(".py"):
        compile(text.replace(bug.old, bug.new), bug.file, "exec")
    assert bug.old != bug.new
    assert all((ROOT / part).exists() for part in bug.tests.split() if part.startswith("tests/")), bug.tests
