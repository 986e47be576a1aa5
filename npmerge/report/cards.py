"""The page of all methods: a card for each, made from the registry and the docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

from npmerge.methods import GROUPS, KINDS, Kind, Method, of_kind

TITLES: dict[Kind, str] = {
    "align": "Alignments",
    "aggregate": "Aggregations",
    "correct": "Corrections",
    "many": "More than two",
}
"""Of the page's parts; references are no methods."""
_ROLE = re.compile(r":\w+:`~?(?:[\w.]*\.)?([\w.]+)`")
_MATH = re.compile(r":math:`([^`]+)`")


def cards_page() -> str:
    """All methods as Markdown: by what they do, and within that by what they need."""
    lines: list[str] = []
    for kind in KINDS:
        if kind not in TITLES:
            continue
        lines += [f"## {TITLES[kind]}", ""]
        for group in GROUPS:
            found = [one for one in of_kind(kind).values() if one.group == group]
            if found:
                lines += [f"### Needs {group}", "", "````{grid} 1 1 2 2", ":gutter: 3", ""]
                for one in found:
                    lines += _card(one)
                lines += ["````", ""]
    return "\n".join(lines)


def _card(one: Method) -> Iterator[str]:
    yield "```{grid-item-card} " + one.label + " (ours)" * one.ours
    yield f":link: {one.module}.{one.name}"
    yield ":link-type: any"
    yield ""
    yield from (f"{text}\n" for text in _idea(one))
    if one.use:
        yield f"**When.** {one.use}\n"
    options = ", ".join(f"`{name}={option.default!r}`" for name, option in one.options.items())
    if options:
        yield f"**Options.** {options}\n"
    source = f" · {{cite:t}}`{one.reference}`" if one.reference else ""
    yield f'`{one.kind}="{one.name}"`{source}'
    yield "```"
    yield ""


def _idea(one: Method) -> list[str]:
    """The docstring's first line, and two sentences of what follows, if anything does before the arguments."""
    first, *rest = (inspect.getdoc(one.function) or "").split("\n\n")
    if rest and not re.match(r"\w+:\n", rest[0]):
        sentences = re.split(r"(?<=[.:])\s+(?=[A-Z*])", " ".join(rest[0].split()))
        return [_markdown(first), _markdown(" ".join(sentences[:2]))]
    return [_markdown(first)]


def _markdown(text: str) -> str:
    """A paragraph of a docstring as Markdown."""
    text = _MATH.sub(r"$\1$", text)
    text = _ROLE.sub(r"`\1`", text)
    return text.replace("``", "`")
