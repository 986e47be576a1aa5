"""All to one: every model is aligned to one of them, and the mean is taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from npmerge.aggregate.summing import Sum, checked_weights
from npmerge.align import Alignment
from npmerge.many.streaming import Load, Models, check_models
from npmerge.methods import method


@method(
    kind="many", label="All to one", row="{row}, all to one", family="many",
    reference="npmerge2024", place=2,
    use="Where the models are close to one of them, or an aggregation takes them all at once.",
)  # fmt: skip
def all_to_one(
    models: Models,
    align: Callable[[nn.Module, nn.Module], Alignment],
    *,
    aggregate: Callable[[Sequence[nn.Module]], nn.Module] | None = None,
    reference: int = 0,
    weights: Sequence[float] | None = None,
) -> nn.Module:
    r"""Align every model to one of them, the reference r, and take the mean, uniform by default.

    :math:`C = \frac{1}{m} \left(\Theta_r + \sum_{i \neq r} \mathrm{Align}(\Theta_r, \Theta_i)\right)`. Two models are
    in memory at a time, an aligned copy, and the sum. Batch norm is not reset.

    Args:
        models: m of them, at least one; each is loaded once.
        align: takes the reference and another model, and aligns this to that.
        aggregate: makes one model of the aligned ones, the reference first, in the place of the mean; all of them are
            in memory then.
        reference: number of the model that the others are aligned to.
        weights: one for each model, to weigh the mean by, such as the number of examples it has learned from.

    Returns:
        A new model on the reference's device. Means are taken in float64, of floating-point buffers (the statistics of
        batch norm) too; other buffers are the reference's.

    Raises:
        ValueError: there is no model, or no such reference, or two differ in architecture; the weights do not fit, or
            there is no mean to weigh.

    Source:
        Section IV-E, "all-to-one".
    """
    check_models(models)
    if not 0 <= reference < len(models):
        raise ValueError(
            f"reference is {reference}: give the number of one of the models, 0 to {len(models) - 1}"
        )
    if aggregate is not None and weights is not None:
        raise ValueError("weights are those of the mean: aggregate by 'mean', or leave them out")
    shares = checked_weights(weights, len(models))
    target = models[reference]()
    others = [number for number in range(len(models)) if number != reference]
    aligned = (_aligned(align, target, models[number]) for number in others)
    if aggregate is not None:
        return aggregate([target, *aligned])
    total = Sum(target, shares[reference])
    for number in others:
        total.add(next(aligned), shares[number])
    return total.mean()


def _aligned(
    align: Callable[[nn.Module, nn.Module], Alignment], target: nn.Module, load: Load
) -> nn.Module:
    model = load()
    return align(target, model).apply(model)
