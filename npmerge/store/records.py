"""Records on disk: one file a cell, checked in every byte and every value, or made again."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from npmerge.store import files
from npmerge.store.files import DamagedError, canonical, config_hash

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

State = Literal["done", "running", "missing", "stale", "damaged", "failed"]
"""What a cell is: done under today's configuration; being made now; without a record; with one that was made under
another configuration; with one that is not to be believed; or it failed when it was last tried."""

STATES: tuple[State, ...] = get_args(State)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,150}")
_FAILED = ".failed"


def _named(name: str) -> str:
    if not _NAME.fullmatch(name) or name.endswith(_FAILED):
        raise ValueError(f"{name!r} is no name for a file: use letters, digits, '_', '-' and '.'")
    return name


@dataclass(frozen=True)
class Cell:
    """One number's work, and where its record is.

    Attributes:
        profile: name of the parameter set.
        experiment: name of the experiment, e.g. ``"same_data"``.
        setting: name of the setting within it, e.g. ``"cifar100-resnet20x1"``.
        seed: of everything random in it.
        name: of the work, e.g. ``"permute-np_merge"``; nobody takes it apart.
        config: all that its numbers are a function of, JSON-serialisable.

    Raises:
        ValueError: a name cannot be that of a file.
    """

    profile: str
    experiment: str
    setting: str
    seed: int
    name: str
    config: dict[str, Any]

    def __post_init__(self) -> None:
        for name in (self.profile, self.experiment, self.setting, self.name):
            _named(name)

    @property
    def config_hash(self) -> str:
        """Stands for the configuration."""
        return config_hash(self.config)

    @property
    def label(self) -> str:
        """The name below the profile, e.g. ``"same_data/cifar100-resnet20x1/seed0/permute-np_merge"``."""
        return f"{self.experiment}/{self.setting}/seed{self.seed}/{self.name}"


class _Strict(BaseModel):
    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, frozen=True, defer_build=True
    )


Name = Annotated[str, AfterValidator(_named)]
Word = Annotated[str, Field(min_length=1, max_length=200)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Seconds = Annotated[float, Field(ge=0, le=1e9)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]+$", max_length=64)]


class Row(_Strict):
    """One number, and in columns what it is of.

    Attributes:
        dataset: name of the image set.
        image_size: height and width of its images in pixels.
        model: name of the architecture.
        width: its width.
        split: how the base models share the training images; ``None`` if each has all.
        models: how many there are.
        many: how more than two are made one; ``None`` for a pair.
        align: name of the alignment; ``None`` where there is none.
        aggregate: name of the aggregation, or of what merged models are held against.
        tuned: whether an option was chosen on held-out data.
        correct: what was done after merging.
        examples_per_class: training images a class that the merge had; ``None`` where that is not varied.
        metric: what was measured, e.g. ``"top1"`` (in percent) or ``"loss"``.
        value: the number.
    """

    dataset: Word
    image_size: Count
    model: Word
    width: Annotated[float, Field(gt=0, le=1e4)]
    split: Word | None
    models: Count
    many: Word | None
    align: Word | None
    aggregate: Word
    tuned: bool
    correct: Word | None
    examples_per_class: Count | Literal["all"] | None
    metric: Word
    value: float

    @model_validator(mode="after")
    def _is_plausible(self) -> Row:
        if self.metric.startswith("top"):
            low, high = 0.0, 100.0
        elif self.metric == "loss":
            low, high = 0.0, 1e6
        else:
            low, high = -1e15, 1e15
        if not low <= self.value <= high:
            raise ValueError(
                f"{self.metric} is {self.value:g}: it lies between {low:g} and {high:g}"
            )
        return self


class Took(_Strict):
    """Seconds of a cell's parts, of which a part that it does not have took none.

    Attributes:
        alignment: aligning; what was found in the store counts with the seconds it once took.
        learning: aggregating, and choosing options.
        reset: correcting.
        scoring: measuring.
    """

    alignment: Seconds = 0.0
    learning: Seconds = 0.0
    reset: Seconds = 0.0
    scoring: Seconds = 0.0


class Where(_Strict):
    """Which cell a record is of; see :class:`Cell`."""

    profile: Name
    experiment: Name
    setting: Name
    seed: Annotated[int, Field(ge=0, le=10**9)]
    name: Name


class Provenance(_Strict):
    """Where a record's numbers come from.

    Attributes:
        revision: of the source, ``+`` behind it if it was changed.
        device: what its maker calls it.
        kernels: what decides the last bits on it; ``None`` if nobody noted it.
        threads: of the CPU.
        precision: of learning; ``None`` if nobody noted it.
        python: its version.
        versions: of the packages.
        finished: date and time.
        seconds: wall-clock time of the cell.
        peak_memory_mib: the most memory in use; ``None`` where nobody counts.
        base_models: where they come from.
        deterministic: whether the kernels were.
    """

    revision: Word
    device: Word
    kernels: Word | None = None
    threads: Count
    precision: Word | None = None
    python: Word
    versions: dict[Word, Word]
    finished: Word
    seconds: Seconds
    peak_memory_mib: Annotated[int, Field(ge=0, le=10**9)] | None = None
    base_models: dict[Word, Any] = {}
    deterministic: bool = False


class _Signed(_Strict):
    """What the files have in common."""

    cell: Where
    config_hash: Hash
    digest: Hash


class Record(_Signed):
    """What running a cell gave.

    Attributes:
        cell: which one.
        config: all that its numbers are a function of.
        config_hash: stands for it.
        rows: its numbers.
        details: what figures need beyond them: curves, histograms, what was chosen.
        seconds: that its parts took.
        provenance: where it comes from.
        digest: SHA-256 of all else.
    """

    config: dict[str, Any]
    rows: Annotated[list[Row], Field(min_length=1, max_length=100_000)]
    details: dict[str, Any]
    seconds: Took
    provenance: Provenance

    @model_validator(mode="after")
    def _is_of_its_config(self) -> Record:
        if self.config_hash != config_hash(self.config):
            raise ValueError("config_hash is that of another configuration")
        return self


class Failure(_Signed):
    """Why a cell has no record.

    Attributes:
        cell: which one.
        config_hash: of its configuration.
        reason: what was wrong.
        time: when.
        digest: SHA-256 of all else.
    """

    reason: Annotated[str, Field(max_length=10_000)]
    time: Word


@dataclass(frozen=True)
class Outcome:
    """What running a cell gives.

    Attributes:
        rows: one a number, each a :class:`Row` or its columns.
        details: what figures need beyond them, JSON-serialisable.
        seconds: that its parts took; see :class:`Took`.
    """

    rows: Sequence[Row | Mapping[str, Any]]
    details: Mapping[str, Any]
    seconds: Mapping[str, float]


class Records:
    """A folder of record files.

    Args:
        folder: where they are; made when the first one is written.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def path(self, cell: Cell) -> Path:
        """The cell's record file."""
        return self.folder / cell.profile / f"{cell.label}.json"

    def state(self, cell: Cell) -> State:
        """What the cell is."""
        path = self.path(cell)
        if files.is_locked(path):
            return "running"
        try:
            record = _read(Record, path)
        except FileNotFoundError:
            record = None
        except DamagedError:
            return "damaged" if self.failure(cell) is None else "failed"
        if record is not None and record.config_hash == cell.config_hash:
            return "done"
        if self.failure(cell) is not None:
            return "failed"
        return "missing" if record is None else "stale"

    def done(self, cell: Cell) -> bool:
        """Whether the cell has a record of today's configuration, even while a process is at work on it."""
        try:
            return _read(Record, self.path(cell)).config_hash == cell.config_hash
        except (FileNotFoundError, DamagedError):
            return False

    def finished(self, cell: Cell) -> bool:
        """Whether there is nothing left to do; says why if there is a record and yet something to do."""
        state = self.state(cell)
        if state in ("damaged", "stale"):
            why = "is damaged" if state == "damaged" else "was made under another configuration"
            log.warning("%s %s: making it again", self.path(cell), why)
        return state == "done"

    def locked(self, cell: Cell, *, wait: bool = False) -> AbstractContextManager[bool]:
        """Be the only process that is at work on a cell; see :func:`npmerge.store.files.locked`.

        Args:
            cell: what is run.
            wait: for whoever is at it now.
        """
        return files.locked(self.path(cell), wait=wait)

    def write(self, cell: Cell, outcome: Outcome, provenance: Mapping[str, Any]) -> Path:
        """Write the cell's record in one piece; a note that it failed is removed.

        Args:
            cell: what was run.
            outcome: what it gave.
            provenance: see :func:`npmerge.store.origins.provenance`.

        Returns:
            The file.

        Raises:
            ValueError: a value is not one that a record may have; the message names it.
            OSError: the file cannot be written.
        """
        path = self.path(cell)
        rows = [row.model_dump() if isinstance(row, Row) else dict(row) for row in outcome.rows]
        content = {
            "cell": _where(cell),
            "config": cell.config,
            "config_hash": cell.config_hash,
            "rows": rows,
            "details": dict(outcome.details),
            "seconds": dict(outcome.seconds),
            "provenance": dict(provenance),
        }
        _write(Record, path, content)
        self._note(cell).unlink(missing_ok=True)
        return path

    def fail(self, cell: Cell, reason: str) -> Path:
        """Note beside its record that a cell failed.

        Args:
            cell: what was run.
            reason: what was wrong.

        Returns:
            The note.

        Raises:
            OSError: it cannot be written.
        """
        path = self._note(cell)
        content = {
            "cell": _where(cell),
            "config_hash": cell.config_hash,
            "reason": reason[-10_000:].encode(errors="replace").decode(),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        _write(Failure, path, content)
        return path

    def failure(self, cell: Cell) -> Failure | None:
        """The note that a cell failed under today's configuration, if there is one that can be believed.

        Args:
            cell: what was run.
        """
        try:
            note = _read(Failure, self._note(cell))
        except FileNotFoundError:
            return None
        except DamagedError as error:
            log.warning("%s: it is not believed", error)
            return None
        return note if note.config_hash == cell.config_hash else None

    def read(
        self,
        profile: str,
        experiment: str,
        cells: Sequence[Cell] | None = None,
        *,
        stale: bool = False,
    ) -> list[Record]:
        """An experiment's records.

        Args:
            profile: name of the parameter set.
            experiment: name of the experiment.
            cells: the records of these, in their order; by default all that are there, whatever their configuration.
            stale: take those of another configuration too.

        Raises:
            FileNotFoundError: a cell has no record.
            ValueError: a record is damaged, or of another configuration.
        """
        again = f"run `npmerge run {experiment} --profile {profile}`"
        asked: dict[Path, Cell | None] = dict.fromkeys(self._paths(profile, experiment))
        if cells is not None:
            asked = {self.path(cell): cell for cell in cells}
        found = []
        for path, cell in asked.items():
            try:
                record = _read(Record, path)
            except FileNotFoundError:
                note = None if cell is None else self.failure(cell)
                failed = "" if note is None else f" (it failed: {note.reason})"
                raise FileNotFoundError(f"{path} is missing{failed}: {again}") from None
            except DamagedError as error:
                raise DamagedError(f"{error}: {again} to make it again") from error
            if cell is not None and not stale and record.config_hash != cell.config_hash:
                raise ValueError(
                    f"{path} was made under another configuration: {again} to make it again"
                )
            found.append(record)
        return found

    def whole(self, profile: str, experiment: str) -> Iterator[Record]:
        """An experiment's records that can be believed, whatever their configuration.

        Args:
            profile: name of the parameter set.
            experiment: name of the experiment.
        """
        for path in self._paths(profile, experiment):
            with contextlib.suppress(DamagedError, FileNotFoundError):
                yield _read(Record, path)

    def _note(self, cell: Cell) -> Path:
        return self.path(cell).with_name(f"{cell.name}{_FAILED}.json")

    def _paths(self, profile: str, experiment: str) -> list[Path]:
        found = sorted((self.folder / profile / experiment).glob("*/seed*/[!.]*.json"))
        return [path for path in found if not path.stem.endswith(_FAILED)]


def table(records: Sequence[Record]) -> pd.DataFrame:
    """All numbers of some records as one table.

    Args:
        records: from :meth:`Records.read`.

    Returns:
        :data:`COLUMNS`; one row a number.
    """
    import pandas as pd  # whoever asks for a state does not wait for it

    return pd.DataFrame(flat(records), columns=COLUMNS)


def flat(records: Iterable[Record]) -> list[dict[str, Any]]:
    """All numbers of some records, each with :data:`COLUMNS`.

    Args:
        records: from :meth:`Records.read`.
    """
    return [
        {
            **record.cell.model_dump(exclude={"name"}),
            **row.model_dump(),
            "device": record.provenance.device,
            "revision": record.provenance.revision,
        }
        for record in records
        for row in record.rows
    ]


COLUMNS = ["profile", "experiment", "setting", "seed", *Row.model_fields, "device", "revision"]
"""Of a table of numbers: which cell each is of, what it is, and where it was made."""

S = TypeVar("S", bound=_Signed)


def _where(cell: Cell) -> dict[str, Any]:
    names = ("profile", "experiment", "setting", "seed", "name")
    return {name: getattr(cell, name) for name in names}


def _write(kind: type[_Signed], path: Path, content: Mapping[str, Any]) -> None:
    try:
        signed = {**content, "digest": files.sha256([canonical(content)])}
        kind.model_validate(json.loads(canonical(signed)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not written: {_reason(error)}") from error
    text = json.dumps(signed, indent=1) + "\n"
    files.write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def _read(kind: type[S], path: Path) -> S:
    """What a file holds, if every byte of it can be believed."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
        if not isinstance(content, dict):
            raise ValueError("it holds no record")
        rest = {key: value for key, value in content.items() if key != "digest"}
        if content.get("digest") != files.sha256([canonical(rest)]):
            raise ValueError("its digest is not that of what it says")
        found = kind.model_validate(content)
        cell = found.cell
        own = (cell.profile, cell.experiment, cell.setting, f"seed{cell.seed}", cell.name)
        if own != (*path.parts[-5:-1], path.stem.removesuffix(_FAILED)):
            raise ValueError(f"it is of {'/'.join(own)}")
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged ({_reason(error)})") from error
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
    return str(error).partition("\n")[0] or type(error).__name__
