"""Products that sum over an axis: matrices, convolutions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from npmerge.symmetry.atoms import Layout, length, rigid
from npmerge.symmetry.call import Call
from npmerge.symmetry.groups import Role
from npmerge.symmetry.rules import rule


@rule("mm bmm mv dot vdot matmul", measurable=True)
def product(call: Call) -> list[Layout]:
    """The last axis of the first factor is summed with the last but one of the second."""
    first, second = call.inputs if len(call.inputs) > 1 else call.inputs * 2
    return [_contracted(call, first, second)]


@rule("addmm addmv baddbmm addbmm addr", measurable=True)
def product_and_sum(call: Call) -> list[Layout]:
    """The same, and something is added."""
    a = call.args
    names = (("mat1", "mat2"), ("mat", "vec"), ("batch1", "batch2"))
    first, second = next((getattr(a, x), getattr(a, y)) for x, y in names if hasattr(a, x))
    layout = _contracted(call, first, second)
    if call.operation == "addbmm":
        layout = layout[1:]
    _broadcast(call, layout, a.self)
    return [layout]


@rule("linear", measurable=True)
def linear(call: Call) -> list[Layout]:
    """Some devices run a linear layer as one operation; its weight is (out, in)."""
    a = call.args
    layout, weight = call.of(a.input), call.of(a.weight)
    call.atoms.unify(layout[-1], weight[-1])
    call.use(a.weight, "out", "in")
    result = [*layout[:-1], weight[0]]
    if a.bias is not None:
        _broadcast(call, result, a.bias)
    return [result]


@rule("_cdist_forward _euclidean_dist")
def distances(call: Call) -> list[Layout]:
    """The last axes of both are summed."""
    x, y = (call.of(tensor) for tensor in call.inputs[:2])
    call.atoms.unify(x[-1], y[-1])
    return [[*x[:-1], y[-2]]]


def _contracted(call: Call, first: Tensor, second: Tensor) -> Layout:
    left, right = call.of(first), call.of(second)
    summed = max(len(right) - 2, 0)
    call.atoms.unify(left[-1], right[summed])
    into: Role = "in"
    out: Role = "out"
    call.use(first, *(out for _ in left[1:]), into)
    call.use(second, *(into if k == summed else out for k in range(len(right))))
    if len(right) == 3:  # each of a batch by itself
        call.atoms.unify(left[0], right[0])
        call.permutations_only(left[0])
    return left[:-1] + (right[-1:] if len(right) > 1 else [])


def _broadcast(call: Call, layout: Layout, plus: Tensor) -> None:
    for axis, other in zip(layout[len(layout) - plus.ndim :], call.of(plus), strict=True):
        if length(other) > 1:
            call.atoms.unify(axis, other)
    call.use(plus, "out")


@rule("convolution", measurable=True)
def convolution(call: Call) -> list[Layout]:
    """A kernel is (out, in of a group, ...), transposed (in, out of a group, ...).

    The groups have an axis of their own.
    """
    a, atoms = call.args, call.atoms
    x, kernel, output = call.of(a.input), call.of(a.weight), call.outputs[0]
    groups = a.groups
    depth = a.input.shape[1] // groups
    for axis in kernel[2:]:
        atoms.pin(axis)
    if groups == 1:
        into, out = (0, 1) if a.transposed else (1, 0)
        atoms.unify(kernel[into], x[1])
        call.use(a.weight, *(("in", "out") if a.transposed else ("out", "in")))
        channels = kernel[out]
    else:
        outer, inner = atoms.split(x[1], depth)
        if a.transposed:
            atoms.unify(kernel[0], ((outer, inner),))
            channels = ((outer, kernel[1]),)
        else:
            atoms.unify(kernel[1], inner)
            same, own = atoms.split(kernel[0], output.shape[1] // groups)
            atoms.unify(outer, same)
            channels = ((same, own),)
        call.use(a.weight, "tied")
        call.permutations_only(outer)
    call.vector(a.bias, channels)
    window = _window(call, x[2:], a.weight.shape[2:], a.input.shape[2:], output.shape[2:])
    return [[x[0], channels, *window]]


def _window(
    call: Call, axes: Layout, kernel: Sequence[int], old: Sequence[int], new: Sequence[int]
) -> Layout:
    if all(size == 1 for size in kernel) and list(old) == list(new):
        return axes
    for axis in axes:
        call.atoms.pin(axis)
    return [rigid(size) for size in new]


@rule("_grouped_mm")
def grouped_product(call: Call) -> list[Layout]:
    """Rows of (T, K) by matrices (E, K, N), which rows by which is told by numbers."""
    a = call.args
    rows, matrices = call.of(a.self), call.of(a.mat2)
    if len(rows) != 2 or len(matrices) != 3:
        call.pin_all()
        return call.rigid_outputs()
    call.atoms.unify(rows[1], matrices[1])
    for axis in (rows[0], matrices[0]):
        call.atoms.pin(axis)
    call.use(a.mat2, "tied", "in", "out")
    return [[rows[0], matrices[2]]]


@rule("_trilinear")
def trilinear(call: Call) -> list[Layout]:
    """Its sums are held fixed."""
    call.pin_all()
    return call.rigid_outputs()
