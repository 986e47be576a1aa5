"""The loss and the accuracy of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from npmerge.checks import CLASSES, check_whole
from npmerge.data.streams import Batch, Data, classified, outputs_of, size_of, stream
from npmerge.device import measuring
from npmerge.named import user_code

Metric = Callable[[Any, Batch], Tensor | float]
"""``metric(outputs, batch)``: one number, the mean over the batch, of what the model answered to it."""


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


@torch.no_grad()
def score(model: nn.Module, data: Data, *, topk: Sequence[int] = (1,)) -> Score:
    """Accuracy and loss of a model in evaluation mode, in float32; every module's mode is restored.

    Args:
        model: maps inputs to logits ``(N, classes)``, or ``(N, ..., classes)`` where each position has a label.
        data: any re-iterable of batches. Of labels that are probabilities the most likely is the class.
        topk: which k to report, each from 1 to the number of classes.

    Raises:
        ValueError: the data is empty, a label is out of range, or a k is, or there is none.
    """
    if isinstance(topk, int):
        raise ValueError(f"topk is {topk}: give several, such as (1, {topk})")
    for k in topk:
        check_whole("topk", k)
    count = 0
    with measuring(model) as device:
        hits = torch.zeros(len(topk), dtype=torch.int64, device=device)
        loss = torch.zeros((), dtype=torch.float64, device=device)
        for batch in stream(data, device):
            logits, labels = answer(model, batch, data)
            classes = logits.shape[1]
            if not topk or not all(1 <= k <= classes for k in topk):
                raise ValueError(
                    f"topk is {tuple(topk)}: each k must lie between 1 and the model's {classes} classes"
                )
            ranked = logits.topk(max(topk), dim=1).indices == _hard(labels)[:, None]
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
        data: any re-iterable of batches.
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
        data: any re-iterable of batches.
        classes: how many classes the data has.

    Returns:
        Percent, ``float64 (classes,)`` on the CPU; NaN for a class without an image.

    Raises:
        ValueError: the data is empty or a label is out of range.
    """
    check_whole("classes", classes, 1, CLASSES)
    with measuring(model) as device:
        hits, counts = (torch.zeros(classes, device=device) for _ in range(2))
        for batch in stream(data, device):
            logits, labels = answer(model, batch, data)
            labels = _hard(labels)
            right = logits.argmax(dim=1) == labels
            found = torch.bincount(labels, minlength=classes)
            if len(found) > classes:
                raise ValueError(f"label {len(found) - 1} is out of range: classes is {classes}")
            hits += torch.bincount(labels[right], minlength=classes)
            counts += found
    return (100 * hits.double() / counts.double()).cpu()


def answer(model: nn.Module, batch: Batch, data: Data) -> tuple[Tensor, Tensor]:
    """A model's logits for a batch and the labels; see :func:`npmerge.data.streams.classified`.

    Args:
        model: as it is.
        batch: from :func:`npmerge.data.streams.stream`.
        data: where it comes from.
    """
    return classified(outputs_of(model, batch), batch, data)


@torch.no_grad()
def measure(model: nn.Module, data: Data, metric: Metric) -> float:
    """The mean of a metric, or of a loss, of a model in evaluation mode, in float32; every module's mode is restored.

    Args:
        model: takes what the batches hold beside their labels.
        data: any re-iterable of batches.
        metric: of the outputs and the batch; each batch counts by its examples.

    Raises:
        ValueError: the data is empty or malformed.
    """
    total, count = 0.0, 0
    with measuring(model) as device:
        for batch in stream(data, device):
            outputs = outputs_of(model, batch)
            with user_code(
                f"metric or loss {getattr(metric, '__name__', type(metric).__name__)!r}"
            ):
                value = float(metric(outputs, batch))
            total += value * size_of(batch)
            count += size_of(batch)
    return total / count


def _hard(labels: Tensor) -> Tensor:
    return labels.argmax(dim=1) if labels.is_floating_point() else labels
