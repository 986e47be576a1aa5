"""Models that are loaded when they are needed, so that memory does not grow with their number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from npmerge.aggregate.summing import emptied, with_tensors
from npmerge.store.checkpoints import load_state, save_state
from npmerge.store.files import write_atomically

Load = Callable[[], nn.Module]
"""Loads a model, afresh at every call."""
Models = Sequence[Load]
"""Models that are loaded when they are needed and given up right after: memory does not grow with their number."""


def put_away(model: nn.Module, path: Path, **metadata: Any) -> Load:
    """Write a model to a file until it is needed.

    Args:
        model: the model.
        path: of the safetensors file.
        metadata: JSON-serialisable, kept in the file.

    Returns:
        A function that reads it back, at every call, with its devices, dtypes, memory formats and modes.
    """
    state = model.state_dict()
    write_atomically(path, partial(save_state, state=state, metadata=metadata))
    devices = {name: value.device for name, value in state.items()}
    return partial(_taken_out, emptied(model), devices, path)


def check_models(models: Models) -> None:
    """Raise a ``ValueError`` if there are no models, or if they are not functions that load them."""
    if not models:
        raise ValueError("no models: give at least one")
    for number, load in enumerate(models):
        if isinstance(load, nn.Module):
            raise ValueError(
                f"models[{number}] is a {type(load).__name__}: give functions that load the models"
            )


def drawn_seed(generator: torch.Generator) -> int:
    """A seed for something of its own."""
    return int(torch.randint(2**31, (), generator=generator))


def _taken_out(empty: nn.Module, devices: Mapping[str, torch.device], path: Path) -> nn.Module:
    state = load_state(path)
    values = {
        name: torch.empty_like(value, device=devices[name]).copy_(state[name])
        for name, value in empty.state_dict().items()
    }
    return with_tensors(empty, values)
