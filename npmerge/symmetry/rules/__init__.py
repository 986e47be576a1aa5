"""What each operation does to the axes of its tensors.

A rule is a function of one run of an operation (:class:`npmerge.symmetry.call.Call`). It returns what the axes of each
output enumerate, and says on the way which axes must enumerate the same things. A file holds the rules of one kind of
operation; all files of this folder are read.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from npmerge.symmetry.atoms import Layout

if TYPE_CHECKING:
    from npmerge.symmetry.call import Call

F = TypeVar("F", bound="Callable[[Call], list[Layout]]")


@dataclass(frozen=True)
class Rule:
    """A rule, and whether what comes out shows what neurons answer, so that a group may be measured there."""

    function: Callable[[Call], list[Layout]]
    measurable: bool


RULES: dict[str, Rule] = {}
"""Rules by the name of the ATen operation, without the underscore of in-place variants."""


def rule(*names: str, measurable: bool = False) -> Callable[[F], F]:
    """Register the rule of some operations.

    Args:
        *names: ATen names, e.g. ``"convolution"``; several in one text may be separated by spaces.
        measurable: whether a group may be measured at an output: a weight layer, a normalisation, an elementwise
            function.

    Returns:
        A decorator that gives the function back.
    """

    def register(function: F) -> F:
        for name in " ".join(names).split():
            RULES[name] = Rule(function, measurable)
        return function

    return register


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
