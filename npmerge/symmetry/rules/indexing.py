"""Operations that take entries by number, and those whose result is one."""

from __future__ import annotations

import torch

from npmerge.symmetry.atoms import Axis, Layout, length, rigid
from npmerge.symmetry.call import Call
from npmerge.symmetry.rules import rule


@rule("embedding")
def embedding(call: Call) -> list[Layout]:
    """The rows have numbers."""
    weight = call.of(call.args.weight)
    call.atoms.pin(weight[0])
    call.use(call.args.weight, "out")
    return [call.of(call.args.indices) + weight[1:]]


@rule("_embedding_bag _embedding_bag_forward_only")
def embedding_bag(call: Call) -> list[Layout]:
    """The rows have numbers; bags have an order."""
    weight = call.of(call.args.weight)
    call.atoms.pin(weight[0])
    call.use(call.args.weight, "out")
    first, *others = call.outputs
    results = [[rigid(first.shape[0]), weight[1]]]
    return results + [[rigid(size) for size in output.shape] for output in others]


@rule("index _unsafe_index")
def index(call: Call) -> list[Layout]:
    """Axes that are indexed have an order; the others stay."""
    layout, given = call.of(call.args.self), list(call.args.indices)
    given += [None] * (len(layout) - len(given))
    used = [k for k, indices in enumerate(given) if indices is not None]
    for k in used:
        call.atoms.pin(layout[k])
        for axis in call.of(given[k]):
            call.atoms.pin(axis)
    if any(given[k].dtype == torch.bool for k in used):
        call.pin_all()
        return call.rigid_outputs()
    wide = max(given[k].ndim for k in used)
    at = used[0] if used[-1] - used[0] + 1 == len(used) else 0
    rest = [axis for k, axis in enumerate(layout) if k not in used]
    shape = call.outputs[0].shape
    return [rest[:at] + [rigid(size) for size in shape[at : at + wide]] + rest[at:]]


@rule("index_select")
def index_select(call: Call) -> list[Layout]:
    """One axis by numbers."""
    layout, a = list(call.of(call.args.self)), call.args
    at = a.dim % len(layout)
    for axis in (layout[at], *call.of(a.index)):
        call.atoms.pin(axis)
    layout[at] = rigid(call.outputs[0].shape[at])
    return [layout]


@rule("gather")
def gather(call: Call) -> list[Layout]:
    """One axis by numbers of its own for each entry; where sizes agree the other axes meet."""
    layout, numbers, a = call.of(call.args.self), call.of(call.args.index), call.args
    at, result = a.dim % len(layout), []
    for k, (axis, number) in enumerate(zip(layout, numbers, strict=True)):
        if k != at and a.self.shape[k] == a.index.shape[k]:
            call.atoms.unify(axis, number)
            result.append(axis)
        else:
            call.atoms.pin(axis)
            call.atoms.pin(number)
            result.append(rigid(a.index.shape[k]))
    return [result]


@rule("index_add index_copy")
def index_add(call: Call) -> list[Layout]:
    """Rows by numbers are added or replaced; the other axes meet."""
    a = call.args
    layout, source = list(call.of(a.self)), call.of(a.source)
    at = a.dim % len(layout)
    for axis in (layout[at], source[at], *call.of(a.index)):
        call.atoms.pin(axis)
    for k, (axis, other) in enumerate(zip(layout, source, strict=True)):
        if k != at:
            call.atoms.unify(axis, other)
    return [layout]


@rule("index_put")
def index_put(call: Call) -> list[Layout]:
    """Entries by numbers are added or replaced; axes without numbers meet those of the values."""
    layout, given = call.of(call.args.self), list(call.args.indices)
    used = [k for k, indices in enumerate(given) if indices is not None]
    if any(given[k].dtype == torch.bool for k in used):
        call.pin_all()
        return call.rigid_outputs()
    for axis in (*(layout[k] for k in used), *(n for k in used for n in call.of(given[k]))):
        call.atoms.pin(axis)
    wide = max(given[k].ndim for k in used)
    at = used[0] if used[-1] - used[0] + 1 == len(used) else 0
    rest: list[Axis | None] = [axis for k, axis in enumerate(layout) if k not in used]
    target = [*rest[:at], *[None] * wide, *rest[at:]]
    values = call.of(call.args.values)
    for own, value in zip(target[len(target) - len(values) :], values, strict=True):
        if own is None:
            call.atoms.pin(value)
        elif length(value) > 1:
            call.atoms.unify(own, value)
    return [layout]


@rule("scatter scatter_add scatter_reduce")
def scatter(call: Call) -> list[Layout]:
    """One axis by numbers of its own for each entry; where sizes agree the other axes meet."""
    a = call.args
    layout, at = list(call.of(a.self)), a.dim % a.self.ndim
    others = [
        t for t in (a.index, getattr(a, "src", None)) if t is not None and t.ndim == a.self.ndim
    ]
    for tensor in others:
        for k, (axis, other) in enumerate(zip(layout, call.of(tensor), strict=True)):
            if k != at and tensor.shape[k] == a.self.shape[k]:
                call.atoms.unify(axis, other)
            else:
                call.atoms.pin(axis)
                call.atoms.pin(other)
    return [layout]


@rule(
    "index_fill masked_scatter masked_select nonzero "
    "_local_scalar_dense equal take put _unique2 unique_consecutive bincount histc searchsorted "
    "bucketize _linalg_check_errors"
)
def numbered(call: Call) -> list[Layout]:
    """What these give or change has an order: everything is held fixed."""
    call.pin_all()
    return call.rigid_outputs()


@rule("sym_size _assert_async is_same_size _assert_scalar _assert_tensor_metadata")
def nothing(call: Call) -> list[Layout]:
    """They look at shapes, or at nothing."""
    return [call.of(call.inputs[0]) for _ in call.outputs]
