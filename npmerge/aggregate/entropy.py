"""Agg by coefficients under which the merged model is surest, which takes no labels."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from npmerge.aggregate.aggregated import Aggregated, taken_over
from npmerge.aggregate.label_free import predictions
from npmerge.aggregate.soups import SharedAlpha, check_level
from npmerge.correct.batchnorm import reset_batchnorm
from npmerge.data.streams import Data, as_logits
from npmerge.methods import method
from npmerge.symmetry import check_same_architecture
from npmerge.training import Learning

logger = logging.getLogger(__name__)

MOVED = 0.25
"""The share of the predictions that may be of other classes than the models' before a collapse is warned of."""


@method(
    kind="aggregate",
    label="AdaMerging",
    family="soup",
    needs=("data",),
    reference="yang2024",
    place=47,
    use="Where there are only unlabelled images; watch which classes it predicts.",
)
def adamerging(
    a: nn.Module,
    b: nn.Module,
    data: Data,
    *,
    level: str = "tensor",
    epochs: int = 10,
    lr: float = 1e-2,
    learning: Learning | None = None,
) -> Aggregated:
    """Learn ``W = alpha * A + (1 - alpha) * B`` by the entropy of its predictions, which is to be low, without labels.

    Alpha is a sigmoid, one half at the start. Entropy is lowest where everything is one class, and networks that were
    trained apart do collapse, so look at ``details["classes"]``; a warning is logged where a quarter of the predictions
    is of other classes than the two models', counted class by class.

    Args:
        a: model A.
        b: model B, of the same architecture and aligned to A.
        data: the optimisation data; its labels are not used. (The authors learn on the test images.)
        level: what has a coefficient of its own, as for :func:`~npmerge.aggregate.soups.learned_soup`; the authors'
            are the ``"model"`` and the ``"tensor"``.
        epochs: passes over the data; the authors make 500 steps of 16 images of each task.
        lr: Adam's learning rate for ``alpha_pre``, that of NP Merge; the authors' is 0.001, for alpha itself.
        learning: how; see :class:`~npmerge.training.Learning`. Its loss is not used.

    Returns:
        The merged model; in ``details["alpha"]`` the coefficients of model A, for every parameter by name; in
        ``details["coefficients"]`` how many were learned; in ``details["classes"]`` how often each class is
        predicted on the data, up to the last one that is; and in ``details["moved"]`` the share of the predictions that
        is of other classes than the two models'.

    Raises:
        ValueError: an unknown level; the models differ in architecture or shape, every parameter is frozen, or the data
            is empty.
        TrainingError: the entropy is not finite.

    Source:
        Yang et al. 2024, its objective; it adds task vectors to a common base, which is left out here: each network
        gets what the other one gives up.
    """
    check_level(level)
    check_same_architecture(a, b)
    model = copy.deepcopy(a)
    optimizer = SharedAlpha(model, b, lr=lr, level=level, bounded=True)
    learning = replace(learning or Learning(), loss=_entropy)
    history = learning.fit(model, data, optimizer, epochs=epochs)
    merged = taken_over(a, model)
    answers = [predictions(one, data).flatten() for one in (reset_batchnorm(model, data), a, b)]
    count = int(torch.cat(answers).max()) + 1
    found, first, second = (answer.bincount(minlength=count) for answer in answers)
    moved = float((found - (first + second) / 2).abs().sum() / (2 * found.sum()))
    if moved > MOVED:
        logger.warning(
            "%.0f%% of the predictions are of other classes than the models': the merged model may have collapsed",
            100 * moved,
        )
    details = {
        "alpha": optimizer.alpha(),
        "coefficients": optimizer.coefficients,
        "classes": found.tolist(),
        "moved": moved,
    }
    return Aggregated(merged, history, details)


def _entropy(outputs: Any, _: object) -> Tensor:
    """The mean entropy of predictions, in nats."""
    logarithms = as_logits(outputs).log_softmax(-1)
    return -(logarithms.exp() * logarithms).sum(-1).mean()
