"""The linear path between two models, and the barrier on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from npmerge.aggregate.averaging import mean
from npmerge.checks import check_whole
from npmerge.data.streams import Data
from npmerge.evaluate.scores import Metric, measure, score


@dataclass(frozen=True)
class PathPoint:
    """A model on the linear path between two others.

    Attributes:
        alpha: the share of model A, in [0, 1].
        accuracy: top-1 in percent; NaN where a loss of one's own is measured.
        loss: mean cross-entropy in nats, or that loss.
    """

    alpha: float
    accuracy: float
    loss: float


def path(
    a: nn.Module,
    b: nn.Module,
    data: Data,
    *,
    points: int = 11,
    correct: Callable[[nn.Module], nn.Module] | None = None,
    loss: Metric | None = None,
) -> list[PathPoint]:
    """Score the models ``alpha * A + (1 - alpha) * B`` for evenly spaced alpha from 0 to 1.

    Args:
        a: model A.
        b: model B, aligned or not.
        data: what to score on: any re-iterable of batches.
        points: how many alphas, the two ends included.
        correct: what is done to the model of every point before it is scored, such as a reset of its batch norm; by
            default nothing.
        loss: of the outputs and the batch; by default the cross-entropy of the labels.

    Raises:
        ValueError: fewer than two points, or the models differ in architecture.

    Source:
        Eq. 1 with a scalar alpha; Frankle et al. 2020.
    """
    check_whole("points", points, 2)  # its two ends
    result = []
    for alpha in torch.linspace(0, 1, points, dtype=torch.float64).tolist():
        model = mean(a, b, alpha=alpha)
        model = model if correct is None else correct(model)
        if loss is not None:
            result.append(PathPoint(alpha, math.nan, measure(model, data, loss)))
            continue
        found = score(model, data)
        result.append(PathPoint(alpha, found.top1, found.loss))
    return result


def barrier(points: Sequence[PathPoint]) -> float:
    """The loss barrier of a path, in nats.

    Args:
        points: from :func:`path`.

    Returns:
        The largest height of the path's loss over the straight line between the losses of its two ends; at least 0.

    Source:
        Entezari et al. 2022, definition 2.
    """
    if not points:
        raise ValueError("no points: give those of a path")
    first, last = points[0], points[-1]
    return max(p.loss - ((1 - p.alpha) * first.loss + p.alpha * last.loss) for p in points)
