"""Operations along an axis."""

from __future__ import annotations

from npmerge.symmetry.atoms import UNIT, Layout, length, rigid
from npmerge.symmetry.call import Call
from npmerge.symmetry.rules import rule


@rule(
    "sum mean amax amin var std var_mean std_mean linalg_vector_norm norm logsumexp prod any all max min argmax argmin "
    "nansum aminmax median mode count_nonzero"
)
def reduce(call: Call) -> list[Layout]:
    """The axes go; where they are answered by a number, they have an order."""
    layout, dim = call.of(call.args.self), getattr(call.args, "dim", None)
    count = len(layout)
    dims = [dim] if isinstance(dim, int) else list(dim or range(count))
    gone = {d % count for d in dims} if count else set()
    first = call.outputs[0]
    numbers = len(call.outputs) > 1 and not call.outputs[1].is_floating_point()
    if numbers or call.operation in ("argmax", "argmin"):
        for d in gone:
            call.atoms.pin(layout[d])
    keep = first.ndim == count
    return [
        [UNIT if d in gone else axis for d, axis in enumerate(layout) if keep or d not in gone]
        for _ in call.outputs
    ]


@rule(
    "cumsum cumprod cummax cummin logcumsumexp sort topk kthvalue argsort flip roll unfold _fft_c2c _fft_r2c _fft_c2r"
)
def along(call: Call) -> list[Layout]:
    """An axis has an order; without one named, all have."""
    layout = list(call.of(call.args.self))
    named = (getattr(call.args, name, None) for name in ("dim", "dims", "dimension"))
    dim = next((value for value in named if value is not None), None)
    count = len(layout)
    for d in [dim % count] if isinstance(dim, int) else [d % count for d in dim or range(count)]:
        call.atoms.pin(layout[d])
        layout[d] = rigid(call.outputs[0].shape[d])
    return [layout + [rigid(size) for size in o.shape[len(layout) :]] for o in call.outputs]


@rule("glu")
def glu(call: Call) -> list[Layout]:
    """The two halves of an axis meet."""
    layout, at = list(call.of(call.args.self)), call.args.dim
    first, second = call.atoms.cut(layout[at], length(layout[at]) // 2)
    call.atoms.unify(first, second)
    layout[at] = first
    return [layout]
