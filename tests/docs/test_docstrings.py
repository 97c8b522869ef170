"""What every public name's docstring must have: a line for each argument, and for what is returned."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cached_property
from importlib.util import find_spec
from types import FunctionType
from typing import Any

import torch

import mtlgrad

MODULES = [
    *("mtlgrad", "mtlgrad.alphavil", "mtlgrad.distributed", "mtlgrad.metrics", "mtlgrad.ops", "mtlgrad.optim"),
    *("mtlgrad.plots", "mtlgrad.posterior", "mtlgrad.recipes", "mtlgrad.reference", "mtlgrad.rules"),
    *[f"mtlgrad.interop.{other}" for other in ("lightning", "torchjd") if find_spec(other)],
]


def public_names() -> Iterator[tuple[str, Any]]:
    """Yield the functions and classes that users may name, each once."""
    known: set[int] = set()
    for module in map(importlib.import_module, MODULES):
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        for name in getattr(module, "__all__", own):
            value = getattr(module, name)
            if not (name.startswith("_") or inspect.ismodule(value) or id(value) in known):
                known.add(id(value))
                yield f"{module.__name__}.{name}", value


def public_members(kind: type) -> Iterator[tuple[str, Any, str | None]]:
    """Yield methods and properties, with the docstring that they have or inherit from a class of this package."""
    bases = [base for base in kind.__mro__ if base.__module__.startswith("mtlgrad")]
    listed = "".join(section(base.__doc__, "Attributes") for base in bases)
    for name in dict.fromkeys(name for base in bases for name in vars(base) if not name.startswith("_")):
        found = [vars(base)[name] for base in bases if name in vars(base)]
        found = [getattr(member, "__func__", member) for member in found]  # of static methods
        is_property = isinstance(found[0], (property, cached_property))
        if isinstance(found[0], FunctionType) or (is_property and f"    {name}: " not in listed):
            yield name, found[0], next((member.__doc__ for member in found if member.__doc__), None)


def section(doc: str | None, title: str) -> str:
    """Return what stands indented below the title."""
    found = re.search(rf"^{title}:\n((?:    .*\n|\n)+)", inspect.cleandoc(doc or "") + "\n", re.MULTILINE)
    return found[1] if found else ""


def faults(doc: str | None, value: Any) -> Iterator[str]:
    """Yield what is missing. Properties, and records, whose fields have comments, need a docstring alone."""
    if not doc:
        yield "expected a docstring, found none"
        return
    if isinstance(value, (property, cached_property)) or dataclasses.is_dataclass(value) or hasattr(value, "_fields"):
        return
    signature = inspect.signature(value)
    heads = re.findall(r"^    ((?:\w+,\s+)*\w+):", section(doc, "Args"), re.MULTILINE)  # "lr, eps: as in torch.optim"
    named = set(re.findall(r"\w+", " ".join(heads)))
    for name, parameter in signature.parameters.items():
        forwarded = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if not (name == "self" or forwarded or name in named):
            yield f"Args: expected {name}, found {sorted(named)}"
    returns = not inspect.isclass(value) and signature.return_annotation not in (None, "None", signature.empty)
    in_one_line = doc.startswith("Return ") and "\n" not in doc
    if returns and not (in_one_line or section(doc, "Returns") or section(doc, "Yields")):
        yield f"Returns: expected a word on the {signature.return_annotation}, found none"


def test_docstrings_tell_arguments_and_results() -> None:
    found = []
    for name, value in public_names():
        members = public_members(value) if inspect.isclass(value) else ()
        found += [f"{name}: {fault}" for fault in faults(value.__doc__, value)]
        found += [f"{name}.{member}: {fault}" for member, inner, doc in members for fault in faults(doc, inner)]
    assert not found, "\n".join(found)


def test_examples_run() -> None:
    names: dict[str, Any] = {"torch": torch, "nn": torch.nn, **vars(torch.nn.functional), **vars(mtlgrad)}
    examples = [
        block
        for _, value in public_names()
        for block in re.findall(r"^Example::\n\n((?:    .*\n|\n)+)", inspect.getdoc(value) or "", re.MULTILINE)
    ]
    assert examples
    for code in examples:
        exec(compile(inspect.cleandoc(code), "a docstring", "exec"), dict(names))
