"""A small vision transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from npmerge.catalogue import MODELS, model
from npmerge.models._transformer import Encoder, encoder_size, initialise

PATCHES = 8
"""Of a side, at most."""


class VisionTransformer(nn.Module):
    """Patches, an encoder and a linear layer; see :func:`vit`."""

    def __init__(self, classes: int, size: int, patch: int, side: int, in_channels: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(in_channels, size, patch, patch)
        self.encoder = Encoder(side**2, size)
        self.head = nn.Linear(size, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` to logits ``(N, classes)``."""
        logits: Tensor = self.head(self.encoder(self.patches(x).flatten(2).transpose(1, 2)))
        return logits


@model(label="ViT", family="transformer", smallest=4, sizes=(4, 8, 16, 32), place=4)
def vit(
    classes: int,
    width: float = 1,
    *,
    in_channels: int = 3,
    image_size: int = 32,
    generator: torch.Generator | None = None,
) -> VisionTransformer:
    """Vision transformer for small images: two pre-norm blocks of four heads, ``width`` times 64 dimensions.

    Patches of 2x2 pixels, or of 4x4 in images of 32, with learned positions; no class token: the head reads the mean
    over all patches. Queries, keys, values and the output have a linear layer each; the hidden layer is four times as
    wide. No dropout.

    Args:
        classes: number of outputs.
        width: multiplies the dimensions of a head, which are 16; there are always four.
        in_channels: colour channels of the images.
        image_size: height and width in pixels; a power of two from 4 to 32.
        generator: of the initial weights; a fresh one with seed 0 by default.

    Source:
        Dosovitskiy et al. 2021; the mean instead of the class token as in Beyer et al. 2022.
    """
    MODELS["vit"].check(classes, width, in_channels=in_channels, image_size=image_size)
    patch = max(2, image_size // PATCHES)
    with torch.random.fork_rng(devices=[]):
        network = VisionTransformer(
            classes, encoder_size(width), patch, image_size // patch, in_channels
        )
    initialise(network, generator)
    return network
