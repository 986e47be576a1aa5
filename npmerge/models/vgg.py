"""VGG11 for small images, without batch norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from npmerge.catalogue import MODELS, model
from npmerge.models._widths import scaled


class VGG(nn.Module):
    """A plain convolutional network without batch norm; see :func:`vgg11`."""

    def __init__(self, features: nn.Sequential, outputs: int, classes: int) -> None:
        super().__init__()
        self.features = features
        self.head = nn.Linear(outputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` to logits ``(N, classes)``."""
        logits: Tensor = self.head(self.features(x).flatten(1))
        return logits


@model(label="VGG11", family="vgg", smallest=2, sizes=(2, 4, 8, 16, 32), place=1)
def vgg11(
    classes: int,
    width: float = 1,
    *,
    in_channels: int = 3,
    image_size: int = 32,
    generator: torch.Generator | None = None,
) -> VGG:
    """VGG11 for small images, ``width`` times as wide: no batch norm, no hidden fully-connected layer, no dropout.

    Eight 3x3 convolutions with bias; ``image_size`` 32 has the original five max-pools. Smaller images leave out the
    first ones, so that the last feature map is 1x1. Xavier-uniform weights with ReLU gain, zero biases.

    Args:
        classes: number of outputs.
        width: multiplies the channels.
        in_channels: colour channels of the images.
        image_size: height and width in pixels; a power of two from 2 to 32.
        generator: of the initial weights; a fresh one with seed 0 by default.

    Source:
        Simonyan & Zisserman 2015, configuration A; head and initialisation as in the protocol page.
    """
    MODELS["vgg11"].check(classes, width, in_channels=in_channels, image_size=image_size)
    skipped = 5 - (image_size.bit_length() - 1)
    layers: list[nn.Module] = []
    inputs, pools = in_channels, 0
    with torch.random.fork_rng(devices=[]):
        for step in (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"):
            if isinstance(step, int):
                outputs = scaled(step, width)
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
                inputs = outputs
            else:
                pools += 1
                layers += [nn.MaxPool2d(2)] if pools > skipped else []
        network = VGG(nn.Sequential(*layers), inputs, classes)
    generator = generator or torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(
                module.weight, gain=nn.init.calculate_gain("relu"), generator=generator
            )
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network
