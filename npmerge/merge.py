"""Align, aggregate and reset in one call."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from npmerge import aggregate as agg
from npmerge import align as alignments
from npmerge.align import Alignment
from npmerge.batchnorm import reset_batchnorm
from npmerge.data.batches import Data

AGGREGATE = ("mean", "np", "finetune")


@dataclass(frozen=True)
class Merged:
    """A merged model and how it was made.

    Attributes:
        model: in evaluation mode, batch norm reset.
        alignment: what B was aligned with.
        alpha: for NP Merge, the learned coefficients of A by parameter name; else None.
    """

    model: nn.Module
    alignment: Alignment
    alpha: dict[str, Tensor] | None


def merge(
    a: nn.Module,
    b: nn.Module,
    data: Data,
    *,
    align: str = "permute",
    aggregate: str = "np",
    epochs: int = 10,
    lr: float = 1e-2,
    progress: bool = False,
) -> Merged:
    """Merge two models: ``C = Agg(Align(A, B))``, then the batch norm reset.

    Args:
        a: model A, kept as it is.
        b: model B, of the same architecture; aligned to A.
        data: training data, any re-iterable of ``(images, labels)``; used by every step that needs data.
        align: how B is aligned: ``"identity"``, ``"permute"``, ``"weight_matching"`` or ``"cca"``.
        aggregate: how the two become one: ``"mean"``, ``"np"`` or ``"finetune"``.
        epochs: passes over the data, for ``"np"`` and ``"finetune"``.
        lr: Adam's learning rate for them.
        progress: show a progress bar.

    Returns:
        A new model with its alignment and alpha; ``a`` and ``b`` are not changed.

    Raises:
        ValueError: an unknown method, models that differ in architecture, or data that is empty or mislabelled.
        SymmetryError: the model holds an operation whose symmetry is not known.

    Source:
        Section III-A.
    """
    if align not in alignments.METHODS:
        raise ValueError(
            f"unknown alignment {align!r}: choose one of {', '.join(alignments.METHODS)}"
        )
    if aggregate not in AGGREGATE:
        raise ValueError(f"unknown aggregation {aggregate!r}: choose one of {', '.join(AGGREGATE)}")
    alignment = alignments.METHODS[align](a, b, data)
    aligned = alignment.apply(b)
    alpha = None
    if aggregate == "mean":
        model = agg.mean(a, aligned)
    elif aggregate == "finetune":
        bar = "fine-tuning" if progress else None
        model = agg.finetune(a, aligned, data, epochs=epochs, lr=lr, progress=bar).model
    else:
        result = agg.np_merge(
            a, aligned, data, epochs=epochs, lr=lr, progress="NP Merge" if progress else None
        )
        model, alpha = result.model, result.alpha
    return Merged(reset_batchnorm(model, data).eval(), alignment, alpha)
