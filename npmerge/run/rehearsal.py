"""What a merge takes beside time: passes over the data, and memory, both found in a rehearsal on a few examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import nn

from npmerge.data import Batches
from npmerge.data.streams import Batch, mapped, size_of
from npmerge.memory import allocated
from npmerge.merging import Choice, HeldOut, Loader, merge
from npmerge.methods import find

BATCHES, EXAMPLES = 32, 16
"""Of the rehearsal that counts passes: so many batches of so many examples."""
HELD_OUT = 3
"""Of these batches, how many are held out for choices."""
STEPS = 2
"""Batches of the rehearsal that counts memory: the first step makes an optimiser's buffers."""


class Counted(Sequence[Batch]):
    """Batches that count the examples that are drawn.

    Args:
        batches: all of them.
        seen: how many, in its only place; several may count together.
    """

    def __init__(self, batches: Sequence[Batch], seen: list[int]) -> None:
        self._batches, self.seen = batches, seen

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, place: Any) -> Any:
        return self._batches[place]

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches:
            self.seen[0] += size_of(batch)
            yield batch


def effort(
    models: Sequence[nn.Module], data: Batches, options: Mapping[str, Any], device: torch.device
) -> dict[str, float]:
    """What a merge takes.

    Options that bound a number of examples are scaled to the rehearsal's.

    Args:
        models: A and B.
        data: the optimisation data, as they are.
        options: of :func:`~npmerge.merging.merge`.
        device: where it runs.

    Returns:
        ``"passes"`` over the optimisation data, trials included, and ``"peak_mib"``, the most memory that a merge of
        two batches an epoch allocates on top of the models, in MiB.
    """
    first = list(islice(data, BATCHES))
    small = list(islice(chain.from_iterable(_cut(batch, EXAMPLES) for batch in first), BATCHES))
    seen, total = [0], sum(map(size_of, small))
    everything, kept, aside = (
        Counted(some, seen) for some in (small, small[HELD_OUT:], small[:HELD_OUT])
    )
    known = find(options["aggregate"], "aggregate").options
    given = {**options, "saved": None, "progress": False, "learn_on": everything}
    given["held_out"] = HeldOut(kept, aside)
    scaled = given["aggregate_options"] = dict(options["aggregate_options"])
    if "examples" in known:
        bound = scaled.get("examples", known["examples"].default)
        scaled["examples"] = max(1, round(bound * total / sum(map(size_of, data))))
    merge(models, everything, **given)
    return {"passes": round(seen[0] / total, 2), "peak_mib": peak_mib(models, data, given, device)}


def peak_mib(
    models: Sequence[Loader], data: Batches, options: Mapping[str, Any], device: torch.device
) -> float:
    """The most memory that a merge of two batches an epoch allocates, in MiB.

    Args:
        models: any number, whose own memory does not count; or functions that load them, whose does.
        data: the optimisation data, as they are.
        options: of :func:`~npmerge.merging.merge`; of a choice the first value is taken.
        device: where it runs.
    """
    few = list(islice(data, STEPS))
    given = {**options, "saved": None, "progress": False, "learn_on": few}
    for step in ("align_options", "aggregate_options"):
        given[step] = {
            name: value.values[0] if isinstance(value, Choice) else value
            for name, value in given[step].items()
        }
    used = allocated(lambda: merge(models, few, **given), device)
    return round(used.peak / 2**20, 1)


def _cut(batch: Batch, size: int) -> Iterator[Batch]:
    """Smaller batches of one."""
    for start in range(0, size_of(batch), size):
        yield mapped(batch, lambda tensor: tensor[start : start + size])  # noqa: B023 - used at once
