"""The examples of README and of all pages run as they stand: a page's Python blocks, in their order, are one script.

A page with the line ``<!-- ranks: 2 -->`` is started as torchrun would, as that many processes on the CPU. Of a diff,
what it leads to is run. The tutorials run when the site is built (`make docs`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import Program, free_port, rank_variables

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TIMEOUT = 300  # seconds for a page, on a busy machine
BEGINS = re.compile(r"```(python|diff)\b")


def script(page: Path) -> str:
    """Return the page's examples at the lines where the page has them, so that a traceback says where."""
    fence, lines = "", []
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            found = BEGINS.match(line)
            fence = "" if fence else found[1] if found else "other"
            lines.append("")
        elif fence == "diff":
            lines.append("" if line.startswith("-") else line[2:])
        else:
            lines.append(line if fence == "python" else "")
    assert not fence, f"{page}: a fence is not closed"
    return "\n".join(lines) + "\n"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def examples() -> list[Any]:
    found = [page for page in PAGES if page.parent.name != "tutorials" and script(page).strip()]
    return [pytest.param(page, id=name_of(page), marks=[pytest.mark.slow] * (page.parent != ROOT)) for page in found]


@pytest.mark.parametrize("page", examples())
def test_examples_run(page: Path, tmp_path: Path) -> None:
    saved = tmp_path / "example.py"
    saved.write_text(script(page))
    ranks = re.findall(r"^<!-- ranks: (\d+) -->$", page.read_text(), flags=re.M)
    size, port = int(ranks[0]) if ranks else 1, free_port()
    # Without a GPU, as the pages' figures are.
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "agg"}
    each = [{**own, **(rank_variables(rank, size, port) if ranks else {})} for rank in range(size)]
    programs = [Program(str(saved), folder=tmp_path, environment=environment) for environment in each]
    for code, out, err in [program.end(TIMEOUT) for program in programs]:
        assert code == 0, f"{page.name} (the line numbers are the page's):\n{out}\n{err}"


def test_readme_is_short_and_begins_with_what_a_stranger_needs() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    fences = [i for i, line in enumerate(lines, 1) if line.startswith("```")]
    assert len(lines) <= 150
    assert fences[0] < 25
    assert "pip install" in lines[fences[0]]
    assert next(i for i, line in enumerate(lines, 1) if BEGINS.match(line)) < 45


@pytest.mark.parametrize("folder", ["guide", "methods"])
def test_every_page_is_in_its_index(folder: str) -> None:
    here = ROOT / "docs" / folder
    linked = re.findall(r"\]\(([^)#/]+\.md)", (here / "README.md").read_text())
    assert sorted({"README.md", *linked}) == sorted(page.name for page in here.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.S | re.M)
    for link in re.findall(r"\]\((?!https?:)([^)#\s]+)", text):
        assert (page.parent / link).exists(), f"{page}: {link}"
    for link in re.findall(r"github(?:usercontent)?\.com/mtlgrad/mtlgrad/(?:(?:blob|tree)/)?main/([^)#\s]+)", text):
        assert (ROOT / link).exists(), f"{page}: {link}"
