"""Models as users have them: wrapped, in half precision, on another device."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)
"""What nothing is computed in: such models are merged in float32."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``.

    Args:
        model: wrapped or not, several times over too.
    """
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def checked(model: object, *, values: bool = True) -> nn.Module:
    """A model, if it is one that can be computed with.

    Args:
        model: anything.
        values: whether its parameters must have values.

    Raises:
        ValueError: it is no module, it has complex parameters, or they are on the device meta.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"a model is a {type(model).__name__}: give a module, or a function that returns one "
            "(`npmerge merge` takes files)"
        )
    for name, parameter in model.named_parameters():
        if parameter.is_complex():
            raise ValueError(
                f"parameter {name!r} is {parameter.dtype}: give a model of real numbers"
            )
        if values and parameter.is_meta:
            raise ValueError(
                f"parameter {name!r} is on the device meta, it has no values: load the model's state dict first"
            )
    return model


def prepared(model: object, device: torch.device | str | None = None) -> nn.Module:
    """A model to compute with: unwrapped, in float32 where it is in half precision, on a device.

    Args:
        model: not changed.
        device: where it is, by default.

    Returns:
        The model itself, or a copy where something had to change.

    Raises:
        ValueError: as :func:`checked`.
    """
    model = unwrapped(checked(model))

    def changed(tensor: Tensor) -> Tensor:
        dtype = torch.float32 if tensor.dtype in HALF else tensor.dtype
        return tensor.to(device=device, dtype=dtype)

    if all(changed(tensor) is tensor for tensor in _tensors(model).values()):
        return model
    model = copy.deepcopy(model)
    for tensor in _tensors(model).values():
        tensor.data = changed(tensor.data)
    return model


Kinds = dict[str, tuple[torch.device | str, torch.dtype]]
"""Where each parameter and buffer of a model is, and its type."""


def kinds_of(model: nn.Module) -> Kinds:
    """Where a model's parameters and buffers are, and their types.

    Args:
        model: wrapped or not.
    """
    return {name: (t.device, t.dtype) for name, t in _tensors(unwrapped(model)).items()}


def put_back(model: nn.Module, kinds: Kinds) -> nn.Module:
    """Give a merged model the devices and the types of a given one, in place.

    Args:
        model: merged.
        kinds: of a model of the same architecture; what that does not have gets those of its first tensor.

    Returns:
        The same model.
    """
    first = next(iter(kinds.values()), ())
    for name, tensor in _tensors(model).items():
        tensor.data = tensor.data.to(*kinds.get(name, first))
    return model


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])
