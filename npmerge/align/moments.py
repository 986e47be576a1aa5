"""Second moments of two models' activations, from one pass over the data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from npmerge.align.alignment import unpack_groups
from npmerge.data.streams import Data, input_of, stream
from npmerge.device import float32
from npmerge.symmetry import Group, check_same_architecture, find_symmetry, trace


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
    """Measure the activations of two models at every group's node, in one pass over the data.

    Both models run in evaluation mode, in the precision of their parameters, without autocast; the models themselves
    are not touched. Products are summed over a batch in float32, over batches in float64, after the first batch's
    means are subtracted. The memory needed does not depend on the size of the data.

    Args:
        a: Model A; its device is used.
        b: Model B, of the same architecture.
        data: Re-iterable of batches (images (N, C, H, W), labels (N,)).
        groups: The symmetry groups, if already known.
        variances_only: Leave out the covariances within each model, which only CCA needs.

    Returns:
        The covariances.

    Raises:
        ValueError: If the models differ in architecture or shape, or the data is empty.
        SymmetryError: If the model's symmetry groups cannot be found.
    """
    check_same_architecture(a, b)
    reference = next((p for p in a.parameters() if p.is_floating_point()), torch.empty(0))
    accumulators: list[_Accumulator] = []
    models: list[fx.GraphModule] = []
    with torch.no_grad(), float32(reference.device):
        for given in stream(data, reference.device):
            # Channels-last, as `stream` gives it, makes (N, C, H, W) activations matrices (N*H*W, C) without a copy.
            images = input_of(given)
            batch = images.to(reference.dtype)
            if not models:
                groups = find_symmetry(a, images) if groups is None else groups
                models = [_tapped(model, groups).to(reference.device) for model in (a, b)]
                accumulators = [_Accumulator() for _ in groups]
            for part in torch.split(batch, _at_a_time(batch)):
                x, y = ([*model(part)] for model in models)
                while x:  # from the last group to the first, each freed once it is used
                    accumulators[len(x) - 1].add(x.pop(), y.pop(), variances_only)
    for model in models:
        _release(model.modules())
    return Covariances(
        tuple(groups or ()),
        tuple(s.xx for s in accumulators),
        tuple(s.yy for s in accumulators),
        tuple(s.xy for s in accumulators),
        tuple(s.count for s in accumulators),
    )


@torch.no_grad()
def activations(model: nn.Module, images: Tensor, groups: Sequence[Group]) -> tuple[Tensor, ...]:
    """What a model's neurons answer to some images, at every group's node.

    Args:
        model: in evaluation mode for this call; not changed.
        images: ``(N, C, H, W)``, on the model's device.
        groups: the symmetry groups.

    Returns:
        Per group a tensor ``(N, size, ...)``.
    """
    found: tuple[Tensor, ...] = _tapped(model, groups).to(images.device)(images)
    return found


def _at_a_time(batch: Tensor) -> int:
    """On a CPU few images at a time, 32 of CIFAR's size: all activations at once would not stay in the cache."""
    if batch.device.type != "cpu":
        return len(batch)
    return max(32, 2**15 // max(1, batch[0, 0].numel())) if len(batch) else 1


def _release(modules: Iterable[nn.Module]) -> None:
    """Give up the tensors of a traced copy: it refers to itself, and would keep them until the garbage collection."""
    for module in modules:
        module._parameters.clear()
        module._buffers.clear()


class _Accumulator:
    """Sums of one group's centred products."""

    def __init__(self) -> None:
        self.count = 0
        self._shifts: tuple[Tensor, Tensor] | None = None
        self._sums: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor, variances_only: bool) -> None:
        """Add a batch of activations (N, size, ...), which are overwritten."""
        u, v = _rows(x), _rows(y)
        self.count += len(u)
        if self._shifts is None:
            self._shifts = u.mean(0), v.mean(0)
        within = _squares if variances_only else _gram
        # And few rows at a time, which stay in a core's cache between the operations.
        step = 2**14 if u.device.type == "cpu" else len(u)
        for p, q in zip(torch.split(u, step), torch.split(v, step), strict=True):
            p -= self._shifts[0]
            q -= self._shifts[1]
            ones = p.new_ones(len(p))
            sums = [s.double() for s in (ones @ p, ones @ q, within(p), within(q), p.T @ q)]
            if self._sums:
                torch._foreach_add_(self._sums, sums)
            else:
                self._sums = sums

    def _covariance(self, index: int, left: int, right: int) -> Tensor:
        mean_left, mean_right = self._sums[left] / self.count, self._sums[right] / self.count
        products = self._sums[index] / self.count
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


def _rows(x: Tensor) -> Tensor:
    """(N, C, ...) as (N * positions, C), in at least float32; a view of a channels-last tensor."""
    rows = x.movedim(1, -1).reshape(-1, x.shape[1])
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


def _tapped(model: nn.Module, groups: Sequence[Group]) -> fx.GraphModule:
    """A copy of the model that returns the groups' activations and computes nothing after the last of them."""
    traced = trace(model)
    graph = traced.graph
    nodes = {node.name: node for node in graph.nodes}
    for group in groups:
        if group.node not in nodes:
            raise ValueError(
                f"the model has no node {group.node!r}: use the groups of a model of this architecture"
            )
    taps: list[fx.Node] = []
    for group in groups:
        node = nodes[group.node]
        with graph.inserting_after(node):
            tap = graph.call_method("narrow", (node, 1, group.offset, group.size))
        if _overwritten(node):
            with graph.inserting_after(tap):
                tap = graph.call_method("clone", (tap,))
        taps.append(tap)
    # What comes before the last tap stays, used or not: an in-place operation may have no user.
    for node in reversed(list(graph.nodes)):
        if node in taps or node.op == "placeholder":
            break
        graph.erase_node(node)
    graph.output(tuple(taps))
    every = set(traced.modules())
    traced.delete_all_unused_submodules()
    _release(every - set(traced.modules()))
    traced.recompile()
    return traced


_INPLACE = ("iadd", "isub", "imul", "itruediv")
_ALIASING = (
    *("getitem", "narrow", "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"),
    *("chunk", "split", "contiguous", "dropout"),
)
_ALIASING_MODULES = (nn.Flatten, nn.Unflatten, nn.Identity, nn.modules.dropout._DropoutNd)


def _overwritten(node: fx.Node) -> bool:
    """Whether a later in-place operation may write into the node's value, directly or through a view of it."""
    for user in node.users:
        if user.op == "call_module" and user.graph.owning_module is not None:
            module: Any = user.graph.owning_module.get_submodule(str(user.target))
            inplace, aliasing = (
                getattr(module, "inplace", False),
                isinstance(module, _ALIASING_MODULES),
            )
        else:
            name = (
                user.target
                if isinstance(user.target, str)
                else getattr(user.target, "__name__", "")
            )
            inplace = (
                user.kwargs.get("inplace")
                or name.endswith("_")
                or name in ("iadd", "isub", "imul", "itruediv")
            )
            aliasing = name in _ALIASING
        if (inplace and user.args[0] is node) or (aliasing and _overwritten(user)):
            return True
    return False
