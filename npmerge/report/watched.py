"""What the moving pictures show: the steps on a path, of a learning and of a tournament, noted as they happen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from npmerge.data.streams import Data
from npmerge.evaluate import PathPoint, path
from npmerge.many import Pairing
from npmerge.training import Loss, Optimizer, fit


@dataclass(frozen=True)
class Step(PathPoint):
    """A model on the path between two others, and what it answers.

    Attributes:
        answers: the class it sees in each image that is shown.
    """

    answers: tuple[int, ...] = ()


@dataclass
class Watched:
    """A merge for :func:`npmerge.many.tournaments.tournament` that notes how good everybody is.

    Attributes:
        merge: the merge itself.
        accuracy: of a model, in percent.
        matches: what was noted, in the order of the merges; for :func:`~npmerge.report.interactive.bracket`.
    """

    merge: Callable[[nn.Module, nn.Module, Pairing], nn.Module]
    accuracy: Callable[[nn.Module], float]
    matches: list[Match] = field(default_factory=list)

    def __call__(self, a: nn.Module, b: nn.Module, pairing: Pairing) -> nn.Module:
        """Merge two models."""
        model = self.merge(a, b, pairing)
        scores = (self.accuracy(one) for one in (a, b, model))
        self.matches.append(Match(pairing, *scores))
        return model


@dataclass(frozen=True)
class Match:
    """A merge in a tournament.

    Attributes:
        pairing: who was merged.
        a: accuracy of model A, in percent.
        b: of model B.
        merged: of what came out.
    """

    pairing: Pairing
    a: float
    b: float
    merged: float


def follow(
    a: nn.Module, b: nn.Module, data: Data, images: Tensor, *, points: int = 21,
    correct: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> list[Step]:  # fmt: skip
    """Score the models on the straight line from B to A, and ask each what it sees in some images.

    Args:
        a: model A.
        b: model B, aligned or not.
        data: what to score on.
        images: ``(n, C, H, W)``, those that are shown.
        points: how many models, the two ends included.
        correct: what is done to each before, such as a reset of its batch norm.
    """
    answers: list[tuple[int, ...]] = []

    def asked(model: nn.Module) -> nn.Module:
        model = correct(model).eval()
        with torch.no_grad():
            answers.append(tuple(model(images).argmax(1).tolist()))
        return model

    scored = path(a, b, data, points=points, correct=asked)
    return [Step(**asdict(p), answers=found) for p, found in zip(scored, answers, strict=True)]


def trail(
    model: nn.Module, optimizer: Optimizer, data: Data, *, steps: int, loss: Loss | None = None
) -> list[list[float]]:
    """Let a model learn, and note all its parameters at the start and after each step.

    Args:
        model: about to learn; changed in place.
        optimizer: of its parameters, or of their coefficients: that of
            :func:`~npmerge.aggregate.nonuniform.learning_alpha`, say.
        data: one batch, so that an epoch is a step.
        steps: how many.
        loss: of the outputs and the batch; by default the cross-entropy of the labels.
    """
    places = [parameters_to_vector(model.parameters()).tolist()]
    for _ in range(steps):
        fit(model, data, optimizer, epochs=1, loss=loss, mixed_precision=False)
        places.append(parameters_to_vector(model.parameters()).tolist())
    return places
