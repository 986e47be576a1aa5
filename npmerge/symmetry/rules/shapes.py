"""Views, and tensors put together or taken apart."""

from __future__ import annotations

from collections.abc import Sequence

from npmerge.symmetry.atoms import UNIT, Axis, Layout, length, rigid
from npmerge.symmetry.call import Call, strides
from npmerge.symmetry.rules import rule


@rule(
    "view _unsafe_view reshape _reshape_alias squeeze unsqueeze flatten unflatten _reshape_copy view_copy squeeze_copy "
    "unsqueeze_copy"
)
def reshape(call: Call) -> list[Layout]:
    """By the smallest blocks of axes that hold equally many entries."""
    layout = call.of(call.args.self)
    old, new = [length(axis) for axis in layout], list(call.outputs[0].shape)
    if [n for n in old if n > 1] == [n for n in new if n > 1]:  # axes of length 1 come and go
        rest = [axis for axis, n in zip(layout, old, strict=True) if n > 1]
        return [[rest.pop(0) if n > 1 else rigid(n) for n in new]]
    return [call.atoms.reshape(layout, old, new)]


@rule("t numpy_T")
def reverse(call: Call) -> list[Layout]:
    """The last axis first."""
    return [call.of(call.args.self)[::-1]]


@rule("transpose")
def transpose(call: Call) -> list[Layout]:
    """Two axes change places."""
    layout, a = list(call.of(call.args.self)), call.args
    layout[a.dim0], layout[a.dim1] = layout[a.dim1], layout[a.dim0]
    return [layout]


@rule("permute")
def permute(call: Call) -> list[Layout]:
    """The axes in another order."""
    layout = call.of(call.args.self)
    return [[layout[axis] for axis in call.args.dims]]


@rule("expand")
def expand(call: Call) -> list[Layout]:
    """The same values along an axis that is new or had length 1."""
    shape = call.outputs[0].shape
    missing = len(shape) - call.args.self.ndim
    layout = [UNIT] * missing + call.of(call.args.self)
    old = [1] * missing + list(call.args.self.shape)
    return [
        [
            axis if n == m else call.atoms.fresh(m)
            for axis, n, m in zip(layout, old, shape, strict=True)
        ]
    ]


@rule("repeat")
def repeated(call: Call) -> list[Layout]:
    """Copies side by side, in any order."""
    layout = [UNIT] * (call.outputs[0].ndim - call.args.self.ndim) + call.of(call.args.self)
    return [
        [
            ((*call.atoms.fresh(count)[0], axis),) if count > 1 else axis
            for axis, count in zip(layout, call.args.repeats, strict=True)
        ]
    ]


@rule("as_strided")
def restride(call: Call) -> list[Layout]:
    """An axis stays where the others never change its index, as windows over another axis do; the rest has an order."""
    tensor, output = call.args.self, call.outputs[0]
    layout = call.of(tensor)
    start, *axes = call.strides[id(tensor)]
    offset, *windows = strides(output)
    kept: dict[tuple[int, int], Axis] = {}
    long = [axis for axis in layout if length(axis) != 1]
    for (size, step), axis in zip(axes, long, strict=True):
        others = [(n, s) for n, s in windows if (n, s) != (size, step)]
        inner = (offset - start) % step + sum((n - 1) * s for n, s in others if s < step)
        alone = all(s < step or s % (size * step) == 0 for _, s in others) and inner < step
        first = (offset - start) // step % size == 0
        if windows.count((size, step)) == 1 and step and alone and first:
            kept[size, step] = axis
        else:
            call.atoms.pin(axis)
    shape = zip(output.shape, output.stride(), strict=True)
    return [[kept.get((n, s), rigid(n)) if n > 1 else rigid(n) for n, s in shape]]


@rule("cat concatenate stack")
def cat(call: Call) -> list[Layout]:
    """One after the other along an axis; the other axes meet."""
    tensors = [tensor for tensor in call.args.tensors if tensor.numel() or tensor.ndim > 1]
    output, parts = call.outputs[0], [call.of(tensor) for tensor in tensors]
    at = call.args.dim % output.ndim
    call.added(tensors)
    if output.ndim > len(parts[0]):
        return [call.atoms.stack(parts, at)]
    for part in parts[1:]:
        for k, (first, other) in enumerate(zip(parts[0], part, strict=True)):
            if k != at:
                call.atoms.unify(first, other)
    layout = list(parts[0])
    layout[at] = tuple(segment for part in parts for segment in call.atoms.resolve(part[at]))
    return [layout]


@rule("split split_with_sizes chunk unsafe_chunk unsafe_split unsafe_split_with_sizes tensor_split")
def split(call: Call) -> list[Layout]:
    """Cut along an axis."""
    layout = call.of(call.args.self)
    at, results = call.args.dim % len(layout), []
    rest = layout[at]
    for output in call.outputs:
        head, rest = call.atoms.cut(rest, output.shape[at])
        results.append([*layout[:at], head, *layout[at + 1 :]])
    return results


@rule("slice")
def slice_(call: Call) -> list[Layout]:
    """A part of an axis; every k-th index, where the axis is a product with k."""
    layout, a = list(call.of(call.args.self)), call.args
    at, step = (a.dim or 0) % len(layout), a.step or 1
    size, count = length(layout[at]), call.outputs[0].shape[at]
    if size == count:
        return [layout]
    if step != 1:
        if size % step:
            call.atoms.pin(layout[at])
            layout[at] = rigid(count)
        else:
            layout[at], inner = call.atoms.split(layout[at], step)
            call.atoms.pin(inner)
            if length(layout[at]) != count:
                call.atoms.pin(layout[at])
                layout[at] = rigid(count)
        return [layout]
    start = a.start or 0
    start = min(max(start + size if start < 0 else start, 0), size)
    layout[at] = call.atoms.cut(call.atoms.cut(layout[at], start)[1], count)[0]
    return [layout]


@rule("select")
def select(call: Call) -> list[Layout]:
    """One index of an axis."""
    layout, a = call.of(call.args.self), call.args
    at = a.dim % len(layout)
    return [call.atoms.select(layout, at, a.index % length(layout[at]))]


@rule("unbind")
def unbind(call: Call) -> list[Layout]:
    """Every index of an axis by itself."""
    layout, a = call.of(call.args.self), call.args
    return [call.atoms.select(layout, a.dim % len(layout), k) for k in range(len(call.outputs))]


@rule("diagonal diagonal_copy")
def diagonal(call: Call) -> list[Layout]:
    """Two axes that enumerate the same things become the last one."""
    layout, a = call.of(call.args.self), call.args
    one, other = a.dim1 % len(layout), a.dim2 % len(layout)
    rest = [axis for k, axis in enumerate(layout) if k not in (one, other)]
    if a.offset or length(layout[one]) != length(layout[other]):
        call.atoms.pin(layout[one])
        call.atoms.pin(layout[other])
        return [[*rest, rigid(call.outputs[0].shape[-1])]]
    call.atoms.unify(layout[one], layout[other])
    return [[*rest, layout[one]]]


@rule("constant_pad_nd")
def pad(call: Call) -> list[Layout]:
    """The same value at every new index."""
    return [_padded(call, call.args.pad, constant=True)]


@rule(
    "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d"
)
def mirror(call: Call) -> list[Layout]:
    """What is added depends on the order."""
    return [_padded(call, call.args.padding, constant=False)]


def _padded(call: Call, sizes: Sequence[int], *, constant: bool) -> Layout:
    layout = list(call.of(call.args.self))
    for k in range(len(sizes) // 2):
        low, high, at = sizes[2 * k], sizes[2 * k + 1], len(layout) - 1 - k
        if not (low or high):
            continue
        if constant and low >= 0 and high >= 0:
            new: Axis = call.atoms.fresh(low) + call.atoms.resolve(layout[at])
            layout[at] = new + call.atoms.fresh(high)
        else:
            call.atoms.pin(layout[at])
            layout[at] = rigid(call.outputs[0].shape[at])
    return layout


@rule("channel_shuffle native_channel_shuffle")
def channel_shuffle(call: Call) -> list[Layout]:
    """(groups, channels of a group) become (channels of a group, groups)."""
    layout = list(call.of(call.args.self))
    groups, inner = call.atoms.split(layout[1], length(layout[1]) // call.args.groups)
    layout[1] = ((inner, groups),)
    return [layout]


@rule("view_as_real view_as_complex")
def complex_parts(call: Call) -> list[Layout]:
    """The real and the imaginary part have an order, on a last axis that comes or goes."""
    layout = call.of(call.args.self)
    if call.operation == "view_as_real":
        return [[*layout, rigid(2)]]
    call.atoms.pin(layout[-1])
    return [layout[:-1]]
