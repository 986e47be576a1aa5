"""Elementwise operations, with broadcasting; ``torch.Tag.pointwise`` names most of them."""

from __future__ import annotations

from npmerge.symmetry.atoms import Axis, Layout, rigid
from npmerge.symmetry.call import Call
from npmerge.symmetry.rules import rule

ADDING = frozenset(("add", "add_", "sub", "sub_"))


@rule(
    "add floor_divide where masked_fill clamp lerp fill zero native_dropout _conj "
    "nan_to_num addcmul addcdiv rsub threshold hardswish hardtanh log_sigmoid_forward _prelu_kernel _softmax "
    "_log_softmax _safe_softmax masked_fill_ bernoulli_",
    measurable=True,
)
def pointwise(call: Call) -> list[Layout]:
    """Axes that meet enumerate the same things; a softmax mixes its axis, whatever the order."""
    shape = call.outputs[0].shape
    layout: Layout = []
    for back in range(len(shape), 0, -1):
        size = shape[-back]
        meeting: list[Axis] = [
            call.of(tensor)[-back]
            for tensor in call.inputs
            if tensor.ndim >= back and tensor.shape[-back] == size
        ]
        if size > 1:
            for other in meeting[1:]:
                call.atoms.unify(meeting[0], other)
        layout.append(meeting[0] if size > 1 and meeting else call.atoms.fresh(size))
    if call.operation in ADDING:  # what is added to activations is mapped as they are
        call.added(call.inputs)
    return [layout for _ in call.outputs]


@rule("_to_copy clone detach copy alias lift_fresh contiguous")
def copied(call: Call) -> list[Layout]:
    """As elementwise operations.

    But whether one runs depends on how tensors lie in memory, so nothing is measured there.
    """
    return pointwise(call)


@rule("triu tril")
def triangle(call: Call) -> list[Layout]:
    """The last two axes have an order."""
    layout = call.of(call.args.self)
    for axis in layout[-2:]:
        call.atoms.pin(axis)
    return [layout]


@rule(
    "zeros_like ones_like empty_like full_like new_zeros new_ones new_full new_empty new_empty_strided"
)
def filled(call: Call) -> list[Layout]:
    """The same value everywhere: free along every axis."""
    return [[call.atoms.fresh(size) for size in call.outputs[0].shape]]


@rule("rand_like randn_like randint_like bernoulli multinomial normal")
def drawn(call: Call) -> list[Layout]:
    """Other values at every index."""
    return [[rigid(size) for size in call.outputs[0].shape]]
