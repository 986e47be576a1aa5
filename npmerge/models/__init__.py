"""The paper's networks, each with a width; one file an architecture."""

from __future__ import annotations

import torch
from torch import nn

from npmerge.catalogue import MODELS
from npmerge.checks import check_seed
from npmerge.models.imagenet_residual import resnet18
from npmerge.models.residual import resnet20
from npmerge.models.vgg import vgg11

__all__ = ["MODELS", "build", "resnet18", "resnet20", "vgg11"]


def build(
    name: str, classes: int, *, width: float, in_channels: int, image_size: int, seed: int
) -> nn.Module:
    """Build a network by name.

    Args:
        name: one of :data:`npmerge.catalogue.MODELS`.
        classes: number of outputs.
        width: multiplies the channels.
        in_channels: colour channels of the images.
        image_size: height and width in pixels.
        seed: of the initial weights.

    Raises:
        ValueError: no such model, or it does not take such images; a number that is out of bounds.
    """
    check_seed(seed)
    built: nn.Module = MODELS[name].function(
        classes,
        width,
        in_channels=in_channels,
        image_size=image_size,
        generator=torch.Generator().manual_seed(seed),
    )
    return built
