"""Federated learning: clients with images of their own train apart, and a server with few images merges the models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from npmerge.experiments.listing import Experiment, setting_cells
from npmerge.experiments.profile import Methods, Profile, Section, Setting
from npmerge.experiments.transformers import HEADS
from npmerge.experiments.zoo import learners
from npmerge.methods import METHODS, of_kind
from npmerge.store.records import Cell, Outcome

OWN, COMMON = "permute", "identity"
"""How clients that began from weights of their own are aligned, where a method has no alignment of its own, and those
that began from common ones."""
AT_ONCE, IN_PAIRS = "all_to_one", "tournament"
COUNTED = ("mean", "np_merge", "finetune", "neuron_interpolation")
"""What other numbers of clients are merged with."""
CLOSE = ("mean", "np_merge", "finetune")
"""Aggregations whose barriers to the clients are measured."""

Strategy = Literal["fedavg", "fedavg_uniform", "np_merge", "finetune", "papa", "frozen"]
"""What rounds are made of: the mean weighed by the clients' images, or not; NP Merge, or fine-tuning, of the clients at
the server; clients that are only pulled to their mean; or a share of the weights frozen in each round."""
AT_SERVER = ("np_merge", "finetune")
"""Strategies whose server learns."""

_Count = Annotated[int, Field(gt=1)]
_Positive = Annotated[float, Field(gt=0)]


class Federated(Section):
    """Clients and a server; a setting says what a client trains, and in ``apart`` the server's images a class.

    Attributes:
        concentrations: of the Dirichlet distributions that the clients' images are drawn from.
        clients: how many, where their number is not varied.
        swept: methods that are run at every concentration, where others are at one only; all by default.
        at: that one, which other numbers of clients and rounds have too.
        counts: other numbers of clients.
        rounds: into how many rounds the epochs of a client's recipe are split; each divides them.
        strategies: what rounds are made of.
        pull: of PAPA, how far a client goes to the mean after a round, from 0 to 1.
        frozen: share of the weights that is frozen in a round.
        alone: epochs of a model that learns from the server's images only.
        epochs: passes over the server's images of every method that learns.
        lr: learning rates, of which every aggregation that has one chooses on held-out images of the server; its own
            default if none are named.
        trial: passes of a trial.
        without: methods that are left out.
    """

    concentrations: tuple[_Positive, ...]
    clients: _Count = 4
    swept: tuple[str, ...] = ()
    at: float = Field(0.5, gt=0)
    counts: tuple[_Count, ...] = ()
    rounds: tuple[Annotated[int, Field(gt=0)], ...] = ()
    strategies: tuple[Strategy, ...] = get_args(Strategy)
    pull: float = Field(0.5, ge=0, le=1)
    frozen: float = Field(0.4, ge=0, le=1)
    alone: int = Field(100, gt=0)
    epochs: int = Field(gt=0)
    lr: tuple[_Positive, ...] = ()
    trial: int = Field(2, gt=0)
    without: tuple[str, ...] = ()


def every_method(without: Iterable[str] = (), *, common: bool) -> tuple[Methods, ...]:
    """All that makes one model of many: alignments before the mean, aggregations, and ways that align by themselves.

    An aggregation that takes any number of models gets all at once, another one is run in a tournament. Those that
    need a common base come with common initial weights only.

    Args:
        without: names that are left out.
        common: whether the models began from the same weights.
    """
    left_out = {*without, *HEADS} - {OWN}
    aligns = (COMMON, OWN) if common else tuple(n for n in of_kind("align") if n not in left_out)
    aggregates = [
        one
        for one in of_kind("aggregate").values()
        if one.name not in {*left_out, "mean"} and (common or "base" not in one.needs)
    ]
    many = [name for name in of_kind("many") if name not in {*left_out, AT_ONCE, IN_PAIRS}]
    return (
        Methods(align=aligns, aggregate=("mean",), many=AT_ONCE),
        *(
            Methods(
                align=(COMMON if common else one.default_alignment,), aggregate=(one.name,),
                many=_many(one.name),
            )
            for one in aggregates
        ),
        *(Methods(align=(OWN,), aggregate=("np_merge",), many=IN_PAIRS) for _ in range(common)),
        *(Methods(align=("weight_matching",), aggregate=("mean",), many=name) for name in many),
    )  # fmt: skip


def list_cells(profile: Profile, section: Federated, seeds: Sequence[int]) -> list[Cell]:
    """No federation, one round by every method, other numbers of clients, and few rounds.

    Args:
        profile: its parameters.
        section: those of the experiment.
        seeds: of the shares, the models and the merging.

    Raises:
        ValueError: a number of rounds does not divide the epochs.
    """
    optimisation = section.optimisation
    options = learners(section.epochs, section.lr, section.trial)
    for name, given in optimisation.options.items():
        options[name] = options.get(name, {}) | given
    whole = section.model_copy(
        update={"optimisation": optimisation.model_copy(update={"options": options})}
    )
    return [
        cell
        for setting in section.settings
        for seed in seeds
        for cell in (
            *_alone(profile, whole, setting, seed),
            *_one_round(profile, whole, setting, seed, first=seed == seeds[0]),
            *(
                _rounds(profile, whole, setting, seed, strategy, rounds)
                for strategy in section.strategies
                for rounds in section.rounds
            ),
        )
    ]


def _cells(
    profile: Profile,
    section: Federated,
    setting: Setting,
    seed: int,
    clients: int,
    methods: Sequence[Methods],
    references: Sequence[str] = (),
) -> list[Cell]:
    """Cells that measure the accuracy on each class too, and so on each client's images."""
    found = setting_cells(
        profile, "federated", section.model_copy(update={"methods": None}), setting, seed,
        methods=methods, models=clients, examples=setting.apart, prefix=f"{clients}-",
        references=references, classes=True,
    )  # fmt: skip
    return [cell for cell in found if cell.name != f"{clients}-base_models"]  # only as trained


def _alone(profile: Profile, section: Federated, setting: Setting, seed: int) -> Iterator[Cell]:
    """No federation: a model of all images, and one of the server's only."""
    none = dict.fromkeys(("split", "concentration", "least", "trunk"))
    every = setting.model_copy(update={**none, "apart": None})
    yield from _cells(profile, section, every, seed, 1, (), ("base_models",))
    recipe = setting.recipe.model_copy(update={"epochs": section.alone})
    few = setting.model_copy(update={**none, "recipe": recipe})
    one = section.model_copy(update={"clients": 1})
    cell = _rounds(profile, one, few, seed, "fedavg_uniform", 1)
    yield replace(cell, name="server_images")


def _one_round(
    profile: Profile, section: Federated, setting: Setting, seed: int, *, first: bool
) -> Iterator[Cell]:
    """Every method at every concentration, and some with other numbers of clients, whose memory is counted once."""
    places = [(concentration, section.clients) for concentration in section.concentrations]
    places += [(section.at, count) for count in section.counts if count != section.clients]
    for concentration, clients in places:
        for trunk in (None, 0):
            align = OWN if trunk is None else COMMON
            methods = tuple(
                Methods(align=(align,), aggregate=(name,), many=_many(name)) for name in COUNTED
            )
            if clients == section.clients:
                every = concentration == section.at or not section.swept
                left_out = section.without if every else METHODS.keys() - section.swept
                methods = section.methods or every_method(left_out, common=trunk is not None)
            where = setting.model_copy(update={"concentration": concentration, "trunk": trunk})
            for cell in _cells(
                profile, section, where, seed, clients, methods, ("base_models", "ensemble")
            ):
                name = cell.config["aggregate"]["method"]
                usual = cell.config["align"] is not None and cell.config["align"]["method"] == align
                more: dict[str, Any] = {}
                if usual and name in CLOSE and clients == section.clients:
                    more["barriers"] = section.optimisation.path_points
                if (
                    usual
                    and name in COUNTED
                    and section.counts
                    and first
                    and concentration == section.at
                ):
                    more["memory"] = True
                measures = cell.config["measures"] | more
                yield replace(cell, config=cell.config | {"measures": measures})


def _rounds(
    profile: Profile,
    section: Federated,
    setting: Setting,
    seed: int,
    strategy: Strategy,
    rounds: int,
) -> Cell:
    """Clients that begin each round from the server's model."""
    epochs, rest = divmod(setting.recipe.epochs, rounds)
    if rest:
        raise ValueError(
            f"rounds has {rounds}, into which the {setting.recipe.epochs} epochs of {setting.name} cannot be split"
        )
    if setting.split:
        setting = setting.model_copy(update={"concentration": section.at, "trunk": 0})
    server = strategy if strategy in AT_SERVER else "mean"
    methods = (Methods(align=(COMMON,), aggregate=(server,), many=_many(server)),)
    (cell,) = _cells(profile, section, setting, seed, section.clients, methods)
    own = {"papa": {"pull": section.pull}, "frozen": {"frozen": section.frozen}}.get(strategy, {})
    given = {"strategy": strategy, "rounds": rounds, "epochs": epochs, **own}
    name = f"{section.clients}-{strategy}-{rounds}rounds"
    return replace(cell, name=name, config=cell.config | {"rounds": given})


def _many(aggregate: str) -> str:
    at_once = aggregate == "mean" or METHODS[aggregate].several
    return AT_ONCE if at_once else IN_PAIRS


def federate(cell: Cell, bench: Any) -> Outcome:
    """Do a cell; see :mod:`npmerge.run.federating`."""
    from npmerge.run.federating import do_federated  # only who does it waits for PyTorch

    return do_federated(cell, bench)


_DIGITS: dict[str, Any] = {
    "dataset": "digits", "image_size": 8, "model": "resnet20", "width": 0.5, "split": "dirichlet",
    "least": 10, "apart": 10,
    "recipe": {"epochs": 10, "batch_size": 50, "lr": 0.1, "warmup_epochs": 2},
}  # fmt: skip
_AVERAGED = {"align": ["identity", "permute"], "aggregate": "mean", "many": "all_to_one"}
_LEARNED = {"align": "permute", "aggregate": ["np_merge", "finetune"], "many": "tournament"}
_OPTIMISATION: dict[str, Any] = {"batch_size": 25, "held_out": 0.3, "path_points": 5}
DEFAULTS = {
    "digits": {
        "settings": [_DIGITS],
        "optimisation": {
            **_OPTIMISATION,
            "options": {"np_merge": {"lr": 0.1}},
            "path_points": 3,
        },
        "methods": [_AVERAGED, _LEARNED],
        "concentrations": [0.5],
        "rounds": [5],
        "strategies": ["fedavg", "np_merge"],
        "alone": 50,
        "epochs": 5,
        "seeds": 1,
    },
    "grid": {
        "settings": [{**_DIGITS, "recipe": {**_DIGITS["recipe"], "batch_size": 20}}],
        "optimisation": {
            **_OPTIMISATION,
            "options": {"cca": {"ridge": {"choose": [1e-2, 1e-1, 1.0, 10.0, 1e2, 1e3]}}},
        },
        "concentrations": [0.05, 0.1, 0.5, 1.0, 10.0],
        "swept": [
            "weight_matching",
            "np_merge",
            "finetune",
            "fisher",
            "regmean",
            "neuron_interpolation",
            "greedy_soup",
            "learned_soup",
            "zipit",
            "ot_fusion",
            "pleas",
            "task_arithmetic",
            "ties",
            "model_stock",
        ],
        "counts": [2, 8, 16, 32],
        "rounds": [1, 2, 5, 10],
        "epochs": 20,
        "lr": [1e-3, 1e-2, 1e-1],
        "trial": 5,
        "without": ["auto_neb", "uniform_soup"],  # the one takes too long, the other is the mean
    },
}
"""A demonstration, and one for a verdict."""

EXPERIMENT = Experiment(
    "federated", "Federated learning", "ours", list_cells,
    section=Federated, defaults=DEFAULTS, work=federate, place=12,
)  # fmt: skip
