"""Symmetry groups: which axes of which parameters must be permuted together."""

from npmerge.symmetry.architecture import check_same_architecture
from npmerge.symmetry.finding import (
    Check,
    check_symmetry,
    compare,
    find_symmetry,
    permute_randomly,
    symmetry_on,
)
from npmerge.symmetry.groups import Group, Role, Slot, Span, Symmetry, SymmetryError, Tap
from npmerge.symmetry.rules import RULES, rule
from npmerge.symmetry.taps import activations, tap

__all__ = [
    "RULES",
    "Check",
    "Group",
    "Role",
    "Slot",
    "Span",
    "Symmetry",
    "SymmetryError",
    "Tap",
    "activations",
    "check_same_architecture",
    "check_symmetry",
    "compare",
    "find_symmetry",
    "permute_randomly",
    "rule",
    "symmetry_on",
    "tap",
]
