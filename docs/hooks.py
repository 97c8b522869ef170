"""What the site needs beyond its plugins: files from elsewhere in the repository, and the tutorials' figures."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from mkdocs.structure.files import File, Files
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).parents[1]
GITHUB, RAW = "https://github.com/mtlgrad/mtlgrad/blob/main/", "https://raw.githubusercontent.com/mtlgrad/mtlgrad/main/"
STYLE = {
    "axes.grid": True,
    "axes.prop_cycle": mpl.cycler(color=["#0072b2", "#d55e00", "#009e73", "#cc79a7"]),  # Okabe and Ito's
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.figsize": (7.2, 3.4),
    "font.size": 10,
    "grid.alpha": 0.25,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "mtlgrad",  # equal runs give equal files
}


def on_startup(**_: Any) -> None:
    mpl.use("agg")
    mpl.rcParams.update(STYLE)
    plt.show = show


def show() -> None:
    """Print the open figures, as SVG in the page's own colour for text, by the ``print`` of the block that calls."""
    for number in plt.get_fignums():
        buffer = io.StringIO()
        figure = plt.figure(number)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        svg = buffer.getvalue().partition("<svg ")[2].replace("#000000", "currentColor")
        sys._getframe(1).f_globals["print"](f'<div class="figure"><svg role="img" {svg}</div>')
        plt.close(figure)


def on_files(files: Files, config: Any, **_: Any) -> None:
    """Add the benchmarks' figures, which lie beside their numbers."""
    for path in sorted((ROOT / "bench" / "results").glob("*.svg")):
        files.append(File.generated(config, f"figures/{path.name}", abs_src_path=str(path)))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Include README and changelog; turn links that lead into the site there, and those that lead out to GitHub."""
    markdown = re.sub(r'^--8<-- "(.+)"$', lambda found: (ROOT / found[1]).read_text(), markdown, flags=re.M)
    docs = get_relative_url(".", page.file.src_uri).removesuffix(".").removesuffix("/")
    docs = f"{docs}/" if docs else ""
    markdown = re.sub(rf"\]\((?:(?:\.\./)+|{RAW})bench/results/(\w+\.svg)\)", rf"]({docs}figures/\1)", markdown)
    markdown = markdown.replace(f"]({GITHUB}docs/", f"]({docs}")
    outside = r"(?:bench|csrc|python|tests)/|(?:CONTRIBUTING|README)\.md"
    return re.sub(rf"\]\((?:\.\./)+({outside})", rf"]({GITHUB}\1", markdown)
