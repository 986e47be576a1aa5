"""Agg on the line from the base to what was learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from npmerge.aggregate import mean
from npmerge.aggregate.uniform_and_greedy import uniform_soup
from npmerge.methods import method
from npmerge.tasks.vectors import checked_base


@method(
    kind="aggregate",
    label="WiSE-FT",
    row="WiSE-FT-{align}",
    family="task",
    needs=("base",),
    reference="wortsman2022wise",
    place=62,
    use="To keep what the base could do while taking what fine-tuning has brought.",
)
@torch.no_grad()
def wise_ft(
    models: Sequence[nn.Module], *, base: nn.Module | None, alpha: float = 0.5
) -> nn.Module:
    """Interpolate from the base to the fine-tuned model: ``(1 - alpha) * theta_0 + alpha * theta_1``.

    With more than one model, theta_1 is their mean. Batch norm statistics are interpolated too.

    Args:
        models: one or more, of one architecture, aligned to the first.
        base: the model that they were trained from.
        alpha: 0 is the base, 1 the mean of the models; one half is the authors' choice without data.

    Returns:
        The merged model.

    Raises:
        ValueError: there is no base, or an architecture differs.

    Source:
        Wortsman et al. 2022, WiSE-FT.
    """
    start = checked_base(models, base)
    return mean(uniform_soup(models), start, alpha=alpha)


def wise_ft_curve(
    models: Sequence[nn.Module], *, base: nn.Module | None, points: int = 11
) -> Iterator[tuple[float, nn.Module]]:
    """Every alpha and its model, one at a time, from the base to the mean of the models.

    Args:
        models: as of :func:`wise_ft`.
        base: the model that they were trained from.
        points: how many, at equal distances; 11 is the authors' grid.

    Raises:
        ValueError: ``points`` is less than two; or as :func:`wise_ft`.
    """
    if points < 2:
        raise ValueError(f"points is {points}: give at least 2, for both ends")
    for number in range(points):
        alpha = number / (points - 1)
        yield alpha, wise_ft(models, base=base, alpha=alpha)
