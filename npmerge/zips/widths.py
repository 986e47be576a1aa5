"""A module with tensors of other shapes: the one place that knows which fields of a layer hold its widths."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

FIELDS: Mapping[str, tuple[str, int]] = {
    "in_features": ("weight", 1),
    "out_features": ("weight", 0),
    "nf": ("weight", 1),
    "num_embeddings": ("weight", 0),
    "embedding_dim": ("weight", 1),
    "num_parameters": ("weight", 0),
    "num_channels": ("weight", 0),
    "num_features": ("running_mean", 0),
}
"""Fields that are the length of an axis of a tensor of the layer."""
HEADS = ("num_heads", "num_attention_heads", "n_head", "n_heads", "nhead")
"""Fields of modules that split a width among heads, in code of their own."""


@torch.no_grad()
def resized(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Copy a model with other tensors, whose widths may be others too.

    Parameters that are shared stay shared, frozen ones frozen. Where a shape is another one, the layer's own fields
    follow: ``in_channels``, ``out_channels`` and ``groups`` of convolutions, ``num_features``, ``in_features``,
    ``normalized_shape`` and their like. Widths that a model's own code has written out are not seen.

    Args:
        model: it is not changed.
        state: a tensor for each name of the state dict, in the types and on the devices that they are to have.

    Returns:
        The copy.

    Raises:
        ValueError: a tensor would have another number of axes, or a width is split among heads or among groups of
            channels.
    """
    result, before = copy.deepcopy(model), model.state_dict()
    changed: set[str] = set()
    for name, tensor in result.state_dict(keep_vars=True).items():
        new = state[name]
        if before[name].ndim != new.ndim:
            raise ValueError(
                f"{name!r} has {tensor.ndim} axes and would have {new.ndim}: give tensors of this architecture"
            )
        if before[name].shape != new.shape:
            changed.add(name.rpartition(".")[0])
        if (tensor.shape, tensor.dtype, tensor.device) == (new.shape, new.dtype, new.device):
            tensor.copy_(new)
        else:
            tensor.data = new.detach().clone()
    for name, module in result.named_modules():
        below = f"{name}." if name else ""
        if any(hasattr(module, field) for field in HEADS) and any(
            at == name or at.startswith(below) for at in changed
        ):
            raise ValueError(
                f"{name!r} splits its width among heads, which cannot become another one: "
                "merge models of one width"
            )
        if name in changed:
            _follow(name, module, model.get_submodule(name))
    return result


def _follow(name: str, module: Any, before: Any) -> None:
    """Set the fields of one layer."""
    for field, (tensor, axis) in FIELDS.items():
        value = getattr(module, tensor, None)
        value = getattr(module, "weight", None) if value is None else value
        if isinstance(getattr(module, field, None), int) and value is not None:
            setattr(module, field, value.shape[axis])
    if isinstance(getattr(module, "normalized_shape", None), tuple) and module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)
    if isinstance(module, _ConvNd):
        across, along = module.weight.shape[:2]
        if before.groups > 1 and along == before.weight.shape[1] == 1:  # channel by channel
            module.groups = across * before.groups // before.weight.shape[0]
        ends = ("in_channels", "out_channels")
        first, second = ends if module.transposed else ends[::-1]
        setattr(module, first, across)
        setattr(module, second, along * module.groups)
    if width := _uneven(module):
        raise ValueError(
            f"{name!r} has {width} channels, which its groups do not divide: choose another width"
        )


def _uneven(module: Any) -> int:
    """The width of a layer that its groups of channels do not divide; else 0."""
    if isinstance(module, nn.GroupNorm):
        return module.num_channels if module.num_channels % module.num_groups else 0
    if isinstance(module, _ConvNd):
        return next((n for n in (module.in_channels, module.out_channels) if n % module.groups), 0)
    return 0
