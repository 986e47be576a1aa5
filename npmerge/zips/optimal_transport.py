"""OT Fusion: every other model's channels are carried onto one model's by optimal transport, then averaged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from npmerge.aggregate.aggregated import Aggregated
from npmerge.align.transport import plans, stochastic
from npmerge.data.streams import Data, example_of
from npmerge.methods import method
from npmerge.symmetry import Group
from npmerge.zips.zipped import Zip, matched_groups


@method(
    kind="aggregate",
    label="OT fusion",
    row="OT fusion",
    family="zip",
    needs=("data",),
    reference="singh2020",
    aligns=True,
    place=61,
    use="For models of different widths, or where a soft match is wanted.",
)
def ot_fusion(
    models: Sequence[nn.Module],
    data: Data,
    *,
    groups: Sequence[Group] | None = None,
    cost: str = "activations",
    metric: str = "euclidean",
    examples: int = 200,
    regularisation: float = 0.0,
    onto: int = 0,
    inputs: str = "row",
) -> Aggregated:
    r"""Carry the channels of all models onto those of one, whose width is kept, and average.

    With the plan T of a group, from a model of n channels to the anchor's k, a carried channel is the mean of what
    comes to it, ``M = diag(k) T.T``, and what reads a channel of the model reads what it has become, ``U = diag(n) T``:
    :math:`W_C = \frac{1}{K} \sum_m M_m W_m U_m` over K models. Classes stay where they are. (The authors' code carries
    the last layer's outputs too, unless told otherwise.)

    Args:
        models: two or more, of one architecture; widths may differ.
        data: re-iterable of batches; the labels are not used.
        groups: the symmetry groups of the first model, if already known.
        cost: ``"activations"`` or ``"weights"``; see :func:`~npmerge.align.transport.plans`.
        metric: ``"euclidean"`` (the authors'), ``"sqeuclidean"`` or ``"cosine"``.
        examples: how many activations are of, at most; 200 is the authors'.
        regularisation: of the plan's entropy, relative to the largest cost; 0, the authors', is exact. A strong one
            makes all carried channels alike: little but the anchor is left, with smaller weights.
        onto: the number of the model onto which the others are carried, from 0; the first by default, as elsewhere
            here (the authors' is the second). Negative ones count from the end.
        inputs: ``"row"``: U has rows that sum to one, so that a copy with doubled channels gives itself; ``"paper"``:
            ``M.T``, as the authors have it, which is the same between equal widths and loses the scale between
            others.

    Returns:
        The merged model, of the anchor's width; in ``details["zip"]`` how it was made, a
        :class:`~npmerge.zips.zipped.Zip`.

    Raises:
        ValueError: there are fewer than two models or they differ in more than widths, an option is unknown or out of
            range, the data is empty, or POT is needed (other widths or regularisation) and missing.
        SymmetryError: a model's symmetry groups cannot be found.

    Source:
        Singh and Jaggi 2020, "Model Fusion via Optimal Transport"; one plan for each symmetry group, biases and
        norms in the weights' distance, and the rows of U are ours.
    """
    if len(models) < 2:
        raise ValueError(f"models has {len(models)}: give at least two")
    if not -len(models) <= onto < len(models):
        raise ValueError(f"onto is {onto}, but there are {len(models)} models: count from 0")
    if inputs not in ("row", "paper"):
        raise ValueError(f"unknown inputs {inputs!r}: choose one of row, paper")
    found = matched_groups(models, example_of(data), groups)
    anchor = onto % len(models)
    carried: list[list[Tensor]] = [
        [torch.eye(group.size, dtype=torch.float64) for group in found[anchor]]
        if number == anchor
        else plans(
            model, models[anchor], found[number], found[anchor], data,
            cost=cost, metric=metric, examples=examples, regularisation=regularisation,
        )
        for number, model in enumerate(models)
    ]  # fmt: skip
    merges = [[stochastic(plan.T) for plan in of] for of in zip(*carried, strict=True)]
    unmerges = [
        [merge.T for merge in of] if inputs == "paper" else [stochastic(plan) for plan in group]
        for of, group in zip(merges, zip(*carried, strict=True), strict=True)
    ]
    scaled = [[merge / len(models) for merge in of] for of in merges]
    zipped = Zip(found, tuple(map(tuple, scaled)), tuple(map(tuple, unmerges)))
    return Aggregated(zipped.apply(models), details={"zip": zipped})
