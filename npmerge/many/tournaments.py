"""A tournament: random pairs are merged, then random pairs of what came out."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from npmerge.many.streaming import Load, Models, check_models, drawn_seed, put_away
from npmerge.methods import method
from npmerge.symmetry import check_same_architecture

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pairing:
    """Two entrants of a tournament that are about to be merged.

    Attributes:
        round: counted from 0.
        index: of the pair in its round, counted from 0.
        seed: of its own, for whatever the merge draws at random.
        a: the models, by their numbers, that model A is made of.
        b: those of model B; none is in both.
    """

    round: int
    index: int
    seed: int
    a: tuple[int, ...]
    b: tuple[int, ...]

    @property
    def label(self) -> str:
        """For progress bars and logs, counted from 1."""
        return f"round {self.round + 1}, pair {self.index + 1}"


@method(
    kind="many", label="Tournament", row="{row}, tournament", family="many",
    reference="npmerge2024", place=1,
    use="For any number of models, two in memory at a time; needs an aggregation of pairs.",
)  # fmt: skip
def tournament(
    models: Models,
    merge: Callable[[nn.Module, nn.Module, Pairing], nn.Module],
    *,
    seed: int,
    folder: Path | str | None = None,
) -> nn.Module:
    """Merge random pairs of models, then random pairs of what came out, until one model is left.

    With an odd number of entrants one has a bye. Two models are in memory at a time, and what ``merge`` needs: what it
    returns waits in a file for its next pairing.

    Args:
        models: at least one; each is loaded once.
        merge: aligns model B to model A and merges the two, of which it may keep nothing; alignment begins anew at
            every pairing.
        seed: of the pairings.
        folder: where the merged models are written, ``round0-pair0.safetensors`` and so on, and stay; made if it is not
            there. By default a temporary one.

    Returns:
        The last model, with the devices, dtypes, memory formats and modes that ``merge`` gave it; a single model as
        it was loaded.

    Raises:
        ValueError: there is no model, or two differ in architecture.

    Source:
        Sections III-C and IV-E.
    """
    check_models(models)
    generator = torch.Generator().manual_seed(seed)
    entrants = [((number,), load) for number, load in enumerate(models)]
    round_ = 0
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(folder) as where:
        while len(entrants) > 1:
            order = torch.randperm(len(entrants), generator=generator).tolist()
            drawn = [entrants[position] for position in order]
            entrants = drawn[len(drawn) // 2 * 2 :]  # an odd one has a bye
            for index, (a, b) in enumerate(zip(drawn[0::2], drawn[1::2], strict=False)):
                pairing = Pairing(round_, index, drawn_seed(generator), a[0], b[0])
                path = Path(where) / f"round{round_}-pair{index}.safetensors"
                logger.debug("%s: models %s and %s", pairing.label, pairing.a, pairing.b)
                # Not in a variable: it would stay in memory while the next pair is merged.
                winner = put_away(
                    _merged(merge, a[1], b[1], pairing), path, pairing=asdict(pairing)
                )
                entrants.append((a[0] + b[0], winner))
            round_ += 1
        return entrants[0][1]()


def _merged(
    merge: Callable[[nn.Module, nn.Module, Pairing], nn.Module],
    load_a: Load,
    load_b: Load,
    pairing: Pairing,
) -> nn.Module:
    a, b = load_a(), load_b()
    check_same_architecture(a, b)
    return merge(a, b, pairing)
