"""Short texts that come with every Python: the names of Unicode characters."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from npmerge.catalogue import dataset
from npmerge.data.batches import Batches, child_seed

LETTERS = " -0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""All that the names are written with; token 0 is the padding behind a text, token 1 the first of these."""
CATEGORIES = {
    "Lu": "upper-case letter", "Ll": "lower-case letter", "Lo": "other letter", "Mn": "mark",
    "Nd": "digit", "No": "other number", "Po": "punctuation", "Sm": "mathematical symbol",
    "So": "other symbol",
}  # fmt: skip
"""The classes, in their order: the general categories with enough names."""
EACH, LENGTH = 200, 32
"""Names of a class, and characters of a name, at most."""
FOUND_BY_CODE = ("CJK ", "HANGUL SYLLABLE", "YI SYLLABLE", "BRAILLE PATTERN")
"""How names begin that only count or spell out a code."""


@dataclass(frozen=True)
class Texts:
    """Texts with their labels.

    Attributes:
        tokens: ``int64 (N, T)``; 0 behind the end of a text.
        labels: ``int64 (N,)``.
    """

    tokens: Tensor
    labels: Tensor

    def read(self, row: int) -> str:
        """A text as it was written, as far as it was not cut.

        Args:
            row: its number.
        """
        return "".join(LETTERS[token - 1] for token in self.tokens[row].tolist() if token)


class TextBatches(Batches):
    """Batches of texts that live on one device: ``int64 (N, T)`` tokens and labels; nothing is augmented.

    Args:
        texts: the texts and their labels.
        batch_size: texts per batch.
        device: where they are kept and the batches are made.
        indices: which of the texts to use; all by default.
        shuffle: draw a new order every epoch.
        drop_last: leave out a last batch that is smaller than the others.
        seed: of the order.

    Raises:
        ValueError: no text is left to make a batch of, or ``batch_size`` is not positive.
    """

    def __init__(
        self,
        texts: Texts,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        indices: Tensor | None = None,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        rows = torch.arange(len(texts.labels)) if indices is None else indices
        self._set_up(
            texts.labels[rows], batch_size, mean=(0.0,), std=(1.0,), device=device,
            shuffle=shuffle, drop_last=drop_last, seed=seed,
        )  # fmt: skip
        self._tokens = texts.tokens[rows].to(self.device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass, the one of ``epoch``, which counts on."""
        generator = torch.Generator().manual_seed(child_seed(self.seed, self.epoch))
        self.epoch += 1
        count = len(self._labels)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        for rows in order[: self.images].to(self.device).split(self.batch_size):
            yield self._tokens[rows], self._labels[rows]


@dataclass(frozen=True)
class TextSet:
    """A set of short texts in memory, behind the interface of :class:`~npmerge.data.images.ImageData`.

    Attributes:
        name: as in the tables.
        train, test: the two halves.
        classes: how many classes there are.
        channels: how many different tokens there are, the padding among them.
    """

    name: str
    train: Texts
    test: Texts
    classes: int
    channels: int

    @property
    def image_size(self) -> int:
        """Tokens of a text."""
        return self.train.tokens.shape[1]

    def example(self) -> Tensor:
        """One text, the first to learn from, ``int64 (1, T)``."""
        return self.train.tokens[:1]

    def first(self, count: int) -> TextSet:
        """The set cut to its first texts.

        Args:
            count: how many texts to leave in each half, at most.
        """
        train, test = (
            Texts(half.tokens[:count], half.labels[:count]) for half in (self.train, self.test)
        )
        return replace(self, train=train, test=test)

    def train_batches(
        self,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        indices: Tensor | None = None,
        seed: int = 0,
    ) -> TextBatches:
        """Shuffled training texts; see :meth:`npmerge.data.images.ImageData.train_batches`."""
        count = len(self.train.labels) if indices is None else len(indices)
        return TextBatches(
            self.train, batch_size, device=device, indices=indices, shuffle=True,
            drop_last=count > batch_size, seed=seed,
        )  # fmt: skip

    def plain_batches(
        self,
        split: str,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        indices: Tensor | None = None,
    ) -> TextBatches:
        """Texts in order; see :meth:`npmerge.data.images.ImageData.plain_batches`."""
        texts = {"train": self.train, "test": self.test}[split]
        return TextBatches(texts, batch_size, device=device, indices=indices)


@dataset(
    label="names of characters", classes=9, image_size=32, channels=39, examples_per_class=149,
    place=5,
)  # fmt: skip
def character_names(_folder: Path | str | None = None, *, image_size: int = 32) -> TextSet:
    """The names of Unicode's characters, such as "GREEK SMALL LETTER ALPHA WITH TONOS", by their general category.

    Real text that comes with Python and never changes: the names and categories of Unicode 3.2, which the standard
    library keeps for internet names. A token is a character. Of each of nine categories at most 200 names are drawn,
    once, with seed 0, and a quarter of them is the test set; no name is in both. Names of more than 32 characters, and
    those that only count or spell out a code, are left out.

    Args:
        image_size: tokens of a text; shorter names are padded, longer ones cut, if it is less than 32.

    Raises:
        ValueError: it is not positive.
    """
    if image_size < 1:
        raise ValueError(f"image_size is {image_size}: a text needs at least one token")
    names: dict[str, list[str]] = {category: [] for category in CATEGORIES}
    known = unicodedata.ucd_3_2_0
    for code in range(0x110000):
        name = known.name(chr(code), "")
        if 0 < len(name) <= LENGTH and not name.startswith(FOUND_BY_CODE):
            names.get(known.category(chr(code)), []).append(name)
    generator = np.random.default_rng(0)
    halves: tuple[list[tuple[str, int]], list[tuple[str, int]]] = ([], [])
    for label, found in enumerate(names.values()):
        drawn = [found[k] for k in generator.permutation(len(found))[:EACH]]
        cut = len(drawn) // 4
        for half, part in zip(halves, (drawn[cut:], drawn[:cut]), strict=True):
            half.extend((name, label) for name in part)
    train, test = (_encoded(half, image_size, generator) for half in halves)
    return TextSet("character_names", train, test, len(CATEGORIES), 1 + len(LETTERS))


def _encoded(half: list[tuple[str, int]], length: int, generator: np.random.Generator) -> Texts:
    """The texts of a half in an order of their own, so that any first part has all classes."""
    tokens = torch.zeros(len(half), length, dtype=torch.int64)
    mixed = [half[k] for k in generator.permutation(len(half))]
    for row, (name, _) in enumerate(mixed):
        shown = name[:length]
        tokens[row, : len(shown)] = torch.tensor([1 + LETTERS.index(letter) for letter in shown])
    return Texts(tokens, torch.tensor([label for _, label in mixed]))
