"""Agg by a coefficient that is chosen without labels: where the answers change least from one to the next."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from npmerge.aggregate.aggregated import Aggregated
from npmerge.aggregate.averaging import mean
from npmerge.correct.batchnorm import reset_batchnorm
from npmerge.data.streams import Data, as_logits, first_examples, outputs_of, stream
from npmerge.device import measuring
from npmerge.methods import method


@method(
    kind="aggregate",
    label="Consistent alpha",
    family="averaging",
    needs=("data",),
    reference="du2025",
    place=49,
    use="Where a single coefficient is to be chosen and there are no labels.",
)
def consistency_alpha(
    a: nn.Module,
    b: nn.Module,
    data: Data,
    *,
    points: int = 21,
    margin: float = 0.2,
    window: int = 1,
    examples: int = 4096,
) -> Aggregated:
    """Interpolate, ``alpha * A + (1 - alpha) * B``, where the predictions change least with alpha.

    Alpha is searched on a grid. For each one the examples are counted that are classified otherwise than by either of
    its neighbours, and the counts are averaged over a window; the least wins, of equal ones the nearest to one half.
    Batch norm is reset for every alpha. Where predictions are stable they need not be right: nothing changes near the
    two models either, which is why a margin is left out.

    Args:
        a: model A.
        b: model B, of the same architecture and aligned to A.
        data: no labels are used.
        points: of the grid, from 0 to 1.
        margin: how far from 0 and 1 alpha stays at least; ours.
        window: how many neighbours on either side a count is averaged with; ours.
        examples: how many, at most; the first ones of a pass, which are held in memory.

    Returns:
        The merged model; the alpha that was chosen in ``details["chosen"]``; and all ``details["alphas"]`` with how
        many ``details["changed"]``, before the averaging: none is counted for 0 and 1.

    Raises:
        ValueError: fewer than three points, a margin that leaves none, a negative window, no example asked for, models
            that differ in architecture or shape, or data that is empty.

    Source:
        Du et al. 2025, AdaMMS, whose grid goes from 0.4 to 1 in steps of 0.1.
    """
    if points < 3 or window < 0 or not 0 <= margin <= 0.5 or examples < 1:
        raise ValueError(
            f"points is {points}, window {window}, margin {margin:g}, examples {examples}: give at least 3 points, a "
            "window of 0 or more, a margin from 0 to 0.5, and at least 1 example"
        )
    first = max(1, math.ceil(margin * (points - 1) - 1e-9))
    inner = range(first, points - first)
    if not inner:
        raise ValueError(f"a margin of {margin:g} leaves none of {points} points: give more points")
    held = list(first_examples(data, examples, "cpu"))
    alphas = torch.linspace(0, 1, points, dtype=torch.float64).tolist()
    answers = torch.stack(
        [predictions(reset_batchnorm(mean(a, b, alpha=alpha), held), held) for alpha in alphas]
    )
    differs = answers[1:] != answers[:-1]
    changed = [0, *(differs[1:] | differs[:-1]).flatten(1).sum(1).tolist(), 0]

    def judged(place: int) -> tuple[float, float]:
        near = changed[max(1, place - window) : min(points - 1, place + window + 1)]
        return sum(near) / len(near), abs(alphas[place] - 0.5)

    chosen = alphas[min(inner, key=judged)]
    details = {"chosen": chosen, "alphas": alphas, "changed": changed}
    return Aggregated(mean(a, b, alpha=chosen), details=details)


@torch.no_grad()
def predictions(model: nn.Module, data: Data) -> Tensor:
    """The most likely class of every example, or of every position of it, in evaluation mode.

    Args:
        model: gives logits.
        data: any re-iterable of batches.

    Returns:
        ``int64``, a row an example, on the CPU.
    """
    with measuring(model) as device:
        return torch.cat(
            [as_logits(outputs_of(model, batch)).argmax(-1).cpu() for batch in stream(data, device)]
        )
