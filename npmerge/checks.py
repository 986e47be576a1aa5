"""What users give, checked where it comes in: whole numbers, finite numbers, seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import SupportsFloat

MOST = 2**63 - 1
"""The largest whole number that PyTorch takes."""

EPOCHS = 1_000_000
"""The most epochs that anything learns for."""

CLASSES = 1_000_000
"""The most outputs of a network."""

IMAGE_SIZE = 10_000
"""The most pixels a side of an image."""

WIDTH = 100
"""The most that the channels of a network are multiplied by."""


def check_whole(name: str, value: object, least: int = 0, most: int = MOST) -> None:
    """Raise if a value is no whole number within bounds.

    Args:
        name: what it is, for the message.
        value: as it was given.
        least: the smallest that is allowed.
        most: the largest.

    Raises:
        ValueError: it is something else.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or not least <= int(value) <= most:  # type: ignore[call-overload]
        bounds = f"{least} to {most if most < 2**32 else f'2^{most.bit_length()} - 1'}"
        raise ValueError(f"{name} is {_shown(value)}: give a whole number from {bounds}")


def check_finite(
    name: str, value: object, *, above: float = -math.inf, most: float = math.inf
) -> None:
    """Raise if a value is no finite number within bounds.

    Args:
        name: what it is, for the message.
        value: as it was given; a tensor or an array of one number is one.
        above: what it must be larger than.
        most: the largest that is allowed.

    Raises:
        ValueError: it is something else.
    """
    number = math.nan
    if isinstance(value, SupportsFloat) and not isinstance(value, bool) and _single(value):
        number = float(value)
    if not (math.isfinite(number) and above < number <= most):
        bounds = f" above {above:g}" * (above > -math.inf)
        bounds += f", at most {most:g}" * (most < math.inf)
        raise ValueError(f"{name} is {_shown(value)}: give a finite number{bounds}")


def check_seed(seed: object) -> None:
    """Raise a ``ValueError`` if a seed is none that all random generators take: a whole number below 2^64."""
    check_whole("seed", seed, most=2**64 - 1)


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise a ``ValueError`` if there is no seed, one that :func:`check_seed` refuses, or one given twice."""
    if not seeds:
        raise ValueError("no seeds: give at least one")
    for seed in seeds:
        check_seed(seed)
        if list(seeds).count(seed) > 1:
            raise ValueError(f"seed {seed} is given twice: give each seed once")


def _single(value: object) -> bool:
    return not getattr(value, "ndim", 0)  # tensors and arrays have one


def _shown(value: object) -> str:
    known = value is None or isinstance(value, str | bytes | SupportsFloat)
    return repr(value) if known and _single(value) else f"a {type(value).__name__}"
