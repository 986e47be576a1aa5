"""State dicts in files: read whole or not at all, held against the model they are for."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PICKLED = (".pt", ".pth")
"""Endings of files that ``torch.save`` has written; every other file is read as safetensors."""


def load_state(path: Path | str) -> dict[str, Tensor]:
    """Read a state dict: safetensors, or a ``.pt`` or ``.pth`` file of ``torch.save`` without running code from it.

    Args:
        path: the file.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        ValueError: there is no such file, it is truncated or damaged, or it holds something else than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no file {path}: give a checkpoint, .safetensors, .pt or .pth")
    try:
        if path.suffix in PICKLED:
            state: Any = torch.load(path, map_location="cpu", weights_only=True)
        else:
            state = load_file(path)
    except Exception as error:  # what torch.load raises for damaged bytes is not bounded
        raise ValueError(
            f"{path} is damaged or not a checkpoint ({_reason(error)}): copy or save it again"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no plain state dict: save model.state_dict() alone")
    return dict(state)


def load_into(model: nn.Module, path: Path | str) -> nn.Module:
    """Load a checkpoint into a model, in place.

    Args:
        model: of the checkpoint's architecture.
        path: see :func:`load_state`.

    Returns:
        The same model in evaluation mode.

    Raises:
        ValueError: the checkpoint cannot be read, does not fit (the first difference is named), or holds values that
            are not finite.
    """
    state = load_state(path)
    difference = _first_difference(model.state_dict(), state)
    if difference:
        raise ValueError(
            f"{path} does not fit the model: {difference}; check the model's name, width, classes and image size"
        )
    for name, value in state.items():
        if not value.isfinite().all():
            raise ValueError(f"{path} holds values in {name!r} that are not finite: train it again")
    model.load_state_dict(state)
    return model.eval()


def save_state(
    path: Path | str, state: Mapping[str, Tensor], metadata: Mapping[str, object]
) -> None:
    """Write tensors to a safetensors file, contiguous and each on its own.

    Args:
        path: the file; see :func:`npmerge.zoo.write_atomically` to write it in one piece.
        state: tensors by name.
        metadata: how they were made; every value is stored as JSON.
    """
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
    }
    save_file(
        tensors,
        path,
        metadata={key: json.dumps(value, sort_keys=True) for key, value in metadata.items()},
    )


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        return "it is not a pickle of tensors alone"
    return str(error).strip().split("\n")[0] or type(error).__name__


def _first_difference(model: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str | None:
    for name, value in model.items():
        if name not in state:
            return f"the model has {name!r} and the checkpoint has not"
        if state[name].shape != value.shape:
            wanted, given = tuple(value.shape), tuple(state[name].shape)
            return f"{name!r} is {wanted} in the model and {given} in the checkpoint"
    for name in state:
        if name not in model:
            return f"the checkpoint has {name!r} and the model has not"
    return None
