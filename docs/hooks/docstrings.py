"""Reads the project's docstrings for the API reference: signatures of pytrees, formulas, doctests, sources.

The docstrings are written to be read in a terminal. Here their plain formulas become blocks, `[n, *event]` keeps its
star, the Example becomes a code block, and a frozen pytree gets the constructor which its decorator gives it.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import griffe

MATHEMATICS = Path(__file__).parents[1] / "mathematics.md"
SECTIONS = ("Args:", "Returns:", "Raises:", "Attributes:", "Yields:")


class ProjectDocstrings(griffe.Extension):
    """A Griffe extension, named in mkdocs.yml."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrites the docstring of anything that has one, and says where its mathematics are."""
        if obj.docstring is None:
            return
        obj.docstring.value = to_markdown(obj.docstring.value)
        public = not obj.is_module and obj.parent is not None and obj.parent.is_module
        headings = mathematics().get(obj.name, []) if public else []
        if headings:
            links = ", ".join(f"[{heading}][{anchor(heading)}]" for heading in headings)
            obj.docstring.value += f"\n\n**Mathematics:** {links}"

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Gives a frozen pytree its constructor."""
        decorators = {str(decorator.value) for decorator in cls.decorators}
        if "frozen_pytree" not in decorators or "__init__" in cls.members:
            return
        fields = [
            griffe.Parameter(
                name,
                annotation=member.annotation,
                kind=griffe.ParameterKind.positional_or_keyword,
                default=member.value,
            )
            for name, member in cls.members.items()
            if member.is_attribute and member.annotation is not None and not name.startswith("_")
        ]
        itself = griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)
        cls.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(itself, *fields)))


@cache
def mathematics() -> dict[str, list[str]]:
    """The headings of the mathematics page under which each name stands in `code`."""
    found: dict[str, list[str]] = {}
    sections = re.split(r"^##+ ", MATHEMATICS.read_text(encoding="utf-8"), flags=re.M)
    for section in sections[2:]:  # after the title and the symbols
        heading = section.partition("\n")[0]
        for name in dict.fromkeys(re.findall(r"`(?:\w+\.)*(\w+)(?:\([^`]*\))?`", section)):
            found.setdefault(name, []).append(heading)
    return found


def anchor(heading: str) -> str:
    """The anchor that MkDocs gives a heading."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def to_markdown(text: str) -> str:
    """A docstring of this project as Google-style Markdown."""
    lines, section, block = [], None, []

    def flush():
        """Ends a formula: lines indented below a paragraph."""
        if block:
            lines.extend(["```text", *(line[2:] for line in block), "```"])
            block.clear()

    for line in text.splitlines():
        indented = line.startswith(" ")
        if line.rstrip() in SECTIONS:
            flush()
            section = "fields"
            lines.append(line)
        elif line.rstrip() == "Example:":
            flush()
            section = "example"
            lines.append("Examples:")
        elif line and not indented:
            flush()
            section = None
            lines.append(escape(re.sub(r"^Source: ", "**Source:** ", line)))
        elif section == "example":
            lines.append(line)
        elif section == "fields":
            lines.append(escape(line))
        elif not line:
            flush()
            lines.append(line)
        elif re.match(r" +- |    +\S", line) and not block:  # a list, or the continuation of one
            lines.append(escape(line if line.lstrip().startswith("- ") else f"    {line.strip()}"))
        elif not block and lines and lines[-1].startswith("**Source:**"):
            lines[-1] += escape(" " + line.strip())
        else:
            block.append(line)
    flush()
    return "\n".join(lines)


def escape(line: str) -> str:
    """Stars and angle brackets as themselves, outside of `code`."""
    parts = re.split(r"(`[^`]*`)", line)
    parts[::2] = (re.sub(r"([*])", r"\\\1", part).replace("<", "&lt;") if part else part for part in parts[::2])
    return "".join(parts).replace(r"\*\*Source:\*\*", "**Source:**")
