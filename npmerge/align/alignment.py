"""The value that every alignment method returns: for each symmetry group, how its channels are mapped."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from npmerge.prepare import checked
from npmerge.store.checkpoints import read_checked, write_checked
from npmerge.symmetry import Group, Slot

_KIND = {"kind": "alignment"}
"""What a file of one is said to be made of."""


@dataclass(frozen=True, eq=False)
class Alignment:
    """For each symmetry group a permutation, or an invertible matrix and its inverse.

    A permutation is an ``int64 (size,)`` tensor with ``aligned[i] = channel[perm[i]]``; a matrix T is a
    ``float64 (size, size)`` tensor with ``aligned = T @ channel``.

    Args:
        groups: The symmetry groups, as :func:`npmerge.symmetry.finding.find_symmetry` finds them.
        maps: One permutation or matrix per group.
        inverses: Their inverses, of the same kinds.

    Raises:
        ValueError: If the numbers, shapes or types do not fit, a permutation is none, a matrix is not finite, or it is
            for a group of which only permutations are allowed.
    """

    groups: Sequence[Group]
    maps: tuple[Tensor, ...]
    inverses: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))
        if not len(self.groups) == len(self.maps) == len(self.inverses):
            numbers = len(self.groups), len(self.maps), len(self.inverses)
            raise ValueError(
                f"{numbers} groups, maps and inverses: give one map and one inverse per group"
            )
        for group, mapping, inverse in zip(self.groups, self.maps, self.inverses, strict=True):
            _check_map(group, mapping)
            _check_map(group, inverse)
            if mapping.ndim > 1 and group.permutations_only:
                raise ValueError(
                    f"a matrix for group {group.name!r}, but {group.permutations_only} allows only permutations"
                )

    @classmethod
    def from_permutations(
        cls, groups: Sequence[Group], permutations: Iterable[Tensor]
    ) -> Alignment:
        """Make an alignment of permutations.

        Args:
            groups: The symmetry groups.
            permutations: One ``int64 (size,)`` tensor per group: ``aligned[i] = channel[perm[i]]``.

        Returns:
            The alignment; the inverses follow from the permutations.

        Raises:
            ValueError: If a tensor is not a permutation of its group's channels.
        """
        maps = tuple(permutation.cpu() for permutation in permutations)
        return cls(tuple(groups), maps, tuple(torch.argsort(p) for p in maps))

    @property
    def is_permutation(self) -> bool:
        """Whether every map is a permutation, so that applying it keeps a model's function."""
        return all(mapping.ndim == 1 for mapping in self.maps)

    def apply(self, model: nn.Module) -> nn.Module:
        """Map a model's channels.

        Permutations reorder every parameter and buffer of a group and keep the model's function. A matrix T maps what
        a layer produces (weights, bias, batch-norm shift and running mean) and T^-1 what the next one consumes. A
        running variance v becomes ``(T * T) @ v``, the variance of ``T x`` for uncorrelated channels: never negative,
        and all that can be said without data. A normalisation's scale s is the standard deviation of what it produces,
        and becomes ``sqrt((T * T) @ (s * s))``, with the sign of ``|T| @ s``. The signs of T are in the weights: in
        ``T @ s`` they would count twice. Both are exact where T permutes, scales and flips channels; elsewhere reset
        the batch norm afterwards.

        Args:
            model: A model of the architecture the groups were found on. It is not changed.

        Returns:
            A new module of the same type, device and dtype.

        Raises:
            ValueError: If the model does not have the groups' tensors and shapes.
        """
        changed = self.mapped(checked(model).state_dict())
        result = copy.deepcopy(model)
        target = result.state_dict()
        for name, tensor in changed.items():
            target[name].copy_(tensor)
        return result

    def mapped(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Map the channels of a model's tensors, without a model.

        Args:
            state: A model's state dict. Its tensors are not changed.

        Returns:
            New tensors by name, of those that the alignment acts on.

        Raises:
            ValueError: As :meth:`apply`.
        """
        changed: dict[str, Tensor] = {}
        for group, mapping, inverse in zip(self.groups, self.maps, self.inverses, strict=True):
            for slot in group.slots:
                check_slot(slot, state)
                tensor = changed.get(slot.name, state[slot.name])
                changed[slot.name] = _map_slot(tensor, slot, mapping, inverse)
        return changed

    def inverse(self) -> Alignment:
        """Return the alignment that undoes this one; of matrices, but for a normalisation's scale and variance."""
        return Alignment(self.groups, self.inverses, self.maps)

    def compose(self, other: Alignment) -> Alignment:
        """Return this alignment after another: ``x.compose(y).apply(m)`` is ``x.apply(y.apply(m))``.

        Args:
            other: The alignment that comes first.

        Returns:
            The composition.

        Raises:
            ValueError: If the two belong to different groups.
        """
        if self.groups != other.groups:
            raise ValueError("alignments of different symmetry groups: compose those of one model")
        maps = tuple(_after(x, y) for x, y in zip(self.maps, other.maps, strict=True))
        inverses = tuple(_after(y, x) for x, y in zip(self.inverses, other.inverses, strict=True))
        return Alignment(self.groups, maps, inverses)

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Take the alignment apart, for a file.

        Returns:
            Its tensors on the CPU, no two with the same memory, and the rest, JSON-serialisable.
        """
        tensors = {}
        for index, (mapping, inverse) in enumerate(zip(self.maps, self.inverses, strict=True)):
            tensors[f"map.{index}"] = mapping.cpu().contiguous()
            # A file holds no tensor twice; an involution or identity may be its own inverse.
            tensors[f"inverse.{index}"] = inverse.cpu().clone().contiguous()
        return tensors, {"groups": [asdict(group) for group in self.groups]}

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor], words: Mapping[str, Any]) -> Alignment:
        """Put an alignment together again.

        Args:
            tensors: as :meth:`pack` returns them.
            words: the rest.
        """
        groups = unpack_groups(words)
        maps = tuple(tensors[f"map.{i}"] for i in range(len(groups)))
        return cls(groups, maps, tuple(tensors[f"inverse.{i}"] for i in range(len(groups))))

    def save(self, path: str | Path) -> None:
        """Write the alignment to a safetensors file, which says if a byte of it is changed.

        Args:
            path: The file; an existing one is replaced only once the new one is complete.

        Raises:
            OSError: If it cannot be written.
        """
        tensors, words = self.pack()
        write_checked(Path(path), tensors, {"made_of": _KIND, **words})

    @classmethod
    def load(cls, path: str | Path) -> Alignment:
        """Read an alignment that :meth:`save` has written.

        Args:
            path: The file.

        Returns:
            The alignment, on the CPU.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged or is not an alignment.
        """
        try:
            return cls.unpack(*read_checked(Path(path), _KIND))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            reason = str(error).split("\n")[0]
            raise ValueError(
                f"{path} is not a complete alignment file ({reason}): make it again"
            ) from error


def unpack_groups(words: Mapping[str, Any]) -> tuple[Group, ...]:
    """The groups that are written out, as by :func:`dataclasses.asdict`, in a list ``"groups"``.

    Args:
        words: where the list is.
    """
    return tuple(map(Group.unpack, words["groups"]))


def _check_map(group: Group, mapping: Tensor) -> None:
    advice = f"give group {group.name!r} an int64 ({group.size},) permutation or a ({group.size}, {group.size}) matrix"
    if mapping.ndim == 1:
        channels = torch.arange(group.size, device=mapping.device)
        if mapping.dtype != torch.int64 or not torch.equal(mapping.sort().values, channels):
            raise ValueError(f"not a permutation of {group.size} channels: {advice}")
    elif mapping.shape != (group.size, group.size) or not mapping.is_floating_point():
        raise ValueError(f"a {mapping.dtype} map of shape {tuple(mapping.shape)}: {advice}")
    elif not mapping.isfinite().all():
        raise ValueError(f"the matrix has entries that are not finite: {advice}")


def check_slot(slot: Slot, state: Mapping[str, Tensor]) -> None:
    """Check that a state dict has the tensor a slot acts on.

    Args:
        slot: The slot.
        state: A model's state dict.

    Raises:
        ValueError: If the tensor is missing or has another shape.
    """
    advice = "use the groups of a model of this architecture and width"
    if slot.name not in state:
        raise ValueError(f"the model has no tensor {slot.name!r}: {advice}")
    shape = tuple(state[slot.name].shape)
    if len(shape) <= slot.axis or shape[slot.axis] != slot.length:
        raise ValueError(
            f"{slot.name!r} has shape {shape}, but the alignment expects length {slot.length} on axis {slot.axis}: "
            f"{advice}"
        )


def _map_slot(tensor: Tensor, slot: Slot, mapping: Tensor, inverse: Tensor) -> Tensor:
    if mapping.ndim == 1:
        return slot.permuted(tensor, mapping)
    matrix = (inverse.T if slot.role == "in" else mapping).to(tensor.device, torch.float64)
    part = slot.view(tensor, len(matrix)).double()
    if slot.role == "variance":
        part = torch.tensordot(matrix.square(), part, dims=1)
    elif slot.role == "scale":
        deviation = torch.tensordot(matrix.square(), part.square(), dims=1).sqrt()
        part = deviation * torch.tensordot(matrix.abs(), part, dims=1).sign()
    else:
        part = torch.tensordot(matrix, part, dims=1)
    result = tensor.clone()
    slot.view(result, len(matrix)).copy_(part)
    return result


def _after(second: Tensor, first: Tensor) -> Tensor:
    second = second.to(first.device)
    if first.ndim == second.ndim == 1:
        return first[second]
    return _matrix(second) @ _matrix(first)


def _matrix(mapping: Tensor) -> Tensor:
    if mapping.ndim == 2:
        return mapping.double()
    return torch.eye(len(mapping), dtype=torch.float64, device=mapping.device)[mapping]
