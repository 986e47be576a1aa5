"""Drawings that can be moved: inline SVG as it is at one step, and what changes in it from step to step.

Without a script, on paper or in JupyterLab, a picture is the SVG alone: its controls stay hidden.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

WIDTH = 360
"""Units of every drawing: about a phone's pixels, so that texts of twelve can be read there."""
SHADES = 7
"""Of ink in a tiny image, beside none."""
SIDE = 10
"""Pixels of a tiny image's side at most."""

Frames = Mapping[str, Sequence[Any]]
"""The values of an element's attributes, step by step; ``text`` is what stands in it."""


@dataclass(frozen=True)
class Picture:
    """A picture in a notebook.

    Attributes:
        alt: what it shows, in words: the finding, from the data.
        html: a figure, complete but for the script and the style of the book.
    """

    alt: str
    html: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.alt


@dataclass
class Film:
    """Collects what changes from step to step, and draws it as it is at the first step shown.

    Attributes:
        start: that step, counted from 0.
        parts: the frames of elements, by the elements' names.
        choices: instead of the parts, several of them to choose from, by the choice's name.
    """

    start: int
    parts: dict[str, Frames] = field(default_factory=dict)
    choices: dict[str, dict[str, Frames]] = field(default_factory=dict)

    def shape(self, tag: str, name: str, frames: Frames, inner: str = "", **fixed: Any) -> str:
        """Draw an element that changes.

        Args:
            tag: its kind, e.g. ``"rect"``.
            name: its own in this picture.
            frames: what changes.
            inner: the elements in it.
            fixed: its other attributes.
        """
        self.parts[name] = frames
        now = {key: values[self.start] for key, values in frames.items()}
        return shape(tag, escape(now.pop("text", "")) or inner, data_part=name, **fixed, **now)

    def picture(
        self, alt: str, height: float, drawn: Iterable[str], controls: str, say: Sequence[str]
    ) -> Picture:
        """Put the picture together.

        Args:
            alt: what it shows, in words.
            height: of the drawing.
            drawn: its elements.
            controls: what moves it: :func:`slider`, for one.
            say: what is written below it, and read aloud, at each step.
        """
        parts = {} if self.choices else {**self.parts, "say": {"text": say}}
        film = {"start": self.start, "parts": parts, "choices": self.choices}
        data = json.dumps(film, separators=(",", ":"), ensure_ascii=False).replace("</", "<\\/")
        picture = shape(
            "svg", "".join(drawn), viewBox=f"0 0 {WIDTH} {height:.0f}", role="img", aria_label=alt,
            font_size=12, fill="currentColor", style="display:block;width:100%;max-width:480px",
        )  # fmt: skip
        output = f'<output data-part="say" aria-live="polite">{escape(say[self.start])}</output>'
        return Picture(
            alt,
            f'<figure class="npm-interactive" style="margin:0">{picture}'
            f'<div class="npm-controls" hidden>{controls}{output}</div>'
            f'<script type="application/json">{data}</script></figure>',
        )


def slider(label: str, steps: int, start: int) -> str:
    """The controls to go from step to step: a slider, and a button that plays them.

    Args:
        label: of the slider.
        steps: how many there are.
        start: the one shown first, counted from 0.
    """
    return (
        f'<label>{escape(label)} <input type="range" min="0" max="{steps - 1}" value="{start}"></label>'
        '<button type="button" data-play>Play</button>'
    )


def shape(tag: str, inner: str = "", **attributes: Any) -> str:
    """An element.

    Args:
        tag: its kind.
        inner: what stands in it.
        attributes: with ``_`` for ``-``.
    """
    said = "".join(
        f' {key.replace("_", "-")}="{escape(_short(value))}"' for key, value in attributes.items()
    )
    return f"<{tag}{said}>{inner}</{tag}>"


def text(x: float, y: float, said: str, anchor: str = "start", **more: Any) -> str:
    """A line of text.

    Args:
        x: where it is anchored.
        y: its base line.
        said: the text.
        anchor: ``"start"``, ``"middle"`` or ``"end"``.
        more: attributes.
    """
    return shape("text", escape(said), x=x, y=y, text_anchor=anchor, **more)


def line(x1: float, y1: float, x2: float, y2: float, **more: Any) -> str:
    """A straight line, of ink unless told otherwise.

    Args:
        x1: of its start.
        y1: of its start.
        x2: of its end.
        y2: of its end.
        more: attributes.
    """
    more.setdefault("stroke", "currentColor")
    return shape("line", x1=x1, y1=y1, x2=x2, y2=y2, **more)


def points(spots: Iterable[Sequence[float]]) -> str:
    """The points of a polyline.

    Args:
        spots: pairs.
    """
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)


def pixels(image: Tensor, x: float, y: float, side: float) -> str:
    """A tiny image in ink, from its lowest value to its highest; a larger one is averaged down.

    Args:
        image: ``(h, w)``.
        x: of its left side.
        y: of its top.
        side: its height.
    """
    small = image.detach().cpu().double()
    if max(small.shape) > SIDE:
        small = adaptive_avg_pool2d(small[None], (SIDE, SIDE))[0]
    values = small.numpy()
    span = values.max() - values.min()
    shades = np.rint(SHADES * (values - values.min()) / (span if span > 0 else 1)).astype(int)
    pieces: dict[int, str] = {}  # a path for each shade, of runs of pixels
    for number, row in enumerate(shades):
        for start, end in pairwise([0, *(np.flatnonzero(np.diff(row)) + 1), len(row)]):
            shade = int(row[start])
            run = f"M{start} {number}h{end - start}v1h-{end - start}z"
            pieces[shade] = pieces.get(shade, "") + run
    drawn = [
        shape("path", d=d, fill_opacity=round(shade / SHADES, 2), shape_rendering="crispEdges")
        for shade, d in pieces.items()
        if shade
    ]
    height, width = values.shape
    frame = shape(
        "rect", width=width, height=height, fill="none", stroke="currentColor", stroke_width=0.15
    )
    where = f"translate({x:.1f} {y:.1f}) scale({side / height:.3f})"
    return shape("g", "".join([*drawn, frame]), transform=where)


def _short(value: Any) -> str:
    return f"{float(value):.1f}" if isinstance(value, np.floating) else str(value)
