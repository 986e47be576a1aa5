"""Trainings that are killed in the middle, each a program of its own: ``killed.py KIND FILE``."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from npmerge.aggregate import AlphaAdam
from npmerge.data import Batches, Images
from npmerge.training import Optimizer, fit, piecewise_linear

EPOCHS = 4


class Killing(Batches):
    """Batches that kill their reader in the middle of the third epoch."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for step, batch in enumerate(super().__iter__()):
            if (self.epoch, step) == (3, 1):
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


def batches(kind: type[Batches] = Batches, *, seed: int = 5) -> Batches:
    """Shuffled and augmented ones."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=generator)
    images = Images(pixels, torch.randint(0, 4, (40,), generator=generator))
    return kind(
        images, 16, mean=(0.5,) * 3, std=(0.25,) * 3, shuffle=True, padding=1, flip=True, seed=seed
    )


def network(seed: int = 0) -> nn.Module:
    """Convolutions and batch norm, channels last, and dropout, which asks PyTorch's own random generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(16, 4),
        )  # fmt: skip
    return model.to(memory_format=torch.channels_last)


def optimizer_of(kind: str, model: nn.Module, b: nn.Module) -> Optimizer:
    """The one of base training, of fine-tuning or of NP Merge with model B."""
    if kind == "sgd":
        return torch.optim.SGD(
            model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True
        )
    if kind == "adam":
        return torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    return AlphaAdam(model, b, lr=0.05)


def train(
    kind: str, data: Batches, saved: Path | None = None, seen: list[int] | None = None
) -> tuple[nn.Module, Optimizer, list[float]]:
    """Train for four epochs on one thread; the epochs that are not taken from the file are noted in ``seen``."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = network()
    optimizer = optimizer_of(kind, model, network(1))
    history = fit(
        model, data, optimizer, epochs=EPOCHS, schedule=piecewise_linear(EPOCHS, 1), saved=saved,
        save_every=0, mixed_precision=False,
        on_epoch=lambda epoch, _: None if seen is None else seen.append(epoch),
    )  # fmt: skip
    return model, optimizer, history


if __name__ == "__main__":
    train(sys.argv[1], batches(Killing), Path(sys.argv[2]))
