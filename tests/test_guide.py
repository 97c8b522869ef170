"""The guide's examples run as they stand: a page's ```python blocks, one after the other, are one script.

A page with the line ``<!-- ranks: 2 -->`` is started by torchrun, as that many processes on the CPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import free_port

GUIDE = Path(__file__).parents[1] / "docs" / "guide"
PAGES = sorted(GUIDE.glob("*.md"))
TIMEOUT = 300  # seconds for a page, on a busy machine


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.S | re.M)


def script(page: Path) -> str:
    """The page's examples at the lines where the page has them, so that a traceback says where."""
    inside, lines = False, []
    for line in page.read_text().splitlines():
        fence = line.startswith("```")
        lines.append(line if inside and not fence else "")
        inside = line == "```python" if fence else inside
    return "\n".join(lines) + "\n"


def command(page: Path, saved: Path) -> list[str]:
    ranks = re.findall(r"^<!-- ranks: (\d+) -->$", page.read_text(), flags=re.M)
    if not ranks:
        return [sys.executable, str(saved)]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", ranks[0], "--master-port", str(free_port())]
    return [sys.executable, *launch, str(saved)]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page.read_text())], ids=lambda page: page.name)
def test_examples_run(page: Path, tmp_path: Path) -> None:
    saved = tmp_path / f"{page.stem}_example.py"  # not accelerate.py, which would hide the package
    saved.write_text(script(page))
    # The processes of torchrun find each other on this machine; without a GPU, as the pages' figures are.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command(page, saved), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert done.returncode == 0, f"{page.name} (the line numbers are the page's):\n{done.stdout}\n{done.stderr}"


def test_there_are_pages_and_all_are_in_the_index() -> None:
    assert any(blocks(page.read_text()) for page in PAGES)
    linked = re.findall(r"\]\(([^)#]+\.md)", (GUIDE / "README.md").read_text())
    assert sorted({"README.md", *linked}) == [page.name for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_fence_is_closed_and_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    assert sum(line.startswith("```") for line in text.splitlines()) % 2 == 0
    assert len(blocks(text)) == text.count("```python\n")
    assert all((GUIDE / link).exists() for link in re.findall(r"\]\((?!https?:)([^)#]+)", text))
