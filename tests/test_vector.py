"""Figures as SVG in a page: the page's colours and font, no id twice, and words for who does not see them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from xml.etree import ElementTree

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from npmerge.methods import FAMILIES, METHODS
from npmerge.report import plots, vector

PAGES = ("#ffffff", "#121212")


@pytest.fixture(autouse=True)
def _no_window() -> Iterator[None]:
    mpl.use("agg")
    with plt.rc_context():
        plots.style()
        yield
    plt.close("all")


def drawn(values: tuple[float, ...] = (1, 2, 0.125)) -> Figure:
    figure, (axis,) = plots.panels([2])
    axis.plot(values, "o-", color="#D1495B", mfc="white", label="NP < 1")
    axis.axhline(1, color="0.5", label="a line")
    axis.fill_between(range(3), values, color="black", alpha=0.1, clip_on=True)
    axis.imshow([[0, 1]], extent=(0, 2, 0, 2), cmap="gray", aspect="auto")
    axis.legend()
    axis.set_xticks([0.125], ["x0.125"])
    plots.label_ends([axis])
    return plots.describe(figure, "What is drawn", 'It "rises" by 1 < 2')


def ids(text: str) -> list[str]:
    return re.findall(r'\bid="([^"]*)"', text)


def test_ids_are_those_of_one_figure_and_every_reference_is_answered() -> None:
    first, second = vector.svg(drawn()), vector.svg(drawn((3, 1, 2)))
    both = ids(first) + ids(second)
    assert len(set(both)) == len(both) > 4
    for text in (first, second):
        asked = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', text)
        assert {one or other for one, other in asked} <= set(ids(text))


def test_equal_figures_give_equal_text() -> None:
    assert vector.svg(drawn()) == vector.svg(drawn())


def test_nothing_is_black_white_or_grey_and_a_method_keeps_its_colour() -> None:
    text = vector.svg(drawn())
    assert re.findall(r"#([0-9a-f]{2})\1\1\b", text) == []
    assert "currentColor" in text
    assert "color-mix(in srgb, currentColor 50%, transparent)" in text
    assert "#d1495b" in text


def test_text_is_text_in_the_page_s_font_and_nothing_is_styled_outside() -> None:
    text = vector.svg(drawn())
    assert ">x0.125</text>" in text
    assert ">NP &lt; 1</text>" in text
    assert "DejaVu" not in text
    assert vector.FONT in text
    assert "<style" not in text


def test_the_alternative_text_is_the_finding_and_what_is_drawn() -> None:
    root = ElementTree.fromstring(vector.svg(drawn()))  # noqa: S314
    assert root.get("role") == "img"
    assert root.get("aria-label") == 'It "rises" by 1 < 2. What is drawn.'
    assert root.get("width") is None  # as wide as the page, up to its own width
    assert f"max-width: {plots.WIDTH * 96:.0f}px" in str(root.get("style"))


def test_a_file_of_its_own_brings_colours_for_both_themes() -> None:
    text = vector.standalone(drawn())
    ElementTree.fromstring(text)  # noqa: S314
    assert text.count("<style>") == 1
    assert all(colour in text for colour in vector.INK.values())


def luminance(colour: str) -> float:
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in mpl.colors.to_rgb(colour)
    ]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("page", PAGES)
def test_every_colour_is_legible_on_light_and_on_dark_pages(page: str) -> None:
    colours = {
        *FAMILIES.values(),
        *(method.color for method in METHODS.values()),
        *plots.MODELS.values(),
        *(colour for _, _, colour in plots.LOOKS),
    }
    assert {colour for colour in colours if contrast(colour, page) < 3} == set()
    assert contrast(vector.INK["dark"], PAGES[1]) > 7
    assert contrast(vector.INK["light"], PAGES[0]) > 7


def test_an_alignment_looks_the_same_in_every_figure() -> None:
    alone, among = plots.looks(["cca"]), plots.looks(["permute", "cca", "identity"])
    assert alone["cca"] == among["cca"]
    assert len(set(among.values())) == 3


def test_names_at_the_ends_of_lines_do_not_overlap() -> None:
    figure, (axis,) = plots.panels([3])
    for number in range(5):
        axis.plot([0, 1], [0, 1 + number / 100], label=f"method number {number} of many")
    plots.label_ends([axis])
    figure.draw_without_rendering()
    boxes = sorted((Text.get_window_extent(name) for name in axis.texts), key=lambda box: box.y0)
    assert len(boxes) == 5
    assert all(below.y1 <= above.y0 + 1 for below, above in pairwise(boxes))
