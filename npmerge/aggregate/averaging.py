"""Agg by a uniform mean: one scalar alpha for the whole model."""

from __future__ import annotations

import copy

import torch
from torch import nn

from npmerge.checks import check_finite
from npmerge.methods import method
from npmerge.symmetry import check_same_architecture


@method(
    kind="aggregate",
    label="Average",
    row="{align}",
    family="averaging",
    place=20,
    use="The baseline that everything is held against; free once the models are aligned.",
)
@torch.no_grad()
def mean(a: nn.Module, b: nn.Module, *, alpha: float = 0.5) -> nn.Module:
    """Interpolate two models uniformly: ``alpha * A + (1 - alpha) * B``.

    Floating-point buffers (the statistics of batch norm) are interpolated too; other buffers are A's.

    Args:
        a: model A.
        b: model B, of the same architecture and aligned to A.
        alpha: the share of model A, any finite number; the paper's baselines use 0.5.

    Returns:
        A new model on A's device; ``a`` and ``b`` are not changed.

    Raises:
        ValueError: the models differ in architecture or shape, or alpha is not finite.

    Source:
        Eq. 1.
    """
    check_finite("alpha", alpha)
    check_same_architecture(a, b)
    merged = copy.deepcopy(a)
    first, second = a.state_dict(), b.state_dict()
    for name, value in merged.state_dict().items():
        if value.is_floating_point():
            value.copy_(alpha * first[name] + (1 - alpha) * second[name].to(value.device))
    return merged
