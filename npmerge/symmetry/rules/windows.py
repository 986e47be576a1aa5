"""Operations on neighbouring positions: pooling, resizing, patches."""

from __future__ import annotations

from npmerge.symmetry.atoms import Atom, Layout, rigid
from npmerge.symmetry.call import Call
from npmerge.symmetry.rules import rule


@rule(
    "max_pool2d_with_indices max_pool3d_with_indices max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d "
    "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d fractional_max_pool2d fractional_max_pool3d "
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d "
    "_upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d "
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa"
)
def positions(call: Call) -> list[Layout]:
    """The last axes, as many as the name says, have an order."""
    layout = call.of(call.inputs[0])
    count = next(int(c) for c in "123" if f"{c}d" in call.operation)
    for axis in layout[-count:]:
        call.atoms.pin(axis)
    kept = layout[:-count]
    return [kept + [rigid(size) for size in output.shape[-count:]] for output in call.outputs]


@rule("grid_sampler_2d grid_sampler_3d")
def grid_sampler(call: Call) -> list[Layout]:
    """The channels keep their order; the positions have one."""
    x, grid = call.of(call.args.input), call.of(call.args.grid)
    call.atoms.unify(x[0], grid[0])
    for axis in (*x[2:], *grid[1:]):
        call.atoms.pin(axis)
    return [[x[0], x[1], *(rigid(size) for size in call.outputs[0].shape[2:])]]


@rule("im2col col2im")
def columns(call: Call) -> list[Layout]:
    """Patches: channels x the positions of a kernel."""
    layout, (height, width) = call.of(call.args.self), call.args.kernel_size
    size = height * width
    at = len(layout) - (3 if call.operation == "im2col" else 2)
    for axis in layout[at + 1 :]:
        call.atoms.pin(axis)
    if call.operation == "im2col":
        channels = ((layout[at], Atom(0, size)),)
    else:
        channels, inner = call.atoms.split(layout[at], size)
        call.atoms.pin(inner)
    return [[*layout[:at], channels, *(rigid(n) for n in call.outputs[0].shape[at + 1 :])]]


@rule("pixel_shuffle pixel_unshuffle")
def pixels(call: Call) -> list[Layout]:
    """Channels x positions of a block become channels, or the other way round."""
    layout, a = call.of(call.args.self), call.args
    for axis in layout[-2:]:
        call.atoms.pin(axis)
    if call.operation == "pixel_shuffle":
        channels, inner = call.atoms.split(layout[-3], a.upscale_factor**2)
        call.atoms.pin(inner)
    else:
        channels = ((layout[-3], Atom(0, a.downscale_factor**2)),)
    return [[*layout[:-3], channels, *(rigid(size) for size in call.outputs[0].shape[-2:])]]
