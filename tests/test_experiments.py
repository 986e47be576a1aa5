"""Experiments: a list of cells each, whose configuration is all that their numbers are a function of."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError
from tiny import PROFILE, tiny_profile

from npmerge import experiments
from npmerge.catalogue import SAMPLING, chosen_experiments, experiment_names, profile_names
from npmerge.experiments import EXPERIMENTS, cells, load_profile, load_profiles, setting_of
from npmerge.experiments.profile import Profile
from npmerge.methods import Combination
from npmerge.run.work import base_models
from npmerge.store.records import Cell

TABLE_I = {
    "base_models-as-trained", "base_models", "ensemble",
    "identity-mean", "permute-mean", "weight_matching-mean", "cca-mean",
    "permute-finetune", "weight_matching-finetune", "permute-np_merge", "weight_matching-np_merge",
    "permute-finetune-tuned", "weight_matching-finetune-tuned",
    "permute-np_merge-tuned", "weight_matching-np_merge-tuned",
}  # fmt: skip
CPU = torch.device("cpu")

Sections = dict[str, Any]


@pytest.fixture(autouse=True)
def _tiny_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_profile(monkeypatch)


def listed(name: str, sections: Sections | None = None, **changes: Any) -> dict[str, Cell]:
    """An experiment's cells of the tiny profile and seed 0, by their names."""
    changes |= {} if sections is None else {"sections": sections}
    profile = PROFILE.model_copy(update=changes)
    found = EXPERIMENTS[name].list(profile, [0])
    return {cell.label: cell for cell in found}


def sections() -> Sections:
    """The tiny profile's, to change."""
    return copy.deepcopy(PROFILE.sections)


def changed(name: str, change: Callable[[Sections], object]) -> tuple[set[str], int]:
    """The names of the cells that a change of the experiment's section makes stale, and how many there are."""
    before, other = listed(name), sections()
    change(other[name])
    after = listed(name, other)
    assert after.keys() == before.keys()
    stale = {label for label in after if after[label].config_hash != before[label].config_hash}
    return {label.rpartition("/")[2] for label in stale}, len(after)


def test_the_experiments_are_the_paper_s_in_its_order() -> None:
    paper = ["same_data", "disjoint_splits", "imagenet", "data_size", "many_models", "cost"]
    ours = ["comparison", "transformers", "coefficients", "zoo", "shared_trunk", "federated"]
    assert list(EXPERIMENTS) == [*paper, *ours]
    assert chosen_experiments("ALL") == chosen_experiments(["ALL", "cost"]) == list(EXPERIMENTS)
    assert chosen_experiments(["cost", "same_data", "cost"]) == ["cost", "same_data"]


def test_listing_cells_does_not_wait_for_pytorch() -> None:
    code = (
        "import sys; from npmerge.experiments import cells; cells('ALL', 'paper', [0]); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_cells_are_every_setting_with_every_seed_and_every_combination() -> None:
    found = cells("same_data", "paper", [0, 1])
    settings = ("cifar10-vgg11x1", "cifar100-resnet20x1")
    assert {cell.label for cell in found} == {
        f"same_data/{setting}/seed{seed}/{name}"
        for setting in settings for seed in (0, 1) for name in TABLE_I
    }  # fmt: skip
    assert len(found) == 4 * len(TABLE_I)
    assert found == cells("same_data", "paper", [0, 1])


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("same_data", 13),
        ("disjoint_splits", 2 * 13),
        ("imagenet", 0),  # the profile has no section of it
        ("data_size", 3 * 11),  # averages of two alignments only
        ("many_models", 2 * 2 * 13),
        ("cost", 2),
    ],
)
def test_no_two_cells_share_a_name_or_a_configuration(name: str, count: int) -> None:
    found = cells(name, "tiny", [0, 1])
    assert len({cell.label for cell in found}) == len(found)
    assert len({cell.config_hash for cell in found}) == len(found)
    assert len([cell for cell in found if cell.seed == 1]) == count


def test_several_experiments_are_listed_as_named_and_each_once() -> None:
    found = cells(["data_size", "same_data", "data_size"], "tiny", [0])
    assert list(dict.fromkeys(cell.experiment for cell in found)) == ["data_size", "same_data"]
    assert len({cell.label for cell in found}) == len(found)


def test_a_cell_says_what_is_merged_and_how() -> None:
    config = listed("same_data")["same_data/digits-vgg11x0.0625/seed0/cca-mean"].config
    assert config["align"]["method"] == "cca"
    assert config["align"]["options"]["ridge"] == {"choose": [0.1], "trial": {}}
    assert (config["aggregate"]["method"], config["correct"]) == ("mean", "reset_batchnorm")
    assert (config["models"], config["many"], config["threads"]) == (2, None, 1)
    assert config["data"] == {
        "batch_size": 200, "held_out": 0.1, "examples_per_class": None, "sampling": SAMPLING,
        "correct_on": "augmented",
    }  # fmt: skip


def test_paths_are_followed_where_the_paper_does_and_classes_scored_on_disjoint_splits() -> None:
    for name, more in (("same_data", {}), ("disjoint_splits", {"classes": True})):
        for label, cell in listed(name).items():
            followed = label.endswith(("/identity-mean", "/permute-mean", "/weight_matching-mean"))
            measured = ({"path": 2} if followed else {}) | more
            assert cell.config.get("measures", {}) == measured


def test_a_tuned_cell_differs_in_the_option_that_is_chosen_and_in_nothing_else() -> None:
    found = listed("same_data")
    (given,) = (cell for label, cell in found.items() if label.endswith("/permute-finetune"))
    (tuned,) = (cell for label, cell in found.items() if label.endswith("/permute-finetune-tuned"))
    config = copy.deepcopy(tuned.config)
    chosen = config["aggregate"]["options"].pop("lr")
    assert chosen == {"choose": [1e-3], "trial": {"epochs": 1}}
    config["aggregate"]["options"]["lr"] = given.config["aggregate"]["options"]["lr"]
    assert config == given.config


def test_every_cell_s_methods_have_a_label_in_tables() -> None:
    for cell in cells("ALL", "paper", [0]):
        config = cell.config
        if "aggregate" in config:
            align = config["align"] and config["align"]["method"]
            assert Combination(config["aggregate"]["method"], align, many=config["many"]).label


def test_a_changed_option_makes_only_its_own_cells_stale() -> None:
    np_merge = {name for name in TABLE_I if name.endswith("np_merge")}
    tuned = {name for name in TABLE_I if name.endswith("finetune-tuned")}

    def options(section: Sections) -> Any:
        return section["optimisation"]["options"]

    stale, _ = changed("same_data", lambda s: options(s)["np_merge"].update(epochs=2))
    assert stale == np_merge
    stale, _ = changed("same_data", lambda s: options(s)["np_merge"].update(lr=0.5))
    assert stale == np_merge  # a default that is no longer taken
    stale, _ = changed("same_data", lambda s: options(s)["cca"]["ridge"].update(choose=[0.5]))
    assert stale == {"cca-mean"}
    stale, _ = changed(
        "same_data", lambda s: s["optimisation"]["tuned"]["finetune"]["lr"].update(choose=[0.5])
    )
    assert stale == tuned
    stale, _ = changed("same_data", lambda s: s["optimisation"].update(path_points=3))
    assert stale == {"identity-mean", "permute-mean", "weight_matching-mean"}
    stale, count = changed("same_data", lambda s: s["optimisation"].update(batch_size=100))
    assert len(stale) == count
    stale, count = changed("same_data", lambda s: s["settings"][0]["recipe"].update(lr=0.5))
    assert len(stale) == count


def test_what_is_only_presentation_is_not_in_the_hash() -> None:
    stale, _ = changed("same_data", lambda s: s["settings"][0].update(beside=["cifar100", "x"]))
    assert stale == set()
    assert listed("same_data", title="another") == listed("same_data")
    setting = setting_of("tiny", "same_data", "digits-vgg11x0.0625")
    assert setting.beside == ("cifar10", "vgg11x1")
    with pytest.raises(ValueError, match="'tiny' has no setting 'digits-vgg11x9' in same_data"):
        setting_of("tiny", "same_data", "digits-vgg11x9")


def test_a_method_added_to_a_section_adds_cells_and_leaves_the_others_as_they_are() -> None:
    few, more = sections(), sections()
    few["same_data"]["methods"] = [{"align": "permute", "aggregate": "mean"}]
    more["same_data"]["methods"] = [
        {"align": ["permute", "identity"], "aggregate": ["mean", "np_merge"]}
    ]
    before, after = listed("same_data", few), listed("same_data", more)
    assert {label.rpartition("/")[2] for label in after.keys() - before.keys()} == {
        "identity-mean", "permute-np_merge", "identity-np_merge",
    }  # fmt: skip
    assert {label: after[label].config_hash for label in before} == {
        label: cell.config_hash for label, cell in before.items()
    }


def test_a_setting_added_to_a_section_leaves_the_others_as_they_are() -> None:
    more = sections()
    more["same_data"]["settings"].append(more["same_data"]["settings"][0] | {"width": 0.125})
    before, after = listed("same_data"), listed("same_data", more)
    assert len(after) == 2 * len(before)
    assert {label: after[label] for label in before} == before


def test_base_models_of_all_seeds_and_splits_are_different_models() -> None:
    pairs = {cell.setting: cell for cell in cells("disjoint_splits", "tiny", [0])}
    assert len(pairs) == 2
    every = [
        base
        for cell in cells(["same_data", "disjoint_splits"], "tiny", range(12))
        for base in base_models(cell)
    ]
    assert len(set(every)) == 12 * 2 * 3


def test_table_iv_and_the_pairs_of_figure_1_train_nothing_of_their_own() -> None:
    trained = {base for cell in cells("disjoint_splits", "tiny", [0]) for base in base_models(cell)}
    for cell in cells(["data_size", "many_models"], "tiny", [0]):
        if cell.config["models"] == 2 and "split" in cell.config["setting"]:
            assert set(base_models(cell)) <= trained


def test_models_that_are_merged_by_the_dozen_begin_with_the_pair() -> None:
    by_count = {
        cell.config["models"]: base_models(cell)
        for cell in cells("many_models", "tiny", [0])
        if "split" not in cell.config["setting"]
    }
    assert by_count[3][:2] == by_count[2]


@pytest.mark.parametrize("name", profile_names())
def test_profiles_are_whole(name: str) -> None:
    assert cells("ALL", name, [0])


def test_the_largest_profile_is_named_first_and_demonstrations_last() -> None:
    names = profile_names()
    assert names == ["paper", "short", "grid", "digits"]
    assert [load_profile(name).place for name in names] == [1, 2, 3, 4]
    demonstrations = [one.name for one in load_profiles(demonstration=True)]
    published = [one.name for one in load_profiles(demonstration=False)]
    assert demonstrations == ["digits"]
    assert published + demonstrations == names


def test_the_paper_profile_is_the_protocol() -> None:
    profile = load_profile("paper")
    section = EXPERIMENTS["same_data"].parameters(profile)
    assert section is not None
    vgg, resnet = section.settings
    assert [setting.recipe.lr for setting in (vgg, resnet)] == [0.08, 0.5]
    for setting in (vgg, resnet):
        assert (setting.image_size, setting.width) == (32, 1)
        recipe = setting.recipe
        assert (recipe.epochs, recipe.batch_size, recipe.warmup_epochs) == (200, 500, 5)
        assert (recipe.momentum, recipe.weight_decay) == (0.9, 5e-4)
    assert section.optimisation.batch_size == 500
    for cell in cells("same_data", "paper", [0]):
        if cell.name in ("permute-np_merge", "permute-finetune"):
            assert cell.config["aggregate"]["options"] == {"epochs": 10, "lr": 0.01}
    many = {cell.config["models"] for cell in cells("many_models", "paper", [0])}
    assert many == {2, 4, 8}
    sizes = {c.config["data"]["examples_per_class"] for c in cells("data_size", "paper", [0])}
    assert sizes == {"all", 100, 10, 5, 1}


MISTAKES: dict[str, tuple[tuple[str | int, ...], Any, str]] = {
    "an unknown parameter": (
        ("same_data", "optimisation", "colour"), 1,
        r"same_data.optimisation.colour: Extra inputs are not permitted",
    ),
    "a wrong value": (
        ("same_data", "optimisation", "batch_size"), "many",
        r"same_data.optimisation.batch_size: Input should be a valid integer",
    ),
    "an unknown experiment": (("magic",), {}, r"magic: there is no such experiment; choose from same_data"),
    "an unknown data set": (
        ("same_data", "settings", 0, "dataset"), "mnist",
        r"same_data.settings.0.dataset: .* unknown data set 'mnist': choose one of ",
    ),
    "an unknown model": (
        ("same_data", "settings", 0, "model"), "vgg12",
        r"same_data.settings.0.model: .* unknown model 'vgg12': choose one of ",
    ),
    "an unknown alignment": (
        ("same_data", "methods"), [{"align": "magic", "aggregate": "mean"}],
        r"same_data.methods.align.0: .* unknown alignment 'magic': choose one of ",
    ),
    "an alignment for an aggregation": (
        ("same_data", "methods"), [{"align": "permute", "aggregate": "permute"}],
        r"same_data.methods.aggregate.0: .* unknown aggregation 'permute'",
    ),
    "an unknown method with options": (
        ("same_data", "optimisation", "options", "magic"), {"lr": 0.1},
        r"same_data.optimisation.options.magic.* unknown method 'magic'",
    ),
    "an unknown option": (
        ("same_data", "optimisation", "options", "np_merge"), {"epoch": 1},
        r"np_merge has no option 'epoch': its options are epochs, lr",
    ),
    "an option of a wrong type": (
        ("same_data", "optimisation", "options", "np_merge"), {"epochs": "many"},
        r"epochs of np_merge is 'many': it must be of type int",
    ),
    "an unknown option of a trial": (
        ("same_data", "optimisation", "tuned", "finetune", "lr"),
        {"choose": [0.1], "trial": {"epoch": 1}},
        r"finetune has no option 'epoch'",
    ),
    "nothing to choose from": (
        ("same_data", "optimisation", "tuned", "finetune", "lr"), {"choose": []},
        r"same_data.optimisation.tuned.finetune.lr.*choose.*: Tuple should have at least 1 item",
    ),
    "no threads": (("threads",), 0, r"threads: Input should be greater than 0"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_profile_is_named_in_one_line(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (*where, last), value, message = MISTAKES[mistake]
    monkeypatch.setattr("npmerge.experiments.profile._FOLDER", tmp_path)
    monkeypatch.setattr("npmerge.experiments.profile.check_profile", lambda _: None)
    monkeypatch.setattr(experiments, "load_profile", load_profile)
    own = {name: getattr(PROFILE, name) for name in ("title", "threads", "precision")}
    values: Any = {**own, **sections()}
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(values))
    assert cells("same_data", "own", [0])
    part = values
    for key in where:
        part = part[key]
    part[last] = value
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=message) as caught:
        cells("same_data", "own", [0])
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, ValidationError)


def test_a_profile_is_not_changed() -> None:
    profile: Any = PROFILE
    with pytest.raises(ValidationError, match="frozen"):
        profile.title = "another"
    assert Profile.model_validate(PROFILE.model_dump()) == PROFILE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"profile": "huge"},
            "unknown profile 'huge': choose one of paper, short, grid, digits",
        ),
        ({"experiment": "magic"}, "unknown experiment 'magic': choose one of same_data, .* or ALL"),
        ({"seeds": [0, 1, 0]}, "seed 0 is given twice: give each seed once"),
        ({"seeds": []}, "no seeds: give at least one"),
        ({"seeds": [-1]}, "seed is -1: give a whole number from 0"),
    ],
)
def test_what_cannot_be_listed_is_said_in_one_line(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"experiment": "same_data", "profile": "tiny", "seeds": [0]} | options
    with pytest.raises(ValueError, match=message) as caught:
        cells(**given)
    assert "\n" not in str(caught.value)


def test_the_names_that_are_read_from_the_files_are_those_of_the_experiments() -> None:
    assert experiment_names() == list(EXPERIMENTS)
