"""Normalisations of activations and of weights."""

from __future__ import annotations

from npmerge.symmetry.atoms import UNIT, Layout, length, rigid
from npmerge.symmetry.call import Call
from npmerge.symmetry.groups import Role
from npmerge.symmetry.rules import rule


@rule("batch_norm", measurable=True)
def batch_norm(call: Call) -> list[Layout]:
    """Each channel of axis 1 by itself."""
    a, layout = call.args, call.of(call.args.input)
    channels = layout[1]
    call.vector(a.weight, channels, "scale")
    call.vector(a.bias, channels)
    roles: dict[str, Role] = {"running_mean": "out", "running_var": "variance"}
    for name, role in roles.items():
        call.vector(getattr(a, name, None), channels, role)
    results = [list(layout)]
    for output in call.outputs[1:]:
        whole = output.ndim == 1 and output.numel() == length(channels)
        results.append([channels] if whole else [rigid(size) for size in output.shape])
    return results


@rule("native_layer_norm _fused_rms_norm rms_norm _fused_layer_norm", measurable=True)
def layer_norm(call: Call) -> list[Layout]:
    """The last axes together."""
    a, layout = call.args, call.of(call.args.input)
    kept = len(layout) - len(a.normalized_shape)
    roles: dict[str, Role] = {"weight": "scale", "bias": "out"}
    for name, role in roles.items():
        tensor = getattr(a, name, None)
        if tensor is not None:
            for axis, other in zip(layout[kept:], call.of(tensor), strict=True):
                call.atoms.unify(axis, other)
            call.use(tensor, role)
    return [list(layout)] + [layout[:kept] + [UNIT] * (o.ndim - kept) for o in call.outputs[1:]]


@rule("native_group_norm", measurable=True)
def group_norm(call: Call) -> list[Layout]:
    """The channels of a group together: groups x channels."""
    a, layout = call.args, call.of(call.args.input)
    if a.group > 1:
        call.atoms.split(layout[1], a.C // a.group)
        call.permutations_only(layout[1])
    call.vector(a.weight, layout[1], "scale")
    call.vector(a.bias, layout[1])
    return [list(layout)] + [[layout[0], rigid(a.group)] for _ in call.outputs[1:]]


@rule("_weight_norm_interface")
def weight_norm(call: Call) -> list[Layout]:
    """G v / ||v||: both have the axes of the weight."""
    v, g = call.of(call.args.v), call.of(call.args.g)
    for axis, other in zip(v, g, strict=True):
        if length(other) > 1:
            call.atoms.unify(axis, other)
    return [v, g][: len(call.outputs)]
