"""Merge neural networks that were trained apart: align their neurons, learn how much each parameter counts."""

from importlib import import_module
from typing import TYPE_CHECKING

from npmerge._version import __version__

if TYPE_CHECKING:
    from npmerge import (
        aggregate,
        align,
        correct,
        data,
        evaluate,
        experiments,
        many,
        models,
        symmetry,
    )
    from npmerge.correct import reset_batchnorm
    from npmerge.inspection import Inspection, inspect
    from npmerge.merging import Choice, HeldOut, Merged, merge
    from npmerge.methods import METHODS, method
    from npmerge.symmetry import (
        Group,
        Slot,
        Symmetry,
        SymmetryError,
        check_symmetry,
        find_symmetry,
    )

__all__ = [
    "METHODS",
    "Choice",
    "Group",
    "HeldOut",
    "Inspection",
    "Learning",
    "Merged",
    "Slot",
    "Symmetry",
    "SymmetryError",
    "__version__",
    "aggregate",
    "align",
    "check_symmetry",
    "correct",
    "data",
    "evaluate",
    "experiments",
    "find_symmetry",
    "inspect",
    "many",
    "merge",
    "method",
    "models",
    "reset_batchnorm",
    "symmetry",
]

_PLACES = {
    "METHODS": "npmerge.methods",
    "method": "npmerge.methods",
    "Choice": "npmerge.merging",
    "Inspection": "npmerge.inspection",
    "inspect": "npmerge.inspection",
    "HeldOut": "npmerge.merging",
    "Merged": "npmerge.merging",
    "Learning": "npmerge.training",
    "merge": "npmerge.merging",
    "Group": "npmerge.symmetry",
    "Slot": "npmerge.symmetry",
    "Symmetry": "npmerge.symmetry",
    "SymmetryError": "npmerge.symmetry",
    "check_symmetry": "npmerge.symmetry",
    "find_symmetry": "npmerge.symmetry",
    "reset_batchnorm": "npmerge.correct",
}


def __getattr__(name: str) -> object:
    """Import what is asked for, and not before: the command line answers without PyTorch."""
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    if name in __all__:
        return import_module(f"npmerge.{name}")
    raise AttributeError(f"module 'npmerge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
