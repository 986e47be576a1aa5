"""Identity: no alignment, as in direct averaging."""

from __future__ import annotations

from torch import nn

from npmerge.align.alignment import Alignment
from npmerge.methods import method
from npmerge.symmetry import check_same_architecture


@method(
    kind="align",
    label="Direct averaging",
    short="D",
    family="alignment",
    place=1,
    use="For models that began as one and have not moved far; else as the control that shows what alignment brings.",
)
def identity(a: nn.Module, b: nn.Module) -> Alignment:
    """Leave every channel of B where it is; no symmetry is looked for.

    Args:
        a: Model A.
        b: Model B, of the same architecture.

    Returns:
        The alignment of no group.

    Raises:
        ValueError: If the models differ in architecture or shape.

    Source:
        The paper's "Direct Averaging".
    """
    check_same_architecture(a, b)
    return Alignment((), (), ())
