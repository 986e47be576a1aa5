"""NP Merge that starts from what another method has made of the two models, and not from their mean."""

from __future__ import annotations

import copy

import torch
from torch import nn

from npmerge.aggregate.aggregated import Aggregated
from npmerge.aggregate.averaging import mean
from npmerge.aggregate.fisher_weighting import fisher
from npmerge.aggregate.interpolated_neurons import neuron_interpolation
from npmerge.aggregate.nonuniform import np_merge
from npmerge.aggregate.regression import regmean
from npmerge.correct.renormalisation import repair
from npmerge.data.streams import Data
from npmerge.methods import method
from npmerge.training import Learning


@torch.no_grad()
def around(point: nn.Module, a: nn.Module, b: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Move two models, as they are to each other, to where a point is their mean: ``point +- (A - B) / 2``.

    Args:
        point: gives the mean of the parameters; of the models' architecture.
        a: model A, whose buffers the first one keeps.
        b: model B.
    """
    first, second = copy.deepcopy(a), copy.deepcopy(b)
    theirs = dict(b.named_parameters())
    both = zip(first.named_parameters(), second.parameters(), point.parameters(), strict=True)
    for (name, one), other, middle in both:
        half = (one - theirs[name].to(one)) / 2
        one.copy_(middle + half)
        other.copy_(middle.to(other) - half.to(other))
    return first, second


@method(
    kind="aggregate", label="NP from REPAIR", family="np", needs=("data", "labels"),
    reference="npmerge2024", ours=True, place=42,
    use="Where the networks have no batch norm and their average has lost its variance.",
)  # fmt: skip
def np_from_repair(
    a: nn.Module,
    b: nn.Module,
    data: Data,
    *,
    epochs: int = 10,
    lr: float = 1e-2,
    learning: Learning | None = None,
) -> Aggregated:
    """Learn ``W = R + (alpha - 1/2) (A - B)`` from the repaired mean R on, one alpha in (0, 1) for every parameter.

    It takes, returns and raises what :func:`~npmerge.aggregate.nonuniform.np_merge` does; R is repaired with the same
    data.

    Source:
        Ours; :func:`~npmerge.correct.renormalisation.repair` and Eq. 2.
    """
    start = around(repair(mean(a, b), data, parents=(a, b)), a, b)
    return np_merge(*start, data, epochs=epochs, lr=lr, learning=learning)


@method(
    kind="aggregate", label="NP from RegMean", family="np", needs=("data", "labels"),
    reference="npmerge2024", ours=True, place=43,
    use="Where RegMean is good already and there are labels to go on with.",
)  # fmt: skip
def np_from_regmean(
    a: nn.Module,
    b: nn.Module,
    data: Data,
    *,
    epochs: int = 10,
    lr: float = 1e-2,
    learning: Learning | None = None,
) -> Aggregated:
    """Learn ``W = R + (alpha - 1/2) (A - B)`` from RegMean's R on, one alpha in (0, 1) for every parameter.

    It takes, returns and raises what :func:`~npmerge.aggregate.nonuniform.np_merge` does; R is solved with the same
    data.

    Source:
        Ours; :func:`~npmerge.aggregate.regression.regmean` and Eq. 2.
    """
    return np_merge(
        *around(regmean(a, b, data), a, b), data, epochs=epochs, lr=lr, learning=learning
    )


@method(
    kind="aggregate", label="NP from Fisher", family="np", needs=("data", "labels"),
    reference="npmerge2024", ours=True, place=44,
    use="To ask whether Fisher weights are a better start than one half; labelled data is at hand.",
)  # fmt: skip
def np_from_fisher(
    a: nn.Module,
    b: nn.Module,
    data: Data,
    *,
    epochs: int = 10,
    lr: float = 1e-2,
    seed: int = 0,
    learning: Learning | None = None,
) -> Aggregated:
    """Learn ``W = F + (alpha - 1/2) (A - B)`` from the Fisher-weighted mean F on, one alpha for every parameter.

    It takes, returns and raises what :func:`~npmerge.aggregate.nonuniform.np_merge` does; the Fisher information is
    taken over the same data, with labels that ``seed`` draws.

    Source:
        Ours; :func:`~npmerge.aggregate.fisher_weighting.fisher` and Eq. 2.
    """
    start = around(fisher(a, b, data, seed=seed).model, a, b)
    return np_merge(*start, data, epochs=epochs, lr=lr, learning=learning)


@method(
    kind="aggregate", label="NP from Neuron Interpolation", family="np", needs=("data", "labels"),
    reference="npmerge2024", ours=True, place=45,
    use="Where Neuron Interpolation is good already, and there are labels to go on with.",
)  # fmt: skip
def np_from_interpolation(
    a: nn.Module,
    b: nn.Module,
    data: Data,
    *,
    epochs: int = 10,
    lr: float = 1e-2,
    learning: Learning | None = None,
) -> Aggregated:
    """Learn ``W = I + (alpha - 1/2) (A - B)`` from Neuron Interpolation's I on, one alpha for every parameter.

    It takes, returns and raises what :func:`~npmerge.aggregate.nonuniform.np_merge` does; I is solved with the same
    data.

    Source:
        Ours; :func:`~npmerge.aggregate.interpolated_neurons.neuron_interpolation` and Eq. 2.
    """
    start = around(neuron_interpolation([a, b], data), a, b)
    return np_merge(*start, data, epochs=epochs, lr=lr, learning=learning)
