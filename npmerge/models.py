"""The paper's networks, each with a width: VGG11 without batch norm, ResNet20 with 3x3 shortcuts, ResNet18."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


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
    _check_size("resnet20", width, image_size, minimum=4)
    widths = _scaled(16, width), _scaled(32, width), _scaled(64, width)
    with torch.random.fork_rng(devices=[]):  # modules draw from the global generator when made
        model = ResNet(classes, widths, 3, in_channels)
    generator = generator or torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    return model


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
    _check_size("resnet18", width, image_size, minimum=8)
    widths = _scaled(64, width), _scaled(128, width), _scaled(256, width), _scaled(512, width)
    with torch.random.fork_rng(devices=[]):
        model = ResNet18(classes, widths, in_channels)
    generator = generator or torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(
                module.weight, mode="fan_out", nonlinearity="relu", generator=generator
            )
    bound = model.fc.in_features**-0.5  # what nn.Linear draws from
    nn.init.uniform_(model.fc.weight, -bound, bound, generator=generator)
    nn.init.uniform_(model.fc.bias, -bound, bound, generator=generator)
    return model


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
    _check_size("vgg11", width, image_size, minimum=2)
    if image_size not in (2, 4, 8, 16, 32):
        raise ValueError(f"vgg11 takes images of 2, 4, 8, 16 or 32 pixels, not {image_size}")
    skipped = 5 - (image_size.bit_length() - 1)
    layers: list[nn.Module] = []
    inputs, pools = in_channels, 0
    with torch.random.fork_rng(devices=[]):
        for step in (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"):
            if isinstance(step, int):
                outputs = _scaled(step, width)
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
                inputs = outputs
            else:
                pools += 1
                layers += [nn.MaxPool2d(2)] if pools > skipped else []
        model = VGG(nn.Sequential(*layers), inputs, classes)
    generator = generator or torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(
                module.weight, gain=nn.init.calculate_gain("relu"), generator=generator
            )
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


MODELS: dict[str, Callable[..., nn.Module]] = {
    "vgg11": vgg11,
    "resnet20": resnet20,
    "resnet18": resnet18,
}


def build(
    name: str, classes: int, *, width: float, in_channels: int, image_size: int, seed: int
) -> nn.Module:
    """Build a network by name.

    Args:
        name: ``"vgg11"``, ``"resnet20"`` or ``"resnet18"``.
        classes: number of outputs.
        width: multiplies the channels.
        in_channels: colour channels of the images.
        image_size: height and width in pixels.
        seed: of the initial weights.

    Raises:
        ValueError: no such model, or it does not take such images.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}")
    generator = torch.Generator().manual_seed(seed)
    return MODELS[name](
        classes, width, in_channels=in_channels, image_size=image_size, generator=generator
    )


def _conv3x3(inputs: int, outputs: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


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


def _scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


def _check_size(name: str, width: float, image_size: int, *, minimum: int) -> None:
    if width <= 0:
        raise ValueError(f"width is {width}: it must be positive")
    if image_size < minimum:
        raise ValueError(f"{name} needs images of at least {minimum} pixels, not {image_size}")
