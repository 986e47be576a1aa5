"""Symmetry groups: which axes of which parameters must be permuted together.

The model is traced by ``torch.fx`` and run once on the meta device. The channel axis of every
tensor is described by a list of segments, each a set of interchangeable channels; operations that
force two axes to be the same unite them. Whatever is not tied to the model's input or output is a
symmetry group.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg

from npmerge._channels import (
    Activation,
    Channels,
    Layout,
    Role,
    UnsupportedError,
    Weight,
    length,
)
from npmerge._rules import (
    FUNCTIONS,
    MEASURABLE_MODULES,
    MEASURABLE_RULES,
    METHODS,
    MODULES,
    tensors,
)


class SymmetryError(ValueError):
    """The model contains an operation whose permutation symmetry is not known."""


@dataclass(frozen=True)
class Slot:
    """Where a group acts on one axis of one tensor of the state dict.

    Attributes:
        name: State-dict key of a parameter or buffer, e.g. ``layer1.0.conv1.weight``.
        axis: The axis that enumerates the group's channels.
        role: ``"out"``: as produced; ``"in"``: as consumed; ``"scale"``: a normalised channel's
            scale (batch norm's weight); ``"variance"``: a produced channel's variance (batch norm's
            running variance); ``"tied"``: consumed and produced by one index (depthwise
            convolution).
        length: Full length of the axis.
        offset: First index on the axis that belongs to the group (concatenation).
        block: Consecutive indices per channel (positions of a flattened map, a depthwise
            multiplier).
    """

    name: str
    axis: int
    role: Role
    length: int
    offset: int = 0
    block: int = 1


@dataclass(frozen=True)
class Group:
    """Channels that can be permuted without changing the model's function.

    Attributes:
        name: Stable, readable name.
        size: Number of channels.
        slots: Every place in the state dict that enumerates these channels.
        node: Name of the fx node whose output represents the group; its axis 1 enumerates the
            channels.
        offset: First channel of the group on that axis; 0, and the axis exactly the group's,
            wherever there is such a node.
    """

    name: str
    size: int
    slots: tuple[Slot, ...]
    node: str
    offset: int = 0


def find_symmetry(model: nn.Module, example_input: Tensor) -> tuple[Group, ...]:
    """Read the permutation symmetry groups off a model.

    A group is represented by the last node whose channels are exactly the group's and that is an
    element-wise operation, a normalisation or a weight layer: the end of a residual stream, after
    its non-linearity and before any pooling.

    Args:
        model: Any module that ``torch.fx`` can trace. It is not changed, and nothing is computed
            with its values.
        example_input: A batch the model accepts, (N, C, ...); only its shape is used.

    Returns:
        The groups in the order of their nodes. Groups of one channel are left out.

    Raises:
        SymmetryError: If the model cannot be traced or contains an operation without a known rule;
            the message names the operation and its module.
        ValueError: If ``example_input`` has no channel axis.

    Source:
        Section II-C of the paper (permutation symmetry); Ainsworth et al. 2023, "Git Re-Basin".
    """
    if example_input.ndim < 2:
        shape = tuple(example_input.shape)
        raise ValueError(f"example_input has shape {shape}: give a batch of shape (N, C, ...)")
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    # Two images, whatever was given: an axis of length 1 would be lost by squeeze().
    images = torch.empty((2, *example_input.shape[1:]), dtype=dtype, device="meta")
    tracer = _Tracer(model)
    with torch.no_grad():
        tracer.run(images)
    return tracer.groups()


def trace(model: nn.Module, device: torch.device | str | None = None) -> fx.GraphModule:
    """Trace a copy of the model in evaluation mode; the model itself is not touched.

    Args:
        model: The model.
        device: Where the copy is made; the model's device by default. On ``"meta"`` it has no data.

    Returns:
        The traced copy, in evaluation mode.

    Raises:
        SymmetryError: If ``torch.fx`` cannot trace the model.
    """
    state = model.state_dict(keep_vars=True).values() if device is not None else ()
    # deepcopy takes these instead of copying the tensors; tied weights stay tied.
    memo: dict[int, Any] = {id(tensor): _moved(tensor, device) for tensor in state}
    clone = copy.deepcopy(model, memo).eval()
    if device is not None:
        clone.to(device)
    try:
        return fx.symbolic_trace(clone)
    except Exception as error:  # whatever the model's own code raises at a proxy
        reason = str(error).strip().split("\n")[0]
        raise SymmetryError(
            f"torch.fx cannot trace {type(model).__name__} ({reason}): keep control flow that "
            "depends on tensors out of its forward"
        ) from error


_GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "groups")


def check_same_architecture(a: nn.Module, b: nn.Module) -> None:
    """Check that two models have the same modules, parameters and buffers.

    Args:
        a: The first model.
        b: The second model.

    Raises:
        ValueError: If they differ; the message names the first difference.
    """
    modules_a, modules_b = dict(a.named_modules()), dict(b.named_modules())
    state_a, state_b = a.state_dict(), b.state_dict()
    _check_names("module", modules_a, modules_b)
    _check_names("tensor", state_a, state_b)
    for name, module in modules_a.items():
        where, other = f"module {name!r}", modules_b[name]
        _check_equal(where, "type", type(module).__name__, type(other).__name__)
        for key in _GEOMETRY:
            value = getattr(module, key, None)
            if isinstance(value, int | str | tuple):
                _check_equal(where, key, value, getattr(other, key, None))
    for name, tensor in state_a.items():
        _check_equal(repr(name), "shape", tuple(tensor.shape), tuple(state_b[name].shape))


_ADVICE = "merge two models of one architecture and width"


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


class _Tracer(fx.Interpreter):
    """Runs the traced model on the meta device and follows its channels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(trace(model, "meta"))
        self.extra_traceback = False  # one line says it all
        self._channels = Channels(_aliases(model))
        self._inferred: dict[fx.Node, Any] = {}
        self._candidates: list[tuple[fx.Node, Layout, bool]] = []

    def run_node(self, n: fx.Node) -> Any:
        try:
            value = super().run_node(n)
        except Exception as error:  # whatever the model's own layers raise
            reason = str(error).strip().split("\n")[0]
            raise SymmetryError(
                f"{_describe(n, self.module)} fails on the example input ({reason}): give a batch "
                "the model accepts"
            ) from error
        try:
            self._inferred[n] = self._infer(n, value)
        except UnsupportedError as error:
            raise SymmetryError(
                f"{_describe(n, self.module)} {error}, for which no permutation symmetry is known: "
                "replace it by a supported operation or leave it out of the model to be aligned"
            ) from None
        return value

    def _infer(self, node: fx.Node, value: Any) -> Any:
        if node.op == "placeholder":
            return self._input(value)
        if node.op == "get_attr":
            names = self._channels.names.get(str(node.target), ())
            return Weight(value.shape, names) if isinstance(value, Tensor) else value
        args = map_arg((node.args, node.kwargs), lambda n: self._inferred[n])
        inputs = tensors(args)
        if node.op == "output":
            self._pin(inputs)
            return None
        constants = map_aggregate(value, _constant)
        if not tensors(constants):
            return value
        if any(isinstance(item, Activation) for item in inputs):
            return self._follow(node, value, *args)
        if any(item.names for item in inputs if isinstance(item, Weight)):
            raise UnsupportedError("computes a new weight from parameters")
        return constants

    def _follow(self, node: fx.Node, value: Any, args: Any, kwargs: Any) -> Any:
        key: Any = node.target
        if node.op == "call_module":
            module = self.module.get_submodule(key)
            rule, args = MODULES.get(type(module)), (module, key, *args)
            measurable = type(module) in MEASURABLE_MODULES
        else:
            method = node.op == "call_method"
            rule = METHODS.get(key.removesuffix("_")) if method else FUNCTIONS.get(key)
            measurable = rule in MEASURABLE_RULES
        if rule is None:
            raise UnsupportedError("is an operation")
        result = rule(self._channels, value, *args, **kwargs)
        if not isinstance(value, Tensor):
            return tuple(_checked(*pair) for pair in zip(value, result, strict=True))
        activation = _checked(value, result)
        self._candidates.append((node, activation.layout, measurable))
        return activation

    def _input(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        activation = Activation(value.shape, self._channels.fresh(value.shape[1]))
        self._pin([activation])
        return activation

    def _pin(self, items: Iterable[Activation | Weight]) -> None:
        for item in items:
            if isinstance(item, Activation):
                self._channels.pin(item.layout)

    def groups(self) -> tuple[Group, ...]:
        pinned = self._channels.pinned
        slots: dict[int, list[Slot]] = {}
        sizes: dict[int, int] = {}
        for use in self._channels.uses:
            offset = 0
            for segment in use.layout:
                if segment.variable not in pinned and segment.size > 1:
                    sizes[segment.variable] = segment.size
                    slots.setdefault(segment.variable, []).extend(
                        Slot(name, use.axis, use.role, length(use.layout), offset, segment.block)
                        for name in use.names
                    )
                offset += segment.length
        nodes = self._representatives()
        for variable in slots.keys() - nodes.keys():
            name = slots[variable][0].name
            raise SymmetryError(f"no activation shows the channels of {name!r} one by one")
        order = {node: position for position, node in enumerate(self._inferred)}
        found = sorted(slots, key=lambda v: (order[nodes[v][0]], nodes[v][1]))
        return tuple(_group(sizes[v], slots[v], *nodes[v]) for v in found)

    def _representatives(self) -> dict[int, tuple[fx.Node, int, bool]]:
        """For each variable the best node that shows it, the offset, and whether it shows no other.

        Best is the last measurable one of those that show exactly the variable; else the last of
        those that do; else the last of those that show it among others.
        """
        best: dict[int, tuple[int, fx.Node, int]] = {}
        for node, layout, measurable in self._candidates:
            segments = self._channels.resolve(layout)
            rank = 1 + measurable if len(segments) == 1 else 0
            offset = 0
            for segment in segments:
                known = best.get(segment.variable)
                if segment.block == 1 and (known is None or rank >= known[0]):
                    best[segment.variable] = rank, node, offset
                offset += segment.length
        return {v: (node, offset, rank > 0) for v, (rank, node, offset) in best.items()}


def _group(size: int, slots: Iterable[Slot], node: fx.Node, offset: int, exact: bool) -> Group:
    name = node.name if exact else f"{node.name}[{offset}:{offset + size}]"
    return Group(name, size, tuple(slots), node.name, offset)


def _checked(value: Tensor, layout: Layout) -> Activation:
    if value.ndim < 2 or value.shape[1] != length(layout):
        shape = tuple(value.shape)
        raise UnsupportedError(f"gives a tensor {shape} whose channels are not on axis 1")
    return Activation(value.shape, layout)


def _constant(value: Any) -> Any:
    return Weight(value.shape) if isinstance(value, Tensor) else value


def _moved(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    moved = tensor.detach().to(device)
    return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved


def _aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """All state-dict names of the tensor that each name stands for (tied weights have several)."""
    names: dict[int, list[str]] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    return {name: tuple(names[id(tensor)]) for name, tensor in state.items()}


def _describe(node: fx.Node, module: nn.Module) -> str:
    if node.op == "call_module":
        owner = module.get_submodule(str(node.target))
        return f"module {node.target!r} ({type(owner).__name__})"
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    path = list(node.meta.get("nn_module_stack", {}).values())
    where = f"module {path[-1][0]!r}" if path and path[-1][0] else "the model's own forward"
    return f"operation {name!r} in {where} (node {node.name!r})"
