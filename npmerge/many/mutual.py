"""MergeMany: every model is matched to the mean of the others, by weights alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from npmerge.aggregate.summing import Sum, emptied
from npmerge.align import Alignment
from npmerge.align.rebasin import match_tensors
from npmerge.many.streaming import Models, check_models, drawn_seed
from npmerge.methods import method
from npmerge.symmetry import Group, check_same_architecture, symmetry_on

logger = logging.getLogger(__name__)


@method(
    kind="many", label="MergeMany", row="MergeMany", family="many", reference="ainsworth2023",
    ours=True, place=3, use="For many models without data.",
)  # fmt: skip
def merge_many(
    models: Models,
    *,
    seed: int,
    groups: Sequence[Group] | None = None,
    example: Any | None = None,
    max_sweeps: int = 100,
) -> nn.Module:
    """Git Re-Basin's MergeMany: match every model to the mean of the others until nothing changes; take the mean.

    Args:
        models: at least one; see :func:`match_many`, after which each is loaded once more.
        seed: of the order of the models and, within one, of the groups.
        groups: the symmetry groups, if already known.
        example: inputs that the models accept, needed only without ``groups``: a tensor, a tuple of several, or a
            dictionary of keywords.
        max_sweeps: the most sweeps over all models.

    Returns:
        A new model on the first one's device, the uniform mean as in :func:`all_to_one`. Batch norm is not reset.

    Raises:
        ValueError: as :func:`match_many`.
        SymmetryError: the models' symmetry groups cannot be found.

    Source:
        Ainsworth et al. 2023, "Git Re-Basin", algorithm 3.
    """
    alignments = match_many(
        models, seed=seed, groups=groups, example=example, max_sweeps=max_sweeps
    )
    total = Sum(alignments[0].apply(models[0]()))
    for alignment, load in zip(alignments[1:], models[1:], strict=True):
        total.add(alignment.apply(load()))
    return total.mean()


def match_many(
    models: Models,
    *,
    seed: int,
    groups: Sequence[Group] | None = None,
    example: Any | None = None,
    max_sweeps: int = 100,
) -> tuple[Alignment, ...]:
    r"""Permute the channels of many models so that they all match, by their weights alone.

    In random order each model is matched to the mean of the others as they are permuted by then,
    :math:`\Theta_i \leftarrow \pi(\Theta_i)` with :math:`\pi` by weight matching to
    :math:`\frac{1}{m - 1} \sum_{j \neq i} \Theta_j`. The sum of all pairs' inner products never falls. It ends when a
    sweep over the models changes no permutation.

    One model is in memory at a time, and in float64 its permuted parameters, the models' sum and mean.

    Args:
        models: m of them, at least one; each is loaded once, and once in every sweep.
        seed: of the order of the models and, within one, of the groups.
        groups: the symmetry groups, if already known.
        example: inputs that the models accept, needed only without ``groups``: a tensor, a tuple of several, or a
            dictionary of keywords.
        max_sweeps: the most sweeps over all models; a warning says that they were not enough.

    Returns:
        A permutation alignment for each model.

    Raises:
        ValueError: there is no model, neither groups nor an example, two models differ in architecture, or a parameter
            is not finite.
        SymmetryError: the models' symmetry groups cannot be found.

    Source:
        Ainsworth et al. 2023, "Git Re-Basin", algorithm 3.
    """
    check_models(models)
    first = models[0]()
    if groups is None:
        if example is None:
            raise ValueError("neither groups nor an example: give a batch that the models accept")
        groups = symmetry_on(first, example)
    still = Alignment.from_permutations(groups, [torch.arange(g.size) for g in groups])
    found = [still] * len(models)
    like = emptied(first)
    devices = {name: parameter.device for name, parameter in first.named_parameters()}
    total = _parameters(first, still, like, devices)
    del first
    for load in models[1:]:
        _add(total, _parameters(load(), still, like, devices))
    generator = torch.Generator().manual_seed(seed)
    changed = len(models) > 1
    sweep = 0
    while changed and sweep < max_sweeps:
        changed = False
        for number in torch.randperm(len(models), generator=generator).tolist():
            mine = _parameters(models[number](), found[number], like, devices)
            _add(total, mine, sign=-1)
            others = {name: value / (len(models) - 1) for name, value in total.items()}
            maps = match_tensors(others, mine, groups, seed=drawn_seed(generator))
            _add(total, mine)
            if not all(map(torch.equal, maps, still.maps)):
                found[number] = Alignment.from_permutations(groups, maps).compose(found[number])
                changed = True
        sweep += 1
    if changed:
        logger.warning("matching many models still changes permutations after %d sweeps", sweep)
    return tuple(found)


def _parameters(
    model: nn.Module, alignment: Alignment, like: nn.Module, devices: Mapping[str, torch.device]
) -> dict[str, Tensor]:
    """A model's parameters after an alignment, copied in float64."""
    check_same_architecture(like, model)
    state = model.state_dict()
    state |= alignment.mapped(state)
    return {
        name: state[name].to(where, torch.float64, copy=True) for name, where in devices.items()
    }


def _add(total: Mapping[str, Tensor], values: Mapping[str, Tensor], sign: int = 1) -> None:
    for name, value in values.items():
        total[name].add_(value, alpha=sign)
