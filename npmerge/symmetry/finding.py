"""Reading the symmetry groups off a model, and checking them."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from npmerge.named import user_code
from npmerge.prepare import checked, unwrapped
from npmerge.symmetry.atoms import (
    Atom,
    Axis,
    atoms_of,
    factor_length,
    is_rigid,
    rigid,
    segment_length,
)
from npmerge.symmetry.groups import Group, Slot, Span, Symmetry, SymmetryError, Tap
from npmerge.symmetry.watch import Escapes, Event, Watch, evaluating, plain_operations

EXAMPLES = 2
"""How many examples are watched: an axis of length 1 could be mistaken."""


def find_symmetry(model: nn.Module, *example: Any, strict: bool = True, **named: Any) -> Symmetry:
    """Read the permutation symmetry groups off a model, by watching one forward pass in evaluation mode.

    Every ATen operation that runs says how the axes of its outputs relate to those of its inputs and parameters. What
    is tied to the inputs or outputs of the model stays where it is; everything else that indexes a parameter is a
    group: channels, neurons, heads, the dimensions of a head. Only the course that the pass took is known, where it
    depends on the data.

    Args:
        model: Any module, compiled or wrapped for several devices too. It is not changed. Parameters on the meta device
            will do.
        *example: Its inputs: a batch of two examples or more (of one, two copies are watched; of more, the first two),
            each long enough that positions differ.
        strict: Refuse operations without a rule; else hold the channels that they touch fixed, and say so in
            ``pinned``.
        **named: Inputs by keyword.

    Returns:
        The groups, in the order of the activations that show them. Groups of one channel are left out.

    Raises:
        SymmetryError: If an operation has no rule, or the model fails on the example; the message names the operation
            and its module.
        ValueError: If the model is no module.

    Source:
        Section II-C of the paper (permutation symmetry); Ainsworth et al. 2023, "Git Re-Basin".
    """
    model = unwrapped(checked(model, values=False))
    example, named = _fitting(model, _few((example, named)))
    watch = Watch(model, strict)
    for leaf in tree_leaves((example, named)):
        if isinstance(leaf, Tensor):
            watch.track(leaf, [rigid(size) for size in leaf.shape])
    cudnn = torch.backends.cudnn.flags(enabled=False)  # the same operations on every device
    with evaluating(model), plain_operations(), cudnn, watch.modules.follow():
        try:
            with watch, Escapes(watch):
                out = model(*example, **named)
        except SymmetryError:
            raise
        except Exception as error:  # whatever the model's own code raises
            reason = (str(error).strip() or type(error).__name__).split("\n")[0]
            raise SymmetryError(
                f"{watch.modules.describe(watch.modules.failed or '')} fails on the example input ({reason}): "
                "give a batch the model accepts"
            ) from error
    for leaf in tree_leaves(_plain(out)):
        if isinstance(leaf, Tensor) and watch.known(leaf):
            for axis in watch.layout_of(leaf):
                watch.atoms.pin(axis)
    return _assembled(model, watch)


def symmetry_on(model: nn.Module, example: Any, *, strict: bool = True) -> Symmetry:
    """:func:`find_symmetry` on an example in one piece, tried once: all groups are permuted at random.

    Args:
        model: The model.
        example: A tensor, a tuple of inputs, or a dictionary of keyword inputs.
        strict: See :func:`find_symmetry`.

    Returns:
        The symmetry.

    Raises:
        SymmetryError: As :func:`find_symmetry`, or the permuted model answers something else than the model.
    """
    if isinstance(example, Mapping):
        positional, named = (), dict(example)
    else:
        positional, named = tuple(example) if isinstance(example, tuple | list) else (example,), {}
    symmetry = find_symmetry(model, *positional, strict=strict, **named)
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    if not like.is_meta:
        positional, named = _fitting(model, _few((positional, named)))
        permuted = copy.deepcopy(model)
        permute_randomly(permuted, symmetry, torch.Generator().manual_seed(0))
        difference = compare(model, permuted, *positional, **named)
        if difference > math.sqrt(torch.finfo(like.dtype).eps):
            raise SymmetryError(
                f"the permuted {type(model).__name__} answers otherwise (by {difference:.0e} of its scale): its "
                "symmetry is not what its operations say; report it, and use the alignment 'identity' meanwhile"
            )
    return symmetry


def _plain(out: Any) -> Any:
    """A model's output as something whose tensors can be found: an object by its attributes."""
    leaves = tree_leaves(out)
    return [
        list(vars(leaf).values())
        if not isinstance(leaf, Tensor) and hasattr(leaf, "__dict__")
        else leaf
        for leaf in leaves
    ]


def _fitting(model: nn.Module, inputs: Any) -> Any:
    """Inputs on the model's device, in its precision."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    device = "cpu" if like.is_meta else like.device
    return tree_map_only(
        Tensor, lambda t: t.to(device, like.dtype if t.is_floating_point() else None), inputs
    )


def _few(inputs: Any) -> Any:
    """Two examples of inputs whose tensors all have one row an example."""
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim]
    counts = {len(tensor) for tensor in tensors}
    if len(counts) != 1:
        return inputs
    (count,) = counts
    if count == 1:
        return tree_map_only(Tensor, lambda t: torch.cat([t] * EXAMPLES) if t.ndim else t, inputs)
    return tree_map_only(Tensor, lambda t: t[:EXAMPLES] if t.ndim else t, inputs)


# --- The result ------------------------------------------------------------------------------


def _assembled(model: nn.Module, watch: Watch) -> Symmetry:
    layouts: dict[str, list[Axis]] = {}
    identities: dict[str, int] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        layout = watch.state_layout(tensor)
        if layout is not None:
            layouts[name], identities[name] = layout, id(tensor)
    # Looking for one axis may have decided another: all are looked up again.
    layouts = {name: [watch.atoms.resolve(a) for a in layout] for name, layout in layouts.items()}
    sizes: dict[int, int] = {}
    for layout in layouts.values():
        for axis in layout:
            sizes.update({atom.variable: atom.size for atom in atoms_of(axis) if atom.variable})
    watch.atoms.frozen = True
    slots: dict[int, list[Slot]] = {variable: [] for variable in sizes}
    for name, layout in layouts.items():
        for number, axis in enumerate(layout):
            role = watch.roles.get((identities[name], number), "tied")
            for variable, place in _places(axis, number):
                slots[variable].append(Slot(**vars(place), name=name, role=role))
    restricted: dict[int, str] = {}
    for axis, reason in watch.restricted:
        for atom in atoms_of(watch.atoms.resolve(axis)):
            restricted.setdefault(atom.variable, reason)
    for variable, found in slots.items():
        tied = next((slot.name for slot in found if slot.role == "tied"), None)
        if tied is not None:
            restricted.setdefault(variable, f"the use of {tied!r}, channel by channel,")
    taps = _taps(watch, sizes)
    order = sorted(
        sizes,
        key=lambda v: (taps[v][0], taps[v][1].offset) if v in taps else (len(watch.events), v),
    )
    names = _names([taps[v][1] if v in taps else None for v in order], [slots[v] for v in order])
    groups = tuple(
        Group(
            name,
            sizes[v],
            tuple(slots[v]),
            taps[v][1] if v in taps else None,
            restricted.get(v, ""),
        )
        for name, v in zip(names, order, strict=True)
    )
    unused = tuple(name for name, p in model.named_parameters() if id(p) not in watch.touched)
    if unused:
        modules = ", ".join(sorted({name.rpartition(".")[0] or name for name in unused}))
        warnings.warn(
            f"{type(model).__name__} does not use {modules} in evaluation: a permutation leaves them as they are",
            stacklevel=3,
        )
    return Symmetry(groups, _movable(model, layouts), dict(watch.pinned), unused)


def _places(axis: Axis, number: int) -> Iterator[tuple[int, Span]]:
    """Where the atoms of an axis lie on it."""
    total = sum(map(segment_length, axis))
    for variable, offset, block, repeats in _factors(axis):
        yield (
            variable,
            Span(axis=number, length=total, offset=offset, block=block, repeats=repeats),
        )


def _factors(axis: Axis) -> Iterator[tuple[int, int, int, tuple[tuple[int, int], ...]]]:
    offset = 0
    for segment in axis:
        sizes = [factor_length(factor) for factor in segment]
        for k, factor in enumerate(segment):
            outer, block = torch.Size(sizes[:k]).numel(), torch.Size(sizes[k + 1 :]).numel()
            loop = ((outer, sizes[k] * block),) if outer > 1 else ()
            if not isinstance(factor, Atom):
                for variable, start, inner, loops in _factors(factor):
                    scaled = tuple((count, step * block) for count, step in loops)
                    yield variable, offset + start * block, inner * block, loop + scaled
            elif factor.variable:
                yield factor.variable, offset, block, loop
        offset += torch.Size(sizes).numel()


def _taps(watch: Watch, sizes: Mapping[int, int]) -> dict[int, tuple[int, Tap]]:
    """For each group the activation that shows it best, and which event it is; the last of those that are equally good.

    Best is one that shows no other group on any axis; then one whose axis is the group's alone; then the output of a
    weight layer, a normalisation or an elementwise function.
    """
    best: dict[int, int] = {}
    taps: dict[int, tuple[int, Tap]] = {}
    for number, event in enumerate(watch.events):
        for output, given in enumerate(event.layouts):
            layout = [watch.atoms.resolve(axis) for axis in given]
            moving = [k for k, axis in enumerate(layout) if not is_rigid(axis)]
            for k in moving:
                inside = {atom.variable for atom in atoms_of(layout[k])} & sizes.keys()
                exact = len(layout[k]) == len(layout[k][0]) == 1
                alone = len(moving) == 1 and (exact or _sum_of_atoms(layout[k]))
                rank = 4 * alone + (2 + event.measurable) * exact
                places = dict(reversed(list(_places(layout[k], k))))
                for variable in inside:
                    if rank >= best.get(variable, 0):
                        best[variable] = rank
                        taps[variable] = number, _tap(event, output, places[variable], not alone)
    return taps


def _sum_of_atoms(axis: Axis) -> bool:
    """Whether no other group lies around or inside a group on an axis, only beside it."""
    return all(sum(bool(a.variable) for a in atoms_of((segment,))) <= 1 for segment in axis)


def _tap(event: Event, output: int, place: Span, mixed: bool) -> Tap:
    return Tap(
        **vars(place), path=event.path, operation=event.operation, occurrence=event.occurrence,
        output=output, mixed=mixed,
    )  # fmt: skip


def _names(taps: Sequence[Tap | None], slots: Sequence[Sequence[Slot]]) -> list[str]:
    """Readable names: of the module whose activation shows a group, else of its first tensor.

    Numbered where they repeat.
    """
    seen: dict[str, int] = {}
    names = []
    for tap, found in zip(taps, slots, strict=True):
        name = found[0].name if tap is None else tap.path or tap.operation
        seen[name] = seen.get(name, 0) + 1
        names.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return names


def _movable(model: nn.Module, layouts: Mapping[str, list[Axis]]) -> float:
    """Share of the parameters' entries that some permutation moves."""
    moved = total = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        if name in layouts:
            moved += parameter.numel() - math.prod(map(_still, layouts[name]))
    return moved / total if total else 0.0


def _still(axis: Axis) -> int:
    """How many indices of an axis no permutation moves."""
    return sum(
        math.prod(
            (0 if factor.variable else factor.size) if isinstance(factor, Atom) else _still(factor)
            for factor in segment
        )
        for segment in axis
    )


# --- Checking --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """What :func:`check_symmetry` has found.

    Attributes:
        difference: Largest difference of an output after all groups were permuted at random, relative to the outputs'
            scale.
        moved: Share of the parameters that were moved, from 0 to 1.
        groups: Number of groups.
        symmetry: What was checked.
    """

    difference: float
    moved: float
    groups: int
    symmetry: Symmetry


@torch.no_grad()
def check_symmetry(
    model: nn.Module, *example: Any, strict: bool = True, seed: int = 0, **named: Any
) -> Check:
    """Permute all symmetry groups of a model at random, and compare what it answers before and after, in float64.

    A copy is checked, whose parameters are perturbed: what still stands at 0 or 1 would hide a mistake.

    Args:
        model: Any module. It is not changed.
        *example: Its inputs, as for :func:`find_symmetry`.
        strict: As for :func:`find_symmetry`.
        seed: Of the permutations and the perturbation.
        **named: Inputs by keyword.

    Returns:
        What was found. A difference above some 1e-8 says that the symmetry is wrong: report the model.

    Raises:
        SymmetryError: As :func:`find_symmetry`.
    """
    generator = torch.Generator().manual_seed(seed)
    example, named = tree_map_only(
        Tensor, lambda t: t.double() if t.is_floating_point() else t, _few((example, named))
    )
    before = copy.deepcopy(unwrapped(checked(model))).double()
    _perturb(before, generator)
    symmetry = find_symmetry(before, *example, strict=strict, **named)
    after = copy.deepcopy(before)
    permute_randomly(after, symmetry, generator)
    with _Double():  # type: ignore[no-untyped-call]  # PyTorch's hook has no types
        difference = compare(before, after, *example, **named)
    return Check(difference, symmetry.movable, len(symmetry), symmetry)


@torch.no_grad()
def compare(first: nn.Module, second: nn.Module, *example: Any, **named: Any) -> float:
    """The largest difference between two models' outputs in evaluation mode, relative to the scale of the first one's.

    Args:
        first: A model.
        second: Another one.
        *example: Inputs of both.
        **named: Inputs by keyword.
    """
    outputs = []
    for model in (first, second):
        with evaluating(model), plain_operations():
            with user_code(f"model {type(model).__name__}"):
                out = model(*example, **named)
            found = tree_leaves(_plain(out))
        outputs.append([t for t in found if isinstance(t, Tensor) and t.is_floating_point()])
    scale = max((float(t.abs().max()) for t in outputs[0] if t.numel()), default=0.0)
    pairs = zip(*outputs, strict=True)
    difference = max((float((x - y).abs().max()) for x, y in pairs if x.numel()), default=0.0)
    return difference / scale if scale else difference


@torch.no_grad()
def permute_randomly(model: nn.Module, groups: Sequence[Group], generator: torch.Generator) -> None:
    """Permute a model's groups at random, in place.

    Args:
        model: Whose groups they are.
        groups: The groups.
        generator: Of the permutations.
    """
    state = model.state_dict(keep_vars=True)
    for group in groups:
        permutation = torch.randperm(group.size, generator=generator)
        owners = {
            id(state[slot.name]): slot.name for slot in group.slots
        }  # tied weights are one tensor
        for slot in group.slots:
            tensor = state[slot.name].detach()
            if owners[id(state[slot.name])] == slot.name:
                tensor.copy_(slot.permuted(tensor, permutation))


def _perturb(model: nn.Module, generator: torch.Generator) -> None:
    parameters = {name for name, _ in model.named_parameters()}
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        draw = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
        if name.endswith("running_var"):
            tensor.mul_(0.5 + draw)
        elif name in parameters or name.endswith("running_mean"):
            spread = float(tensor.std()) if tensor.numel() > 1 else 0.0
            tensor.add_((draw - 0.5) * (0.2 * spread if spread > 1e-3 else 0.4))


class _Double(TorchDispatchMode):
    """Norms that compute in float32 would hide mistakes behind rounding: they compute in float64."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def widened(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        kwargs = {name: widened(value) for name, value in (kwargs or {}).items()}
        return func(*map(widened, args), **kwargs)
