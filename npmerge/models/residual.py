"""ResNet20 for small images, with 3x3 shortcuts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from npmerge.catalogue import MODELS, model
from npmerge.models._widths import scaled


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm around a shortcut; ReLU after the addition."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3x3(outputs, outputs, 1)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                _conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """``(N, inputs, H, W)`` to ``(N, outputs, H / stride, W / stride)``."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)) + self.shortcut(x)
        activated: Tensor = self.relu(out)
        return activated


class ResNet(nn.Module):
    """A CIFAR residual network of three stages; see :func:`resnet20`."""

    def __init__(
        self, classes: int, widths: tuple[int, int, int], blocks: int, in_channels: int
    ) -> None:
        super().__init__()
        self.conv = _conv3x3(in_channels, widths[0], 1)
        self.bn = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        inputs = widths[0]
        stages = []
        for stage, outputs in enumerate(widths):
            layers = []
            for block in range(blocks):
                layers.append(BasicBlock(inputs, outputs, 2 if stage and not block else 1))
                inputs = outputs
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` to logits ``(N, classes)``."""
        x = self.stages(self.relu(self.bn(self.conv(x))))
        logits: Tensor = self.head(self.pool(x).flatten(1))
        return logits


@model(label="ResNet20", family="resnet", smallest=4, place=2)
def resnet20(
    classes: int,
    width: float = 1,
    *,
    in_channels: int = 3,
    image_size: int = 32,
    generator: torch.Generator | None = None,
) -> ResNet:
    """ResNet20 for small images, ``width`` times as wide as the original.

    A 3x3 stem and three stages of three basic blocks with 16, 32 and 64 times ``width`` channels. The shortcut of the
    two down-sampling blocks is a 3x3 convolution of stride 2 with batch norm. Kaiming-normal weights, zero biases.

    Args:
        classes: number of outputs.
        width: multiplies the channels.
        in_channels: colour channels of the images.
        image_size: height and width in pixels; any size of at least 4 works.
        generator: of the initial weights; a fresh one with seed 0 by default.

    Source:
        He et al. 2016, Section 4.2; Zagoruyko & Komodakis 2016 (width); shortcut and initialisation as in the
        protocol page.
    """
    MODELS["resnet20"].check(classes, width, in_channels=in_channels, image_size=image_size)
    widths = scaled(16, width), scaled(32, width), scaled(64, width)
    with torch.random.fork_rng(devices=[]):  # modules draw from the global generator when made
        network = ResNet(classes, widths, 3, in_channels)
    generator = generator or torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    return network


def _conv3x3(inputs: int, outputs: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
