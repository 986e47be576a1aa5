"""Operations that take entries by number, and those whose result is one."""

from __future__ import annotations

import torch

from npmerge.symmetry.atoms import Layout, rigid
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


@rule(
    "index_put scatter scatter_add scatter_reduce index_add index_copy index_fill masked_scatter masked_select nonzero "
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
