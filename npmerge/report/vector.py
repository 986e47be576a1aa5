"""Figures as SVG that takes its colours and its font from the page around it, light or dark."""

from __future__ import annotations

import re
import sys
from hashlib import sha256
from html import escape
from io import StringIO
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

FONT = "var(--pst-font-family-base, sans-serif)"
"""The theme's, where there is one."""
INK = {"light": "#222832", "dark": "#ced6dd"}
"""Colours of text where there is no page around: the theme's own."""
_PIXELS = 96 / 72


def svg(figure: Figure) -> str:
    """A figure as an ``<svg>`` element, to stand in a page of HTML.

    Black is the page's colour of text, and a grey as much of it as it is dark; the ground is the page's. Equal figures
    give equal text. No two others share an id, so that several can stand in one page.

    Args:
        figure: its label (``figure.get_label()``) is the alternative text.
    """
    buffer = StringIO()
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "npmerge"}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    alt = str(figure.get_label())
    root, content = re.findall(r"(<svg.*?>)(.*)", buffer.getvalue(), re.DOTALL)[0]
    content = re.sub(r"<style.*?</style>", "", content, flags=re.DOTALL)  # of the whole page
    content = re.sub(r"<[^>]+>", _themed, content)
    digest = sha256((alt + content).encode()).hexdigest()[:8]
    content = re.sub(r'(\bid="|href="#|url[(]#)', rf"\g<1>f{digest}-", content)
    box = re.findall(r'viewBox="(.*?)"', root)[0]
    width = float(box.split()[2]) * _PIXELS
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}" '
        f'role="img" aria-label="{escape(alt)}" fill="currentColor" stroke-linejoin="round" '
        f'style="display: block; width: 100%; height: auto; max-width: {width:.0f}px; margin: 0 auto">{content}'
    )


def standalone(figure: Figure) -> str:
    """A figure as a file of its own: dark where the page that shows it has a dark ``color-scheme``.

    Args:
        figure: the figure.
    """
    colours = (
        f":root {{ color: {INK['light']} }} "
        f"@media (prefers-color-scheme: dark) {{ :root {{ color: {INK['dark']} }} }}"
    )
    text = svg(figure)
    end = text.index(">") + 1
    return f"{text[:end]}<style>{colours}</style>{text[end:]}"


def in_notebooks() -> None:
    """Let a notebook show figures as SVG, beside the PNG for where there is no HTML."""
    ipython: Any = sys.modules.get("IPython")  # there if this is a notebook
    shell = ipython and ipython.get_ipython()
    if shell:
        plt.switch_backend(plt.get_backend())  # now: it forgets every format but its own
        shell.display_formatter.formatters["text/html"].for_type(Figure, svg)


def _themed(tag: re.Match[str]) -> str:
    """An element in the page's font and colours, its coordinates to a hundredth of a point."""
    text = re.sub(r"^<g id=\"[^\"]*\"", "<g", tag[0])
    text = re.sub(r"'DejaVu Sans'.*?sans-serif", FONT, text)
    text = re.sub(r"(\.\d\d)\d+", r"\1", text)
    return re.sub(r"#([0-9a-f]{2})\1\1\b", _ink, text)


def _ink(grey: re.Match[str]) -> str:
    share = 100 - round(100 * int(grey[1], 16) / 255)
    if share == 100:
        return "currentColor"
    return f"color-mix(in srgb, currentColor {share}%, transparent)"
