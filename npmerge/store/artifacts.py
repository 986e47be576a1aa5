"""What is made of base models and used by many: alignments, statistics and corrected models, each made once."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from npmerge.align import Alignment, Covariances
from npmerge.catalogue import GROUPS
from npmerge.store.checkpoints import State, kept
from npmerge.store.files import config_hash

T = TypeVar("T")


class Artifacts:
    """A folder of files, each addressed by what it is made of.

    What is missing or damaged is made, by one process while the others wait, and read back. The seconds that are kept
    with it are those of making all of it: what a function finds in the folder counts with the seconds it once took.

    Args:
        folder: where the files are; made when the first one is written.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._spared = 0.0  # seconds that making what was found would have taken beyond finding it

    def alignment(
        self, made_of: Mapping[str, Any], make: Callable[[], tuple[Alignment, Mapping[str, Any]]]
    ) -> tuple[Alignment, dict[str, Any], float]:
        """An alignment.

        Args:
            made_of: all that it is a function of, JSON-serialisable.
            make: makes it, and says what was chosen for it.

        Returns:
            The alignment, on the CPU; what was chosen; and the seconds it took to make.

        Raises:
            ArithmeticError: it holds values that are not finite.
            OSError: it cannot be written; said before it is made.
        """

        def pack() -> tuple[Mapping[str, Tensor], dict[str, Any]]:
            alignment, chosen = make()
            tensors, words = alignment.pack()
            return tensors, {**words, "chosen": dict(chosen)}

        def unpack(state: State, words: Mapping[str, Any]) -> tuple[Alignment, dict[str, Any]]:
            return Alignment.unpack(state, words), words["chosen"]

        (alignment, chosen), seconds = self._kept("alignment", _grouped(made_of), pack, unpack)
        return alignment, chosen, seconds

    def statistics(
        self, made_of: Mapping[str, Any], make: Callable[[], Covariances]
    ) -> Covariances:
        """Second moments of two models' activations.

        Args:
            made_of: as for :meth:`alignment`.
            make: makes them.

        Returns:
            The covariances, on the CPU.

        Raises:
            ArithmeticError, OSError: as :meth:`alignment`.
        """
        return self._kept(
            "statistics", _grouped(made_of), lambda: make().pack(), Covariances.unpack
        )[0]

    def model(
        self, made_of: Mapping[str, Any], like: nn.Module, make: Callable[[], nn.Module]
    ) -> nn.Module:
        """A model, for example a base model whose batch norm was reset.

        Args:
            made_of: as for :meth:`alignment`.
            like: a model of its architecture. It is not changed.
            make: makes it.

        Returns:
            The model in evaluation mode, on the device of ``like``.

        Raises:
            ArithmeticError, OSError: as :meth:`alignment`.
        """

        def unpack(state: State, _: Mapping[str, Any]) -> nn.Module:
            model = copy.deepcopy(like)
            model.load_state_dict(state)
            return model.eval()

        return self._kept("model", made_of, lambda: (make().state_dict(), {}), unpack)[0]

    def _kept(
        self,
        kind: str,
        made_of: Mapping[str, Any],
        make: Callable[[], tuple[Mapping[str, Tensor], dict[str, Any]]],
        unpack: Callable[[State, Mapping[str, Any]], T],
    ) -> tuple[T, float]:
        begin, spared = time.perf_counter(), self._spared

        def timed() -> tuple[State, dict[str, Any]]:
            start, before = time.perf_counter(), self._spared
            state, words = make()
            state = {name: value.cpu() for name, value in state.items()}
            seconds = time.perf_counter() - start + self._spared - before
            return state, {**words, "seconds": seconds}

        path = self.folder / f"{kind}-{config_hash(made_of)}.safetensors"
        state, words = kept(path, {"kind": kind, **made_of}, timed)
        seconds = float(words["seconds"])
        self._spared = spared + seconds - (time.perf_counter() - begin)
        return unpack(state, words), seconds


def _grouped(made_of: Mapping[str, Any]) -> dict[str, Any]:
    return {**made_of, "groups": GROUPS}
