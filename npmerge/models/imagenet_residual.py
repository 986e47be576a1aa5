"""ResNet18 for ImageNet: torchvision's, with a width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from npmerge.catalogue import MODELS, model
from npmerge.models._widths import scaled


class ResNet18(nn.Module):
    """torchvision's ``resnet18`` with other widths, under its module names; see :func:`resnet18`."""

    def __init__(self, classes: int, widths: tuple[int, int, int, int], in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.layer1 = _resnet18_stage(widths[0], widths[0], 1)
        self.layer2 = _resnet18_stage(widths[0], widths[1], 2)
        self.layer3 = _resnet18_stage(widths[1], widths[2], 2)
        self.layer4 = _resnet18_stage(widths[2], widths[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[3], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(N, C, H, W)`` to logits ``(N, classes)``."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


@model(label="ResNet18", family="resnet", smallest=8, place=3)
def resnet18(
    classes: int = 1000,
    width: float = 1,
    *,
    in_channels: int = 3,
    image_size: int = 224,
    generator: torch.Generator | None = None,
) -> ResNet18:
    """ResNet18 for ImageNet, ``width`` times as wide as the original; the paper's is four times as wide.

    torchvision's ``resnet18`` (built out of its ``BasicBlock``) with 64, 128, 256 and 512 times ``width`` channels. At
    width 1 the two load each other's state dict. Initialised as torchvision does: Kaiming-normal convolutions by their
    outputs (``fan_out``), PyTorch's own uniform linear layer.

    A width below 0.25 is for looking at, not for training on a CPU: there, the gradient of a strided 1x1 convolution of
    fewer than 16 channels overwrites memory that is not its own (oneDNN issue 6035, open as of PyTorch 2.15).

    Args:
        classes: number of outputs.
        width: multiplies the channels.
        in_channels: colour channels of the images.
        image_size: height and width in pixels; any size of at least 8 works, 32 and more use every stride.
        generator: of the initial weights; a fresh one with seed 0 by default.

    Source:
        He et al. 2016, Table 1; width as in the protocol page.
    """
    MODELS["resnet18"].check(classes, width, in_channels=in_channels, image_size=image_size)
    widths = scaled(64, width), scaled(128, width), scaled(256, width), scaled(512, width)
    with torch.random.fork_rng(devices=[]):
        network = ResNet18(classes, widths, in_channels)
    generator = generator or torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(
                module.weight, mode="fan_out", nonlinearity="relu", generator=generator
            )
    bound = network.fc.in_features**-0.5  # what nn.Linear draws from
    nn.init.uniform_(network.fc.weight, -bound, bound, generator=generator)
    nn.init.uniform_(network.fc.bias, -bound, bound, generator=generator)
    return network


def _resnet18_stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    from torchvision.models.resnet import BasicBlock  # only who builds a ResNet18 waits for it

    shortcut = None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        )
    return nn.Sequential(
        BasicBlock(inputs, outputs, stride, shortcut), BasicBlock(outputs, outputs)
    )
