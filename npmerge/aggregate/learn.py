"""Learn several merged models in step: what :func:`npmerge.training.fit_together` is to training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from npmerge.training import Run, TrainingError, fit_together

Result_co = TypeVar("Result_co", covariant=True)


class Learning(Protocol[Result_co]):
    """A merged model that is about to be learned, such as :class:`npmerge.aggregate.np_merge.LearnAlpha`."""

    @property
    def run(self) -> Run:
        """What to train."""

    def result(self, history: list[float]) -> Result_co:
        """What was learned, given the mean loss of each epoch."""


def learn_together(
    learnings: Sequence[Learning[Result_co]],
    *,
    epochs: int,
    at_once: int | None = None,
    mixed_precision: bool | None = None,
    progress: str | None = None,
) -> list[Result_co | TrainingError]:
    """Learn merged models in step, each as it would be alone, up to rounding.

    Args:
        learnings: of any kinds, with as many steps an epoch each.
        epochs: passes over the data.
        at_once: models to train at the same time; by default one on a CPU and 16 on CUDA.
        mixed_precision: bfloat16 autocast; by default where the device gains from it (CUDA).
        progress: label of the progress bar; none by default.

    Returns:
        What each learned, or the error if it diverged.

    Raises:
        ValueError: the data is empty or of different lengths, or a label is out of range.
    """
    found = fit_together(
        [learning.run for learning in learnings],
        epochs=epochs,
        at_once=at_once,
        mixed_precision=mixed_precision,
        progress=progress,
    )
    return [
        history if isinstance(history, TrainingError) else learning.result(history)
        for learning, history in zip(learnings, found, strict=True)
    ]


def learn(
    learning: Learning[Result_co],
    *,
    epochs: int,
    mixed_precision: bool | None = None,
    progress: str | None = None,
) -> Result_co:
    """Learn one merged model; see :func:`learn_together`.

    Args:
        learning: the model.
        epochs: passes over the data.
        mixed_precision: bfloat16 autocast; by default where the device gains from it (CUDA).
        progress: label of the progress bar; none by default.

    Raises:
        TrainingError: the loss is not finite.
    """
    (found,) = learn_together(
        [learning], epochs=epochs, mixed_precision=mixed_precision, progress=progress
    )
    if isinstance(found, TrainingError):
        raise found
    return found
