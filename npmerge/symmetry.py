"""Symmetry groups: which axes of which parameters must be permuted together.

The model is traced by ``torch.fx`` and run once on the meta device. The channel axis of every tensor is described by
a list of *segments*, each a variable (a set of interchangeable channels); operations that force two axes to be the
same unite their variables, as in first-order unification. Whatever is not tied to the model's input or output is a
symmetry group.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg

Role = Literal["out", "in", "variance", "tied"]


class SymmetryError(ValueError):
    """The model contains an operation whose permutation symmetry is not known."""


@dataclass(frozen=True)
class Slot:
    """Where a group acts on one axis of one tensor of the state dict.

    Attributes:
        name: State-dict key of a parameter or buffer, e.g. ``layer1.0.conv1.weight``.
        axis: The axis that enumerates the group's channels.
        role: ``"out"``: as produced; ``"in"``: as consumed; ``"variance"``: a produced channel's variance (batch
            norm's running variance); ``"tied"``: consumed and produced by one index (depthwise convolution).
        length: Full length of the axis.
        offset: First index on the axis that belongs to the group (concatenation).
        block: Consecutive indices per channel (a flattened map's positions, a depthwise multiplier).
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
        node: Name of the fx node whose output represents the group; its axis 1 enumerates the channels.
        offset: First channel of the group on that axis; 0, and the axis all the group's, wherever such a node exists.
    """

    name: str
    size: int
    slots: tuple[Slot, ...]
    node: str
    offset: int = 0


def symmetry(model: nn.Module, example_input: Tensor) -> tuple[Group, ...]:
    """Read the permutation symmetry groups off a model.

    A group is represented by the last node whose channels are exactly the group's and that is an element-wise
    operation, a normalisation or a weight layer: the end of a residual stream, after its non-linearity and before any
    pooling.

    Args:
        model: Any module that ``torch.fx`` can trace. It is not changed and nothing is computed with its values.
        example_input: A batch the model accepts, (N, C, ...); only its shape is used.

    Returns:
        The groups in the order of their nodes. Groups of one channel are left out.

    Raises:
        SymmetryError: If the model cannot be traced or contains an operation without a known rule; the message names
            the operation and its module.
        ValueError: If ``example_input`` has no channel axis.

    Source:
        Section II-C of the paper (permutation symmetry); Ainsworth et al. 2023, "Git Re-Basin", section 3.
    """
    if example_input.ndim < 2:
        shape = tuple(example_input.shape)
        raise ValueError(f"example_input has shape {shape}; give a batch of shape (N, C, ...)")
    scope = _Scope(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    # Two images, whatever was given: an axis of length 1 would be lost by squeeze().
    images = torch.empty(
        (2, *example_input.shape[1:]), dtype=dtype or example_input.dtype, device="meta"
    )
    with torch.no_grad():
        scope.run(images)
    return scope.groups()


def trace(model: nn.Module) -> fx.GraphModule:
    """Trace a copy of the model in evaluation mode; the model itself is not touched.

    Args:
        model: The model.

    Returns:
        The traced copy, in evaluation mode.

    Raises:
        SymmetryError: If ``torch.fx`` cannot trace the model.
    """
    clone = copy.deepcopy(model).eval()
    try:
        return fx.symbolic_trace(clone)
    except Exception as error:  # whatever the model's own code raises when it meets a proxy
        reason = str(error).strip().split("\n")[0]
        raise SymmetryError(
            f"torch.fx cannot trace {type(model).__name__}: {reason}; remove control flow that depends on "
            "tensor values from its forward"
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
    advice = "merge two models of one architecture and width"
    modules_a, modules_b = dict(a.named_modules()), dict(b.named_modules())
    state_a, state_b = a.state_dict(), b.state_dict()
    for kind, left, right in (("module", modules_a, modules_b), ("tensor", state_a, state_b)):
        for name in (*left, *right):
            if (name in left) != (name in right):
                owner = "first" if name in left else "second"
                raise ValueError(f"only the {owner} model has the {kind} {name!r}; {advice}")
    for name, module in modules_a.items():
        types = type(module).__name__, type(modules_b[name]).__name__
        if types[0] != types[1]:
            raise ValueError(
                f"module {name!r} is {types[0]} in the first model and {types[1]} in the second; {advice}"
            )
        for key in _GEOMETRY:
            values = getattr(module, key, None), getattr(modules_b[name], key, None)
            if isinstance(values[0], int | str | tuple) and values[0] != values[1]:
                raise ValueError(
                    f"module {name!r} has {key} {values[0]} in the first model and {values[1]} in the second; {advice}"
                )
    for name, tensor in state_a.items():
        shapes = tuple(tensor.shape), tuple(state_b[name].shape)
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{name!r} has shape {shapes[0]} in the first model and {shapes[1]} in the second; {advice}"
            )


# --- Variables and layouts ---------------------------------------------------------------------------------------


class _Unsupported(Exception):
    """Raised by a rule; the tracer adds which operation and module it was."""


@dataclass(frozen=True)
class _Segment:
    variable: int
    size: int
    block: int = 1

    @property
    def length(self) -> int:
        return self.size * self.block


_Layout = tuple[_Segment, ...]


def _length(layout: _Layout) -> int:
    return sum(segment.length for segment in layout)


def _scaled(layout: _Layout, factor: int) -> _Layout:
    return tuple(_Segment(s.variable, s.size, s.block * factor) for s in layout)


class _Variables:
    """Sets of interchangeable channels; a bound variable stands for a list of segments of others."""

    def __init__(self) -> None:
        self._bindings: list[_Layout | None] = []

    def fresh(self, size: int) -> _Layout:
        if size == 0:
            return ()
        self._bindings.append(None)
        return (_Segment(len(self._bindings) - 1, size),)

    def resolve(self, layout: _Layout) -> _Layout:
        return tuple(self._resolved(layout))

    def _resolved(self, layout: _Layout) -> Iterator[_Segment]:
        for segment in layout:
            binding = self._bindings[segment.variable]
            if binding is None:
                yield segment
            else:
                yield from self._resolved(_scaled(binding, segment.block))

    def unite(self, first: _Layout, second: _Layout) -> None:
        if _length(first) != _length(second):
            raise _Unsupported(f"joins axes of {_length(first)} and {_length(second)} channels")
        while (left := self.resolve(first)) != (right := self.resolve(second)):
            x, y = next((x, y) for x, y in zip(left, right, strict=False) if x != y)
            coarse, fine = (x, y) if x.block >= y.block else (y, x)
            ratio, remainder = divmod(coarse.block, fine.block)
            if remainder or x.variable == y.variable:
                raise _Unsupported("joins axes whose channels are interleaved differently")
            wide = coarse.size * ratio
            if fine.size >= wide:
                shared = (_Segment(coarse.variable, coarse.size, ratio),)
                self._bindings[fine.variable] = shared + self.fresh(fine.size - wide)
            else:
                self._halve(coarse, fine.size, ratio)

    def cut(self, layout: _Layout, at: int) -> tuple[_Layout, _Layout]:
        """Cut an axis at an index, halving the variable that lies across it."""
        head: list[_Segment] = []
        segments = list(reversed(self.resolve(layout)))
        while segments and at > 0:
            segment = segments.pop()
            if segment.length > at:
                self._halve(segment, at, segment.block)
                segments.extend(reversed(self.resolve((segment,))))
            else:
                head.append(segment)
                at -= segment.length
        return tuple(head), tuple(reversed(segments))

    def _halve(self, segment: _Segment, length: int, block: int) -> None:
        size, remainder = divmod(length, block)
        if remainder:
            raise _Unsupported("cuts an axis inside a channel's block of indices")
        self._bindings[segment.variable] = self.fresh(size) + self.fresh(segment.size - size)


# --- The traced run ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Traced:
    """An activation: axis 1 is laid out as `layout`."""

    shape: torch.Size
    layout: _Layout


@dataclass(frozen=True)
class _Weight:
    """A parameter or buffer under all its state-dict names; without a name, a constant."""

    shape: torch.Size
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Use:
    names: tuple[str, ...]
    axis: int
    role: Role
    layout: _Layout


_Result = _Layout | tuple[_Layout, ...]
_Rule = Callable[..., Any]


class _Scope(fx.Interpreter):
    """Runs the traced model on the meta device and collects where each variable acts."""

    def __init__(self, model: nn.Module) -> None:
        traced = trace(model)
        self._names = _aliases(model)
        super().__init__(traced.to("meta"))
        self.variables = _Variables()
        self._uses: dict[tuple[str, int], _Use] = {}
        self._pinned: list[_Layout] = []
        self._inferred: dict[fx.Node, Any] = {}
        self._candidates: list[tuple[fx.Node, _Layout, bool]] = []

    def run_node(self, n: fx.Node) -> Any:
        try:
            value = super().run_node(n)
        except RuntimeError as error:
            raise SymmetryError(
                f"{_describe(n)} fails on the example input: {str(error).splitlines()[0]}"
            ) from error
        try:
            self._inferred[n] = self._infer(n, value)
        except _Unsupported as error:
            raise SymmetryError(
                f"{_describe(n)} {error}; its permutation symmetry is not known: replace the operation, or align the "
                "part of the model without it"
            ) from None
        return value

    def _infer(self, node: fx.Node, value: Any) -> Any:
        if node.op == "placeholder":
            return self._input(value)
        if node.op == "get_attr":
            return self._attribute(str(node.target), value)
        args = map_arg((node.args, node.kwargs), lambda n: self._inferred[n])
        inputs = _tensors(args)
        if node.op == "output":
            for item in inputs:
                self.pin(item)
            return None
        if not _tensors(map_aggregate(value, _shape_only)):
            return value
        if not any(isinstance(item, _Traced) for item in inputs):
            if any(item.names for item in inputs if isinstance(item, _Weight)):
                raise _Unsupported("computes a new weight from parameters")
            return map_aggregate(value, _shape_only)
        result, measurable = self._apply_rule(node, value, args)
        if isinstance(value, Tensor):
            traced = self._checked(value, result)
            self._candidates.append((node, traced.layout, measurable))
            return traced
        return tuple(
            self._checked(part, layout) for part, layout in zip(value, result, strict=True)
        )

    def _apply_rule(self, node: fx.Node, value: Any, args: Any) -> tuple[_Result, bool]:
        positional, keywords = args
        if node.op == "call_module":
            module = self.module.get_submodule(str(node.target))
            rule = _MODULES.get(type(module))
            if rule is None:
                raise _Unsupported("has no rule")
            result = rule(self, value, module, str(node.target), *positional, **keywords)
            return result, type(module) in _MEASURABLE_MODULES
        table = _METHODS if node.op == "call_method" else _FUNCTIONS
        key = str(node.target).removesuffix("_") if node.op == "call_method" else node.target
        if key not in table:
            raise _Unsupported("has no rule")
        rule = table[key]
        return rule(self, value, *positional, **keywords), rule in _MEASURABLE_RULES

    @staticmethod
    def _checked(value: Tensor, layout: Any) -> _Traced:
        if value.ndim < 2 or value.shape[1] != _length(layout):
            shape = tuple(value.shape)
            raise _Unsupported(f"gives a tensor of shape {shape} whose channels are not on axis 1")
        return _Traced(value.shape, layout)

    def _input(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        traced = _Traced(value.shape, self.variables.fresh(value.shape[1]))
        self.pin(traced)
        return traced

    def _attribute(self, target: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return _Weight(value.shape, self._names.get(target, ()))

    def weight(self, module: nn.Module, prefix: str, key: str) -> _Weight | None:
        tensor = getattr(module, key, None)
        if tensor is None:
            return None
        name = f"{prefix}.{key}"
        if name not in self._names:
            raise _Unsupported(f"computes its {key!r} from other parameters")
        return _Weight(tensor.shape, self._names[name])

    def use(self, weight: _Weight | None, axis: int, layout: _Layout, role: Role) -> None:
        """Say that an axis of a weight enumerates the channels of a layout."""
        if weight is None:
            return
        if not weight.names:
            self._pinned.append(layout)
            return
        key = weight.names[0], axis
        known = self._uses.get(key)
        if known is not None:
            self.variables.unite(known.layout, layout)
            role = role if known.role == role else "tied"
        self._uses[key] = _Use(weight.names, axis, role, layout)

    def pin(self, item: _Traced | _Weight) -> None:
        if isinstance(item, _Traced):
            self._pinned.append(item.layout)

    def groups(self) -> tuple[Group, ...]:
        pinned = {s.variable for layout in self._pinned for s in self.variables.resolve(layout)}
        slots: dict[int, list[Slot]] = {}
        sizes: dict[int, int] = {}
        for use in self._uses.values():
            offset, length = 0, _length(use.layout)
            for segment in self.variables.resolve(use.layout):
                if segment.variable not in pinned and segment.size > 1:
                    sizes[segment.variable] = segment.size
                    slots.setdefault(segment.variable, []).extend(
                        Slot(name, use.axis, use.role, length, offset, segment.block)
                        for name in use.names
                    )
                offset += segment.length
        nodes = self._representatives()
        order = {node: position for position, node in enumerate(self._inferred)}
        for variable in slots.keys() - nodes.keys():
            raise SymmetryError(
                f"no activation shows the channels of {slots[variable][0].name!r} one by one"
            )
        found = sorted(slots, key=lambda v: (order[nodes[v][0]], nodes[v][1]))
        return tuple(self._group(sizes[v], slots[v], *nodes[v]) for v in found)

    @staticmethod
    def _group(size: int, slots: list[Slot], node: fx.Node, offset: int, exact: bool) -> Group:
        name = node.name if exact else f"{node.name}[{offset}:{offset + size}]"
        return Group(name, size, tuple(slots), node.name, offset)

    def _representatives(self) -> dict[int, tuple[fx.Node, int, bool]]:
        """For each variable the best node that shows it: exactly it and measurable, exactly it, among others."""
        best: dict[int, tuple[int, fx.Node, int]] = {}
        for node, layout, measurable in self._candidates:
            segments = self.variables.resolve(layout)
            rank = (2 if measurable else 1) if len(segments) == 1 else 0
            offset = 0
            for segment in segments:
                known = best.get(segment.variable)
                if segment.block == 1 and (known is None or rank >= known[0]):
                    best[segment.variable] = rank, node, offset
                offset += segment.length
        return {v: (node, offset, rank > 0) for v, (rank, node, offset) in best.items()}


def _aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """All state-dict names of the tensor that each name stands for (tied weights have several)."""
    names: dict[int, list[str]] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    return {name: tuple(names[id(tensor)]) for name, tensor in state.items()}


def _describe(node: fx.Node) -> str:
    target = (
        node.target
        if isinstance(node.target, str)
        else getattr(node.target, "__name__", str(node.target))
    )
    if node.op == "call_module":
        module = (
            node.graph.owning_module.get_submodule(str(target))
            if node.graph.owning_module
            else None
        )
        return f"module {target!r} ({type(module).__name__})"
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    owner = stack[-1] if stack else None
    path = repr(owner[0]) if isinstance(owner, tuple) and owner[0] else "the model itself"
    return f"operation {target!r} (node {node.name!r}, in {path})"


def _tensors(args: Any) -> list[_Traced | _Weight]:
    found: list[_Traced | _Weight] = []

    def visit(item: Any) -> Any:
        if isinstance(item, _Traced | _Weight):
            found.append(item)
        return item

    map_aggregate(args, visit)
    return found


def _shape_only(value: Any) -> Any:
    return _Weight(value.shape) if isinstance(value, Tensor) else value


# --- Rules: (scope, output value, *arguments) -> layout of axis 1 ------------------------------------------------


def _layout(x: Any) -> _Layout:
    if not isinstance(x, _Traced):
        raise _Unsupported("does not take an activation as its input")
    return x.layout


def _keep(scope: _Scope, out: Any, x: Any, *args: Any, **kwargs: Any) -> _Layout:
    if not isinstance(out, Tensor):
        raise _Unsupported("returns several tensors")
    return _layout(x)


def _elementwise(scope: _Scope, out: Tensor, *args: Any, **kwargs: Any) -> _Layout:
    inputs = _tensors((args, kwargs))
    traced = [x for x in inputs if isinstance(x, _Traced)]
    if any(len(x.shape) != out.ndim for x in traced):
        raise _Unsupported(f"broadcasts activations of shapes {[tuple(x.shape) for x in traced]}")
    full = [x.layout for x in traced if x.shape[1] == out.shape[1]]
    layout = full[0] if full else scope.variables.fresh(out.shape[1])
    for other in full[1:]:
        scope.variables.unite(layout, other)
    for weight in inputs:
        if isinstance(weight, _Weight):
            axis = len(weight.shape) - out.ndim + 1
            if axis >= 0 and weight.shape[axis] == out.shape[1]:
                scope.use(weight, axis, layout, "tied")
    return layout


def _conv(
    scope: _Scope,
    out: Tensor,
    x: Any,
    weight: _Weight,
    bias: _Weight | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> _Layout:
    layout = _consume(scope, x, weight, 1, 0, out.shape[1], groups)
    scope.use(bias, 0, layout, "out")
    return layout


def _conv_transpose(
    scope: _Scope,
    out: Tensor,
    x: Any,
    weight: _Weight,
    bias: _Weight | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> _Layout:
    layout = _consume(scope, x, weight, 0, 1, out.shape[1], groups)
    scope.use(bias, 0, layout, "out")
    return layout


def _consume(
    scope: _Scope, x: Any, weight: _Weight, axis_in: int, axis_out: int, channels: int, groups: int
) -> _Layout:
    """Channel mixing opens a new variable; a depthwise convolution repeats its input's."""
    if groups == 1:
        layout = scope.variables.fresh(channels)
        scope.use(weight, axis_in, _layout(x), "in")
        scope.use(weight, axis_out, layout, "out")
        return layout
    if groups != x.shape[1]:
        raise _Unsupported(f"is a convolution of {x.shape[1]} channels in {groups} groups")
    layout = _scaled(_layout(x), channels // groups)
    scope.use(weight, 0, layout if axis_out == 0 else x.layout, "tied")
    return layout


def _linear(
    scope: _Scope, out: Tensor, x: Any, weight: _Weight, bias: _Weight | None = None
) -> _Layout:
    if len(x.shape) != 2:
        raise _Unsupported(
            f"is a linear layer on the last axis of an input of shape {tuple(x.shape)}, not (N, C)"
        )
    return _conv(scope, out, x, weight, bias)


def _batch_norm(
    scope: _Scope,
    out: Tensor,
    x: Any,
    running_mean: _Weight | None,
    running_var: _Weight | None,
    weight: _Weight | None = None,
    bias: _Weight | None = None,
    *args: Any,
    **kwargs: Any,
) -> _Layout:
    layout = _layout(x)
    for tensor in (weight, bias, running_mean):
        scope.use(tensor, 0, layout, "out")
    scope.use(running_var, 0, layout, "variance")
    return layout


def _instance_norm(
    scope: _Scope,
    out: Tensor,
    x: Any,
    running_mean: _Weight | None = None,
    running_var: _Weight | None = None,
    weight: _Weight | None = None,
    bias: _Weight | None = None,
    *args: Any,
    **kwargs: Any,
) -> _Layout:
    return _batch_norm(scope, out, x, running_mean, running_var, weight, bias)


def _group_norm(
    scope: _Scope,
    out: Tensor,
    x: Any,
    num_groups: int,
    weight: _Weight | None = None,
    bias: _Weight | None = None,
    eps: float = 1e-5,
) -> _Layout:
    if 1 < num_groups < x.shape[1]:
        raise _Unsupported(f"normalises {x.shape[1]} channels in {num_groups} groups")
    return _batch_norm(scope, out, x, None, None, weight, bias)


def _layer_norm(
    scope: _Scope,
    out: Tensor,
    x: Any,
    normalized_shape: Sequence[int],
    weight: _Weight | None = None,
    bias: _Weight | None = None,
    eps: float = 1e-5,
) -> _Layout:
    layout = _layout(x)
    axis = len(normalized_shape) - len(x.shape) + 1
    if axis >= 0:
        scope.use(weight, axis, layout, "out")
        scope.use(bias, axis, layout, "out")
    return layout


def _prelu(scope: _Scope, out: Tensor, x: Any, weight: _Weight) -> _Layout:
    if weight.shape.numel() > 1:
        scope.use(weight, 0, _layout(x), "tied")
    return _layout(x)


def _reshape(scope: _Scope, out: Tensor, x: Any, *args: Any, **kwargs: Any) -> _Layout:
    layout, (count, channels, *positions) = _layout(x), x.shape
    shape = tuple(out.shape)
    if len(shape) >= 2 and shape[0] == count:
        if shape[1] == channels:
            return layout
        if shape[1] % channels == 0 and torch.Size(positions).numel() % (shape[1] // channels) == 0:
            return _scaled(layout, shape[1] // channels)
        segments = scope.variables.resolve(layout)
        if channels % shape[1] == 0 and all(
            s.block % (channels // shape[1]) == 0 for s in segments
        ):
            return tuple(
                _Segment(s.variable, s.size, s.block * shape[1] // channels) for s in segments
            )
    raise _Unsupported(f"reshapes {tuple(x.shape)} to {shape} across the channels")


def _reduce(
    scope: _Scope, out: Tensor, x: Any, dim: Any = None, keepdim: bool = False, **kwargs: Any
) -> _Layout:
    dim = kwargs.get("axis", dim)
    ndim = len(x.shape)
    dims = {d % ndim for d in ([dim] if isinstance(dim, int) else dim or range(ndim))}
    if 0 in dims or (1 in dims and not keepdim):
        raise _Unsupported(
            f"reduces axes {sorted(dims)} of an activation of shape {tuple(x.shape)}"
        )
    return scope.variables.fresh(1) if 1 in dims else _layout(x)


def _cat(
    scope: _Scope, out: Tensor, tensors: Iterable[Any], dim: int = 0, **kwargs: Any
) -> _Layout:
    layouts = [_layout(x) for x in tensors]
    if kwargs.get("axis", dim) % out.ndim == 1:
        return tuple(segment for layout in layouts for segment in layout)
    for other in layouts[1:]:
        scope.variables.unite(layouts[0], other)
    return layouts[0]


def _split(
    scope: _Scope, out: Sequence[Tensor], x: Any, size: Any, dim: int = 0
) -> tuple[_Layout, ...]:
    layout = _layout(x)
    if dim % len(x.shape) != 1:
        return tuple(layout for _ in out)
    parts = []
    for part in out:
        head, layout = scope.variables.cut(layout, part.shape[1])
        parts.append(head)
    return tuple(parts)


def _getitem(scope: _Scope, out: Any, x: Any, index: Any) -> _Result:
    if not isinstance(x, _Traced):
        result = x[index]
        if isinstance(result, _Traced):
            return result.layout
        raise _Unsupported("takes several parts of a tuple")
    entries = index if isinstance(index, tuple) else (index,)
    if Ellipsis in entries:
        at = entries.index(Ellipsis)
        missing = len(x.shape) - sum(e is not None for e in entries) + 1
        entries = (*entries[:at], *[slice(None)] * missing, *entries[at + 1 :])
    batch, channel = (*entries, slice(None), slice(None))[:2]
    if (
        not isinstance(batch, slice)
        or not isinstance(channel, slice)
        or channel.step not in (None, 1)
    ):
        raise _Unsupported(f"indexes an activation of shape {tuple(x.shape)} by {index}")
    start, stop, _ = channel.indices(x.shape[1])
    return scope.variables.cut(scope.variables.cut(_layout(x), stop)[0], start)[1]


def _pad(
    scope: _Scope, out: Tensor, x: Any, pad: Sequence[int], *args: Any, **kwargs: Any
) -> _Layout:
    ndim = len(x.shape)
    low, high = (*pad, *[0] * (2 * ndim))[2 * (ndim - 2) : 2 * (ndim - 1)]
    if low == high == 0:
        return _layout(x)
    mode = args[0] if args else kwargs.get("mode", "constant")
    if mode != "constant" or low < 0 or high < 0:
        raise _Unsupported(f"pads the channels by ({low}, {high}) in mode {mode!r}")
    return scope.variables.fresh(low) + _layout(x) + scope.variables.fresh(high)


# --- Rules of modules: (scope, output value, module, path, *arguments) -------------------------------------------


def _unary(rule: _Rule) -> _Rule:
    def wrapped(
        scope: _Scope, out: Any, module: nn.Module, path: str, x: Any, *args: Any
    ) -> _Result:
        result: _Result = rule(scope, out, x)
        return result

    return wrapped


def _weighted(rule: _Rule, *attributes: str) -> _Rule:
    """A module's rule from its function's: the named attributes, weights or numbers, are the keyword arguments."""

    def wrapped(
        scope: _Scope, out: Any, module: nn.Module, path: str, x: Any, *args: Any
    ) -> _Result:
        values = {key: getattr(module, key, None) for key in attributes}
        for key, value in values.items():
            if isinstance(value, Tensor):
                values[key] = scope.weight(module, path, key)
        result: _Result = rule(scope, out, x, **values)
        return result

    return wrapped


def _named(names: str) -> dict[Any, str]:
    spaces = (torch, F, operator)
    return {
        getattr(space, name): name
        for name in names.split()
        for space in spaces
        if hasattr(space, name)
    }


_ELEMENTWISE = """
    relu relu6 leaky_relu elu selu celu gelu silu mish hardswish hardsigmoid hardtanh sigmoid tanh softplus softsign
    logsigmoid tanhshrink hardshrink softshrink threshold exp log log1p sqrt rsqrt square pow abs neg erf sin cos clamp
    clamp_min clamp_max clip add sub mul div true_divide truediv multiply subtract divide maximum minimum where iadd
    isub imul itruediv clone contiguous detach float double half bfloat16 to type type_as
"""
_KEEPING = """
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d adaptive_avg_pool1d
    adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d dropout
    dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout interpolate softmax log_softmax normalize
"""
_RESHAPING = "flatten view reshape squeeze unsqueeze unflatten"
_REDUCING = "mean sum amax amin std var"

_BY_NAME: dict[str, _Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(_KEEPING.split(), _keep),
    **dict.fromkeys(_RESHAPING.split(), _reshape),
    **dict.fromkeys(_REDUCING.split(), _reduce),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _conv),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _conv_transpose),
    **dict.fromkeys(("cat", "concatenate"), _cat),
    **dict.fromkeys(("chunk", "split"), _split),
    "linear": _linear,
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "prelu": _prelu,
    "getitem": _getitem,
    "pad": _pad,
}
_METHODS: dict[Any, _Rule] = _BY_NAME
_FUNCTIONS: dict[Any, _Rule] = {
    function: _BY_NAME[name.removesuffix("_")]
    for key in _BY_NAME
    for function, name in _named(f"{key} {key}_").items()
}

_ELEMENTWISE_MODULES = (
    "ReLU ReLU6 LeakyReLU ELU SELU CELU GELU SiLU Mish Hardswish Hardsigmoid Hardtanh Sigmoid Tanh Softplus Softsign "
    "LogSigmoid Tanhshrink Hardshrink Softshrink Threshold"
)
_KEEPING_MODULES = (
    "MaxPool1d MaxPool2d MaxPool3d AvgPool1d AvgPool2d AvgPool3d LPPool1d LPPool2d AdaptiveAvgPool1d AdaptiveAvgPool2d "
    "AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d Dropout Dropout1d Dropout2d Dropout3d "
    "AlphaDropout FeatureAlphaDropout Identity Upsample UpsamplingNearest2d UpsamplingBilinear2d Softmax LogSoftmax "
    "ZeroPad1d ZeroPad2d ZeroPad3d ConstantPad1d ConstantPad2d ConstantPad3d ReflectionPad1d ReflectionPad2d "
    "ReflectionPad3d ReplicationPad1d ReplicationPad2d ReplicationPad3d CircularPad1d CircularPad2d CircularPad3d"
)
_LAYERS: dict[str, _Rule] = {
    **dict.fromkeys(("Conv1d", "Conv2d", "Conv3d"), _weighted(_conv, "weight", "bias", "groups")),
    **dict.fromkeys(
        ("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"),
        _weighted(_conv_transpose, "weight", "bias", "groups"),
    ),
    **dict.fromkeys(
        ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"),
        _weighted(_batch_norm, "running_mean", "running_var", "weight", "bias"),
    ),
    **dict.fromkeys(
        ("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"),
        _weighted(_instance_norm, "running_mean", "running_var", "weight", "bias"),
    ),
    "Linear": _weighted(_linear, "weight", "bias"),
    "GroupNorm": _weighted(_group_norm, "num_groups", "weight", "bias"),
    "LayerNorm": _weighted(_layer_norm, "normalized_shape", "weight", "bias"),
    "PReLU": _weighted(_prelu, "weight"),
}


def _modules(rules: dict[str, _Rule]) -> dict[Any, _Rule]:
    return {getattr(nn, name): rule for name, rule in rules.items()}


_MEASURABLE_MODULES = _modules(
    {**dict.fromkeys(_ELEMENTWISE_MODULES.split(), _unary(_elementwise)), **_LAYERS}
)
_MODULES = {
    **_MEASURABLE_MODULES,
    **_modules(dict.fromkeys(_KEEPING_MODULES.split(), _unary(_keep))),
    **_modules(dict.fromkeys(("Flatten", "Unflatten"), _unary(_reshape))),
}
_MEASURABLE_RULES = (
    *(
        _elementwise,
        _conv,
        _conv_transpose,
        _linear,
        _batch_norm,
        _instance_norm,
        _group_norm,
        _layer_norm,
        _prelu,
    ),
)
