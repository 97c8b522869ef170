"""The docstrings' Sphinx idioms, as the site's Markdown: roles, formulas, literal blocks, tables, ``#:`` comments."""

from __future__ import annotations

import re
from collections.abc import Iterator
from textwrap import dedent, indent
from typing import Any

import griffe
from latex2mathml.converter import convert

#: A display formula, up to an empty line; what Markdown does not look into.
FORMULA = r"^( *)\.\. math::(.*?)(?=\n *\n|\Z)"
KEPT = re.compile(rf"(?P<kept>```.*?```|``.+?``|`[^`]+`|{FORMULA})", re.M | re.S)


class Sphinx(griffe.Extension):
    """Rewrite every docstring of the package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        for obj in _objects(pkg):
            if obj.docstring is None and obj.is_attribute:
                obj.docstring = _comment(obj)
            if obj.docstring is not None:
                obj.docstring.value = _markdown(obj.docstring.value, obj)


def _objects(obj: griffe.Object) -> Iterator[griffe.Object]:
    yield obj
    for member in obj.members.values():
        if isinstance(member, griffe.Object):
            yield from _objects(member)


def _comment(attribute: griffe.Object) -> griffe.Docstring | None:
    """Return what stands behind ``#:``, in the attribute's line or the lines above it."""
    lines, number = attribute.lines_collection[attribute.filepath], (attribute.lineno or 1) - 1
    found = [lines[number].partition("#: ")[2]]
    while not found[-1] and lines[number - 1].lstrip().startswith("#: "):
        number -= 1
        found = [lines[number].partition("#: ")[2], *found]
    text = " ".join(found).strip()
    return griffe.Docstring(text[:1].upper() + text[1:], parent=attribute) if text else None


def _markdown(text: str, obj: griffe.Object) -> str:
    text = re.sub(r"^( *)(.*?):?:\n\n((?:\1 +.*(?:\n|\Z)|\n)+)", _literal, text, flags=re.M)
    text = re.sub(r"^( +[\w, ]+,)\n +([\w, ]+:)", r"\1 \2", text, flags=re.M)  # arguments that share a description
    text = re.sub(r"^(=+  =+)\n(.*?)\n\1$", _table, text, flags=re.M | re.S)
    text = "".join(_plain(piece) if kept is None else kept for piece, kept in _pieces(text))
    text = re.sub(FORMULA, _display, text, flags=re.M | re.S)
    text = re.sub(r":math:`([^`]+)`", lambda found: _formula(found[1], "inline"), text)
    return re.sub(r":(?:func|class|meth|attr|mod|data):`([^`]+)`", lambda found: _reference(found[1], obj), text)


def _pieces(text: str) -> Iterator[tuple[str, str | None]]:
    end = 0
    for found in KEPT.finditer(text):
        yield text[end : found.start()], None
        yield "", found["kept"]
        end = found.end()
    yield text[end:], None


def _plain(text: str) -> str:
    """What a product, a row or an exponent looks like is no markup."""
    return re.sub(r"(?<!\*)\*(?!\*)", r"\\*", text.replace("<", "&lt;"))


def _formula(latex: str, display: str) -> str:
    names = re.sub(r"\\arg\\(m[inax]+)", r"\\operatorname{arg\\,\1}", latex).replace(r"\_", "_")
    return convert(names, display=display)


def _display(found: re.Match[str]) -> str:
    return f'{found[1]}<div class="formula">{_formula(" ".join(found[2].split()), "block")}</div>'


def _literal(found: re.Match[str]) -> str:
    """A block of code, or of formulas that are written out, behind a double colon."""
    if not found[0].startswith(f"{found[1]}{found[2]}::"):
        return found[0]
    code = dedent(found[3]).strip("\n")
    language = "python" if re.search(r"^for .*:$|^\w+\.\w+\(", code, flags=re.M) else "text"
    lead = f"{found[1]}{found[2]}:\n\n" if found[2] else ""
    return lead + indent(f"```{language}\n{code}\n```\n", found[1]) + "\n"


def _table(found: re.Match[str]) -> str:
    """A simple table of two columns; what has an empty first cell goes on with the row above."""
    width = found[1].index(" ")
    rows: list[list[str]] = []
    for line in found[2].splitlines():
        first, second = line[:width].strip(), line[width:].strip()
        if first:
            rows.append([first, second])
        else:
            rows[-1][1] += f" {second}"
    return "\n".join(["| | |", "|---|---|", *(f"| {first} | {second} |" for first, second in rows)])


def _reference(name: str, obj: griffe.Object) -> str:
    """Return a link where the site has an entry of that name; else the name alone, as code."""
    name = name.lstrip("~.")
    path, scope = name, obj if obj.is_class or obj.is_module else obj.parent
    if not name.startswith("mtlgrad."):
        first, _, rest = name.partition(".")
        if scope.is_class and first in scope.all_members:
            path = scope.all_members[first].canonical_path
        else:
            try:
                path = scope.resolve(first)
            except griffe.NameResolutionError:
                return f"`{name}`"
        path = f"{path}.{rest}" if rest else path
    package, _, last = path.rpartition(".")
    if package in obj.modules_collection:  # a function may have its module's name
        path = obj.modules_collection[package].imports.get(last, path)
    return f'<autoref identifier="{path}" optional><code>{name.removeprefix("mtlgrad.")}</code></autoref>'
