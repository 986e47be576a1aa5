"""Picking up activations in a second pass: each is handed on the moment it exists, and the pass ends after the last."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from npmerge.named import user_code
from npmerge.symmetry.groups import Group, SymmetryError
from npmerge.symmetry.watch import Modules, evaluating, operation_of, plain_operations


class _LastError(Exception):
    """The last tap was reached."""


class _Tapping(TorchDispatchMode):
    def __init__(
        self, modules: Modules, groups: Sequence[Group], take: Callable[[int, Tensor], None]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # PyTorch's hook has no types
        self._modules, self._take = modules, take
        self.held: dict[int, Tensor] = {}
        self.wanted: dict[tuple[str, str, int], list[tuple[int, int]]] = {}
        for number, group in enumerate(groups):
            if group.tap is not None:
                key = group.tap.path, group.tap.operation, group.tap.occurrence
                self.wanted.setdefault(key, []).append((number, group.tap.output))
        self._operations = {operation for _, operation, _ in self.wanted}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.held and func._schema.is_mutable:
            self._save(args)
        out = func(*args, **(kwargs or {}))
        name = operation_of(func)
        if name in self._operations:
            key = self._modules.path, name, self._modules.tick(name)
            tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
            for number, output in self.wanted.pop(key, ()):
                self._take(number, tensors[output])
            if not self.wanted:
                raise _LastError
        return out

    def _save(self, args: Any) -> None:
        """Copy what is held and may be about to be overwritten."""
        written = {_memory(leaf) for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
        for number, tensor in self.held.items():
            if _memory(tensor) in written:
                self.held[number] = tensor.clone()


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def activations(
    model: nn.Module, groups: Sequence[Group], *inputs: Any, **named: Any
) -> list[Tensor | None]:
    """What the neurons of each group answer.

    Args:
        model: Whose groups they are; in evaluation mode for this call. It is not changed.
        groups: The symmetry groups.
        *inputs: The model's inputs.
        **named: Inputs by keyword.

    Returns:
        Per group the activation that shows it, whole; ``group.tap`` says where the group lies on it. ``None`` for a
        group that none shows.

    Raises:
        SymmetryError: As :func:`tap`.
    """
    held: dict[int, Tensor] = {}
    _run(model, groups, held.__setitem__, held, inputs, named)
    return [held.get(number) for number in range(len(groups))]


def tap(
    model: nn.Module,
    groups: Sequence[Group],
    take: Callable[[int, Tensor], None],
    *inputs: Any,
    **named: Any,
) -> None:
    """Run a model in evaluation mode and hand out the activations that show its groups.

    Args:
        model: Whose groups they are. It is not changed.
        groups: The symmetry groups; one without an activation is passed over.
        take: Called with a group's number and its activation the moment it exists, in the order of the pass; later
            operations may overwrite it, and it must not be changed.
        *inputs: The model's inputs.
        **named: Inputs by keyword.

    Raises:
        SymmetryError: If an activation does not appear: the pass took another course than the one watched.
    """
    _run(model, groups, take, {}, inputs, named)


def _run(
    model: nn.Module,
    groups: Sequence[Group],
    take: Callable[[int, Tensor], None],
    held: dict[int, Tensor],
    inputs: Any,
    named: Any,
) -> None:
    if not any(group.tap for group in groups):
        return
    modules = Modules(model)
    mode = _Tapping(modules, groups, take)
    mode.held = held
    quiet = contextlib.suppress(_LastError)
    own = user_code(f"model {type(model).__name__}", "give inputs that it takes")
    with evaluating(model), plain_operations(), modules.follow(), own, quiet, mode:
        model(*inputs, **named)
    if mode.wanted:
        path, operation, _ = next(iter(mode.wanted))
        raise SymmetryError(
            f"operation {operation!r} in {modules.describe(path)} did not run as often as on the example: "
            "find the groups of a model of this architecture, on inputs that take the same course"
        )
