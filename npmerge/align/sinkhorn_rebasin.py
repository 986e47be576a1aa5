"""Sinkhorn re-basin: permutations found by gradient, through matrices whose rows and columns sum to one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from npmerge.aggregate.averaging import mean
from npmerge.align.alignment import Alignment, check_slot
from npmerge.align.correlation import assignment, permute
from npmerge.align.judging import corrected_loss, fixed_batches, seeded
from npmerge.align.rebasin import weight_matching
from npmerge.data.batches import child_seed
from npmerge.data.streams import Data, example_of
from npmerge.device import device_of
from npmerge.methods import method
from npmerge.symmetry import Group, check_same_architecture, symmetry_on
from npmerge.training import Learning

DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "inner": lambda x, y: -(x * y).sum(),
    "l2": lambda x, y: (x - y).square().sum(),
    "l1": lambda x, y: (x - y).abs().sum(),
}
"""How far A's weights are from B's: minus their inner product, the sum of squares, or that of absolute differences."""


@method(
    kind="align", label="Sinkhorn", short="SH", family="alignment", reference="pena2023", place=6,
    use="Where an alignment is to be learned by gradient.",
)  # fmt: skip
def sinkhorn(
    a: nn.Module,
    b: nn.Module,
    example: Any,
    *,
    distance: str = "inner",
    start: str = "identity",
    steps: int = 50,
    lr: float = 1.0,
    noise: float = 0.1,
    temperature: float = 1.0,
    iterations: int = 20,
    groups: Sequence[Group] | None = None,
    seed: int = 0,
) -> Alignment:
    r"""Permute B's channels so that its weights are nearest to A's, all groups at once and by gradient.

    Each group has a matrix of scores X, and :math:`P = S(X / \tau)` maps its channels softly: S exponentiates and
    normalises columns and rows in turn. AdamW minimises the distance of A to P(B), and the linear assignment on X
    rounds P. What is returned is the nearest of the rounded P, the alignment at the start and the identity.

    Of permutations, those with the least squares have the largest inner product. Of soft maps they have not: maps that
    average channels come nearer, because they shrink the weights. So on networks trained apart the inner product finds
    nearer permutations; those of a permuted copy are found more reliably by the squares.

    Args:
        a: model A; its device is used.
        b: model B, of the same architecture.
        example: inputs that the models accept: a tensor, a tuple of several, or a dictionary of keywords.
        distance: ``"inner"``, minus the inner product (ours); the authors' ``"l2"``, the sum of squares; or ``"l1"``,
            that of absolute differences. Running statistics do not count.
        start: ``"identity"``, the authors', or ``"weight_matching"``.
        steps: of AdamW; the authors'.
        lr: its learning rate. The authors' is 10, which finds planted permutations less reliably.
        noise: standard deviation of what is added to the scores at the start, those of a permutation matrix; the
            authors'.
        temperature: tau, the authors'.
        iterations: of S, each of columns and rows; the authors'.
        groups: the symmetry groups, if already known.
        seed: of the noise, and of weight matching.

    Returns:
        A permutation per group.

    Raises:
        ValueError: the models differ in architecture or shape, a parameter is not finite, an unknown distance or start,
            or a temperature or a number of iterations that is not positive.
        SymmetryError: the model's symmetry groups cannot be found.

    Source:
        Peña et al. 2023, "Re-basin via implicit Sinkhorn differentiation"; its gradient is implicit, ours goes through
        the iterations.
    """
    _check("distance", distance, DISTANCES)
    _check("start", start, ("identity", "weight_matching"))
    check_same_architecture(a, b)
    groups = tuple(symmetry_on(a, example) if groups is None else groups)
    known = [Alignment.from_permutations(groups, [torch.arange(g.size) for g in groups])]
    if not groups:
        return known[0]
    if start == "weight_matching":
        known.append(weight_matching(a, b, example, groups=groups, seed=seed))
    fixed, moved = (_weights(model, a) for model in (a, b))
    soft = _SoftMaps(known[-1], fixed, noise, temperature, iterations, seed)
    optimizer = torch.optim.AdamW(soft.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(_distance(fixed, _mapped(moved, groups, soft()), distance))
        optimizer.step()
    return min(
        (*known, soft.rounded()),
        key=lambda one: float(_distance(fixed, one.mapped(b.state_dict()), distance)),
    )


@method(
    kind="align", label="Sinkhorn, loss", short="SHL", family="alignment",
    needs=("data", "labels"), reference="pena2023", place=7,
    use="As Sinkhorn, where the loss of the merged model should decide and labels are at hand.",
)  # fmt: skip
def sinkhorn_loss(
    a: nn.Module,
    b: nn.Module,
    data: Data,
    *,
    point: str = "midpoint",
    start: str = "identity",
    epochs: int = 20,
    lr: float = 1.0,
    noise: float = 0.1,
    temperature: float = 1.0,
    iterations: int = 20,
    examples: int = 1024,
    groups: Sequence[Group] | None = None,
    seed: int = 0,
    learning: Learning | None = None,
) -> Alignment:
    r"""Permute B's channels so that the loss between A and B is lowest, by gradient through soft permutations.

    As :func:`sinkhorn`, but what AdamW minimises is the loss at :math:`\lambda A + (1 - \lambda) P(B)`. The soft
    maps reach a lower loss than permutations do: the identity, the alignment at the start and the rounded P of each
    epoch are judged by the loss of the average on fixed batches, and the best is returned.

    Batch norm uses each batch's own statistics while learning, and is reset on the fixed batches to judge: the running
    statistics of neither model fit their average.

    Args:
        a: model A; its device is used.
        b: model B, of the same architecture.
        data: labelled training data, any re-iterable of batches.
        point: lambda: one half at the ``"midpoint"``; at a ``"random"`` one uniform on (0, 1), anew at each step.
        start: ``"identity"``, the authors', ``"weight_matching"`` or ``"permute"``.
        epochs: passes over the data; the authors' for small networks, 50 for large ones.
        lr: AdamW's learning rate. The authors' is 0.1; with as few steps as here it leaves ResNets where they start.
        noise: as in :func:`sinkhorn`.
        temperature: as in :func:`sinkhorn`.
        iterations: as in :func:`sinkhorn`.
        examples: how many the fixed batches hold, at least: the first of a pass.
        groups: the symmetry groups, if already known.
        seed: of the noise, the random points, dropout, and weight matching.
        learning: how; see :class:`~npmerge.training.Learning`.

    Returns:
        A permutation per group.

    Raises:
        ValueError: the models differ in architecture or shape, a parameter is not finite, an unknown point or start, a
            temperature or a number of iterations or examples that is not positive, data that is empty, or a label that
            is out of range.
        SymmetryError: the model's symmetry groups cannot be found.
        TrainingError: the loss is not finite.

    Source:
        Peña et al. 2023, as :func:`sinkhorn`.
    """
    _check("point", point, ("midpoint", "random"))
    _check("start", start, ("identity", "weight_matching", "permute"))
    check_same_architecture(a, b)
    example, fixed = example_of(data), fixed_batches(data, examples)
    groups = tuple(symmetry_on(a, example) if groups is None else groups)
    known = [Alignment.from_permutations(groups, [torch.arange(g.size) for g in groups])]
    if not groups:
        return known[0]
    if start == "weight_matching":
        known.append(weight_matching(a, b, example, groups=groups, seed=seed))
    elif start == "permute":
        known.append(permute(a, b, data, groups=groups))
    learning = learning or Learning()
    soft = _SoftMaps(known[-1], _weights(a, a), noise, temperature, iterations, seed)
    between = _Between(a, b, soft, seed if point == "random" else None)

    def judge(alignment: Alignment) -> None:
        average = mean(a, alignment.apply(b))
        between.keep_if_best(alignment, corrected_loss(average, fixed, learning.loss))

    def on_epoch(epoch: int, loss: float) -> None:
        judge(soft.rounded())
        if learning.on_epoch is not None:
            learning.on_epoch(epoch, loss)

    for alignment in known:
        judge(alignment)
    optimizer = torch.optim.AdamW(soft.parameters(), lr=lr)
    with seeded(seed, device_of(a)):
        replace(learning, on_epoch=on_epoch).fit(between, data, optimizer, epochs=epochs)
    return between.best()


class _SoftMaps(nn.Module):
    """A matrix of scores for each group; gives doubly stochastic ones."""

    def __init__(
        self,
        begun: Alignment,
        weights: Mapping[str, Tensor],
        noise: float,
        temperature: float,
        iterations: int,
        seed: int,
    ) -> None:
        super().__init__()
        if not temperature > 0 or iterations < 1:
            raise ValueError(
                f"temperature is {temperature} and iterations {iterations}: both must be positive"
            )
        self.groups, self._temperature, self._iterations = begun.groups, temperature, iterations
        generator, like = torch.Generator().manual_seed(seed), next(iter(weights.values()))
        self.scores = nn.ParameterList()
        for mapping in begun.maps:
            size = len(mapping)
            drawn = torch.randn(size, size, generator=generator)
            self.scores.append((torch.eye(size)[mapping] + noise * drawn).to(like))

    def forward(self) -> list[Tensor]:
        return [
            doubly_stochastic(scores / self._temperature, self._iterations)
            for scores in self.scores
        ]

    def rounded(self) -> Alignment:
        """The permutations of the largest scores."""
        pairs = zip(self.scores, self.groups, strict=True)
        found = [assignment(scores.detach().double(), group) for scores, group in pairs]
        return Alignment.from_permutations(self.groups, found)


class _Between(nn.Module):
    """The model between A and the softly mapped B: at a point drawn anew at each call, or without a seed half-way.

    The best alignment that was seen is part of its state, so that a training can be resumed, as is the number of calls.
    """

    calls: Tensor
    maps: Tensor
    lowest: Tensor

    def __init__(self, a: nn.Module, b: nn.Module, soft: _SoftMaps, seed: int | None) -> None:
        super().__init__()
        self.soft, self.model = soft, copy.deepcopy(a).requires_grad_(requires_grad=False)
        self._a, self._b = (_weights(model, a) for model in (a, b))
        self._seed = seed
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("maps", torch.cat([torch.arange(g.size) for g in soft.groups]))
        self.register_buffer("lowest", torch.tensor(float("inf"), dtype=torch.float64))

    def keep_if_best(self, alignment: Alignment, loss: float) -> None:
        """Keep an alignment if its loss is the lowest so far."""
        if loss < self.lowest:
            self.maps.copy_(torch.cat(alignment.maps))
            self.lowest.fill_(loss)

    def best(self) -> Alignment:
        """What was kept."""
        maps = self.maps.split([group.size for group in self.soft.groups])
        return Alignment.from_permutations(self.soft.groups, maps)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        share = 0.5
        if self._seed is not None:
            generator = torch.Generator().manual_seed(child_seed(self._seed, int(self.calls)))
            share = float(torch.rand((), generator=generator))
            self.calls += 1
        with torch.autocast(device_of(self).type, enabled=False):
            mapped = self._b | _mapped(self._b, self.soft.groups, self.soft())
            weights = {n: torch.lerp(mapped[n], own, share) for n, own in self._a.items()}
        return functional_call(self.model, weights, inputs, named)


def doubly_stochastic(scores: Tensor, iterations: int) -> Tensor:
    """Exponentiate a matrix and normalise its columns and its rows in turn, differentiably.

    Args:
        scores: ``(n, n)``; what is added to a row or a column does not count.
        iterations: how often both are normalised; the rows come last and sum to one exactly.

    Returns:
        A matrix of positive numbers.

    Source:
        Sinkhorn's iterations, on logarithms.
    """
    for _ in range(iterations):
        scores = scores.log_softmax(0).log_softmax(1)
    return scores.exp()


def _mapped(
    tensors: Mapping[str, Tensor], groups: Sequence[Group], maps: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Map the channels of tensors by matrices, differentiably; as :meth:`Alignment.mapped` where they permute."""
    changed: dict[str, Tensor] = {}
    for group, matrix in zip(groups, maps, strict=True):
        for slot in group.slots:
            if slot.name in tensors:
                check_slot(slot, tensors)
                tensor = changed.get(slot.name, tensors[slot.name])
                places = slot.indices(group.size).to(tensor.device)
                moved = tensor.movedim(slot.axis, 0)
                rows = matrix.to(tensor) @ moved[places].flatten(1)
                changed[slot.name] = moved.index_copy(
                    0, places.flatten(), rows.view(-1, *moved.shape[1:])
                ).movedim(0, slot.axis)
    return changed


def _distance(fixed: Mapping[str, Tensor], moved: Mapping[str, Tensor], kind: str) -> Tensor:
    """Of B's tensors to A's; buffers do not count."""
    pairs = [(fixed[name], tensor) for name, tensor in moved.items() if name in fixed]
    values = [DISTANCES[kind](x, y.to(x)) for x, y in pairs]
    return torch.stack([value.to(values[0].device) for value in values]).sum()


def _weights(model: nn.Module, like: nn.Module) -> dict[str, Tensor]:
    """A model's parameters on another's devices, in float32 at least."""
    places = {name: p.device for name, p in like.named_parameters()}
    weights = {}
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(
                f"{name!r} has values that are not finite: check both models' parameters"
            )
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        weights[name] = parameter.detach().to(places[name], dtype)
    return weights


def _check(word: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise ValueError(f"unknown {word} {value!r}: choose one of {', '.join(known)}")
