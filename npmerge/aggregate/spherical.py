"""Agg along an arc: the direction and the size of each tensor are interpolated apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from npmerge.aggregate.averaging import mean
from npmerge.methods import method

PARALLEL = 0.9995
"""Cosine from which on a straight line is as good as an arc."""


@method(
    kind="aggregate",
    label="SLERP",
    family="averaging",
    reference="shoemake1985",
    place=60,
    use="Without data and without batch norm; behind a batch norm reset it is the mean but for the scales.",
)
@torch.no_grad()
def slerp(a: nn.Module, b: nn.Module, *, alpha: float = 0.5) -> nn.Module:
    """Interpolate each parameter tensor along the arc between the two: its norm does not collapse as that of a mean.

    ``sin(alpha w) / sin(w) * A + sin((1 - alpha) w) / sin(w) * B`` with the angle ``w`` between the tensors as vectors;
    the mean where they are parallel, or one is zero. Buffers are averaged.

    Args:
        a: model A.
        b: model B, of the same architecture and aligned to A.
        alpha: the share of model A.

    Returns:
        A new model on A's device.

    Raises:
        ValueError: the models differ in architecture or shape.

    Source:
        Shoemake 1985; tensor by tensor as model-merging tools do.
    """
    merged, theirs = mean(a, b, alpha=alpha), dict(b.named_parameters())
    for (name, own), target in zip(a.named_parameters(), merged.parameters(), strict=True):
        first, second = _shares(own, theirs[name].to(own), alpha)
        target.copy_(first * own + second * theirs[name].to(own))
    return merged


def _shares(first: Tensor, second: Tensor, alpha: float) -> tuple[Tensor | float, Tensor | float]:
    one, two = first.double().flatten(), second.double().flatten()
    size = one.norm() * two.norm()
    cosine = (one @ two / size.clamp(min=1e-16)).clamp(-1, 1)
    if size < 1e-16 or cosine.abs() > PARALLEL:
        return alpha, 1 - alpha
    angle = torch.arccos(cosine)
    return (
        (torch.sin(alpha * angle) / torch.sin(angle)).to(first.dtype),
        (torch.sin((1 - alpha) * angle) / torch.sin(angle)).to(first.dtype),
    )
