"""What each operation does to the channel axis.

A rule is a function ``(channels, output value, *the operation's arguments) -> layout of the output's axis 1``, in which
activations and weights stand in for tensors. To teach the tracer an operation, add a rule and its name to a table.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.node import map_aggregate

from npmerge._channels import (
    Activation,
    Channels,
    Layout,
    Segment,
    UnsupportedError,
    Weight,
    scaled,
)

Result = Layout | tuple[Layout, ...]
Rule = Callable[..., Any]


def tensors(values: Any) -> list[Activation | Weight]:
    """Return the activations and weights among nested arguments."""
    found: list[Activation | Weight] = []

    def visit(item: Any) -> Any:
        if isinstance(item, Activation | Weight):
            found.append(item)
        return item

    map_aggregate(values, visit)
    return found


def _layout(x: Any) -> Layout:
    if not isinstance(x, Activation):
        raise UnsupportedError("does not take an activation as its input")
    return x.layout


def _keep(_: Channels, out: Any, x: Any, *_args: Any, **_kwargs: Any) -> Layout:
    if not isinstance(out, Tensor):
        raise UnsupportedError("returns several tensors")
    return _layout(x)


def _elementwise(channels: Channels, out: Tensor, *args: Any, **kwargs: Any) -> Layout:
    inputs = tensors((args, kwargs))
    activations = [x for x in inputs if isinstance(x, Activation)]
    if any(len(x.shape) != out.ndim for x in activations):
        shapes = [tuple(x.shape) for x in activations]
        raise UnsupportedError(f"broadcasts activations of shapes {shapes}")
    full = [x.layout for x in activations if x.shape[1] == out.shape[1]]
    layout = full[0] if full else channels.fresh(out.shape[1])
    for other in full[1:]:
        channels.unite(layout, other)
    for weight in inputs:
        if isinstance(weight, Weight):
            axis = len(weight.shape) - out.ndim + 1
            if axis >= 0 and weight.shape[axis] == out.shape[1]:
                channels.use(weight, axis, layout, "tied")
    return layout


def _mix(
    channels: Channels, x: Any, weight: Weight, axis_in: int, axis_out: int, groups: int, size: int
) -> Layout:
    """Mixing channels opens a new variable; a depthwise convolution repeats its input's."""
    layout = _layout(x)
    if groups == 1:
        channels.use(weight, axis_in, layout, "in")
        layout = channels.fresh(size)
        channels.use(weight, axis_out, layout, "out")
        return layout
    if groups != x.shape[1]:
        raise UnsupportedError(f"is a convolution of {x.shape[1]} channels in {groups} groups")
    repeated = scaled(layout, size // groups)
    channels.use(weight, 0, repeated if axis_out == 0 else layout, "tied")
    return repeated


def _conv(
    channels: Channels,
    out: Tensor,
    x: Any,
    weight: Weight,
    bias: Weight | None = None,
    *options: Any,
    groups: int = 1,
    axes: tuple[int, int] = (1, 0),
    **_: Any,
) -> Layout:
    groups = options[3] if len(options) > 3 else groups
    layout = _mix(channels, x, weight, *axes, groups, out.shape[1])
    channels.use(bias, 0, layout, "out")
    return layout


_conv_transpose = partial(_conv, axes=(0, 1))  # its weight is (in, out, ...)


def _linear(
    channels: Channels, out: Tensor, x: Any, weight: Weight, bias: Weight | None = None
) -> Layout:
    if len(x.shape) != 2:
        shape = tuple(x.shape)
        raise UnsupportedError(f"is a linear layer on the last axis of {shape}, not on (N, C)")
    return _conv(channels, out, x, weight, bias)


def _batch_norm(
    channels: Channels,
    _out: Tensor,
    x: Any,
    running_mean: Weight | None = None,
    running_var: Weight | None = None,
    weight: Weight | None = None,
    bias: Weight | None = None,
    *_args: Any,
    **_kwargs: Any,
) -> Layout:
    layout = _layout(x)
    for tensor in (bias, running_mean):
        channels.use(tensor, 0, layout, "out")
    channels.use(weight, 0, layout, "scale")
    channels.use(running_var, 0, layout, "variance")
    return layout


def _group_norm(
    channels: Channels,
    out: Tensor,
    x: Any,
    num_groups: int,
    weight: Weight | None = None,
    bias: Weight | None = None,
    *_args: Any,
    **_kwargs: Any,
) -> Layout:
    if 1 < num_groups < x.shape[1]:
        raise UnsupportedError(f"normalises {x.shape[1]} channels in {num_groups} groups")
    return _batch_norm(channels, out, x, None, None, weight, bias)


def _layer_norm(
    channels: Channels,
    _out: Tensor,
    x: Any,
    normalized_shape: Sequence[int],
    weight: Weight | None = None,
    bias: Weight | None = None,
    *_args: Any,
    **_kwargs: Any,
) -> Layout:
    layout = _layout(x)
    axis = len(normalized_shape) - len(x.shape) + 1
    if axis >= 0:  # otherwise only positions are normalised, alike for all channels
        channels.use(weight, axis, layout, "scale")
        channels.use(bias, axis, layout, "out")
    return layout


def _prelu(channels: Channels, _out: Tensor, x: Any, weight: Weight) -> Layout:
    layout = _layout(x)
    if weight.shape.numel() > 1:
        channels.use(weight, 0, layout, "tied")
    return layout


def _reshape(channels: Channels, out: Tensor, x: Any, *_args: Any, **_kwargs: Any) -> Layout:
    layout, (count, width, *positions) = _layout(x), x.shape
    if out.ndim >= 2 and out.shape[0] == count:
        if out.shape[1] == width:
            return layout
        factor, remainder = divmod(out.shape[1], width)
        if remainder == 0 and torch.Size(positions).numel() % factor == 0:
            return scaled(layout, factor)
        factor, remainder = divmod(width, out.shape[1])
        segments = channels.resolve(layout)
        if remainder == 0 and all(s.block % factor == 0 for s in segments):
            return tuple(Segment(s.variable, s.size, s.block // factor) for s in segments)
    shapes = f"{tuple(x.shape)} to {tuple(out.shape)}"
    raise UnsupportedError(f"reshapes {shapes} across the channels")


def _reduce(
    channels: Channels, _out: Tensor, x: Any, dim: Any = None, keepdim: bool = False, **kwargs: Any
) -> Layout:
    dim, ndim = kwargs.get("axis", dim), len(x.shape)
    dims = {d % ndim for d in ([dim] if isinstance(dim, int) else dim or range(ndim))}
    if 0 in dims or (1 in dims and not keepdim):
        raise UnsupportedError(f"reduces axes {sorted(dims)} of shape {tuple(x.shape)}")
    return channels.fresh(1) if 1 in dims else _layout(x)


def _cat(channels: Channels, out: Tensor, parts: Iterable[Any], dim: int = 0, **kw: Any) -> Layout:
    layouts = [_layout(x) for x in parts]
    if kw.get("axis", dim) % out.ndim == 1:
        return tuple(segment for layout in layouts for segment in layout)
    for other in layouts[1:]:
        channels.unite(layouts[0], other)
    return layouts[0]


def _split(
    channels: Channels, out: Sequence[Tensor], x: Any, _size: Any, dim: int = 0
) -> tuple[Layout, ...]:
    layout = _layout(x)
    if dim % len(x.shape) != 1:
        return tuple(layout for _ in out)
    parts = []
    for part in out:
        head, layout = channels.cut(layout, part.shape[1])
        parts.append(head)
    return tuple(parts)


def _getitem(channels: Channels, _out: Any, x: Any, index: Any) -> Result:
    if not isinstance(x, Activation):
        return _layout(x[index])
    entries = index if isinstance(index, tuple) else (index,)
    if Ellipsis in entries:
        at = entries.index(Ellipsis)
        missing = len(x.shape) - sum(e is not None for e in entries) + 1
        entries = (*entries[:at], *[slice(None)] * missing, *entries[at + 1 :])
    batch, channel = (*entries, slice(None), slice(None))[:2]
    slices = isinstance(batch, slice) and isinstance(channel, slice)
    if not slices or channel.step not in (None, 1):
        raise UnsupportedError(f"indexes an activation of shape {tuple(x.shape)} by {index}")
    start, stop, _ = channel.indices(x.shape[1])
    return channels.cut(channels.cut(_layout(x), stop)[0], start)[1]


def _pad(
    channels: Channels, _out: Tensor, x: Any, pad: Sequence[int], *args: Any, **kwargs: Any
) -> Layout:
    ndim = len(x.shape)
    low, high = (*pad, *[0] * (2 * ndim))[2 * (ndim - 2) : 2 * (ndim - 1)]
    if low == high == 0:
        return _layout(x)
    mode = args[0] if args else kwargs.get("mode", "constant")
    if mode != "constant" or low < 0 or high < 0:
        raise UnsupportedError(f"pads the channels by ({low}, {high}) in mode {mode!r}")
    return channels.fresh(low) + _layout(x) + channels.fresh(high)


# --- Tables ------------------------------------------------------------------------------------


def _table(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


_MEASURABLE: dict[str, Rule] = {
    **_table(
        _elementwise,
        "relu relu6 leaky_relu elu selu celu gelu silu mish hardswish hardsigmoid hardtanh sigmoid "
        "tanh softplus softsign logsigmoid tanhshrink hardshrink softshrink threshold exp log "
        "log1p sqrt rsqrt square pow abs neg erf sin cos clamp clamp_min clamp_max clip add sub "
        "mul div true_divide truediv multiply subtract divide maximum minimum where iadd isub "
        "imul itruediv clone contiguous detach float double half bfloat16 to",
    ),
    **_table(_conv, "conv1d conv2d conv3d"),
    **_table(_conv_transpose, "conv_transpose1d conv_transpose2d conv_transpose3d"),
    **_table(_batch_norm, "batch_norm instance_norm"),
    **_table(_group_norm, "group_norm"),
    **_table(_layer_norm, "layer_norm"),
    **_table(_linear, "linear"),
    **_table(_prelu, "prelu"),
}
_OTHER: dict[str, Rule] = {
    **_table(
        _keep,
        "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d lp_pool1d lp_pool2d "
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d "
        "adaptive_max_pool2d adaptive_max_pool3d dropout dropout1d dropout2d dropout3d "
        "alpha_dropout feature_alpha_dropout interpolate softmax log_softmax normalize",
    ),
    **_table(_reshape, "flatten view reshape squeeze unsqueeze unflatten"),
    **_table(_reduce, "mean sum amax amin std var"),
    **_table(_cat, "cat concatenate"),
    **_table(_split, "chunk split"),
    **_table(_getitem, "getitem"),
    **_table(_pad, "pad"),
}

METHODS: dict[Any, Rule] = _MEASURABLE | _OTHER
"""Rules of tensor methods, by name without the underscore of in-place variants."""

FUNCTIONS: dict[Any, Rule] = {
    getattr(space, variant): rule
    for name, rule in METHODS.items()
    for variant in (name, f"{name}_")
    for space in (torch, F, operator)
    if hasattr(space, variant)
}
"""Rules of functions."""


def _unary(rule: Rule) -> Rule:
    def of_module(channels: Channels, out: Any, _module: nn.Module, _path: str, x: Any) -> Any:
        return rule(channels, out, x)

    return of_module


def _weighted(rule: Rule, *attributes: str) -> Rule:
    """Make a module's rule of its function's, whose keyword arguments are the module's attributes."""

    def of_module(channels: Channels, out: Any, module: nn.Module, path: str, x: Any) -> Any:
        values = {key: getattr(module, key, None) for key in attributes}
        weights = {
            key: channels.weight(module, path, key)
            for key, value in values.items()
            if isinstance(value, Tensor)
        }
        return rule(channels, out, x, **(values | weights))

    return of_module


_STATISTICS = ("running_mean", "running_var", "weight", "bias")

MEASURABLE_MODULES: dict[type[nn.Module], Rule] = {
    **dict.fromkeys(
        (
            *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
            *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus),
            *(nn.Softsign, nn.LogSigmoid, nn.Tanhshrink, nn.Hardshrink, nn.Softshrink),
            nn.Threshold,
        ),
        _unary(_elementwise),
    ),
    **dict.fromkeys(
        (nn.Conv1d, nn.Conv2d, nn.Conv3d), _weighted(_conv, "weight", "bias", "groups")
    ),
    **dict.fromkeys(
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        _weighted(_conv_transpose, "weight", "bias", "groups"),
    ),
    **dict.fromkeys(
        (
            *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
            *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
        ),
        _weighted(_batch_norm, *_STATISTICS),
    ),
    nn.Linear: _weighted(_linear, "weight", "bias"),
    nn.GroupNorm: _weighted(_group_norm, "num_groups", "weight", "bias"),
    nn.LayerNorm: _weighted(_layer_norm, "normalized_shape", "weight", "bias"),
    nn.PReLU: _weighted(_prelu, "weight"),
}
"""Rules of modules whose output may represent a group."""

MODULES: dict[type[nn.Module], Rule] = {
    **MEASURABLE_MODULES,
    **dict.fromkeys(
        (
            *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
            *(nn.LPPool1d, nn.LPPool2d, nn.Identity, nn.Softmax, nn.LogSoftmax),
            *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
            *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
            *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
            *(nn.AlphaDropout, nn.FeatureAlphaDropout),
            *(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
            *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
            *(nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
            *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
            *(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
            *(nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
        ),
        _unary(_keep),
    ),
    **dict.fromkeys((nn.Flatten, nn.Unflatten), _unary(_reshape)),
}
"""Rules of all modules."""

MEASURABLE_RULES = frozenset(_MEASURABLE.values())
"""Rules of functions whose output may represent a group."""
