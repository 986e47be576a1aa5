"""How much work a cell is: passes over images, read off its configuration, and FLOPs, counted on its network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from math import comb
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from npmerge.catalogue import DATASETS, MODELS
from npmerge.data import load
from npmerge.device import channels_last
from npmerge.experiments import EXPERIMENTS
from npmerge.methods import METHODS
from npmerge.models import build
from npmerge.run.costs import AVERAGES, LEARNING
from npmerge.run.work import base_models
from npmerge.store.records import Cell
from npmerge.store.zoo import BaseModel

Kind = Literal["training", "learning", "reset", "scoring", "alignment", "matching"]
"""Of work: all but the last are passes over images, whose work is that of the network's forward passes; the factor
between them, such as that of a backward pass, is in their rates."""
KINDS: tuple[Kind, ...] = get_args(Kind)
IMAGES = {
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
    "imagenet200": (260_000, 10_000),
}
"""Training and test images of the sets that need not be at hand; of ImageNet's classes, none has more than 1,300."""


@dataclass(frozen=True)
class Network:
    """A network at its size, on images of their size.

    Attributes:
        dataset: name of the image set.
        model: name of the architecture.
        width: its width.
        image_size: height and width of the images in pixels.
    """

    dataset: str
    model: str
    width: float
    image_size: int

    @classmethod
    def of(cls, setting: Mapping[str, Any]) -> Network:
        """The network of a cell's setting."""
        return cls(*(setting[field.name] for field in fields(cls)))

    @property
    def name(self) -> str:
        """For people and in files, e.g. ``"cifar100-resnet20x8-32"``."""
        return f"{self.dataset}-{self.model}x{self.width:g}-{self.image_size}"

    def build(self, seed: int = 0) -> nn.Module:
        """It, with new weights."""
        data = DATASETS[self.dataset]
        return build(
            self.model, data.classes, width=self.width, in_channels=data.channels,
            image_size=self.image_size, seed=seed,
        )  # fmt: skip

    def batch(self, count: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Random inputs with random labels."""
        data, size = DATASETS[self.dataset], self.image_size
        if MODELS[self.model].takes == "texts":
            inputs = torch.randint(data.channels, (count, size), device=device)
        else:
            shape = count, data.channels, size, size
            inputs = channels_last(torch.randn(shape, device=device))
        return inputs, torch.randint(data.classes, (count,), device=device)

    def work(self, kind: Kind) -> float:
        """FLOPs of an image's forward pass; of matching, what grows like its products of matrices.

        Without batch norm there is nothing to reset.
        """
        if kind == "reset" and not any(isinstance(m, _BatchNorm) for m in _empty(self).modules()):
            return 0.0
        return _parameters(self) ** 1.5 if kind == "matching" else _flops(self)


@cache
def _empty(network: Network) -> nn.Module:
    with torch.device("meta"):
        return network.build().eval()


@cache
def _flops(network: Network) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _empty(network)(network.batch(1, "meta")[0])
    return float(counter.get_total_flops())


@cache
def _parameters(network: Network) -> int:
    return sum(p.numel() for p in _empty(network).parameters())


class Part(NamedTuple):
    """A part of a cell's work.

    Attributes:
        stage: where a record counts its seconds; see :class:`npmerge.store.records.Took`.
        kind: of the work.
        times: images; of matching, how often.
        shared: what is made once for all cells; ``None`` if it is the cell's own.
    """

    stage: str
    kind: Kind
    times: float
    shared: object = None


def parts(cell: Cell) -> list[Part] | None:
    """The work of a cell, read off its configuration; ``None`` if that does not tell.

    Left out is what is small beside a pass over the data: loading, averaging, solving what moments are measured for.

    Args:
        cell: from an experiment.
    """
    config, work = cell.config, EXPERIMENTS[cell.experiment].work
    data, setting, measures = config["data"], config["setting"], config.get("measures", {})
    examples = data["examples_per_class"]
    images, test = _images(setting["dataset"])
    if isinstance(examples, int):
        images = min(images, examples * DATASETS[setting["dataset"]].classes)
    bases = base_models(cell)
    resets = [Part("bases", "reset", images, (base, examples, cell.seed)) for base in bases]
    if cell.experiment == "cost":
        return resets + _cost(config, images, test)
    if work is not None or "rounds" in config:
        return None
    aggregate, align, many = config["aggregate"], config["align"], config["many"]
    scored = test * (1 + bool(measures.get("classes")))
    if METHODS[aggregate["method"]].kind == "reference":
        found = [Part("scoring", "scoring", scored * len(bases))]
        corrected = [part._replace(stage="scoring") for part in resets]
        return found + corrected * (config["correct"] is not None)
    found = [*resets, Part("scoring", "scoring", scored)]
    merges = len(bases) - 1
    pairs = merges if many and "merge" in METHODS[many].parameters else 1
    if many and not {"align", "merge"}.intersection(METHODS[many].parameters):
        found.append(Part("alignment", "matching", comb(len(bases), 2)))
    elif align["method"] != "identity":
        found += _aligned(
            align, images, data["held_out"], None if many else (*bases, cell.seed, examples), merges
        )
    found += _chosen(aggregate, images, data["held_out"])
    found += [
        Part("learning", "learning", pairs * _passes(aggregate, aggregate["options"]) * images)
    ]
    if config["correct"]:
        found.append(Part("reset", "reset", pairs * images))
    if points := measures.get("path"):
        found += [
            Part("scoring", "scoring", points * test),
            Part("scoring", "reset", points * images),
        ]
    return [part for part in found if part.times]


def _aligned(
    align: Mapping[str, Any], images: float, held_out: float, pair: object, merges: int
) -> list[Part]:
    """Moments are measured once for all alignments of a pair, and each is found once."""
    name = align["method"]
    found = _chosen(align, images, held_out)
    moments = "statistics" in METHODS[name].parameters
    shared = pair and ("moments" if moments else name, pair)
    if "data" in METHODS[name].needs:
        return [
            *found,
            Part(
                "alignment", "alignment", merges * _passes(align, align["options"]) * images, shared
            ),
        ]
    return [*found, Part("alignment", "matching", merges, shared)]


def _chosen(method: Mapping[str, Any], images: float, held_out: float) -> list[Part]:
    """What is tried out on held-out data."""
    stage = "alignment" if METHODS[method["method"]].kind == "align" else "learning"
    found = []
    for value in method["options"].values():
        if isinstance(value, dict) and "choose" in value:
            tried = len(value["choose"]) * images
            passes = _passes(method, method["options"] | value["trial"]) * (stage == "learning")
            found += [
                Part(stage, "learning", passes * (1 - held_out) * tried),
                Part("reset", "reset", (1 - held_out) * tried),
                Part(stage, "scoring", held_out * tried),
            ]
    return found


def _passes(method: Mapping[str, Any], options: Mapping[str, Any]) -> int:
    """Epochs; one where a method takes data without them."""
    epochs: int = options.get("epochs", 1)
    return epochs if "data" in METHODS[method["method"]].needs else 0


def _cost(config: Mapping[str, Any], images: float, test: float) -> list[Part]:
    """See :mod:`npmerge.run.costs`."""
    if config.get("many"):
        return [
            Part("", kind, (config["copies"] - 1) * images)
            for kind in ("alignment", "learning", "reset")
        ]
    epochs = len(LEARNING) * config["epochs"]
    return [
        Part("", "alignment", AVERAGES * images),
        Part("", "learning", epochs * images),
        Part("", "reset", (AVERAGES + epochs) * images),
        Part("", "scoring", (1 + epochs) * test),
    ]


def trained_images(base: BaseModel) -> float:
    """Images that the training of a base model sees, all epochs together."""
    last = base.recipe.epochs if base.until is None else base.until
    first = base.trunk.until or 0 if base.trunk is not None else 0
    return (last - first) * _share(base)


@cache
def _share(base: BaseModel) -> int:
    images, _ = _images(base.dataset)
    if base.partition == "same":
        return images
    classes = 200 if base.dataset == "imagenet200" else DATASETS[base.dataset].classes
    return len(base.partition.indices(torch.arange(images) % classes))


@cache
def _images(name: str) -> tuple[int, int]:
    if name in IMAGES:
        return IMAGES[name]
    data = load(name)
    return len(data.train.labels), len(data.test.labels)
