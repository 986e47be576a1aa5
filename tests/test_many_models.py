"""The experiment of Figure 1: tournaments, all to one and their controls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.container import ErrorbarContainer
from tiny import PROFILE
from torch import nn

from npmerge.experiments import many_models, same_data
from npmerge.experiments.merging import Machine
from npmerge.many_figures import LOOKS, many_scores, many_table, plot_many
from npmerge.paper import METHODS
from npmerge.results import COLUMNS, Outcome
from npmerge.zoo import Zoo

HERE = Machine(torch.device("cpu"))
DIRICHLET_OF_3 = many_models.units(PROFILE, [0])[-2]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def outcome(zoo: Zoo) -> Outcome:
    """Three models that share the digits."""
    return many_models.run(DIRICHLET_OF_3, zoo=zoo, machine=HERE)


def test_every_setting_seed_and_count_is_a_unit_and_pairs_are_shared_with_other_chapters() -> None:
    units = many_models.units(PROFILE, [0, 1])
    assert len({unit.name for unit in units}) == len({unit.config_hash for unit in units}) == 8
    counts = [len(many_models.base_models(unit)) for unit in units]
    assert sorted(set(counts)) == [2, 3]
    pairs = [many_models.base_models(unit) for unit in units if unit.seed == 0]
    balanced_of_3, balanced_of_2, dirichlet_of_3, dirichlet_of_2 = pairs
    assert balanced_of_3[:2] == balanced_of_2  # the same networks, one more
    assert not {b.address for b in dirichlet_of_2} & {b.address for b in dirichlet_of_3}
    section = PROFILE.many_models.model_copy(update={"settings": PROFILE.same_data.settings})
    alike = PROFILE.model_copy(update={"many_models": section})
    theirs = same_data.base_models(same_data.units(PROFILE, [0])[0])
    assert many_models.base_models(many_models.units(alike, [0])[1]) == theirs


def test_a_record_has_every_method_and_control(outcome: Outcome) -> None:
    assert all(list(row) == COLUMNS for row in outcome.records)
    assert {row["setting"] for row in outcome.records} == {"dirichlet, 3 models"}
    methods = {row["method"] for row in outcome.records}
    assert methods == {*LOOKS, "base_avg_no_reset"}
    assert set(outcome.details["seconds"]) == methods - {
        "base_avg",
        "base_avg_no_reset",
        "ensemble",
    }
    assert methods - {"base_avg_no_reset"} <= set(METHODS)


def test_models_are_loaded_when_they_are_needed_and_never_all_at_once(
    zoo: Zoo, outcome: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The zoo gives loaders; asking it for all the models at once would fail."""
    known = zoo.loaders(many_models.base_models(DIRICHLET_OF_3), _data(), device="cpu")
    loads: list[int] = []

    def counted(number: int, load: Callable[[], nn.Module]) -> nn.Module:
        loads.append(number)
        return load()

    def loaders(*_: Any, **__: Any) -> list[Callable[[], nn.Module]]:
        return [partial(counted, number, load) for number, load in enumerate(known)]

    monkeypatch.setattr(zoo, "loaders", loaders)
    monkeypatch.setattr(zoo, "get_all", lambda *_, **__: pytest.fail("loaded all models"))
    again = many_models.run(DIRICHLET_OF_3, zoo=zoo, machine=HERE)
    assert again.records == outcome.records
    assert set(loads) == {0, 1, 2}
    assert len(loads) > 3 * 5  # each method streams them anew


def test_tables_and_figure_have_a_place_for_every_count(outcome: Outcome) -> None:
    contents = [
        {
            "unit": {"seed": seed},
            "config": DIRICHLET_OF_3.config | {"models": count},
            "records": [row | {"value": row["value"] + seed} for row in outcome.records],
        }
        for seed in (0, 1)
        for count in (3, 8)
    ]
    rows = many_scores(contents)
    value = next(
        r["value"] for r in outcome.records if (r["method"], r["metric"]) == ("np_permute", "top1")
    )
    ours = rows[(rows["method"] == "np_permute") & (rows["models"] == 8)]
    assert ours["mean"].tolist() == [pytest.approx(value + 0.5)]
    table = many_table(contents)
    assert list(table.columns) == ["dirichlet, 3 models", "dirichlet, 8 models"]
    assert table.loc["NP-P tournament"].iloc[0] == f"{value + 0.5:.2f} ± {2**-0.5:.2f}"
    assert table.notna().all(axis=None)
    figure = plot_many(contents)
    assert len(figure.axes) == 1
    drawn = [one for one in figure.axes[0].containers if isinstance(one, ErrorbarContainer)]
    assert len(drawn) == len(LOOKS)
    assert {np.size(one.lines[0].get_xdata()) for one in drawn} == {2}
    assert isinstance(table, pd.DataFrame)


def _data() -> Any:
    return PROFILE.many_models.settings[1].load()
