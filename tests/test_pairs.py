"""Disjoint splits and data size: who sees what, and what the records say of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import PROFILE

from npmerge.data import Images
from npmerge.data.partition import dirichlet, per_class
from npmerge.experiments import data_size, disjoint_splits
from npmerge.experiments.merging import Machine, Merging, base_models
from npmerge.experiments.profile import Setting
from npmerge.results import COLUMNS, Outcome, Unit
from npmerge.zoo import Zoo

HERE = Machine(torch.device("cpu"))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("zoo"))


def top1(outcome: Outcome) -> dict[str, float]:
    return {r["method"]: r["value"] for r in outcome.records if r["metric"] == "top1"}


@pytest.fixture(scope="module")
def split(zoo: Zoo) -> Outcome:
    """The Dirichlet unit of seed 0."""
    return disjoint_splits.run(disjoint_splits.units(PROFILE, [0])[1], zoo=zoo, machine=HERE)


def unit_with(examples: int | str) -> Unit:
    (found,) = (
        unit
        for unit in data_size.units(PROFILE, [0])
        if unit.config["examples_per_class"] == examples
    )
    return found


def test_the_units_of_a_split_say_which_and_share_no_model() -> None:
    units = disjoint_splits.units(PROFILE, [0, 1])
    assert [unit.setting for unit in units] == (
        ["digits-resnet20x0.125-80-20"] * 2 + ["digits-resnet20x0.125-dirichlet"] * 2
    )
    addresses = [base.address for unit in units for base in base_models(unit)]
    assert len(set(addresses)) == 8


def test_table_iv_trains_nothing_of_its_own() -> None:
    bases = {base.address for unit in data_size.units(PROFILE, [0]) for base in base_models(unit)}
    ours = {base.address for base in base_models(disjoint_splits.units(PROFILE, [0])[1])}
    assert bases == ours


def test_a_split_s_record_has_its_columns_and_who_saw_and_knows_which_class(split: Outcome) -> None:
    assert all(list(row) == COLUMNS for row in split.records)
    assert {row["setting"] for row in split.records} == {"dirichlet"}
    labels = Setting(**disjoint_splits.units(PROFILE, [0])[1].config["setting"]).load().train.labels
    seen = torch.tensor(split.details["classes"]["seen"])
    assert seen.sum(dim=0).tolist() == torch.bincount(labels).tolist()
    shares = dirichlet(labels, seed=0)
    assert seen.sum(dim=1).tolist() == [len(share) for share in shares]
    accuracy = split.details["classes"]["accuracy"]
    assert set(accuracy) == {
        "A", "B", "ensemble", "permute", "np_permute", "finetune_permute",
    }  # fmt: skip
    test_labels = Setting(**PROFILE.disjoint_splits.settings[1].model_dump()).load().test.labels
    weights = torch.bincount(test_labels).double() / len(test_labels)
    for name in ("ensemble", "permute", "np_permute"):
        mean = float((torch.tensor(accuracy[name]) * weights).sum())
        assert mean == pytest.approx(top1(split)[name])


def test_all_of_the_data_gives_the_numbers_of_the_disjoint_split(zoo: Zoo, split: Outcome) -> None:
    whole = data_size.run(unit_with("all"), zoo=zoo, machine=HERE)
    assert {row["examples_per_class"] for row in whole.records} == {"all"}
    theirs = top1(split)
    assert top1(whole) == {method: theirs[method] for method in top1(whole)}


@pytest.mark.parametrize("examples", [5, 1])
def test_no_other_training_image_than_the_optimisation_data_is_used(
    examples: int, zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = unit_with(examples)
    expected = data_size.run(unit, zoo=zoo, machine=HERE)
    known = Setting.load

    def spoiled(setting: Setting) -> Any:
        data = known(setting)
        kept = per_class(data.train.labels, examples, seed=0)
        pixels = torch.full_like(data.train.pixels, 255)
        pixels[kept] = data.train.pixels[kept]
        return replace(data, train=Images(pixels, data.train.labels))

    monkeypatch.setattr(Setting, "load", spoiled)
    assert data_size.run(unit, zoo=zoo, machine=HERE).records == expected.records
    assert {row["examples_per_class"] for row in expected.records} == {examples}


def test_the_parents_are_scored_as_trained_and_with_batch_norm_of_the_union(split: Outcome) -> None:
    found = top1(split)
    assert found["base_avg"] != found["base_avg_no_reset"]


def test_an_unmerged_pair_is_left_as_the_zoo_has_it(zoo: Zoo) -> None:
    unit = disjoint_splits.units(PROFILE, [0])[0]
    pair = Merging.of(unit, zoo, HERE, table="II")
    data = Setting(**unit.config["setting"]).load()
    fresh = zoo.get_all(base_models(unit), data)
    for model, again in zip(pair.pair, fresh, strict=True):
        for name, value in again.state_dict().items():
            assert torch.equal(model.state_dict()[name], value)


def test_dirichlet_shares_without_a_class_and_a_left_over_image_train_align_and_merge(
    tmp_path: Path,
) -> None:
    """201 images in batches of 100 leave one over; model 0 of this draw has never seen class 0."""
    section = PROFILE.disjoint_splits
    setting = section.settings[1].model_copy(update={"images": 201})
    labels = setting.load().train.labels
    counts = {
        seed: [torch.bincount(labels[s], minlength=10) for s in dirichlet(labels, seed=seed)]
        for seed in range(200)
    }
    seed = next(s for s, both in counts.items() if min(int(c.min()) for c in both) == 0)
    options = section.optimisation.model_copy(update={"batch_size": 100})
    profile = PROFILE.model_copy(
        update={
            "disjoint_splits": section.model_copy(
                update={"settings": (setting,), "optimisation": options}
            )
        }
    )
    (unit,) = disjoint_splits.units(profile, [seed])
    found = disjoint_splits.run(unit, zoo=Zoo(tmp_path), machine=HERE)
    assert any(0 in row for row in found.details["classes"]["seen"])
    assert all(torch.isfinite(torch.tensor(row["value"])) for row in found.records)
