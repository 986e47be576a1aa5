"""Whether two models are of one architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from npmerge.prepare import checked

_GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "groups")


def check_same_architecture(
    a: nn.Module, b: nn.Module, *, widths: bool = True, types: bool = False
) -> None:
    """Check that two models have the same modules, parameters and buffers.

    Args:
        a: The first model.
        b: The second model.
        widths: Whether their shapes, and the groups of convolutions, must be the same too.
        types: Whether the types of their numbers must be, as where both get the same inputs.

    Raises:
        ValueError: If they differ; the message names the first difference.
    """
    checked(a, values=False)
    checked(b, values=not _on_meta(a))
    modules_a, modules_b = dict(a.named_modules()), dict(b.named_modules())
    state_a, state_b = a.state_dict(), b.state_dict()
    _check_names("module", modules_a, modules_b)
    _check_names("tensor", state_a, state_b)
    for name, module in modules_a.items():
        where, other = f"module {name!r}", modules_b[name]
        _check_equal(where, "type", type(module).__name__, type(other).__name__)
        for key in _GEOMETRY:
            value = getattr(module, key, None)
            if isinstance(value, int | str | tuple) and (widths or key != "groups"):
                _check_equal(where, key, value, getattr(other, key, None))
    for name, tensor in state_a.items():
        if widths:
            _check_equal(repr(name), "shape", tuple(tensor.shape), tuple(state_b[name].shape))
        if types:
            _check_equal(repr(name), "type", tensor.dtype, state_b[name].dtype)


def _on_meta(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


_ADVICE = "merge two models of one architecture, width and type"


def _check_names(kind: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    for owner, names, others in (("first", a, b), ("second", b, a)):
        for name in names:
            if name not in others:
                raise ValueError(f"only the {owner} model has the {kind} {name!r}: {_ADVICE}")


def _check_equal(where: str, what: str, a: object, b: object) -> None:
    if a != b:
        raise ValueError(
            f"{where} has {what} {a} in the first model and {b} in the second: {_ADVICE}"
        )
