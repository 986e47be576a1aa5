"""How NP Merge and fine-tuning learn: their training loss, and how far alpha's coefficients spread."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from npmerge.aggregate import QUANTILES
from npmerge.report.numbers import by_method, in_order, method_of, place_of
from npmerge.report.plots import describe, label_ends, panels
from npmerge.report.words import place_labels
from npmerge.store.records import Record, table

MANY = 25
"""Epochs beyond which their points are not drawn one by one."""


def plot_learning(records: Sequence[Record], align: str = "permute") -> Figure | None:
    """The training loss by epoch, and the quantiles of alpha after each; means over the seeds, two panels a setting.

    Args:
        records: of one experiment at one profile.
        align: the alignment whose methods are drawn.

    Returns:
        ``None`` where no record tells.
    """
    kept = [
        record
        for record in records
        if record.rows[0].align == align
        and record.rows[0].many is None
        and len(record.details.get("history", [])) > 1
    ]
    if not kept:
        return None
    names = place_labels(by_method(table(kept)))
    places = list(dict.fromkeys(place_of(record) for record in kept))
    figure, axes = panels([2.2] * 2 * len(places))
    told = []
    for place, loss, alpha in zip(places, axes[::2], axes[1::2], strict=True):
        here = [record for record in kept if place_of(record) == place]
        for method in in_order({method_of(record): None for record in here}):
            same = [record for record in here if method_of(record) == method]
            line = "--" if method.tuned else "-"
            _draw_loss(loss, same, method.color, line, method.label)
            _draw_spread(alpha, same, method.color, line, method.label)
        ends = {
            str(line.get_label()): float(np.asarray(line.get_ydata())[-1]) for line in loss.lines
        }
        told.append(f"{names[place]}: {', '.join(f'{n} ends at {v:.2f}' for n, v in ends.items())}")
        loss.set_title(f"{names[place]}\ntraining loss (nats)")
        alpha.set_title("where nine tenths of α lie")  # noqa: RUF001
        alpha.axhline(0.5, color="black", lw=0.8, ls=":")
        alpha.set(xlabel="epoch", ylim=(0, 1))
    label_ends(axes)
    lowest = min(ends, key=lambda name: ends[name])
    title = f"{lowest} ends at the lowest training loss, {ends[lowest]:.2f} nats"
    alt = f"Training loss and spread of alpha by epoch. {'. '.join(told)}"
    return describe(figure, alt, title if len(places) == 1 else "")


def _draw_loss(axis: Axes, same: Sequence[Record], color: str, line: str, label: str) -> None:
    losses = np.mean([record.details["history"] for record in same], axis=0)
    epochs = np.arange(1, len(losses) + 1)
    marker = "o" if len(epochs) <= MANY else ""
    axis.plot(epochs, losses, ls=line, marker=marker, ms=3, color=color, label=label)


def _draw_spread(axis: Axes, same: Sequence[Record], color: str, line: str, label: str) -> None:
    spreads = [record.details["spread"] for record in same if "spread" in record.details]
    if not spreads:
        return
    values = np.vstack([np.full(len(QUANTILES), 0.5), np.mean(spreads, axis=0)])
    epochs = np.arange(len(values))
    low, high = QUANTILES.index(0.05), QUANTILES.index(0.95)
    axis.plot(epochs, values[:, low], ls=line, color=color)
    axis.plot(epochs, values[:, high], ls=line, color=color, label=label)
    axis.fill_between(epochs, values[:, low], values[:, high], color=color, alpha=0.12)
