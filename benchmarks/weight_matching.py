"""Weight matching of two torchvision networks beside that of the package ``rebasin``.

Time: from two models to B', model B with its channels matched to A's: finding the groups, matching, applying. Distance:
of all parameters of A and B', the smaller the better; both are coordinate descents that end where their order of visits
leads them.

``rebasin`` is not installed with npmerge; without it the benchmark runs alone. It needs no more than:

    pip install --no-deps --target DIR rebasin torchview graphviz
    PYTHONPATH=DIR python benchmarks/weight_matching.py
"""

from __future__ import annotations

import argparse
import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
import torchvision
from _common import Setting, begin, command_line, interleaved, summary
from torch import nn

import npmerge as npm

MODELS = "resnet18", "resnet50", "vgg13"
CLASSES = 10


@dataclass(frozen=True)
class Pair(Setting):
    """What this benchmark can be asked to vary."""

    alone: bool

    @property
    def network(self) -> str:
        return self.model


def network(setting: Pair, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = getattr(torchvision.models, setting.model)(num_classes=CLASSES)
    return model.to(setting.device).eval()


def ours(a: nn.Module, b: nn.Module, example: torch.Tensor) -> nn.Module:
    return npm.align.weight_matching(a, b, example).apply(b)


def theirs(a: nn.Module, b: nn.Module, example: torch.Tensor) -> nn.Module:
    descent = importlib.import_module("rebasin").PermutationCoordinateDescent
    moved = copy.deepcopy(b)  # it permutes the model that it is given
    torch.manual_seed(0)
    device = example.device
    descent(a, moved, example, device_a=device, device_b=device).rebasin()
    return moved


@torch.no_grad()
def distance(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return sum(float((p - q).double().square().sum()) for p, q in pairs) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(
        parents=[command_line(__doc__, batch_size=1, repeats=3)],
        add_help=False,
        conflict_handler="resolve",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )
    parser.add_argument("--model", default=MODELS[0], choices=MODELS, help="of torchvision")
    parser.add_argument("--alone", action="store_true", help="leave rebasin out: minutes if wide")
    parser.set_defaults(threads=1)
    setting, report = begin(parser, Pair)
    a, b = (network(setting, seed) for seed in (0, 1))
    size = setting.image_size
    example = torch.zeros(setting.batch_size, 3, size, size, device=setting.device)
    methods: dict[str, Callable[..., nn.Module]] = {"npmerge": ours}
    if not setting.alone and find_spec("rebasin") is not None:
        methods["rebasin"] = theirs
    moved: dict[str, nn.Module] = {}

    def match(name: str) -> None:
        moved[name] = methods[name](a, b, example)

    runs = {name: partial(match, name) for name in methods}
    rows = summary(interleaved(runs, setting), "npmerge", 1)
    for name, row in rows.items():
        row["extra"] = {"distance": distance(a, moved[name])}
    report.table(f"Weight matching, {setting.network}, {CLASSES} classes", rows, images=False)
    report.note(f"Distance of A and B as they are: {distance(a, b):.2f}.")
    if "rebasin" not in methods:
        reason = "was left out" if setting.alone else "is not installed; see --help"
        report.note(f"The package rebasin {reason}.")
    report.write()


if __name__ == "__main__":
    main()
