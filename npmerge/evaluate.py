"""Scores: top-k accuracy and loss, the ensemble, and the barrier along the linear path between two models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from npmerge.aggregate.mean import mean
from npmerge.batchnorm import reset_batchnorm
from npmerge.data.batches import Data, check_labels, stream
from npmerge.device import channels_last, measuring


@dataclass(frozen=True)
class Score:
    """What a model scores on a data set.

    Attributes:
        accuracy: percent of the images whose class is among the k highest outputs, for each k asked for.
        loss: mean cross-entropy in nats.
    """

    accuracy: dict[int, float]
    loss: float

    @property
    def top1(self) -> float:
        """Top-1 accuracy in percent."""
        return self.accuracy[1]


@dataclass(frozen=True)
class PathPoint:
    """A model on the linear path between two others.

    Attributes:
        alpha: the share of model A, in [0, 1].
        accuracy: top-1 in percent.
        loss: mean cross-entropy in nats.
    """

    alpha: float
    accuracy: float
    loss: float


class Ensemble(nn.Module):
    """Several models that answer with the mean of their logits.

    Args:
        models: take the same images and have the same classes.

    Source:
        Section IV-A, "Ensemble".
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        if not models:
            raise ValueError("an ensemble needs at least one model")
        self.models = nn.ModuleList(models)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` to the mean logits ``(N, classes)``."""
        return torch.stack([model(images) for model in self.models]).mean(dim=0)


@torch.no_grad()
def score(model: nn.Module, data: Data, *, topk: Sequence[int] = (1,)) -> Score:
    """Accuracy and loss of a model in evaluation mode, in float32; every module's mode is restored.

    Args:
        model: maps images ``(N, C, H, W)`` to logits ``(N, classes)``.
        data: any re-iterable of ``(images, labels)``.
        topk: which k to report, each from 1 to the number of classes.

    Raises:
        ValueError: the data is empty, a label is out of range, or a k is, or there is none.
    """
    count = 0
    with measuring(model) as device:
        hits = torch.zeros(len(topk), dtype=torch.int64, device=device)
        loss = torch.zeros((), dtype=torch.float64, device=device)
        for images, labels in stream(data, device):
            logits = model(channels_last(images)).float()
            classes = logits.shape[1]
            check_labels(data, labels, classes)
            if not topk or not all(1 <= k <= classes for k in topk):
                raise ValueError(
                    f"topk is {tuple(topk)}: each k must lie between 1 and the model's {classes} classes"
                )
            ranked = logits.topk(max(topk), dim=1).indices == labels[:, None]
            hits += torch.stack([ranked[:, :k].sum() for k in topk])
            loss += cross_entropy(logits, labels, reduction="sum")
            count += len(labels)
    return Score(
        {k: 100 * hit / count for k, hit in zip(topk, hits.tolist(), strict=True)},
        float(loss) / count,
    )


def accuracy(model: nn.Module, data: Data, *, topk: Sequence[int] = (1,)) -> dict[int, float]:
    """Top-k accuracy in percent; see :func:`score`.

    Args:
        model: maps images ``(N, C, H, W)`` to logits ``(N, classes)``.
        data: any re-iterable of ``(images, labels)``.
        topk: which k to report.

    Returns:
        ``{k: percent}``.
    """
    return score(model, data, topk=topk).accuracy


@torch.no_grad()
def class_accuracy(model: nn.Module, data: Data, classes: int) -> Tensor:
    """Top-1 accuracy on the images of each class, in float32; every module's mode is restored.

    Args:
        model: maps images ``(N, C, H, W)`` to logits.
        data: any re-iterable of ``(images, labels)``.
        classes: how many classes the data has.

    Returns:
        Percent, ``float64 (classes,)`` on the CPU; NaN for a class without an image.
    """
    with measuring(model) as device:
        hits, counts = (torch.zeros(classes, device=device) for _ in range(2))
        for images, labels in stream(data, device):
            right = model(channels_last(images)).argmax(dim=1) == labels
            hits += torch.bincount(labels[right], minlength=classes)
            counts += torch.bincount(labels, minlength=classes)
    return (100 * hits.double() / counts.double()).cpu()


def path(
    a: nn.Module, b: nn.Module, data: Data, *, points: int = 11, reset_data: Data | None = None
) -> list[PathPoint]:
    """Score the models ``alpha * A + (1 - alpha) * B`` for evenly spaced alpha from 0 to 1.

    Args:
        a: model A.
        b: model B, aligned or not.
        data: what to score on: any re-iterable of ``(images, labels)``.
        points: how many alphas, the two ends included.
        reset_data: training data to re-estimate batch norm from at every point; not re-estimated by default.

    Raises:
        ValueError: fewer than two points, or the models differ in architecture.

    Source:
        Eq. 1 with a scalar alpha; Frankle et al. 2020.
    """
    if points < 2:
        raise ValueError(f"points is {points}: a path has at least its two ends")
    result = []
    for alpha in torch.linspace(0, 1, points, dtype=torch.float64).tolist():
        model = mean(a, b, alpha=alpha)
        if reset_data is not None:
            reset_batchnorm(model, reset_data)
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
    first, last = points[0], points[-1]
    return max(p.loss - ((1 - p.alpha) * first.loss + p.alpha * last.loss) for p in points)
