"""Identity: no alignment, as in direct averaging."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from npmerge.align.alignment import Alignment
from npmerge.methods import method
from npmerge.symmetry import Group, check_same_architecture, find_symmetry


@method(kind="align", label="Direct averaging", short="D", family="alignment", place=1)
def identity(
    a: nn.Module, b: nn.Module, example: Tensor, *, groups: Sequence[Group] | None = None
) -> Alignment:
    """Leave every channel of B where it is.

    Args:
        a: Model A.
        b: Model B, of the same architecture.
        example: A batch the models accept, (N, C, ...); only its shape is used.
        groups: The symmetry groups, if already known.

    Returns:
        The identity permutation of every group.

    Raises:
        ValueError: If the models differ in architecture or shape.
        SymmetryError: If the model's symmetry groups cannot be found.

    Source:
        The paper's "Direct Averaging".
    """
    check_same_architecture(a, b)
    groups = find_symmetry(a, example) if groups is None else groups
    return Alignment.from_permutations(groups, [torch.arange(g.size) for g in groups])
