"""Merge neural networks that were trained apart: align their neurons, learn how much each parameter counts."""

from importlib.metadata import version

from npmerge import aggregate, align, data, evaluate, experiments, models
from npmerge.batchnorm import reset_batchnorm
from npmerge.merge import Merged, merge
from npmerge.symmetry import Group, Slot, SymmetryError, symmetry

__version__ = version("npmerge")

__all__ = [
    "Group",
    "Merged",
    "Slot",
    "SymmetryError",
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
