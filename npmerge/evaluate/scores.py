"""The loss and the accuracy of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from npmerge.data.streams import (
    Batch,
    Data,
    as_logits,
    check_labels,
    labels_of,
    outputs_of,
    size_of,
    stream,
)
from npmerge.device import measuring


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
        model: maps images ``(N, C, H, W)`` to logits ``(N, classes)``.
        data: any re-iterable of batches.
        topk: which k to report, each from 1 to the number of classes.

    Raises:
        ValueError: the data is empty, a label is out of range, or a k is, or there is none.
    """
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
            ranked = logits.topk(max(topk), dim=1).indices == labels[:, None]
            hits += torch.stack([ranked[:, :k].sum() for k in topk])
            loss += cross_entropy(logits, labels, reduction="sum")
            count += size_of(batch)
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
    with measuring(model) as device:
        hits, counts = (torch.zeros(classes, device=device) for _ in range(2))
        for batch in stream(data, device):
            logits, labels = answer(model, batch, data)
            right = logits.argmax(dim=1) == labels
            hits += torch.bincount(labels[right], minlength=classes)
            counts += torch.bincount(labels, minlength=classes)
    return (100 * hits.double() / counts.double()).cpu()


def answer(model: nn.Module, batch: Batch, data: Data) -> tuple[Tensor, Tensor]:
    """A model's logits for a batch, in float32, and the labels that they are held against.

    Args:
        model: as it is.
        batch: from :func:`npmerge.data.streams.stream`.
        data: where it comes from.

    Raises:
        ValueError: a label is out of range.
    """
    logits, labels = as_logits(outputs_of(model, batch)), labels_of(batch)
    check_labels(data, labels, logits.shape[1])
    return logits, labels
