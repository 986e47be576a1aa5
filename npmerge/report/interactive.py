"""Pictures that a reader can move, each from data; ``interactive.js`` moves them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from npmerge.methods import METHODS
from npmerge.report import drawing
from npmerge.report.drawing import WIDTH, Film, Frames, Picture
from npmerge.report.plots import MODELS, looks
from npmerge.report.watched import Match, Step

EPOCHS = 25
"""More epochs than these are thinned out: a page should stay small."""
NEURONS = 16
"""Of more, the first of A are drawn, with their partners."""
ALPHA = "\N{GREEK SMALL LETTER ALPHA}"
ALIGNED = "B\N{PRIME}"
Places = np.ndarray[Any, np.dtype[np.float64]]
_A, _B = ({"fill": colour, "font_weight": "bold"} for colour in MODELS.values())
_DOTS = {
    "o": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0",
    "s": "M-5 -5h10v10h-10z",
    "^": "M0 -6l6 11h-12z",
    "X": "M-5 -3l2 -2l3 3l3 -3l2 2l-3 3l3 3l-2 2l-3 -3l-3 3l-2 -2l3 -3z",
}
_OTHER = "M0 -6l6 6l-6 6l-6 -6z"
_DASHES = {"-": "none", "--": "7 4", ":": "2 3", "-.": "8 3 2 3"}
_OTHER_DASH = "1 2"


def along_paths(
    paths: Mapping[str, Sequence[Step]], images: Tensor, labels: Sequence[int]
) -> Picture:
    """Slide alpha along the paths of several alignments: accuracy, and what each merged network sees in some images.

    Args:
        paths: from :func:`~npmerge.report.watched.follow`, equally many points each, by the alignment's name.
        images: ``(n, C, H, W)``, those shown there; eight fit in a row.
        labels: their classes.
    """
    count = len(labels)
    alphas = [step.alpha for step in next(iter(paths.values()))]
    half = min(range(len(alphas)), key=lambda number: abs(alphas[number] - 0.5))
    film, x, y = Film(half), _scale(36, 314), _scale(164, -1.4)
    drawn = [drawing.text(0, 11, "test accuracy (%)")]
    for score in (0, 50, 100):
        drawn.append(drawing.text(30, y(score) + 4, f"{score}", "end"))
        drawn.append(drawing.line(36, y(score), 350, y(score), opacity=0.25))
    drawn += [
        drawing.text(36, 181, f"all {ALIGNED}", **_B),
        drawing.text(193, 181, f"share of A, {ALPHA}", "middle"),
        drawing.text(350, 181, "all A", "end", **_A),
        film.shape("path", "here", {"d": [f"M{x(alpha):.1f} 24V164" for alpha in alphas]},
                   stroke="currentColor", stroke_dasharray="2 3", opacity=0.6),
    ]  # fmt: skip
    drawn += [drawing.pixels(images[n].mean(0), 6 + 44 * n, 194, 34) for n in range(count)]
    right = {
        name: [sum(one == label for one, label in zip(step.answers, labels, strict=True)) for step in steps]
        for name, steps in paths.items()
    }  # fmt: skip
    for row, (name, (dash, marker, colour)) in enumerate(looks(paths).items()):
        steps, top = paths[name], 250 + 46 * row
        spots = [(x(step.alpha), y(step.accuracy)) for step in steps]
        style: dict[str, Any] = {"stroke": colour, "stroke_width": 2, "fill": "none",
                 "stroke_dasharray": _DASHES.get(dash, _OTHER_DASH)}  # fmt: skip
        dot = _DOTS.get(marker, _OTHER)
        drawn += [
            drawing.shape("polyline", points=drawing.points(spots), **style),
            film.shape("path", f"dot{row}", {"transform": [f"translate({a:.1f} {b:.1f})" for a, b in spots]},
                       d=dot, fill=colour),
            drawing.line(6, top - 4, 34, top - 4, **style),
            drawing.shape("path", d=dot, fill=colour, transform=f"translate(20 {top - 4})"),
            film.shape("text", f"value{row}", {"text": [
                f"{METHODS[name].label}: {step.accuracy:.1f} %, {good} of {count} right"
                for step, good in zip(steps, right[name], strict=True)
            ]}, x=42, y=top, font_weight="bold"),
        ]  # fmt: skip
        for column, label in enumerate(labels):
            said = [step.answers[column] for step in steps]
            drawn.append(
                film.shape("text", f"said{row}-{column}", {
                    "text": [f"{one} {'✓' if one == label else '✗'}" for one in said],
                    "font-weight": ["normal" if one == label else "bold" for one in said],
                }, x=23 + 44 * column, y=top + 19, text_anchor="middle")
            )  # fmt: skip
    say = [
        f"{ALPHA} = {alpha:.2f}: "
        + ", ".join(f"{METHODS[n].label} {paths[n][i].accuracy:.1f} %" for n in paths)
        for i, alpha in enumerate(alphas)
    ]
    alt = f"Accuracy on the straight line from B to A. Halfway, {say[half]}. " + " ".join(
        f"{METHODS[n].label} begins with {steps[0].accuracy:.1f} % and ends with {steps[-1].accuracy:.1f} %; "
        f"halfway it is right in {right[n][half]} of the first {count} test images."
        for n, steps in paths.items()
    )
    controls = drawing.slider(f"{ALPHA}, from {ALIGNED} to A", len(alphas), half)
    return film.picture(alt, 232 + 46 * len(paths), drawn, controls, say)


def box(
    a: nn.Module,
    b: nn.Module,
    trails: Mapping[str, Sequence[Sequence[float]]],
    loss: Callable[[Tensor], Tensor],
) -> Picture:
    """Step through learning in the plane of a model's only two parameters, with the box between A and B.

    Args:
        a: model A, of two parameters.
        b: model B.
        trails: from :func:`~npmerge.report.watched.trail`, equally long, by the method's name.
        loss: of places in the plane, ``(n, 2)``, the loss of each, ``(n,)``.
    """
    corners = np.array([parameters_to_vector(one.parameters()).tolist() for one in (a, b)])
    places = {name: np.asarray(found) for name, found in trails.items()}
    every = np.concatenate([corners, *places.values()])
    low, high = every.min(0), every.max(0)
    margin = 0.12 * (high - low)
    low, high, size = low - margin, high + margin, np.array([WIDTH - 20, 280])

    def spot(place: Places) -> Places:
        shares = (place - low) / (high - low)
        found: Places = size * np.stack([shares[..., 0], 1 - shares[..., 1]], -1) + [20, 0]
        return found

    steps = len(next(iter(places.values())))
    film = Film(steps - 1)
    (left, top), (right, bottom) = spot(corners).min(0), spot(corners).max(0)
    drawn = _contours(loss, low, high, spot)
    drawn += [
        drawing.shape("rect", x=20, y=0, width=size[0], height=size[1], fill="none",
               stroke="currentColor", opacity=0.4),
        drawing.shape("rect", x=left, y=top, width=right - left, height=bottom - top, fill="currentColor",
               fill_opacity=0.1, stroke="currentColor", stroke_width=1.5),
        drawing.text(WIDTH, 297, "first parameter →", "end"),
        drawing.shape("text", "second parameter →", transform="translate(14 280) rotate(-90)"),
    ]  # fmt: skip
    for name, style, (x, y) in zip(("A", ALIGNED), (_A, _B), spot(corners), strict=True):
        way, anchor = (-10, "end") if x < (left + right) / 2 else (10, "start")
        drawn.append(
            drawing.shape("circle", cx=x, cy=y, r=6, fill=style["fill"], stroke="currentColor")
        )
        drawn.append(drawing.text(x + way, y + 5, name, anchor, **style))
    losses = {name: loss(torch.tensor(found)).tolist() for name, found in places.items()}
    inside = {
        name: ((found >= corners.min(0) - 1e-9) & (found <= corners.max(0) + 1e-9)).all(1).tolist()
        for name, found in places.items()
    }
    for row, (name, found) in enumerate(places.items()):
        spots, colour = spot(found), METHODS[name].color
        ways = np.concatenate([[0], np.linalg.norm(np.diff(spots, axis=0), axis=1).cumsum()])
        dot = list(_DOTS.values())[row % len(_DOTS)]
        line = {"points": drawing.points(spots), "fill": "none", "stroke": colour}
        drawn += [
            drawing.shape("polyline", **line, stroke_width=1.5, opacity=0.35),
            film.shape("polyline", f"trail{row}", {"stroke-dashoffset": [round(ways[-1] - way, 1) for way in ways]},
                       **line, stroke_width=3, stroke_dasharray=f"{ways[-1]:.1f}"),
            film.shape("path", f"dot{row}", {"transform": [f"translate({p:.1f} {q:.1f})" for p, q in spots]},
                       d=dot, fill=colour, stroke="currentColor"),
            drawing.shape("path", d=dot, fill=colour,
                   transform=f"translate(28 {314 + 20 * row})"),
            film.shape("text", f"value{row}", {"text": [
                f"{METHODS[name].label}: loss {value:.3f}, {'inside' if within else 'outside'} the box"
                for value, within in zip(losses[name], inside[name], strict=True)
            ]}, x=42, y=318 + 20 * row),
        ]  # fmt: skip
    say = [
        f"Step {step} of {steps - 1}: "
        + "; ".join(
            f"{METHODS[n].label} {'inside' if inside[n][step] else 'outside'}, loss {losses[n][step]:.3f}"
            for n in places
        )
        for step in range(steps)
    ]
    alt = f"The plane of the two parameters, with the box between A and {ALIGNED}. " + " ".join(
        f"{METHODS[name].label} "
        + ("stays in the box" if all(within) else f"leaves the box at step {within.index(False)}")
        + f" and takes the loss from {losses[name][0]:.3f} to {losses[name][-1]:.3f} in {steps - 1} steps."
        for name, within in inside.items()
    )
    return film.picture(
        alt, 308 + 20 * len(places), drawn, drawing.slider("step", steps, steps - 1), say
    )


def neurons(first: Tensor, second: Tensor, correlation: Tensor, order: Sequence[int]) -> Picture:
    """Let the neurons of B fly to the places of their partners in A.

    Args:
        first: a tiny image of each of A's neurons, ``(n, h, w)``: its activations or its filter.
        second: of B's, as they were trained.
        correlation: ``(n, n)``, A's neurons in rows, B's in columns.
        order: for each of A's neurons its partner in B, as in an alignment's map.
    """
    partners = [int(one) for one in order]
    count, drawn_of_b = len(partners), sorted(partners[:NEURONS])
    row = 44 if count <= 8 else 30
    film, side = Film(0), row - 8
    values = [float(correlation[mine, theirs]) for mine, theirs in enumerate(partners)]
    before, after = float(correlation.diagonal().mean()), float(np.mean(values))
    drawn = [
        drawing.text(78, 13, "A", "end", **_A),
        film.shape("text", "title", {"text": ["B, as trained", f"{ALIGNED}, aligned"]}, x=228, y=13, **_B),
    ]  # fmt: skip
    wires, squares = [], []
    for mine, (theirs, value) in enumerate(zip(partners[:NEURONS], values, strict=False)):
        middle, start = (24 + row * (place + 0.5) for place in (mine, drawn_of_b.index(theirs)))
        wires.append(
            film.shape("path", f"wire{mine}", {"d": [f"M82 {middle}L224 {end}" for end in (start, middle)]},
                       stroke="currentColor", stroke_width=round(0.5 + 4 * abs(value), 1),
                       stroke_opacity=round(0.2 + 0.7 * abs(value), 2),
                       stroke_dasharray="none" if value >= 0 else "3 3", fill="none")
        )  # fmt: skip
        said = f"{theirs + 1}: {value:.2f}".replace("-", "\N{MINUS SIGN}")
        moving = drawing.pixels(second[theirs], 228, start - side / 2, side)
        moving += drawing.text(234 + side, start + 4, said)
        moves = [f"transform:translateY({way:.1f}px)" for way in (0, middle - start)]
        squares += [
            drawing.text(72 - side, middle + 4, f"{mine + 1}", "end"),
            drawing.pixels(first[mine], 78 - side, middle - side / 2, side),
            film.shape("g", f"neuron{theirs}", {"style": moves}, moving),
        ]
    moved = sum(mine != theirs for mine, theirs in enumerate(partners))
    say = [
        f"As trained: neurons in the same place correlate by {before:.2f} on average.",
        f"Aligned: neurons in the same place correlate by {after:.2f} on average; {moved} of {count} have moved.",
    ]
    alt = (
        f"{count} neurons of A and of B, each as a tiny image, with lines between partners. In the same place they "
        f"correlate by {before:.2f} on average, with their partners by {after:.2f}; {moved} of {count} have to move."
    )
    button = '<button type="button" data-toggle aria-pressed="false">Align</button>'
    return film.picture(alt, 28 + row * len(drawn_of_b), [*drawn, *wires, *squares], button, say)


def bracket(matches: Sequence[Match]) -> Picture:
    """The bracket of a tournament, with the accuracy of every network; pointing at one says who was merged.

    Args:
        matches: from :class:`~npmerge.report.watched.Watched`, in the order of the merges.
    """
    scores: dict[tuple[int, ...], float] = {}
    about: dict[tuple[int, ...], str] = {}
    parents: dict[tuple[int, ...], Match] = {}
    for match in matches:
        a, b = match.pairing.a, match.pairing.b
        scores |= {a: match.a, b: match.b, a + b: match.merged}
        parents[a + b] = match
        about[a + b] = (
            f"{match.pairing.label}: {_who(a)} ({match.a:.1f} %) and {_who(b)} ({match.b:.1f} %) "
            f"became one of {match.merged:.1f} %."
        ).capitalize()
    winner = matches[-1].pairing.a + matches[-1].pairing.b
    columns = 2 + max(match.pairing.round for match in matches)
    pitch = (WIDTH - 80) / (columns - 1)
    places: dict[tuple[int, ...], tuple[float, float]] = {
        (number,): (1.0, 22 + 50.0 * row) for row, number in enumerate(winner)
    }
    lines, nodes = [], []
    for models, match in parents.items():
        ends = [places[match.pairing.a], places[match.pairing.b]]
        x, y = 1 + pitch * (match.pairing.round + 1), float(np.mean([end[1] for end in ends]))
        places[models] = x, y
        for end in ends:
            turn = x - (pitch - 78) / 2
            lines.append(
                drawing.shape("path", d=f"M{end[0] + 78:.0f} {end[1]:.0f}H{turn:.0f}V{y:.0f}H{x:.0f}", fill="none",
                       stroke="currentColor", stroke_width=1.5, opacity=0.6)
            )  # fmt: skip
    for models, (x, y) in places.items():
        told = (
            about.get(models) or f"{_who(models)}, as trained: {scores[models]:.1f} %.".capitalize()
        )
        colour = METHODS["np_merge"].color if models in parents else METHODS["base_models"].color
        name = f"merge of {len(models)}" if models in parents else _who(models)
        nodes.append(
            drawing.shape("g", drawing.shape("title", escape(told))
                   + drawing.shape("rect", x=x, y=y - 20, width=78, height=40, rx=5, fill=colour, fill_opacity=0.18,
                            stroke=colour, stroke_width=2)
                   + drawing.text(x + 39, y - 4, name, "middle")
                   + drawing.text(x + 39, y + 13, f"{scores[models]:.1f} %", "middle", font_weight="bold"),
                   data_tell=told)
        )  # fmt: skip
    leaves = [scores[number,] for number in winner]
    alt = (
        f"A tournament of {len(winner)} networks of {min(leaves):.1f} to {max(leaves):.1f} %; the last merge has "
        f"{scores[winner]:.1f} %. " + " ".join(about[models] for models in parents)
    )
    return Film(0).picture(
        alt, 50 * len(winner), lines + nodes, "", ["Choose a network to see how it was made."]
    )


def alpha_by_epoch(histograms: Sequence[Mapping[str, Sequence[int]]], *, first: int = 1) -> Picture:
    """The histogram of alpha, of all layers or of one, with a slider over the epochs.

    Args:
        histograms: a mapping an epoch, all with the same keys: for each layer (a name of your choice) how many
            coefficients lie in each of equally wide bins over (0, 1), 20 for example.
        first: the number of the first of these epochs; 0 where the start, alpha = 0.5, is among them.
    """
    last = len(histograms) - 1
    kept = sorted({round(place) for place in np.linspace(0, last, min(last + 1, EPOCHS))})
    layers = {name: np.array([histograms[e][name] for e in kept]) for name in histograms[0]}
    layers = {"all layers": np.sum(list(layers.values()), axis=0)} | layers
    shares = {
        name: counts / counts.sum(1, keepdims=True).clip(1) for name, counts in layers.items()
    }
    bins = len(shares["all layers"][0])
    film, wide = Film(len(kept) - 1), (WIDTH - 20) / bins
    near = abs((np.arange(bins) + 0.5) / bins - 0.5) < 0.1
    frames: dict[str, dict[str, Frames]] = {}
    say: dict[str, list[str]] = {}
    for name, found in shares.items():
        heights = np.rint(150 * found / max(found.max(), 1e-9)).astype(int)
        frames[name] = {f"bar{bin_}": {"height": heights[:, bin_].tolist()} for bin_ in range(bins)}
        say[name] = [
            f"Epoch {first + epoch}: {100 * one[near].sum():.0f} % of {ALPHA} within 0.1 of one half"
            for epoch, one in zip(kept, found, strict=True)
        ]
    bars = [
        film.shape("rect", name, moving, x=round(10 + wide * number + 0.5, 1), y=0, width=round(wide - 1, 1),
                   fill=METHODS["np_merge"].color)
        for number, (name, moving) in enumerate(frames["all layers"].items())
    ]  # fmt: skip
    drawn = [
        drawing.shape("g", "".join(bars), transform="translate(0 160) scale(1 -1)"),
        drawing.line(10, 160.5, WIDTH - 10, 160.5),
        drawing.line(WIDTH / 2, 6, WIDTH / 2, 160, stroke_dasharray="2 3", opacity=0.6),
        drawing.text(10, 177, f"0: all {ALIGNED}", **_B),
        drawing.text(WIDTH / 2, 177, f"{ALPHA} = ½", "middle"),
        drawing.text(WIDTH - 10, 177, "1: all A", "end", **_A),
    ]
    film.choices.update(
        {name: moving | {"say": {"text": say[name]}} for name, moving in frames.items()}
    )
    alt = f"Histograms of alpha over {bins} bins. " + ". ".join(
        dict.fromkeys((say["all layers"][0], say["all layers"][-1]))
    )
    options = "".join(f"<option>{escape(name)}</option>" for name in shares)
    choose = f"<label>layer <select data-choice>{options}</select></label>"
    controls = drawing.slider("epoch", len(kept), len(kept) - 1) + choose
    return film.picture(f"{alt}.", 184, drawn, controls, say["all layers"])


def _scale(start: float, length: float) -> Callable[[float], float]:
    return lambda value: start + length * value


def _who(models: tuple[int, ...]) -> str:
    text = ", ".join(str(number + 1) for number in sorted(models))
    return f"network {text}" if len(models) == 1 else f"the merge of {text}"


def _contours(
    loss: Callable[[Tensor], Tensor], low: Places, high: Places, spot: Callable[[Places], Places]
) -> list[str]:
    """Lines of equal loss, one for each tenth of the plane."""
    x, y = (np.linspace(start, end, 41) for start, end in zip(low, high, strict=True))
    grid = np.stack(np.meshgrid(x, y), -1)
    values = loss(torch.tensor(grid.reshape(-1, 2))).detach().numpy().reshape(grid.shape[:2])
    levels = np.unique(np.quantile(values, np.linspace(0.02, 0.9, 10)))
    style: dict[str, Any] = {"fill": "none", "stroke": "currentColor", "opacity": 0.3}
    found = Figure().subplots().contour(x, y, values, levels=levels).allsegs
    return [
        drawing.shape("polyline", points=drawing.points(spot(np.asarray(line))), **style)
        for lines in found
        for line in lines
    ]
