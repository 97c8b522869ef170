"""Every public name stands in one directive of docs/reference, from which the site makes its entry."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

PAGES = sorted((Path(__file__).parents[2] / "docs" / "reference").glob("*.md"))
MODULES = [
    *("alphavil", "distributed", "interop.lightning", "interop.torchjd", "metrics", "ops", "optim", "plots"),
    *("posterior", "recipes", "reference", "rules"),
]


def found_at(path: str) -> Any:
    """Return what a directive names; where a function has its module's name, the path's first is the module."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for name in parts[end:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(path)


def public_names(module: ModuleType) -> list[str]:
    """Return what a module exports; without ``__all__``, what it defines."""
    defined = [n for n, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return getattr(module, "__all__", [name for name in defined if not name.startswith("_")])


def test_every_public_name_has_one_entry() -> None:
    directives = [path for page in PAGES for path in re.findall(r"^::: (\S+)$", page.read_text(), flags=re.M)]
    entries = Counter(id(found_at(path)) for path in directives)
    assert entries.total() == len(directives)
    modules = [importlib.import_module(f"mtlgrad.{name}") for name in MODULES]
    wanted = {
        f"{module.__name__}.{name}": getattr(module, name)
        for module in (importlib.import_module("mtlgrad"), *modules)
        for name in public_names(module)
    }
    assert len(wanted) > 100
    assert {name: entries[id(value)] for name, value in wanted.items() if entries[id(value)] != 1} == {}


def test_the_list_of_modules_is_whole() -> None:
    package = Path(str(importlib.import_module("mtlgrad").__file__)).parent
    inner = {"arguments", "bayesagg", "cli", "data", "graph", "interop", "jacobian", "traced", "world"}
    names = {path.stem for path in package.iterdir() if path.suffix in ("", ".py") and not path.stem.startswith("_")}
    assert names - inner == {name for name in MODULES if "." not in name}
