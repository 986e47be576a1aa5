"""Merge neural networks that were trained apart: align their neurons, learn how much each parameter counts."""

from npmerge import aggregate, align, data, evaluate, experiments, models
from npmerge._version import __version__
from npmerge.batchnorm import reset_batchnorm
from npmerge.merge import Merged, merge
from npmerge.symmetry import Group, Slot, SymmetryError, symmetry

__all__ = [
    "Group",
    "Merged",
    "Slot",
    "SymmetryError",
    "__version__",
    "aggregate",
    "align",
    "data",
    "evaluate",
    "experiments",
    "merge",
    "models",
    "reset_batchnorm",
    "symmetry",
]
