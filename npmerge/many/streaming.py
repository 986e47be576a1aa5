"""Models that are loaded when they are needed, so that memory does not grow with their number."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from npmerge.store.checkpoints import load_state, save_state
from npmerge.store.files import write_atomically
from npmerge.symmetry import check_same_architecture

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


class Sum:
    """Models of one architecture added up in float64, each times its weight, on the devices of the first one."""

    def __init__(self, first: nn.Module, weight: float = 1) -> None:
        state = first.state_dict()
        self._like = emptied(first)
        self._weight = weight
        self._kept = {name: v.clone() for name, v in state.items() if not v.is_floating_point()}
        self._sums = {
            name: weight * v.to(torch.float64) for name, v in state.items() if v.is_floating_point()
        }

    def add(self, model: nn.Module, weight: float = 1) -> None:
        """Add a model."""
        check_same_architecture(self._like, model)
        state = model.state_dict()
        for name, total in self._sums.items():
            total.add_(state[name].to(total.device), alpha=weight)
        self._weight += weight

    def mean(self) -> nn.Module:
        """The mean as a new model, in the dtypes of the first one."""
        values = dict(self._kept)
        for name, empty in self._like.state_dict().items():
            if name in self._sums:
                values[name] = (self._sums[name] / self._weight).to(empty.dtype)
        return _with_tensors(self._like, values)


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


def _with_tensors(model: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model that has these tensors in the place of its own; tied ones stay tied."""
    memo: dict[int, Any] = {}  # deepcopy takes these instead of copying
    for name, old in model.state_dict(keep_vars=True).items():
        new = values[name]
        memo[id(old)] = (
            nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        )
    return copy.deepcopy(model, memo)


def emptied(model: nn.Module) -> nn.Module:
    """A copy of a model without its data: on the meta device, where memory formats are kept."""
    return _with_tensors(model, {name: v.to("meta") for name, v in model.state_dict().items()})


def _taken_out(empty: nn.Module, devices: Mapping[str, torch.device], path: Path) -> nn.Module:
    state = load_state(path)
    values = {
        name: torch.empty_like(value, device=devices[name]).copy_(state[name])
        for name, value in empty.state_dict().items()
    }
    return _with_tensors(empty, values)
