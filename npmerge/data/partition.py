"""Who sees which training images: index sets from labels and a seed."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Partition:
    """One model's share of a split of the training images.

    Attributes:
        split: :func:`split_80_20` or :func:`dirichlet`.
        part: which share, counted from 0.
        models: how many models share the images; two for 80-20.
        seed: of the split.
        concentration: of the Dirichlet distribution.
        least: images that every share has at least, of :func:`dirichlet`.
        apart: images a class that belong to no share: those that :func:`per_class` picks with the same seed.
    """

    split: Literal["80-20", "dirichlet"]
    part: int
    models: int
    seed: int
    concentration: float = 0.5
    least: int = 0
    apart: int = 0

    @property
    def made_of(self) -> dict[str, Any]:
        """All of it, JSON-serialisable; what is as by default has no say in it."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        defaults = {field.name: field.default for field in fields(self)}
        return {name: value for name, value in values.items() if value != defaults[name]}

    def indices(self, labels: Tensor) -> Tensor:
        """The sorted indices of the share.

        Args:
            labels: of all training images, ``int64 (N,)``.

        Raises:
            ValueError: the split is unknown, or not made for so many models; a class has too few images to set so many
                apart, or there are too few for the shares.
        """
        if self.apart:
            ours = torch.ones(len(labels), dtype=torch.bool)
            ours[per_class(labels, self.apart, seed=self.seed)] = False
            shared = ours.nonzero().flatten()
            return shared[replace(self, apart=0).indices(labels[shared])]
        if self.split == "dirichlet":
            return dirichlet(
                labels, self.models, seed=self.seed, concentration=self.concentration,
                least=self.least,
            )[self.part]  # fmt: skip
        if self.split != "80-20" or self.models != 2:
            raise ValueError(
                f"no split {self.split!r} for {self.models} models: take 80-20 (two models) or dirichlet"
            )
        return split_80_20(labels, seed=self.seed)[self.part]


def same(labels: Tensor, models: int = 2) -> list[Tensor]:
    """Every model sees every image (Section IV-B).

    Args:
        labels: ``int64 (N,)``.
        models: how many index sets to make.

    Returns:
        ``models`` equal index sets ``int64 (N,)``.
    """
    return [torch.arange(len(labels)) for _ in range(models)]


def split_80_20(labels: Tensor, *, seed: int, share: float = 0.8) -> list[Tensor]:
    """The 80%-20% split of Section IV-A: two disjoint index sets that together are complete.

    Args:
        labels: ``int64 (N,)``.
        seed: of the draw within each class.
        share: the part of each class in the first half of the classes that model A gets; it gets ``1 - share`` of the
            rest.

    Returns:
        The sorted indices of model A and of model B.
    """
    generator = torch.Generator().manual_seed(seed)
    classes = int(labels.max()) + 1
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for label in range(classes):
        rows = _shuffled(labels, label, generator)
        cut = round(len(rows) * (share if label < classes // 2 else 1 - share))
        parts[0].append(rows[:cut])
        parts[1].append(rows[cut:])
    return [torch.cat(part).sort().values for part in parts]


def dirichlet(
    labels: Tensor, models: int = 2, *, seed: int, concentration: float = 0.5, least: int = 0
) -> list[Tensor]:
    """The Dirichlet split of Section IV-A: each class is shared out by its own draw of Dir(0.5, ..., 0.5).

    The smaller the concentration, the fewer models share a class. A model may be left with hardly an image: where it
    has fewer than ``least``, it is given images that are drawn from those of whichever model has most at that time.

    Args:
        labels: ``int64 (N,)``.
        models: how many index sets to make.
        seed: of the shares and of the draw within each class.
        concentration: the Dirichlet parameter, above 0, the same for every model.
        least: images that every model has at least.

    Returns:
        ``models`` sorted, disjoint index sets, together complete. A model may get no image of a class.

    Raises:
        ValueError: the concentration is not positive, or there are too few images for ``least``.
    """
    if not concentration > 0:
        raise ValueError(f"concentration is {concentration}: it must be above 0")
    if least * models > len(labels):
        raise ValueError(
            f"{models} models of at least {least} images asked for, but there are {len(labels)}"
        )
    generator = torch.Generator().manual_seed(seed)
    shares = np.random.default_rng(seed)
    parts: list[list[Tensor]] = [[] for _ in range(models)]
    for label in range(int(labels.max()) + 1):
        rows = _shuffled(labels, label, generator)
        counts = torch.from_numpy(shares.dirichlet([concentration] * models) * len(rows)).long()
        lucky = torch.randperm(models, generator=generator)[: len(rows) - int(counts.sum())]
        counts[lucky] += 1
        for part, piece in zip(parts, torch.split(rows, counts.tolist()), strict=True):
            part.append(piece)
    whole = [torch.cat(part) for part in parts]
    for poor in range(models):
        while (lacking := least - len(whole[poor])) > 0:
            rich = max(range(models), key=lambda model: len(whole[model]))
            drawn = whole[rich][torch.randperm(len(whole[rich]), generator=generator)]
            given = min(lacking, len(drawn) - least)
            whole[poor], whole[rich] = torch.cat([whole[poor], drawn[:given]]), drawn[given:]
    return [part.sort().values for part in whole]


def per_class(labels: Tensor, count: int, *, seed: int) -> Tensor:
    """``count`` images of every class (Section IV-D); smaller counts are subsets of larger ones with the same seed.

    Args:
        labels: ``int64 (N,)``.
        count: images a class.
        seed: of the draw within each class.

    Returns:
        The sorted indices.

    Raises:
        ValueError: ``count`` is not positive, or a class has fewer images.
    """
    generator = torch.Generator().manual_seed(seed)
    picked = []
    for label in range(int(labels.max()) + 1):
        rows = _shuffled(labels, label, generator)
        if not 1 <= count <= len(rows):
            raise ValueError(
                f"{count} images per class asked for, but class {label} has {len(rows)}"
            )
        picked.append(rows[:count])
    return torch.cat(picked).sort().values


def holdout(labels: Tensor, fraction: float, *, seed: int) -> tuple[Tensor, Tensor]:
    """Set a stratified part of the training images aside for choosing hyper-parameters.

    Where that would leave a class without an image (with one image a class, say), the part is drawn from all images
    without regard to their classes.

    Args:
        labels: ``int64 (N,)``, at least two.
        fraction: of every class, in (0, 1), that is set aside; at least one image.
        seed: of the draw within each class.

    Returns:
        The sorted indices that are kept and those that are set aside.

    Raises:
        ValueError: ``fraction`` is not in (0, 1).
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction}: it must lie between 0 and 1")
    generator = torch.Generator().manual_seed(seed)
    kept, aside = [], []
    for label in range(int(labels.max()) + 1):
        rows = _shuffled(labels, label, generator)
        cut = max(1, round(len(rows) * fraction))
        if 0 < len(rows) <= cut:
            rows = torch.randperm(len(labels), generator=generator)
            cut = max(1, round(len(rows) * fraction))
            return rows[cut:].sort().values, rows[:cut].sort().values
        aside.append(rows[:cut])
        kept.append(rows[cut:])
    return torch.cat(kept).sort().values, torch.cat(aside).sort().values


def _shuffled(labels: Tensor, label: int, generator: torch.Generator) -> Tensor:
    rows = (labels == label).nonzero().flatten()
    return rows[torch.randperm(len(rows), generator=generator)]
