"""What merged models are held against: the base models themselves, and all of them together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

import torch
from torch import Tensor, nn

from npmerge.data.streams import Data, as_logits, stream
from npmerge.device import measuring
from npmerge.evaluate.scores import Score, answer, score
from npmerge.methods import method
from npmerge.prepare import checked


class Ensemble(nn.Module):
    """Several models that answer with the mean of their logits.

    Args:
        models: take the same inputs and have the same classes.

    Source:
        Section IV-A, "Ensemble".
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        if not models:
            raise ValueError("an ensemble needs at least one model")
        self.models = nn.ModuleList(map(checked, models))

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """What each model takes, such as images ``(N, C, H, W)``, to the mean logits ``(N, classes)``."""
        return torch.stack([as_logits(model(*inputs, **named)) for model in self.models]).mean(
            dim=0
        )


@method(kind="reference", label="Base models avg.", family="reference", place=1)
def base_models(
    models: Sequence[Callable[[], nn.Module]], data: Data, *, topk: Sequence[int] = (1,)
) -> Score:
    """The mean score of models as they were trained, one in memory at a time.

    Args:
        models: functions that load them, at least one; each is called once.
        data: any re-iterable of batches.
        topk: which k to report.

    Raises:
        ValueError: there is no model; or as :func:`~npmerge.evaluate.scores.score`.

    Source:
        Section IV-A, "Base models avg.".
    """
    _check(models)
    scores = [score(load(), data, topk=topk) for load in models]
    return Score(
        {k: fmean(found.accuracy[k] for found in scores) for k in topk},
        fmean(found.loss for found in scores),
    )


@method(kind="reference", label="Ensemble", family="reference", place=2)
@torch.no_grad()
def ensemble(
    models: Sequence[Callable[[], nn.Module]], data: Data, *, topk: Sequence[int] = (1,)
) -> Score:
    """Accuracy and loss of an ensemble: the score of an :class:`Ensemble`, one model in memory at a time.

    The sums of the logits wait on the CPU: 4 bytes for every image and class.

    Args:
        models: functions that load them, at least one; each is called once.
        data: a re-iterable of batches that gives the same examples in the same order in every pass.
        topk: which k to report.

    Raises:
        ValueError: there is no model, the models differ in their classes, or the data is empty or comes in another
            order at another pass; or as :func:`~npmerge.evaluate.scores.score`.

    Source:
        Section IV-A, "Ensemble".
    """
    _check(models)
    sums = _answers(models[0](), data)
    for load in models[1:]:
        sums = _added(sums, _answers(load(), data))
    means = [(logits / len(models), labels) for logits, labels in sums]
    return score(nn.Identity(), means, topk=topk)


def _check(models: Sequence[Callable[[], nn.Module]]) -> None:
    if not models:
        raise ValueError("no models: give at least one")
    for number, load in enumerate(models):
        if isinstance(load, nn.Module) or not callable(load):
            raise ValueError(
                f"models[{number}] is a {type(load).__name__}: give functions that load the models"
            )


def _answers(model: nn.Module, data: Data) -> list[tuple[Tensor, Tensor]]:
    """A model's logits in evaluation mode and the labels, batch by batch on the CPU."""
    with measuring(model) as device:
        return [
            (logits.cpu(), labels.cpu())
            for logits, labels in (answer(model, batch, data) for batch in stream(data, device))
        ]


def _added(
    first: Sequence[tuple[Tensor, Tensor]], second: Sequence[tuple[Tensor, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    if len(first) != len(second) or not all(
        torch.equal(x, y) for (_, x), (_, y) in zip(first, second, strict=True)
    ):
        raise ValueError(
            "the data came in another order at the second pass: give data that is not shuffled"
        )
    classes, others = first[0][0].shape[1], second[0][0].shape[1]
    if classes != others:
        raise ValueError(
            f"models of {classes} and {others} classes: an ensemble's models have the same"
        )
    return [(x + y, labels) for (x, labels), (y, _) in zip(first, second, strict=True)]
