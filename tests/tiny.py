"""Small data and models that the tests share."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from npmerge import catalogue
from npmerge.data import Images
from npmerge.experiments import Profile, profile

CLASSES = 4

torch.set_num_threads(1)  # tensors are too small to share out

SETTING = {
    "dataset": "digits",
    "image_size": 4,
    "model": "vgg11",
    "width": 0.0625,
    "recipe": {"epochs": 1, "batch_size": 200, "lr": 0.05, "warmup_epochs": 0.5},
    "beside": ["cifar10", "vgg11x1"],
}
OPTIMISATION = {
    "batch_size": 200,
    "options": {
        "np_merge": {"epochs": 1},
        "finetune": {"epochs": 1},
        "cca": {"ridge": {"choose": [0.1]}},
    },
    "tuned": {"finetune": {"lr": {"choose": [1e-3], "trial": {"epochs": 1}}}},
    "path_points": 2,
}
DIRICHLET = SETTING | {
    "model": "resnet20",
    "width": 0.125,
    "beside": ["cifar100", "resnet20x8"],
    "split": "dirichlet",
}
PROFILE = Profile(
    name="tiny",
    title="a setting in seconds",
    threads=1,
    precision="float32",
    sections={
        "same_data": {"settings": [SETTING], "optimisation": OPTIMISATION},
        "disjoint_splits": {
            "settings": [DIRICHLET | {"split": "80-20"}, DIRICHLET],
            "optimisation": OPTIMISATION,
        },
        "data_size": {
            "settings": [DIRICHLET],
            "optimisation": OPTIMISATION,
            "examples_per_class": ["all", 5, 1],
        },
        "many_models": {
            "settings": [{k: v for k, v in DIRICHLET.items() if k != "split"}, DIRICHLET],
            "optimisation": OPTIMISATION | {"tuned": {}},
            "counts": [2, 3],
        },
        "cost": {
            "settings": [DIRICHLET | {"split": None}],
            "optimisation": OPTIMISATION,
            "epochs": 1,
            "counts": [2],
        },
    },
)
"""4x4 digits, one epoch each."""


def tiny_profile(patch: pytest.MonkeyPatch) -> None:
    """Let the profile ``tiny`` be found by its name."""
    known = profile.load_profile
    for place in ("npmerge.experiments", "npmerge.run.engine"):
        patch.setattr(
            f"{place}.load_profile", lambda name: PROFILE if name == "tiny" else known(name)
        )
    names = [*catalogue.profile_names(), "tiny"]
    for place in ("npmerge.catalogue", "npmerge.cli", "npmerge.parameters"):
        patch.setattr(f"{place}.profile_names", lambda: names)


def images(count: int = 24, *, channels: int = 3, size: int = 8, seed: int = 0) -> Images:
    """Random pixels and labels."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, channels, size, size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return Images(pixels, torch.randint(0, CLASSES, (count,), generator=generator))


def loader(
    count: int = 24, batch_size: int = 8, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """Normally distributed images of 8x8 pixels whose class shifts their mean: learnable."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    shift = torch.linspace(-1, 1, CLASSES)[labels].view(-1, 1, 1, 1)
    pixels = (torch.randn(count, 3, 8, 8, generator=generator) + shift).to(dtype)
    return list(zip(pixels.split(batch_size), labels.split(batch_size), strict=True))


def net(seed: int = 0, *, norm: bool = True, width: int = 6) -> nn.Sequential:
    """Two convolutions, batch norm, pooling and two linear layers; no batch norm with ``norm=False``."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=not norm),
            nn.BatchNorm2d(width) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=not norm),
            nn.BatchNorm2d(width) if norm else nn.Identity(),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, 5),
            nn.ReLU(),
            nn.Linear(5, CLASSES),
        )
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) - 0.3)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.add_(1)
                module.running_var.abs_().add_(0.5)
    return model


@dataclass(frozen=True)
class Snapshot:
    """All that a function could change about a model."""

    state: dict[str, Tensor]
    modes: list[bool]
    requires_grad: list[bool]
    grads: list[Tensor | None]

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        return cls(
            {name: value.clone() for name, value in model.state_dict().items()},
            [module.training for module in model.modules()],
            [parameter.requires_grad for parameter in model.parameters()],
            [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        )

    def assert_still(self, model: nn.Module) -> None:
        now = Snapshot.of(model)
        assert_same_state(self.state, now.state)
        assert self.modes == now.modes
        assert self.requires_grad == now.requires_grad
        for before, after in zip(self.grads, now.grads, strict=True):
            assert (before is None) == (after is None)
            assert before is None or after is None or torch.equal(before, after)


def marked(model: nn.Module) -> nn.Module:
    """Give a model gradients, a frozen parameter and modules in both modes, for :class:`Snapshot` to watch."""
    model.train()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    next(model.parameters()).requires_grad_(requires_grad=False)
    next(module for module in model.modules() if isinstance(module, nn.Conv2d)).eval()
    return model


def assert_same_state(x: dict[str, Tensor], y: dict[str, Tensor]) -> None:
    assert x.keys() == y.keys()
    assert [name for name in x if not torch.equal(x[name], y[name])] == []


def same_parameters(x: nn.Module, y: nn.Module) -> bool:
    pairs = zip(x.parameters(), y.parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)
