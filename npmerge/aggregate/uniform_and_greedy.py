"""Soups: the mean of many models, or of those that improve it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from npmerge.aggregate.aggregated import Aggregated
from npmerge.aggregate.summing import Sum, checked_weights
from npmerge.correct.batchnorm import reset_batchnorm
from npmerge.data.streams import Data
from npmerge.evaluate.scores import score
from npmerge.methods import method


@method(
    kind="aggregate",
    label="Uniform soup",
    family="soup",
    reference="wortsman2022",
    place=46,
    use="For any number of models that are connected already.",
)
def uniform_soup(
    models: Sequence[nn.Module], *, weights: Sequence[float] | None = None
) -> nn.Module:
    """Average any number of models: ``sum_i w_i W_i / sum_i w_i``.

    Args:
        models: of one architecture and aligned, the first to be the reference.
        weights: one for each model, such as the number of examples it has learned from, by which federated averaging
            weighs; equal by default.

    Returns:
        A new model on the first one's devices. The mean is taken in float64, of floating-point buffers too; other
        buffers are the first one's.

    Raises:
        ValueError: there is no model, the weights do not fit, or the models differ in architecture or shape.

    Source:
        Wortsman et al. 2022, the uniform soup; McMahan et al. 2017 for the weights.
    """
    if not models:
        raise ValueError("no models: give at least one")
    shares = checked_weights(weights, len(models))
    total = Sum(models[0], shares[0])
    for model, share in zip(models[1:], shares[1:], strict=True):
        total.add(model, share)
    return total.mean()


@method(
    kind="aggregate",
    label="Greedy soup",
    family="soup",
    needs=("data", "labels"),
    reference="wortsman2022",
    place=46,
    use="For many models of which some may hurt; needs held-out data to choose by.",
)
def greedy_soup(models: Sequence[nn.Module], data: Data) -> Aggregated:
    """Average the models that help: from the best on, each one joins the mean that makes it more accurate.

    Batch norm is reset on the data, in a copy, before a model or a mean is scored. A mean joins two models or more, so
    that the result is as accurate on the data as the best model, or more.

    Args:
        models: of one architecture and aligned, the first to be the reference.
        data: labelled, and neither what the models have learned from nor test data: a part of the training data that
            was held out.

    Returns:
        The mean of the chosen models; their numbers, in the order in which they joined, in ``details["chosen"]``; the
        accuracy of each model alone, in percent, in ``details["alone"]``, and the mean's as it grew in
        ``details["accuracy"]``.

    Raises:
        ValueError: there is no model, the models differ in architecture or shape, the data is empty, or a label is out
            of range.

    Source:
        Wortsman et al. 2022, the greedy soup; a tie does not join, as in its code.
    """

    def accuracy(soup: nn.Module) -> float:
        return score(reset_batchnorm(soup, data), data).top1

    alone = [accuracy(uniform_soup([model])) for model in models]
    first, *others = sorted(range(len(models)), key=lambda number: -alone[number])
    chosen, grown = [first], [alone[first]]
    for number in others:
        found = accuracy(uniform_soup([models[i] for i in (*chosen, number)]))
        if found > grown[-1]:
            chosen.append(number)
            grown.append(found)
    soup = uniform_soup([models[number] for number in chosen])
    return Aggregated(soup, details={"chosen": chosen, "alone": alone, "accuracy": grown})
