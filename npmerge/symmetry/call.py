"""One run of an operation, as a rule sees it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from npmerge.symmetry.atoms import Axis, Layout, rigid
from npmerge.symmetry.groups import Role

if TYPE_CHECKING:
    from npmerge.symmetry.watch import Watch


class Call:
    """One run of an operation, as a rule sees it.

    Attributes:
        operation: its ATen name, e.g. ``"convolution"``.
        args: the arguments by the names of its schema.
        inputs: the tensors among them.
        outputs: the tensors that came out.
        atoms: where axes are united, cut, split and pinned.
    """

    def __init__(self, watch: Watch, operation: str, args: Any, inputs: list[Tensor]) -> None:
        self.operation, self.args, self.inputs = operation, args, inputs
        self.outputs: list[Tensor] = []
        self.atoms = watch.atoms
        self.strides = {id(tensor): strides(tensor) for tensor in inputs}
        self.stated: set[int] = set()
        self._watch = watch
        self._layouts = {id(tensor): watch.layout_of(tensor) for tensor in inputs}

    def of(self, tensor: Tensor) -> Layout:
        """What the axes of an input enumerate."""
        return self._layouts[id(tensor)]

    def use(self, tensor: Tensor, *roles: Role) -> None:
        """Say how the axes of a tensor are used, should it be a parameter.

        Args:
            tensor: an input.
            *roles: one an axis, or one for all.
        """
        self.stated.add(id(tensor))
        for axis in range(tensor.ndim):
            self._watch.note_role(tensor, axis, roles[min(axis, len(roles) - 1)], self)

    def added(self, tensors: Iterable[Tensor]) -> None:
        """Say that tensors are added to activations, or stand beside them.

        Parameters among them are mapped as those are.
        """
        tensors = list(tensors)
        if not all(map(self._watch.is_weight, tensors)):
            for tensor in tensors:
                self.use(tensor, "out")

    def vector(self, tensor: Tensor | None, axis: Axis, role: Role = "out") -> None:
        """Say that a parameter ``(C,)`` enumerates an axis; ``None`` says nothing."""
        if tensor is not None:
            self.atoms.unify(axis, self.of(tensor)[0])
            self.use(tensor, role)

    def permutations_only(self, axis: Axis) -> None:
        """Say that no other linear map than a permutation of an axis means anything here."""
        self._watch.restrict(axis, self)

    def pin_all(self, tensors: Iterable[Tensor] | None = None) -> None:
        """Hold every axis of some tensors, by default of all inputs, fixed."""
        for tensor in self.inputs if tensors is None else tensors:
            for axis in self.of(tensor):
                self.atoms.pin(axis)

    def rigid_outputs(self) -> list[Layout]:
        """Outputs of which nothing moves."""
        return [[rigid(size) for size in output.shape] for output in self.outputs]

    def __str__(self) -> str:
        return f"operation {self.operation!r} in {self._watch.modules.describe()}"


def strides(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor's entries lie, axes of length 1 left out."""
    shape = zip(tensor.shape, tensor.stride(), strict=True)
    return (tensor.storage_offset(), *((size, step) for size, step in shape if size != 1))
