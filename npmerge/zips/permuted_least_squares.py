"""PLeaS: the pairs that are most alike are merged, the others kept apart, and each layer is solved by least squares."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import repeat

import torch
from torch import Tensor, nn

from npmerge.aggregate.aggregated import Aggregated
from npmerge.aggregate.nonuniform import np_merge
from npmerge.aggregate.regression import (
    LeastSquares,
    first_batches,
    linear_layers,
    run_to,
    running_once,
)
from npmerge.aggregate.started import around
from npmerge.align.moments import covariances
from npmerge.data.streams import Data, example_of, stream
from npmerge.device import measuring
from npmerge.methods import method
from npmerge.symmetry import Group, check_same_architecture, symmetry_on
from npmerge.symmetry.multiplying import by_tensor, multiplied
from npmerge.training import Learning
from npmerge.zips.greedy_zipping import is_free, joined
from npmerge.zips.zipped import Zip


@method(
    kind="aggregate",
    label="PLeaS",
    family="zip",
    needs=("data",),
    reference="nasery2025",
    place=62,
    use="Where the merged model may be wider than each, or for unlabelled least squares after any alignment.",
)
@torch.no_grad()
def pleas(
    models: Sequence[nn.Module],
    data: Data,
    *,
    groups: Sequence[Group] | None = None,
    ratio: float = 0.0,
    ridge: float = 1e-3,
    examples: int = 4096,
) -> Aggregated:
    r"""Merge the pairs of channels that correlate best, keep the others apart, and solve each layer's least squares.

    Of a group's n pairs, ``ratio * n``, those that correlate least, stay two channels: it becomes ``1 + ratio`` times
    as wide. The weights of a layer are :math:`\arg\min_W |W z - t|^2`, with z the models' own inputs of the layer and t
    their outputs, merged alike: means of pairs, and single channels. They start from what a
    :class:`~npmerge.zips.zipped.Zip` gives, the average at ratio 0; at ratio 1 it is the ensemble, whose mean logits
    stay. (A norm over channels, as LayerNorm, sees those of all models at once: with one it is not quite the ensemble.)
    Linear layers, and convolutions whose channels form one group; all else is as the zip gives it.

    A group that allows only permutations, that no activation shows, or whose activation shows others too, keeps its
    width.

    Args:
        models: two or more of one architecture and width, aligned to the first, by any method. None is changed.
        data: re-iterable of batches; the labels are not used. All models are given all of it.
        groups: the symmetry groups, if already known.
        ratio: of each group's pairs, those that are kept apart, from 0 to 1; with k models the other k - 1 add as many
            each.
        ridge: keeps the weights near the zip's, as a share of the mean of the inputs' squares; the authors take 400
            steps of Adam from there instead.
        examples: how many are learned from: the first batches of a pass that have so many, or all. They are held in
            memory, and each layer takes a pass of its own.

    Returns:
        The merged model, whose batch norm is to be reset; in ``details["zip"]`` how its channels were made.

    Raises:
        ValueError: fewer than two models, or they differ in architecture or shape; ``ratio`` is not from 0 to 1,
            ``ridge`` is negative, ``examples`` is not positive, or the data is empty.
        SymmetryError: the model's symmetry groups cannot be found.

    Source:
        Nasery et al. 2025, "PLeaS: Merging Models with Permutations and Least Squares". Ours: one ratio for all groups,
        where the authors choose each by a quadratic programme under a budget; the closed form; and that no weight is
        held at zero, as they hold those between channels of two models.
    """
    if len(models) < 2:
        raise ValueError(f"models has {len(models)}: give at least two")
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio is {ratio}: it must be from 0 to 1")
    for model in models[1:]:
        check_same_architecture(models[0], model)
    groups = tuple(symmetry_on(models[0], example_of(data)) if groups is None else groups)
    zipped = _partly_joined(models, data, groups, ratio)
    merged = zipped.apply(models)
    few = list(first_batches(data, "cpu", examples))
    with ExitStack() as stack:
        devices = [stack.enter_context(measuring(model)) for model in models]
        for name in running_once(merged, linear_layers(merged), few):
            layer = merged.get_submodule(name)
            squares = LeastSquares(layer, ridge)
            for batches in zip(*(stream(few, device) for device in devices), strict=True):
                found = [run_to(*run) for run in zip(models, repeat(name), batches)]
                channels = found[0][0].ndim - 1 if isinstance(layer, nn.Linear) else 1
                inputs, answers = (
                    _merged(zipped, tensors, name, of=axis, channels=channels)
                    for axis, tensors in ((1, [x for x, _ in found]), (0, [y for _, y in found]))
                )
                squares.add(inputs, answers)
            squares.solve()
    return Aggregated(merged, details={"zip": zipped})


@method(
    kind="aggregate", label="NP from PLeaS", family="np", needs=("data", "labels"),
    reference="npmerge2024", ours=True, place=44,
    use="Where PLeaS is good already, at the width of one network, and there are labels to go on with.",
)  # fmt: skip
def np_from_pleas(
    a: nn.Module,
    b: nn.Module,
    data: Data,
    *,
    groups: Sequence[Group] | None = None,
    epochs: int = 10,
    lr: float = 1e-2,
    learning: Learning | None = None,
) -> Aggregated:
    """Learn ``W = P + (alpha - 1/2) (A - B)`` from PLeaS' P on, one alpha in (0, 1) for every parameter.

    It takes, returns and raises what :func:`~npmerge.aggregate.nonuniform.np_merge` does; P is solved with the same
    data, and no channel is kept apart. ``groups`` are the symmetry groups, if already known.

    Source:
        Ours; :func:`pleas` and Eq. 2.
    """
    start = around(pleas([a, b], data, groups=groups, ratio=0.0).model, a, b)
    return np_merge(*start, data, epochs=epochs, lr=lr, learning=learning)


def _partly_joined(
    models: Sequence[nn.Module], data: Data, groups: tuple[Group, ...], ratio: float
) -> Zip:
    """The zip that joins all pairs but those that correlate least."""
    first, *others = models
    measured = [
        covariances(first, other, data, groups=groups, variances_only=True).correlations()
        for other in others
    ]
    merges, unmerges = [], []
    for group, *found in zip(groups, *measured, strict=True):
        alike = sum(correlation.diagonal() for correlation in found)
        apart = torch.as_tensor(alike).argsort()[: round(ratio * group.size) * is_free(group)].cpu()
        labels = torch.arange(group.size).repeat(len(models), 1)
        labels[1:, apart] = group.size + torch.arange(len(others) * len(apart)).view(
            len(others), -1
        )
        merge, unmerge = joined(labels.flatten(), group.size)
        merges.append(merge)
        unmerges.append(unmerge)
    return Zip((groups,) * len(models), tuple(merges), tuple(unmerges))


def _merged(zipped: Zip, found: Sequence[Tensor], name: str, *, of: int, channels: int) -> Tensor:
    """What the models' layers of a name are given or answer, as channels of the merged model.

    They lie as on an axis of the layer's weights: ``of`` 0, that of the outputs, or 1, that of the inputs.
    """
    parts, shares = [], []
    for number, (tensor, groups) in enumerate(zip(found, zipped.groups, strict=True)):
        maps = [
            (replace(slot, axis=channels), zipped.merges[group][number].to(tensor))
            for group, slot in by_tensor(groups).get(f"{name}.weight", ())
            if slot.axis == of
        ]
        one = tensor.new_ones([n if k == channels else 1 for k, n in enumerate(tensor.shape)])
        parts.append(multiplied(tensor, maps)[0].to(found[0].device))
        shares.append(multiplied(one, maps)[0].to(found[0].device))
    return torch.stack(parts).sum(0) / torch.stack(shares).sum(0)
