"""What an experiment is: a name, and the list of its cells."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from npmerge.catalogue import SAMPLING
from npmerge.experiments.profile import Choose, Methods, Optimisation, Profile, Section, Setting
from npmerge.methods import METHODS
from npmerge.store.records import Cell

RESET = "reset_batchnorm"
"""What is done to base models."""
SHOWN = 3
"""Names that an error lists."""
_NUMBERS: dict[str, Any] = {"int": int, "float": (int, float)}
TABLE = (
    Methods(align=("identity", "permute", "weight_matching", "cca"), aggregate=("mean",)),
    Methods(align=("permute", "weight_matching"), aggregate=("finetune", "np_merge")),
)
"""What the paper's tables of pairs have."""
PATHS = ("identity", "permute", "weight_matching")
"""The alignments after which the path between the models is followed."""


@dataclass(frozen=True)
class Experiment:
    """A section of the paper, or a question of one's own, as a list of cells.

    Attributes:
        name: in commands and files.
        title: for people.
        table: the paper's table or figure that it reproduces.
        cells: lists its cells, given a profile, the experiment's section of it, and seeds.
        section: the class of its parameters in a profile.
        defaults: those parameters by profile, for profiles whose files do not have them.
        work: does a cell; given it and a :class:`npmerge.run.work.Bench`, returns an
            :class:`~npmerge.store.records.Outcome`. By default the cell's models are merged and scored.
        alone: whether no other cell may run beside one of its own, because they are timed.
        place: among the experiments.
    """

    name: str
    title: str
    table: str
    cells: Callable[[Profile, Any, Sequence[int]], list[Cell]]
    section: type[Section] = Section
    defaults: Mapping[str, Any] = field(default_factory=dict)
    work: Callable[[Cell, Any], Any] | None = None
    alone: bool = False
    place: int = 100

    def parameters(self, profile: Profile) -> Section | None:
        """Its section of a profile; ``None`` where there is none."""
        return profile.section(self.name, self.section, self.defaults.get(profile.name))

    def list(self, profile: Profile, seeds: Sequence[int]) -> list[Cell]:
        """Its cells at a profile; none where the profile has no section of it."""
        section = self.parameters(profile)
        return [] if section is None else self.cells(profile, section, seeds[: section.seeds])


def setting_cells(
    profile: Profile,
    experiment: str,
    section: Section,
    setting: Setting,
    seed: int,
    *,
    methods: Sequence[Methods] = TABLE,
    models: int = 2,
    examples: int | str | None = None,
    prefix: str = "",
    references: Iterable[str] = ("base_models", "ensemble"),
    paths: Sequence[str] = (),
    classes: bool = False,
    effort: bool = False,
) -> list[Cell]:
    """The cells of one setting and seed: the references, every combination of methods, and the tuned ones.

    Args:
        profile: whose threads and precision are used.
        experiment: its name.
        section: its parameters.
        setting: data set, network, recipe and split.
        seed: of the split, the models and the merging.
        methods: what is run, unless the section says it.
        models: how many are merged.
        examples: optimisation images a class.
        prefix: of the cells' names, where a setting has several sets of them.
        references: names of what merged models are held against.
        paths: the alignments after which, with ``mean``, the path between the models is followed.
        classes: measure the accuracy on each class too.
        effort: count each merge's passes over the data and its memory too.
    """
    options = section.optimisation
    common = {
        "setting": setting.config,
        "seed": seed,
        "models": models,
        "threads": profile.threads,
        "precision": profile.precision,
        "data": {
            "batch_size": options.batch_size,
            "held_out": options.held_out,
            "examples_per_class": examples,
            "sampling": SAMPLING,
            "correct_on": "augmented",
        },
    }

    def cell(name: str, config: dict[str, Any], measures: dict[str, Any]) -> Cell:
        whole: dict[str, Any] = {**common, "many": None, "align": None, **config}
        if classes:
            measures = measures | {"classes": True}
        if measures:
            whole["measures"] = measures
        return Cell(profile.name, experiment, setting.name, seed, prefix + name, whole)

    found = []
    for reference in references:
        found.append(cell(reference, {"aggregate": {"method": reference}, "correct": RESET}, {}))
        if reference == "base_models":
            raw = {"aggregate": {"method": reference}, "correct": None}
            found.insert(0, cell(f"{reference}-as-trained", raw, {}))
    chosen = section.methods or methods
    for tuned in (False, True):
        for some in chosen:
            for aggregate in some.aggregate:
                if tuned and (aggregate not in options.tuned or not _tunable(some)):
                    continue
                for align in some.align:
                    correct = None if some.correct == RESET else some.correct or "raw"
                    parts = [some.many, align, aggregate, correct, "tuned" if tuned else None]
                    config: dict[str, Any] = {
                        "many": some.many,
                        "align": _method(options, align),
                        "aggregate": _method(options, aggregate, tuned=tuned),
                        "correct": some.correct,
                    }
                    follow = aggregate == "mean" and align in paths and some.many is None
                    follow = follow and some.correct == RESET  # which the ends of a path have too
                    measures: dict[str, Any] = {"path": options.path_points} if follow else {}
                    if effort:
                        measures["effort"] = True
                    found.append(cell("-".join(filter(None, parts)), config, measures))
    return found


def _tunable(some: Methods) -> bool:
    """Tournaments choose nothing: that would be a choice at each of their merges."""
    return some.many is None


def _method(options: Optimisation, name: str, *, tuned: bool = False) -> dict[str, Any]:
    """A method with every option it has, so that a changed default makes a record stale."""
    given = options.options.get(name, {}) | (options.tuned[name] if tuned else {})
    known = METHODS[name].options
    for option, value in given.items():
        _check(name, option, value.choose if isinstance(value, Choose) else [value])
        for other, trial in value.trial.items() if isinstance(value, Choose) else ():
            _check(name, other, [trial])
    values = {option: known[option].default for option in known} | given
    return {
        "method": name,
        "options": {
            option: value.model_dump(mode="json") if isinstance(value, Choose) else value
            for option, value in values.items()
        },
    }


def _check(name: str, option: str, values: Iterable[Any]) -> None:
    """Find a profile's mistakes before anything is trained."""
    known = METHODS[name].options
    if option not in known:
        raise ValueError(
            f"{name} has no option {option!r}: its options are {', '.join(known) or 'none'}"
        )
    kind = known[option].type
    for value in values:
        number = _NUMBERS.get(kind)
        if number and (isinstance(value, bool) or not isinstance(value, number)):
            raise ValueError(f"{option} of {name} is {value!r}: it must be of type {kind}")


def in_order(cells: Iterable[Cell], seeds: Sequence[int], first: Sequence[str] = ()) -> list[Cell]:
    """Cells in the order in which they are done.

    Args:
        cells: of all experiments, one after another.
        seeds: in the order wanted: seed by seed, so that one seed of everything is there early.
        first: shell patterns of cells that come before all others, the first pattern's first; see :func:`matching`.
    """

    def rank(cell: Cell) -> tuple[int, int]:
        ranks = (at for at, pattern in enumerate(first) if fnmatchcase(cell.label, pattern))
        return next(ranks, len(first)), list(seeds).index(cell.seed)

    return sorted(cells, key=rank)


def matching(cells: Sequence[Cell], pattern: str | None) -> list[Cell]:
    """The cells whose name below the profile matches a pattern.

    Args:
        cells: to choose from.
        pattern: a shell pattern, e.g. ``"disjoint_splits/*dirichlet*"``; all by default.

    Raises:
        ValueError: none does.
    """
    if pattern is None:
        return list(cells)
    found = [cell for cell in cells if fnmatchcase(cell.label, pattern)]
    if not found:
        names = ", ".join(cell.label for cell in cells[:SHOWN])
        more = f" and {len(cells) - SHOWN} more" if len(cells) > SHOWN else ""
        raise ValueError(f"no cell matches {pattern!r}: there are {names}{more}")
    return found
