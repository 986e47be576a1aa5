"""A method as a value: what it is called, what it needs and what can be set, registered where it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from npmerge.checks import EPOCHS, check_finite, check_whole
from npmerge.registry import Entry, Option, Registry

F = TypeVar("F", bound=Callable[..., Any])

Kind = Literal["align", "aggregate", "correct", "many", "reference"]
"""What a method does: align B to A, make one model of aligned ones, correct a merged model, make one of many by the
methods before, or be what merged models are held against."""

KINDS: tuple[Kind, ...] = ("align", "aggregate", "correct", "many", "reference")

Need = Literal["data", "labels", "base"]
"""What a method may need: training data, their labels too, or a common base that both models were trained from."""

FAMILIES = {
    "reference": "#6B7280",
    "averaging": "#4C78A8",
    "finetune": "#B279A2",
    "np": "#D1495B",
    "soup": "#6A8E23",
    "fisher": "#2F7F86",
    "regression": "#9C755F",
    "alignment": "#4C78A8",
    "correction": "#8C6D31",
    "many": "#C47A1B",
    "zip": "#5B6BBF",
    "task": "#A8612A",
    "training": "#C2527F",
    "path": "#3F7F4F",
}
"""The families of methods, each with a colour that is told from the others without red-green vision, on light and on
dark pages."""

GROUPS = (
    "nothing", "unlabelled data", "labelled data", "training on unlabelled data",
    "training on labelled data", "common base",
)  # fmt: skip
"""What methods need, from the least to the most; only those of one group are compared like with like."""

GIVEN = frozenset(
    {"groups", "statistics", "seed", "base", "learning", "example", "reset_data", "topk", "align",
     "merge", "aggregate", "parents", "folder"}
)  # fmt: skip
"""Keywords that :func:`~npmerge.merging.merge` fills in; every other keyword of a method is an option of its user's."""


@dataclass(frozen=True, kw_only=True)
class Method(Entry):
    """A method of the literature, or of ours.

    Attributes:
        kind: what it does.
        label: its name in prose and lists.
        row: its name in the rows of tables; by default its label with the alignment's behind it. In it ``{align}``
            stands for the alignment: its ``short`` name, or its label where there is nothing else to tell, as for
            averaging; and in that of a way to make one of many, ``{row}`` for what it does at each step.
        short: of an alignment, in a row's name; its label by default.
        family: whose colour it has, a key of :data:`FAMILIES`; another name gets a colour of its own.
        needs: what it cannot do without.
        reference: its key in ``references.bib``.
        ours: whether it is a control that the paper does not have.
        aligns: of an aggregation, whether it finds an alignment of its own, so that none need come before it.
        use: when to take it, in a sentence.
    """

    kind: Kind
    label: str
    row: str = ""
    short: str = ""
    family: str = ""
    needs: tuple[Need, ...] = ()
    reference: str | None = None
    ours: bool = False
    aligns: bool = False
    use: str = ""

    @property
    def several(self) -> bool:
        """Of an aggregation, whether it takes any number of models at once."""
        return "models" in self.parameters

    @property
    def options(self) -> Mapping[str, Option]:
        """What a user may set, by name."""
        return {name: option for name, option in self.keywords.items() if name not in GIVEN}

    def check(self, options: Mapping[str, Any]) -> None:
        """Raise if there is an option that the method does not have, or that cannot be what it is.

        Args:
            options: by name.

        Raises:
            ValueError: which one, and what to give instead.
        """
        for name, value in options.items():
            if name not in self.options:
                known = ", ".join(self.options) or "none"
                raise ValueError(f"{self.name} has no option {name!r}: its options are {known}")
            if name == "epochs":
                check_whole(name, value, most=EPOCHS)
            elif name == "lr":
                check_finite(name, value, above=0)
            else:
                self.options[name].check(name, value)

    @property
    def default_alignment(self) -> str:
        """Of an aggregation, the alignment that comes before it if none is named."""
        return "identity" if self.aligns or "base" in self.needs else "permute"

    @property
    def learns(self) -> bool:
        """Whether it learns by passes over data."""
        return "epochs" in self.options and "data" in self.needs

    @property
    def group(self) -> str:
        """What it needs, in words of :data:`GROUPS`."""
        return _group([self])

    @property
    def color(self) -> str:
        """The family's colour."""
        spare = ("#2A9D8F", "#C06C3E", "#8661A8", "#4F8F6B", "#9C755F", "#3B8EA5")
        return FAMILIES.get(self.family) or spare[sum(map(ord, self.family)) % len(spare)]

    def describe(self) -> dict[str, Any]:
        """All that is known of the method, JSON-serialisable."""
        return {
            "name": self.name,
            "kind": self.kind,
            "label": self.label,
            "family": self.family,
            "needs": list(self.needs),
            "reference": self.reference,
            "ours": self.ours,
            "aligns": self.aligns,
            "use": self.use,
            "options": {
                name: {"type": option.type, "default": option.default}
                for name, option in self.options.items()
            },
            "summary": self.summary,
        }


METHODS: Registry[Method] = Registry(
    "method",
    "method",
    Method,
    (
        "npmerge.align",
        "npmerge.aggregate",
        "npmerge.zips",
        "npmerge.tasks",
        "npmerge.paths",
        "npmerge.correct",
        "npmerge.many",
        "npmerge.evaluate",
    ),
)
"""Every method by its name."""


def method(
    *,
    kind: Kind,
    label: str,
    row: str = "",
    short: str = "",
    family: str = "",
    needs: tuple[Need, ...] = (),
    reference: str | None = None,
    ours: bool = False,
    aligns: bool = False,
    use: str = "",
    place: int = 100,
) -> Callable[[F], F]:
    """Register the function that is decorated as a method; see :class:`Method` for the words.

    Its name is the method's. What it takes is decided by its kind and by the names of its parameters: an ``align``
    method is called with ``(a, b, data)`` and returns an :class:`~npmerge.align.alignment.Alignment`; an ``aggregate``
    method with ``(a, b, data)`` where b is aligned, or with ``(models, data)``, any number of them, and returns a model
    or an :class:`~npmerge.aggregate.aggregated.Aggregated`; a ``correct`` method with ``(model, data)``, a ``many``
    method with ``(models)`` (functions that load them), and a ``reference`` with ``(models, data)``. A method without a
    parameter ``data`` is called without it. Keywords of :data:`GIVEN` are filled in where a method has them; all others
    are options.

    Raises:
        ValueError: there is a method of that name.
    """
    return METHODS.register(
        kind=kind, label=label, row=row, short=short, family=family, needs=needs,
        reference=reference, ours=ours, aligns=aligns, use=use, place=place,
    )  # fmt: skip


def of_kind(kind: Kind) -> dict[str, Method]:
    """The methods of a kind, by name.

    Args:
        kind: one of :data:`KINDS`.
    """
    return {name: one for name, one in METHODS.items() if one.kind == kind}


def find(name: str, kind: Kind) -> Method:
    """A method by its name.

    Args:
        name: the method's.
        kind: what it must be.

    Raises:
        ValueError: no such method of that kind; the message lists those there are.
    """
    known = of_kind(kind)
    if name not in known:
        noun = {"align": "alignment", "aggregate": "aggregation", "correct": "correction"}
        raise ValueError(
            f"unknown {noun.get(kind, kind)} {name!r}: choose one of {', '.join(known)}"
        )
    return known[name]


def _group(methods: Iterable[Method]) -> str:
    found = list(methods)
    needs = {need for one in found for need in one.needs}
    if "base" in needs:
        return "common base"
    if "data" not in needs:
        return "nothing"
    labels = "labelled" if "labels" in needs else "unlabelled"
    return f"training on {labels} data" if any(one.learns for one in found) else f"{labels} data"


@dataclass(frozen=True)
class Combination:
    """The methods that made a model, or what it is held against: what a row of a table is about.

    Attributes:
        aggregate: name of an aggregation, of a way to make one of many that takes none, or of a reference.
        align: name of the alignment; ``None`` where there is none, as for a reference.
        tuned: whether an option of the aggregation was chosen on held-out data.
        correct: what was done after merging.
        many: how more than two became one; ``None`` for a pair.
    """

    aggregate: str
    align: str | None = None
    tuned: bool = False
    correct: str | None = "reset_batchnorm"
    many: str | None = None

    @property
    def label(self) -> str:
        """Its name in the rows of tables."""
        last = METHODS[self.aggregate]
        text = last.label
        if self.align is not None:
            first, row = METHODS[self.align], last.row or f"{last.label}-{{align}}"
            row += ", after {align}" * (last.aligns and self.align != last.default_alignment)
            alone = row == "{align}"
            text = row.format(align=first.label if alone else first.short or first.label)
        text += ", tuned" * self.tuned
        if self.correct != "reset_batchnorm":
            text += f", {METHODS[self.correct].label if self.correct else 'as trained'}"
        ours = self.tuned or last.ours
        if self.many is not None:
            text = (METHODS[self.many].row or f"{{row}}, {METHODS[self.many].label}").format(
                row=text
            )
            ours = ours or METHODS[self.many].ours
        return text + " (ours)" * ours

    @property
    def color(self) -> str:
        """The colour of its family."""
        return METHODS[self.aggregate].color

    @property
    def family(self) -> str:
        """The family of its aggregation."""
        return METHODS[self.aggregate].family

    @property
    def group(self) -> str:
        """What all of it needs, in words of :data:`GROUPS`; that batch norm is reset with data does not count."""
        correct = None if self.correct == "reset_batchnorm" else self.correct
        return _group(
            [METHODS[name] for name in (self.aggregate, self.align, correct) if name is not None]
        )

    @property
    def place(self) -> tuple[Any, ...]:
        """Sorts combinations as tables list them."""
        order = {name: place for place, name in enumerate(METHODS)}
        last = METHODS[self.aggregate]
        return (
            last.place, order[self.aggregate], self.tuned,
            "" if self.many is None else self.many,
            -1 if self.align is None else order[self.align], self.correct or "",
        )  # fmt: skip
