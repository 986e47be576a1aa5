"""Architectures that the symmetry and alignment tests share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from npmerge.align import Alignment
from npmerge.symmetry import Group


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64 and evaluation mode with no two channels alike, batch-norm statistics included."""
    model = model.double().eval()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            draw = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
            if tensor.ndim > 1:
                draw = (draw - 0.5) * (12 / tensor[0].numel()) ** 0.5
            elif "var" in name or "weight" in name:
                draw = draw + 0.5
            tensor.copy_(draw)
    return model


def images(
    count: int = 2, size: int = 8, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, size, size, generator=generator, dtype=dtype)


def random_alignment(groups: Sequence[Group], seed: int = 1) -> Alignment:
    """A permutation of every group that moves every channel."""
    generator = torch.Generator().manual_seed(seed)
    maps = []
    for group in groups:
        order = torch.randperm(group.size, generator=generator)
        maps.append(order.argsort()[(order + 1) % group.size])
    return Alignment.from_permutations(groups, maps)


def without_slot(groups: Sequence[Group], group: int, slot: int) -> list[Group]:
    result = list(groups)
    slots = groups[group].slots
    result[group] = replace(groups[group], slots=slots[:slot] + slots[slot + 1 :])
    return result


class Residual(nn.Module):
    """A stem, a residual block, a down-sampling block with a convolutional shortcut, and a head."""

    def __init__(self, width: int = 6, *, norm: bool = True) -> None:
        super().__init__()

        def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
            layer = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=not norm)
            return nn.Sequential(layer, nn.BatchNorm2d(outputs) if norm else nn.Identity())

        self.stem = conv(3, width)
        self.conv1, self.conv2 = conv(width, width), conv(width, width)
        self.conv3, self.conv4 = conv(width, 2 * width, 2), conv(2 * width, 2 * width)
        self.shortcut = conv(width, 2 * width, 2)
        self.head = nn.Linear(2 * width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.conv2(F.relu(self.conv1(x))) + x)
        x = F.relu(self.conv4(F.relu(self.conv3(x))) + self.shortcut(x))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def plain(width: int = 6, *, norm: bool = True) -> nn.Sequential:
    """Two convolutions, max-pooling, and a hidden linear layer behind a flattened 4x4 map."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width) if norm else nn.Identity(),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(2 * width * 16, 10),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(10, 4),
    )


class Drawn(nn.Module):
    """A network from a list of blocks: ("plain" | "residual" | "concat" | "depthwise", channels, norm)."""

    def __init__(self, blocks: Sequence[tuple[str, int, bool]]) -> None:
        super().__init__()
        self.kinds = [kind for kind, _, _ in blocks]
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        inputs = 3
        for kind, width, norm in blocks:
            outputs = {"residual": inputs, "depthwise": 2 * inputs}.get(kind, width)
            groups = inputs if kind == "depthwise" else 1
            self.convs.append(nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups))
            self.norms.append(nn.BatchNorm2d(outputs) if norm else nn.Identity())
            inputs = inputs + outputs if kind == "concat" else outputs
        self.head = nn.Linear(inputs * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        for kind, conv, norm in zip(self.kinds, self.convs, self.norms, strict=True):
            y = torch.relu(norm(conv(x)))
            x = x + y if kind == "residual" else torch.cat([x, y], 1) if kind == "concat" else y
        logits: Tensor = self.head(torch.flatten(F.adaptive_avg_pool2d(x, 4), 1))
        return logits


class Attention(nn.Module):
    """An embedding of (N, T, 7), three heads of four dimensions beside a residual stream, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(7, 12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        logits: Tensor = self.head(x + self.attention(x, x, x)[0]).mean(1)
        return logits


class Recurrent(nn.Module):
    """Two layers that go through (N, T, 7) in both directions, and a head at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(7, 5, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(x)[0][:, -1])
        return logits
