"""C2M3: all models are mapped into one order of the channels, jointly, by weights alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from npmerge.aggregate.summing import Sum, emptied
from npmerge.align import Alignment
from npmerge.align.joint_matching import joint_ascent, parameters_of, rounded, uniform_maps
from npmerge.many.streaming import Load, Models, check_models
from npmerge.methods import method
from npmerge.symmetry import Group, check_same_architecture, symmetry_on


@method(
    kind="many",
    label="C2M3",
    row="C2M3",
    family="many",
    reference="crisostomi2024",
    place=4,
    use="For three models or more without data and without a reference among them.",
)
def c2m3(
    models: Models,
    *,
    groups: Sequence[Group] | None = None,
    example: Any | None = None,
    max_steps: int = 200,
) -> nn.Module:
    """Permute the channels of all models jointly, cycle-consistently and in no order of the models; take the mean.

    Args:
        models: at least one; see :func:`match_cycles`, after which each is loaded once more.
        groups: the symmetry groups, if already known.
        example: inputs that the models accept, needed only without ``groups``: a tensor, a tuple of several, or a
            dictionary of keywords.
        max_steps: the most steps; 200 are the authors'.

    Returns:
        A new model on the first one's device, the uniform mean as in :func:`~npmerge.many.reference.all_to_one`. Batch
        norm is not reset; the authors rescale the mean's activations, as
        :func:`~npmerge.correct.renormalisation.repair` does for two models.

    Raises:
        ValueError: as :func:`match_cycles`.
        SymmetryError: the models' symmetry groups cannot be found.

    Source:
        Crisostomi et al. 2024, "C2M3".
    """
    alignments = match_cycles(models, groups=groups, example=example, max_steps=max_steps)
    total = Sum(alignments[0].apply(models[0]()))
    for alignment, load in zip(alignments[1:], models[1:], strict=True):
        total.add(alignment.apply(load()))
    return total.mean()


def match_cycles(
    models: Models,
    *,
    groups: Sequence[Group] | None = None,
    example: Any | None = None,
    max_steps: int = 200,
) -> tuple[Alignment, ...]:
    r"""Map many models into one order of the channels, the universe, by their weights alone.

    The permutations :math:`P_m` raise :math:`\sum_{m < n} \langle P_m \Theta_m, P_n \Theta_n \rangle`, the inner
    products of all pairs, by steps that move all groups of all models together, as in
    :func:`~npmerge.align.joint_matching.frank_wolfe`. From n to m the channels go by :math:`P_m^{-1} P_n`, so that any
    round over several models ends where it began.

    Another order of the universe changes no product. Its order is therefore that of the model whose parameters have the
    largest norm, which stays as it is, and the others begin with all entries of a group equal: neither the order of the
    models nor that of their channels matters. (The authors move all models, from the identity. On networks trained on
    digits that takes more steps and ends lower.)

    One model is in memory at a time, and in float64 the sum of all at a few points of a step.

    Args:
        models: at least one; each is loaded twice, and once in every step.
        groups: the symmetry groups, if already known.
        example: inputs that the models accept, needed only without ``groups``: a tensor, a tuple of several, or a
            dictionary of keywords.
        max_steps: the most steps; 200 are the authors'.

    Returns:
        A permutation alignment of each model to the universe.

    Raises:
        ValueError: there is no model, neither groups nor an example, two models differ in architecture, ``max_steps``
            is not positive, or a parameter is not finite.
        SymmetryError: the models' symmetry groups cannot be found.

    Source:
        Crisostomi et al. 2024, "C2M3".
    """
    check_models(models)
    first = models[0]()
    if groups is None:
        if example is None:
            raise ValueError("neither groups nor an example: give a batch that the models accept")
        groups = symmetry_on(first, example)
    like = emptied(first)
    del first
    loads = [partial(_parameters, load, like) for load in models]
    norms = [sum(float(p.double().square().sum()) for p in load().values()) for load in loads]
    largest = norms.index(max(norms))
    fixed = loads.pop(largest)()
    start = [uniform_maps(groups)] * len(loads)
    maps, _ = joint_ascent(fixed, loads, groups, start, max_steps=max_steps)
    found = [rounded(groups, own) for own in maps]
    still = Alignment.from_permutations(groups, [torch.arange(group.size) for group in groups])
    return (*found[:largest], still, *found[largest:])


def _parameters(load: Load, like: nn.Module) -> dict[str, Tensor]:
    model = load()
    check_same_architecture(like, model)
    return parameters_of(model)
