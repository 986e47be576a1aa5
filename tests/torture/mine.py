"""A user's own model and data, for ``npmerge merge --model mine:net --data mine:batches``."""

import torch
from torch import nn


def net() -> nn.Module:
    """The one of ``tiny.net``."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4),
    )  # fmt: skip


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two batches of noise."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 3, 8, 8, generator=generator)
    labels = torch.randint(0, 4, (16,), generator=generator)
    return list(zip(images.split(8), labels.split(8), strict=True))
