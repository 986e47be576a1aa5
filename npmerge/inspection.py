"""What a merge would meet: looked at before anything is learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from npmerge.align import Alignment
from npmerge.data.streams import Data, example_of
from npmerge.evaluate import PathPoint, barrier, path
from npmerge.merging import Merger
from npmerge.prepare import prepared
from npmerge.symmetry import Symmetry, SymmetryError, symmetry_on
from npmerge.training import Loss


@dataclass(frozen=True)
class Inspection:
    """Two models before they are merged.

    Attributes:
        symmetry: what can be permuted; ``None`` if the models hold an operation whose symmetry is not known.
        unknown: what that operation is, and what to do; empty if there is none.
        before: the straight line between the models as they are, from B (alpha 0) to A.
        after: the same once B is aligned.
        batchnorms: layers whose statistics are reset after merging.
    """

    symmetry: Symmetry | None
    unknown: str
    before: Sequence[PathPoint]
    after: Sequence[PathPoint]
    batchnorms: int

    @property
    def barriers(self) -> tuple[float, float]:
        """The loss barrier before and after the alignment."""
        return barrier(self.before), barrier(self.after)

    def __str__(self) -> str:
        groups = self.symmetry or ()
        share = 100 * self.symmetry.movable if self.symmetry is not None else 0.0
        before, after = self.barriers
        lines = [
            f"groups of channels            {len(groups)}",
            f"parameters that can move      {share:.1f}%",
            f"barrier before the alignment  {before:.4f}",
            f"barrier after the alignment   {after:.4f}",
            f"batch norm layers to reset    {self.batchnorms}",
        ]
        if self.unknown:
            lines.append(f"no symmetry: {self.unknown}")
        if self.symmetry is not None and self.symmetry.pinned:
            lines.append(f"held fixed by: {', '.join(self.symmetry.pinned)}")
        if self.symmetry is not None and self.symmetry.unused:
            lines.append(f"not used by the model: {', '.join(self.symmetry.unused)}")
        return "\n".join(lines)


def inspect(
    a: nn.Module,
    b: nn.Module,
    data: Data,
    *,
    align: str | Alignment = "permute",
    align_options: Mapping[str, Any] | None = None,
    learn_on: Data | Callable[[int], Data] | None = None,
    judged: Data | None = None,
    loss: Loss | None = None,
    points: int = 5,
    seed: int = 0,
    strict: bool = True,
) -> Inspection:
    """Look at two models before they are merged: what can be permuted, and the barrier between them.

    Args:
        a: model A.
        b: model B, of the same architecture.
        data: training data, for the alignment; see :func:`npmerge.merging.merge`.
        align: how B is aligned.
        align_options: of the alignment.
        learn_on: training data as the models saw them, for batch norm; ``data`` by default. A function gets the seed.
        judged: what the models on the line are scored on; ``data`` by default.
        loss: of the outputs and the batch; by default the cross-entropy of the labels.
        points: models on the line, its two ends included.
        seed: of whatever the alignment draws.
        strict: see :func:`npmerge.merging.merge`.

    Returns:
        The groups, the two lines, and how many layers of batch norm there are. Where a symmetry is not known, and the
        alignment needs one, both lines are that of the models as they are.

    Raises:
        ValueError: models that differ in architecture, data that is empty, an unknown method or option.

    Source:
        Section II-C; Entezari et al. 2022, definition 2.
    """
    a, b = prepared(a), prepared(b)
    steps = Merger(
        data, align=align, aggregate="mean", seed=seed, align_options=align_options,
        learn_on=learn_on, strict=strict,
    )  # fmt: skip
    symmetry, unknown = None, ""
    try:
        symmetry = symmetry_on(a, example_of(data), strict=strict)
    except SymmetryError as error:
        unknown = str(error)

    def line(aligned: nn.Module) -> list[PathPoint]:
        where = data if judged is None else judged
        return path(a, aligned, where, points=points, loss=loss, correct=steps.correct)

    before = line(b)
    try:
        after = line(steps.align(a, b).apply(b))
    except SymmetryError:
        after = before
    counted = [m for m in a.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    return Inspection(symmetry, unknown, before, after, len(counted))
