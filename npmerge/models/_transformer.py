"""What the transformers share: pre-norm encoder blocks, and how their weights begin."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from npmerge.models._widths import scaled

HEADS, DEPTH = 4, 2
HEAD_SIZE = 16
"""Dimensions of a head at width 1."""


class Attention(nn.Module):
    """Multi-head self-attention with a layer each for queries, keys, values and the output."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(size, size) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, T, D)`` to ``(N, T, D)``."""
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        out: Tensor = self.output(mixed)
        return out


class Block(nn.Module):
    """Attention, then two layers with GELU, each after layer norm and around a shortcut."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.attention = Attention(size, heads)
        self.mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size))

    def forward(self, x: Tensor) -> Tensor:
        """``(N, T, D)`` to ``(N, T, D)``."""
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Encoder(nn.Module):
    """Learned positions, blocks, a last layer norm and the mean over all positions."""

    def __init__(self, positions: int, size: int, heads: int = HEADS, depth: int = DEPTH) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(positions, size))
        self.blocks = nn.Sequential(*(Block(size, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(size)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, T, D)`` to ``(N, D)``."""
        features: Tensor = self.norm(self.blocks(x + self.positions)).mean(1)
        return features


def encoder_size(width: float) -> int:
    """Dimensions of the residual stream: so many times the heads'."""
    return HEADS * scaled(HEAD_SIZE, width)


def initialise(network: nn.Module, generator: torch.Generator | None) -> None:
    """Draw all weights: Xavier-uniform layers with zero biases; embeddings and positions of standard deviation 1."""
    generator = generator or torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, generator=generator)
        elif isinstance(module, Encoder):
            nn.init.normal_(module.positions, generator=generator)
