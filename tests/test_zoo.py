"""The zoo of methods: the experiments that compare them, what a merge takes, and models that were one at first."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from reports import BASE as BASES
from reports import ENSEMBLE, record
from tiny import Snapshot, assert_same_state, loader, net

import npmerge as npm
from npmerge.data import ImageData, load
from npmerge.experiments import cells
from npmerge.methods import GROUPS, METHODS, Combination, of_kind
from npmerge.report import zoo as report
from npmerge.report.cards import cards_page
from npmerge.report.numbers import combination, place_of
from npmerge.run.rehearsal import Counted, effort
from npmerge.run.work import base_models
from npmerge.store.records import Cell, Record
from npmerge.store.zoo import BaseModel, Recipe, Zoo

RECIPE = Recipe(4, 200, 0.1, warmup_epochs=1)
TRUNK = BaseModel("digits", 4, "resnet20", 0.125, RECIPE, "same", seed=3, threads=1, until=2)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load("digits", image_size=4)


def test_models_with_a_trunk_go_on_from_it_and_from_nothing_else(
    digits: ImageData, tmp_path: Path
) -> None:
    zoo = Zoo(tmp_path)
    branch = replace(TRUNK, until=2, trunk=TRUNK)  # no epoch of its own
    assert_same_state(zoo.load(branch, digits).state_dict(), zoo.load(TRUNK, digits).state_dict())
    ends = [zoo.load(replace(branch, until=None, seed=seed), digits) for seed in (3, 4)]
    assert not torch.equal(ends[0].head.weight, ends[1].head.weight)
    apart = zoo.load(replace(TRUNK, until=None, seed=4), digits)
    start = zoo.load(TRUNK, digits).head.weight

    def moved(model: torch.nn.Module) -> float:
        weight: torch.Tensor = model.head.weight
        return float((weight - start).detach().norm())

    assert max(map(moved, ends)) < moved(apart)


def test_a_trunk_of_no_epochs_is_a_common_initialisation(digits: ImageData, tmp_path: Path) -> None:
    zoo, none = Zoo(tmp_path), replace(TRUNK, until=0)
    branch = replace(TRUNK, until=0, seed=9, trunk=none)
    assert_same_state(zoo.load(branch, digits).state_dict(), zoo.load(none, digits).state_dict())


def test_what_a_model_without_a_trunk_is_made_of_does_not_speak_of_one() -> None:
    alone = replace(TRUNK, until=None)
    assert {"trunk", "until"} & alone.made_of.keys() == set()
    assert replace(alone, trunk=TRUNK).name != alone.name != TRUNK.name


def test_the_shared_trunk_has_a_base_where_there_is_one() -> None:
    listed = cells("shared_trunk", "digits", [0])
    needing = {name for name, one in of_kind("aggregate").items() if "base" in one.needs}
    by_trunk: dict[int | None, list[Cell]] = {}
    for cell in listed:
        by_trunk.setdefault(cell.config["setting"].get("trunk"), []).append(cell)
    assert list(by_trunk) == [None, 4]
    for together, some in by_trunk.items():
        methods = {cell.config["aggregate"]["method"] for cell in some}
        assert needing & methods == (set() if together is None else needing)
        trunks = {base.trunk for cell in some for base in base_models(cell)}
        (trunk,) = trunks
        assert (trunk is None) == (together is None)
        assert trunk is None or (trunk.until, trunk.partition) == (together, "same")


def test_the_zoo_has_every_method_that_needs_no_base() -> None:
    listed = cells("zoo", "grid", [0])
    assert len({cell.label for cell in listed}) == len(listed)
    used = {cell.config["aggregate"]["method"] for cell in listed}
    used |= {cell.config["align"]["method"] for cell in listed if cell.config["align"]}
    used |= {cell.config["correct"] for cell in listed}
    heads = {name for name in of_kind("align") if name.startswith("permute_")}
    for kind in ("align", "aggregate", "correct"):
        wanted = {name for name, one in of_kind(kind).items() if "base" not in one.needs}
        assert wanted - heads <= used


def test_what_needs_the_same_is_one_group() -> None:
    assert Combination("mean", "weight_matching").group == "nothing"
    assert Combination("mean", "permute").group == "unlabelled data"
    assert Combination("mean", "identity", correct="repair").group == "unlabelled data"
    assert Combination("np_merge", "identity").group == "training on labelled data"
    assert {Combination(name, "identity").group for name in of_kind("aggregate")} <= set(GROUPS)


def test_passes_are_counted_and_memory_grows_with_the_optimiser(digits: ImageData) -> None:
    models = [net(0), net(1)]
    before = [Snapshot.of(model) for model in models]
    data = loader(64, 16)
    ways = {"align_options": {}, "seed": 0, "correct": "reset_batchnorm"}
    found = partial(effort, models, data, device=torch.device("cpu"))
    plain = found({**ways, "align": "identity", "aggregate": "mean", "aggregate_options": {}})
    assert plain["passes"] == 1  # of the reset
    learning = {**ways, "align": "permute", "aggregate": "np_merge"}
    learned = found({**learning, "aggregate_options": {"epochs": 3}})
    assert (
        learned["passes"] == 5.25
    )  # a batch to look at, one to align, three to learn, one to reset
    assert learned["peak_mib"] > plain["peak_mib"] > 0
    half = {**ways, "align": "identity", "aggregate": "regmean"}
    few = found({**half, "aggregate_options": {"examples": 32}})
    every = found({**half, "aggregate_options": {}})
    assert every["passes"] == 3  # one each of A and B, and one to reset
    assert few["passes"] < every["passes"]
    for snapshot, model in zip(before, models, strict=True):
        snapshot.assert_still(model)


def test_counted_batches_are_those_that_they_count() -> None:
    seen = [0]
    counted = Counted(loader(24, 8), seen)
    assert len(counted) == 3
    assert sum(len(labels) for _, labels in counted) == seen[0] == 24
    next(iter(counted))
    assert seen[0] == 32


def of(cell: Cell, passes: bool = True) -> Record:
    """A record of a cell: as accurate as its name is long."""
    config = cell.config
    align = config["align"] and config["align"]["method"]
    row = {"aggregate": config["aggregate"]["method"], "align": align, "many": None, "tuned": False}
    method = combination({**row, "correct": config["correct"]})
    values = {"top1": 20.0 + len(cell.name) + cell.seed, "loss": 1.0}
    if passes and align:
        values |= {"passes": float(len(cell.name) % 7), "peak_mib": 10.0}
    made = record(
        method, values, cell.seed, profile="grid", experiment=cell.experiment, width=0.5,
        split=config["setting"].get("split"), examples=config["data"]["examples_per_class"],
    )  # fmt: skip
    where = made.cell.model_copy(update={"setting": cell.setting, "name": cell.name})
    return made.model_copy(update={"config": config, "cell": where})


def test_the_table_puts_those_together_that_need_the_same_and_the_picture_names_the_front() -> None:
    plain = [c for c in cells("zoo", "grid", [0, 1, 2]) if "tuned" not in c.name]
    records = [of(cell) for cell in plain if cell.name != "base_models-as-trained"]
    place = place_of(records[0])
    table = report.zoo_table(records, place)
    needs = list(dict.fromkeys(table.index.get_level_values("needs")))
    assert needs == [group for group in GROUPS if group in needs]
    assert table.loc[("unlabelled data", "Permute"), "accuracy"] == "33.00 ± 1.00"
    assert table.loc[("unlabelled data", "Permute"), "passes"] == "5.0"
    said = report.findings(records)
    assert "Each network alone has" in said
    assert "*Needs nothing*" in said
    variants = report.combinations_table(records)
    assert "NP from REPAIR-P" in variants.index
    assert "NP-P" not in variants.index
    figure = report.plot_effort(records)
    assert figure.get_label().startswith("The highest that unlabelled data reaches")


def test_the_trunk_s_columns_are_the_epochs_together() -> None:
    records = [of(c) for c in cells("shared_trunk", "grid", [0, 1]) if "as-trained" not in c.name]
    table = report.trunk_table(records)
    assert list(table.columns) == ["apart", "0", "1", "2", "4", "6", "8"]
    needing = table.loc[GROUPS[-1]]
    assert (needing["apart"] == "\N{EN DASH}").all()
    assert not (needing["0"] == "\N{EN DASH}").any()
    said = report.trunk_findings(records)
    assert "- Trained apart: averaged as they are 33.5 %, the ensemble" in said
    assert "- After 8 common epochs: " in said
    assert "beyond the seeds" not in said  # two seeds judge nothing
    label = report.plot_trunk(records).get_label()
    assert label.startswith("Averaged as they are, networks reach 33.5")


MOVES = {"finetune", "training", "path"}
"""Families that train the weights themselves, so that they leave even a good model."""
ITSELF = [
    name
    for name, one in of_kind("aggregate").items()
    if one.family not in MOVES and "base" not in one.needs
]


@pytest.mark.parametrize("name", ITSELF)
@pytest.mark.parametrize("norm", [True, False])
def test_a_model_merged_with_itself_is_itself(name: str, norm: bool) -> None:
    data = loader(64, 16)
    a = npm.reset_batchnorm(net(0, norm=norm), data).eval()
    options = {"epochs": 1} if "epochs" in METHODS[name].options else {}
    merged = npm.merge([a, a], data, aggregate=name, aggregate_options=options)
    # What is measured behind layers that are normalised batch by batch is not quite what A itself has there.
    by_batch = name == "np_from_repair" or (norm and name.endswith("_interpolation"))
    near = 0.1 if by_batch else 1e-4
    with torch.no_grad():
        for images, _ in data:
            assert torch.allclose(merged.model(images), a(images), rtol=near, atol=near)


@pytest.mark.parametrize("name", sorted({*of_kind("aggregate")} - {*ITSELF}))
def test_what_trains_or_has_a_base_gives_another_model(name: str) -> None:
    data, a = loader(64, 16), net(0)
    options = {"epochs": 2} if "epochs" in METHODS[name].options else {}
    merged = npm.merge([a, net(1)], data, aggregate=name, aggregate_options=options, base=net(2))
    pairs = zip(merged.model.parameters(), a.parameters(), strict=True)
    assert not all(torch.equal(x, y) for x, y in pairs)
    assert all(p.isfinite().all() for p in merged.model.parameters())


def test_many_models_become_one_at_once_where_an_aggregation_takes_any_number() -> None:
    models, data = [net(seed) for seed in range(3)], loader()
    merged = npm.merge(models, data, aggregate="uniform_soup")
    one = npm.merge(models, data, aggregate="mean", many="all_to_one")
    assert_same_state(merged.model.state_dict(), one.model.state_dict())
    base = net(9)
    summed = npm.merge(
        models, data, aggregate="task_arithmetic", base=base, aggregate_options={"scale": 1 / 3},
        correct=None,
    )  # fmt: skip
    assert summed.alignment is not None
    assert summed.alignment.groups == ()  # nothing is aligned where a base is shared
    for name, found in summed.model.named_parameters():
        mean = sum(model.get_parameter(name) for model in models) / 3
        assert torch.allclose(found, mean, atol=1e-6), name
    with pytest.raises(ValueError, match="ties needs a base: give base, the model that all"):
        npm.merge(models, data, aggregate="ties")
    with pytest.raises(ValueError, match="'merge_many' takes the mean of all models"):
        npm.merge(models, data, aggregate="ties", base=base, many="merge_many")


def test_channels_of_one_s_own_cannot_be_held_against_those_of_the_parents() -> None:
    with pytest.raises(ValueError, match="zipit makes channels of its own: correct by reset_batch"):
        npm.merge([net(0), net(1)], loader(), aggregate="zipit", correct="repair")


def test_every_method_has_a_card_with_when_to_take_it() -> None:
    page = cards_page()
    for kind in ("align", "aggregate", "correct", "many"):
        for name, one in of_kind(kind).items():
            assert f'`{kind}="{name}"`' in page
            assert one.use.endswith("."), name
            assert one.use in page
    assert BASES.aggregate not in page
    assert ENSEMBLE.aggregate + '"' not in page
