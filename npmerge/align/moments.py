"""Second moments of two models' activations, from one pass over the data."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from npmerge.align.alignment import unpack_groups
from npmerge.data.streams import Data, inputs_of, stream
from npmerge.device import float32
from npmerge.symmetry import Group, activations, check_same_architecture, find_symmetry, tap


@dataclass(frozen=True, eq=False)
class Covariances:
    """Centred covariances of two models' activations: over all samples and positions, divided by their number.

    Each channel's own mean over the data is subtracted, separately for A and B.

    Attributes:
        groups: The symmetry groups.
        xx: Per group, A with A, ``float64 (size, size)``; only the variances, ``(size,)``, if so asked for.
        yy: Per group, B with B, alike.
        xy: Per group, A with B, ``float64 (size, size)``.
        counts: Per group, the number of samples times positions.
    """

    groups: tuple[Group, ...]
    xx: tuple[Tensor, ...]
    yy: tuple[Tensor, ...]
    xy: tuple[Tensor, ...]
    counts: tuple[int, ...]

    def correlations(self) -> tuple[Tensor, ...]:
        """Pearson correlations of A's channels (rows) with B's (columns); 0 for a channel that is constant."""
        return tuple(map(_correlation, self.xx, self.yy, self.xy))

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Take the covariances apart, for a file.

        Returns:
            Their tensors on the CPU, and the rest, JSON-serialisable.
        """
        parts = {"xx": self.xx, "yy": self.yy, "xy": self.xy}
        tensors = {
            f"{name}.{i}": t.cpu() for name, part in parts.items() for i, t in enumerate(part)
        }
        groups = [asdict(group) for group in self.groups]
        return tensors, {"groups": groups, "counts": list(self.counts)}

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor], words: Mapping[str, Any]) -> Covariances:
        """Put covariances together again.

        Args:
            tensors: as :meth:`pack` returns them.
            words: the rest.
        """
        groups = unpack_groups(words)
        xx, yy, xy = (
            tuple(tensors[f"{name}.{i}"] for i in range(len(groups))) for name in ("xx", "yy", "xy")
        )
        return cls(groups, xx, yy, xy, tuple(words["counts"]))


def covariances(
    a: nn.Module,
    b: nn.Module,
    data: Data,
    *,
    groups: Sequence[Group] | None = None,
    variances_only: bool = False,
) -> Covariances:
    """Measure the activations of two models that show their groups, in one pass over the data.

    Both models run in evaluation mode, in the precision of their parameters, without autocast; the models themselves
    are not touched. Products are summed over a batch in float32, over batches in float64, after the first batch's
    means are subtracted. The memory needed does not depend on the size of the data.

    Args:
        a: Model A; its device is used.
        b: Model B, of the same architecture.
        data: Re-iterable of batches (tuples of inputs and labels, or dictionaries).
        groups: The symmetry groups, if already known.
        variances_only: Leave out the covariances within each model, which only CCA needs.

    Returns:
        The covariances; all zero for a group that no activation shows.

    Raises:
        ValueError: If the models differ in architecture, shape or type, or the data is empty.
        SymmetryError: If the model's symmetry groups cannot be found.
    """
    check_same_architecture(a, b, types=True)
    device = next((p.device for p in a.parameters()), torch.device("cpu"))
    accumulators: list[_Accumulator] = []
    with torch.no_grad(), float32(device):
        for batch in stream(data, device):
            # Channels-last, as `stream` gives it, makes (N, C, H, W) activations matrices (N*H*W, C) without a copy.
            inputs = inputs_of(batch, a)
            if groups is None:
                groups = find_symmetry(a, *inputs[0], **inputs[1])
            if not accumulators:
                accumulators = [_Accumulator(group, variances_only) for group in groups]
            for positional, named in _parts(inputs, device):
                first = activations(a, groups, *positional, **named)

                tap(b, groups, partial(_add, accumulators, first), *positional, **named)
    return Covariances(
        tuple(groups or ()),
        tuple(s.xx for s in accumulators),
        tuple(s.yy for s in accumulators),
        tuple(s.xy for s in accumulators),
        tuple(s.count for s in accumulators),
    )


def _add(
    accumulators: list[_Accumulator], held: list[Tensor | None], number: int, second: Tensor
) -> None:
    first, held[number] = held[number], None  # freed once it is used
    if first is not None:
        accumulators[number].add(first, second)


def _parts(inputs: Any, device: torch.device) -> Iterator[Any]:
    """On a CPU few images at a time, 32 of CIFAR's size: all activations at once would not stay in the cache."""
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    count = len(tensors[0])
    positions = max(t[0, 0].numel() if t.ndim > 2 else t[0].numel() for t in tensors)
    step = max(32, 2**15 // max(1, positions)) if device.type == "cpu" else count
    for start in range(0, count, step):
        rows = slice(start, start + step)
        yield tree_map_only(Tensor, operator.itemgetter(rows), inputs)


class _Accumulator:
    """Sums of one group's centred products."""

    def __init__(self, group: Group, variances_only: bool) -> None:
        self.count = 0
        self._group = group
        self._within = _squares if variances_only else _gram
        self._shifts: tuple[Tensor, Tensor] | None = None
        square = torch.zeros(group.size, group.size, dtype=torch.float64)
        mean = square.new_zeros(group.size)
        within = mean if variances_only else square
        self._sums = [mean, mean.clone(), within.clone(), within.clone(), square]

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add activations of a batch, which stay as they are."""
        tapped, size = self._group.tap, self._group.size
        if tapped is None:
            return
        u, v = (_precise(tapped.rows(activation, size)) for activation in (x, y))
        if self._shifts is None:
            self._shifts = u.mean(0), v.mean(0)
            self._sums = [s.to(u.device) for s in self._sums]
        self.count += len(u)
        # Few rows at a time, which stay in a core's cache between the operations.
        step = 2**14 if u.device.type == "cpu" else len(u)
        for p, q in zip(torch.split(u, step), torch.split(v, step), strict=True):
            p, q = p - self._shifts[0], q - self._shifts[1]
            ones = p.new_ones(len(p))
            products = (ones @ p, ones @ q, self._within(p), self._within(q), p.T @ q)
            torch._foreach_add_(self._sums, [s.double() for s in products])

    def _covariance(self, index: int, left: int, right: int) -> Tensor:
        count = max(self.count, 1)
        mean_left, mean_right = self._sums[left] / count, self._sums[right] / count
        products = self._sums[index] / count
        if products.ndim == 1:
            return (products - mean_left * mean_right).clamp_min(0)
        return products - torch.outer(mean_left, mean_right)

    @property
    def xx(self) -> Tensor:
        return self._covariance(2, 0, 0)

    @property
    def yy(self) -> Tensor:
        return self._covariance(3, 1, 1)

    @property
    def xy(self) -> Tensor:
        return self._covariance(4, 0, 1)


def _precise(rows: Tensor) -> Tensor:
    return rows if rows.dtype == torch.float64 else rows.float()


def _squares(u: Tensor) -> Tensor:
    return u.new_ones(len(u)) @ u.square()


def _gram(u: Tensor) -> Tensor:
    return u.T @ u


def _correlation(xx: Tensor, yy: Tensor, xy: Tensor) -> Tensor:
    scale_x, scale_y = (
        torch.where(v > 0, v.rsqrt(), 0)
        for v in (m if m.ndim == 1 else m.diagonal() for m in (xx, yy))
    )
    return (scale_x[:, None] * xy * scale_y).clamp(-1, 1)
