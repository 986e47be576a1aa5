"""A small transformer that classifies texts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from npmerge.catalogue import MODELS, model
from npmerge.models._transformer import Encoder, encoder_size, initialise


class TextTransformer(nn.Module):
    """Embeddings, an encoder and a linear layer; see :func:`text_encoder`."""

    def __init__(self, classes: int, size: int, tokens: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, size)
        self.encoder = Encoder(length, size)
        self.head = nn.Linear(size, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens ``(N, T)`` to logits ``(N, classes)``."""
        logits: Tensor = self.head(self.encoder(self.embedding(tokens)))
        return logits


@model(label="text encoder", family="transformer", takes="texts", place=5)
def text_encoder(
    classes: int,
    width: float = 1,
    *,
    in_channels: int = 39,
    image_size: int = 32,
    generator: torch.Generator | None = None,
) -> TextTransformer:
    """Transformer that classifies texts: two pre-norm blocks of four heads, ``width`` times 64 dimensions.

    It is :func:`~npmerge.models.vision_transformer.vit` with embedded tokens instead of patches. Padding is a token
    like the others: nothing is masked.

    Args:
        classes: number of outputs.
        width: multiplies the dimensions of a head, which are 16; there are always four.
        in_channels: how many different tokens there are.
        image_size: tokens of a text.
        generator: of the initial weights; a fresh one with seed 0 by default.

    Source:
        Vaswani et al. 2017, the encoder; layer norm first as in Xiong et al. 2020.
    """
    MODELS["text_encoder"].check(classes, width, in_channels=in_channels, image_size=image_size)
    with torch.random.fork_rng(devices=[]):
        network = TextTransformer(classes, encoder_size(width), in_channels, image_size)
    initialise(network, generator)
    return network
