"""More than two models: a tournament of pairs, or all to one."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from npmerge.align import Alignment
from npmerge.align.weight_matching import match_tensors
from npmerge.checkpoints import load_state, save_state
from npmerge.data.batches import Data, stream
from npmerge.device import channels_last, measuring
from npmerge.evaluate import Score, score
from npmerge.symmetry import Group, check_same_architecture, symmetry
from npmerge.zoo import write_atomically

logger = logging.getLogger(__name__)

Load = Callable[[], nn.Module]
"""Loads a model, afresh at every call."""
Models = Sequence[Load]
"""Models that are loaded when they are needed and given up right after: memory does not grow with their number."""


@dataclass(frozen=True)
class Pairing:
    """Two entrants of a tournament that are about to be merged.

    Attributes:
        round: counted from 0.
        index: of the pair in its round, counted from 0.
        seed: of its own, for whatever the merge draws at random.
        a: the models, by their numbers, that model A is made of.
        b: those of model B; none is in both.
    """

    round: int
    index: int
    seed: int
    a: tuple[int, ...]
    b: tuple[int, ...]

    @property
    def label(self) -> str:
        """For progress bars and logs, counted from 1."""
        return f"round {self.round + 1}, pair {self.index + 1}"


def tournament(
    models: Models,
    merge: Callable[[nn.Module, nn.Module, Pairing], nn.Module],
    *,
    seed: int,
    folder: Path | str | None = None,
) -> nn.Module:
    """Merge random pairs of models, then random pairs of what came out, until one model is left.

    With an odd number of entrants one has a bye. Two models are in memory at a time, and what ``merge`` needs: what it
    returns waits in a file for its next pairing.

    Args:
        models: at least one; each is loaded once.
        merge: aligns model B to model A and merges the two, of which it may keep nothing; alignment begins anew at
            every pairing.
        seed: of the pairings.
        folder: where the merged models are written, ``round0-pair0.safetensors`` and so on, and stay; made if it is not
            there. By default a temporary one.

    Returns:
        The last model, with the devices, dtypes, memory formats and modes that ``merge`` gave it; a single model as
        it was loaded.

    Raises:
        ValueError: there is no model, or two differ in architecture.

    Source:
        Sections III-C and IV-E.
    """
    _check(models)
    generator = torch.Generator().manual_seed(seed)
    entrants = [((number,), load) for number, load in enumerate(models)]
    round_ = 0
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(folder) as where:
        while len(entrants) > 1:
            order = torch.randperm(len(entrants), generator=generator).tolist()
            drawn = [entrants[position] for position in order]
            entrants = drawn[len(drawn) // 2 * 2 :]  # an odd one has a bye
            for index, (a, b) in enumerate(zip(drawn[0::2], drawn[1::2], strict=False)):
                pairing = Pairing(round_, index, _seed(generator), a[0], b[0])
                path = Path(where) / f"round{round_}-pair{index}.safetensors"
                logger.debug("%s: models %s and %s", pairing.label, pairing.a, pairing.b)
                # Not in a variable: it would stay in memory while the next pair is merged.
                winner = put_away(
                    _merged(merge, a[1], b[1], pairing), path, pairing=asdict(pairing)
                )
                entrants.append((a[0] + b[0], winner))
            round_ += 1
        return entrants[0][1]()


def all_to_one(
    models: Models,
    align: Callable[[nn.Module, nn.Module], Alignment],
    *,
    reference: int = 0,
) -> nn.Module:
    r"""Align every model to one of them, the reference r, and take the uniform mean.

    :math:`C = \frac{1}{m} \left(\Theta_r + \sum_{i \neq r} \mathrm{Align}(\Theta_r, \Theta_i)\right)`. Two models are
    in memory at a time, an aligned copy, and the sum. Batch norm is not reset.

    Args:
        models: m of them, at least one; each is loaded once.
        align: takes the reference and another model, and aligns this to that.
        reference: number of the model that the others are aligned to.

    Returns:
        A new model on the reference's device. Means are taken in float64, of floating-point buffers (the statistics of
        batch norm) too; other buffers are the reference's.

    Raises:
        ValueError: there is no model, or no such reference, or two differ in architecture.

    Source:
        Section IV-E, "all-to-one".
    """
    _check(models)
    if not 0 <= reference < len(models):
        raise ValueError(
            f"reference is {reference}: give the number of one of the models, 0 to {len(models) - 1}"
        )
    target = models[reference]()
    total = _Sum(target)
    for number, load in enumerate(models):
        if number != reference:
            total.add(_aligned(align, target, load))
    return total.mean()


def merge_many(
    models: Models,
    *,
    seed: int,
    groups: Sequence[Group] | None = None,
    example: Tensor | None = None,
    max_sweeps: int = 100,
) -> nn.Module:
    """Git Re-Basin's MergeMany: match every model to the mean of the others until nothing changes; take the mean.

    Args:
        models: at least one; see :func:`match_many`, after which each is loaded once more.
        seed: of the order of the models and, within one, of the groups.
        groups: the symmetry groups, if already known.
        example: a batch the models accept, ``(N, C, ...)``; only its shape is used, and only without ``groups``.
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
    total = _Sum(alignments[0].apply(models[0]()))
    for alignment, load in zip(alignments[1:], models[1:], strict=True):
        total.add(alignment.apply(load()))
    return total.mean()


def match_many(
    models: Models,
    *,
    seed: int,
    groups: Sequence[Group] | None = None,
    example: Tensor | None = None,
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
        example: a batch the models accept, ``(N, C, ...)``; only its shape is used, and only without ``groups``.
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
    _check(models)
    first = models[0]()
    if groups is None:
        if example is None:
            raise ValueError("neither groups nor an example: give a batch that the models accept")
        groups = symmetry(first, example)
    still = Alignment.from_permutations(groups, [torch.arange(g.size) for g in groups])
    found = [still] * len(models)
    like = _emptied(first)
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
            maps = match_tensors(others, mine, groups, seed=_seed(generator))
            _add(total, mine)
            if not all(map(torch.equal, maps, still.maps)):
                found[number] = Alignment.from_permutations(groups, maps).compose(found[number])
                changed = True
        sweep += 1
    if changed:
        logger.warning("matching many models still changes permutations after %d sweeps", sweep)
    return tuple(found)


def put_away(model: nn.Module, path: Path, **metadata: Any) -> Load:
    """Write a model to a file until it is needed.

    Args:
        model: the model.
        path: of the safetensors file.
        metadata: JSON-serialisable, kept in the file.

    Returns:
        A function that reads it back, at every call, with its devices, dtypes, memory formats and modes.
    """
    state = model.state_dict()
    write_atomically(path, partial(save_state, state=state, metadata=metadata))
    devices = {name: value.device for name, value in state.items()}
    return partial(_taken_out, _emptied(model), devices, path)


@torch.no_grad()
def score_ensemble(models: Models, data: Data, *, topk: Sequence[int] = (1,)) -> Score:
    """Accuracy and loss of an ensemble: :func:`npmerge.evaluate.score` of an ``Ensemble``, one model at a time.

    The sums of the logits wait on the CPU: 4 bytes for every image and class.

    Args:
        models: at least one; each is loaded once.
        data: a re-iterable of ``(images, labels)`` that gives the same images in the same order in every pass.
        topk: which k to report, each from 1 to the number of classes.

    Raises:
        ValueError: there is no model, the models differ in their classes, or the data is empty or comes in another
            order at another pass; or as :func:`npmerge.evaluate.score`.

    Source:
        Section IV-A, "Ensemble".
    """
    _check(models)
    sums = _logits(models[0](), data)
    for load in models[1:]:
        sums = _added(sums, _logits(load(), data))
    means = [(logits / len(models), labels) for logits, labels in sums]
    return score(nn.Identity(), means, topk=topk)


class _Sum:
    """Models of one architecture added up in float64, on the devices of the first one."""

    def __init__(self, first: nn.Module) -> None:
        state = first.state_dict()
        self._like = _emptied(first)
        self._count = 1
        self._kept = {name: v.clone() for name, v in state.items() if not v.is_floating_point()}
        self._sums = {
            name: v.to(torch.float64, copy=True)
            for name, v in state.items()
            if v.is_floating_point()
        }

    def add(self, model: nn.Module) -> None:
        check_same_architecture(self._like, model)
        state = model.state_dict()
        for name, total in self._sums.items():
            total.add_(state[name].to(total.device))
        self._count += 1

    def mean(self) -> nn.Module:
        """The mean as a new model, in the dtypes of the first one."""
        values = dict(self._kept)
        for name, empty in self._like.state_dict().items():
            if name in self._sums:
                values[name] = (self._sums[name] / self._count).to(empty.dtype)
        return _with_tensors(self._like, values)


def _check(models: Models) -> None:
    if not models:
        raise ValueError("no models: give at least one")
    for number, load in enumerate(models):
        if isinstance(load, nn.Module):
            raise ValueError(
                f"models[{number}] is a {type(load).__name__}: give functions that load the models"
            )


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**31, (), generator=generator))


def _merged(
    merge: Callable[[nn.Module, nn.Module, Pairing], nn.Module],
    load_a: Load,
    load_b: Load,
    pairing: Pairing,
) -> nn.Module:
    a, b = load_a(), load_b()
    check_same_architecture(a, b)
    return merge(a, b, pairing)


def _aligned(
    align: Callable[[nn.Module, nn.Module], Alignment], target: nn.Module, load: Load
) -> nn.Module:
    model = load()
    check_same_architecture(target, model)
    return align(target, model).apply(model)


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


def _with_tensors(model: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model that has these tensors in the place of its own; tied ones stay tied."""
    memo: dict[int, Any] = {}  # deepcopy takes these instead of copying
    for name, old in model.state_dict(keep_vars=True).items():
        new = values[name]
        memo[id(old)] = (
            nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        )
    return copy.deepcopy(model, memo)


def _emptied(model: nn.Module) -> nn.Module:
    """A copy of a model without its data: on the meta device, where memory formats are kept."""
    return _with_tensors(model, {name: v.to("meta") for name, v in model.state_dict().items()})


def _taken_out(empty: nn.Module, devices: Mapping[str, torch.device], path: Path) -> nn.Module:
    state = load_state(path)
    values = {
        name: torch.empty_like(value, device=devices[name]).copy_(state[name])
        for name, value in empty.state_dict().items()
    }
    return _with_tensors(empty, values)


def _logits(model: nn.Module, data: Data) -> list[tuple[Tensor, Tensor]]:
    """A model's logits in evaluation mode, in float32, and the labels, batch by batch on the CPU."""
    with measuring(model) as device:
        return [
            (model(channels_last(images)).float().cpu(), labels.cpu())
            for images, labels in stream(data, device)
        ]


def _added(
    first: Sequence[tuple[Tensor, Tensor]], second: Sequence[tuple[Tensor, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    if len(first) != len(second) or not all(
        torch.equal(x, y) for (_, x), (_, y) in zip(first, second, strict=True)
    ):
        raise ValueError(
            "the data came in another order at the second pass: give data that is not shuffled"
        )
    classes, others = first[0][0].shape[1], second[0][0].shape[1]
    if classes != others:
        raise ValueError(
            f"models of {classes} and {others} classes: an ensemble's models have the same"
        )
    return [(x + y, labels) for (x, labels), (y, _) in zip(first, second, strict=True)]
