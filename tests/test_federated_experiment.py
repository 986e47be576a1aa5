"""Federated learning as an experiment: who has which images, what a client gets, and what is sent for it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reports import record
from torch import Tensor

from npmerge.data.partition import Partition, dirichlet, per_class
from npmerge.experiments import cells
from npmerge.experiments.federated import AT_ONCE, IN_PAIRS, every_method
from npmerge.methods import METHODS, Combination, of_kind
from npmerge.report import federated as report
from npmerge.run.federating import client_accuracy, do_federated
from npmerge.run.work import Bench, base_models, load_images
from npmerge.store.records import Cell, Record
from npmerge.store.zoo import BaseModel, Recipe, Zoo

LABELS = torch.arange(1200) % 10
RECIPE = {"epochs": 2, "batch_size": 50, "lr": 0.03, "warmup_epochs": 1.0}


def shares(clients: int, **how: Any) -> list[Tensor]:
    return [Partition("dirichlet", k, clients, 3, **how).indices(LABELS) for k in range(clients)]


@pytest.mark.parametrize("concentration", [0.05, 0.5, 10.0])
@pytest.mark.parametrize("clients", [2, 32])
def test_every_image_is_a_client_s_or_the_server_s_and_nobody_else_s(
    clients: int, concentration: float
) -> None:
    own = shares(clients, concentration=concentration, least=10, apart=4)
    server = per_class(LABELS, 4, seed=3)
    together = torch.cat([*own, server])
    assert torch.equal(together.sort().values, torch.arange(len(LABELS)))
    assert min(map(len, own)) >= 10


def test_the_smaller_the_concentration_the_fewer_classes_has_a_client() -> None:
    def largest_class(concentration: float) -> float:
        counts = [
            torch.bincount(LABELS[one], minlength=10)
            for one in shares(8, concentration=concentration)
        ]
        return float(torch.stack([c.max() / c.sum().clamp(min=1) for c in counts]).mean())

    assert largest_class(0.05) > largest_class(0.5) > largest_class(10.0)


def test_a_client_with_too_few_images_is_given_the_largest_client_s_and_others_keep_theirs() -> (
    None
):
    bare = dirichlet(LABELS, 16, seed=3, concentration=0.05)
    topped = dirichlet(LABELS, 16, seed=3, concentration=0.05, least=10)
    assert min(map(len, bare)) < 10 == min(map(len, topped))
    richest = max(map(len, bare))
    for before, after in zip(bare, topped, strict=True):
        if 10 <= len(before) < richest / 2:
            assert torch.equal(before, after)
    assert all(
        torch.equal(x, y)
        for x, y in zip(
            topped, dirichlet(LABELS, 16, seed=3, concentration=0.05, least=10), strict=True
        )
    )


def test_shares_that_cannot_be_had_are_refused() -> None:
    with pytest.raises(ValueError, match=r"concentration is 0: it must be above 0"):
        dirichlet(LABELS, seed=0, concentration=0)
    with pytest.raises(
        ValueError, match=r"200 models of at least 10 images asked for, but there are 1200"
    ):
        dirichlet(LABELS, 200, seed=0, least=10)


def test_a_partition_s_defaults_have_no_say_in_what_a_model_is_made_of() -> None:
    plain = Partition("dirichlet", 0, 2, 5)
    assert plain.made_of == {"split": "dirichlet", "part": 0, "models": 2, "seed": 5}
    assert replace(plain, apart=10).made_of == plain.made_of | {"apart": 10}
    base = BaseModel("cifar100", 32, "resnet20", 1, Recipe(40, 500, 0.5), plain, 0, threads=1)
    assert base.made_of["partition"] == plain.made_of
    assert base.name != replace(base, partition=replace(plain, concentration=0.1)).name


def test_a_method_with_a_base_needs_common_weights_and_one_of_pairs_a_tournament() -> None:
    for common in (False, True):
        found = {m.aggregate[0]: m for m in every_method(common=common) if m.aggregate != ("mean",)}
        expected = {
            name
            for name, one in of_kind("aggregate").items()
            if name != "mean" and (common or "base" not in one.needs)
        }
        assert found.keys() == expected
        for name, one in found.items():
            assert one.many == (AT_ONCE if METHODS[name].several else IN_PAIRS)


def test_the_same_clients_are_merged_by_every_method_and_go_to_and_fro_in_rounds() -> None:
    grid = cells("federated", "grid", [0])
    by_place: dict[tuple[str, int], set[tuple[str, ...]]] = {}
    for cell in grid:
        if "rounds" not in cell.config and cell.config["models"] > 1:
            place = cell.setting, cell.config["models"]
            by_place.setdefault(place, set()).add(tuple(b.name for b in base_models(cell)))
    assert all(len(bases) == 1 for bases in by_place.values())
    assert {clients for _, clients in by_place} == {2, 4, 8, 16, 32}
    for cell in grid:
        if "rounds" in cell.config:
            assert [base.until for base in base_models(cell)] == [0]


def test_all_rounds_together_are_as_many_epochs_as_one() -> None:
    rounds = [
        cell
        for cell in cells("federated", "grid", [0])
        if cell.config.get("rounds") and cell.config["setting"].get("split")
    ]
    assert {
        cell.config["rounds"]["rounds"] * cell.config["rounds"]["epochs"] for cell in rounds
    } == {cell.config["setting"]["recipe"]["epochs"] for cell in rounds}
    counted = Counter(cell.config["rounds"]["strategy"] for cell in rounds)
    assert set(counted.values()) == {4}


def test_the_worst_client_is_told_by_what_it_has() -> None:
    accuracy, counts = [100.0, 50.0, 0.0], [[3, 1, 0], [0, 1, 1]]
    assert client_accuracy(accuracy, counts) == {"mean_client": 56.25, "worst_client": 25.0}
    each = [[100.0, 0.0, 0.0], [0.0, 100.0, 100.0]]  # clients' own models, each on its own classes
    assert client_accuracy(each, counts) == {"mean_client": 87.5, "worst_client": 75.0}


def tiny(name: str) -> Cell:
    """A cell of the demonstration with less to do."""
    (cell,) = (c for c in cells("federated", "digits", [0]) if c.label.endswith(name))
    setting = cell.config["setting"]
    small = setting | {"model": "vgg11", "width": 0.125, "recipe": RECIPE}
    config = cell.config | {"setting": small, "models": min(2, cell.config["models"])}
    if "rounds" in config:
        config["rounds"] = config["rounds"] | {"rounds": 2, "epochs": 1}
    return replace(cell, config=config)


def values(cell: Cell, folder: Path) -> tuple[dict[str, float], dict[str, Any]]:
    found = do_federated(cell, Bench.at(Zoo(folder), torch.device("cpu")))
    return {row.metric: row.value for row in found.rows}, dict(found.details)  # type: ignore[union-attr]


def test_one_round_sends_each_client_s_network_once(tmp_path: Path) -> None:
    cell = tiny("dirichlet0.5/seed0/4-all_to_one-permute-mean")
    found, details = values(cell, tmp_path)
    client = Zoo(tmp_path).load(base_models(cell)[0], load_images(cell.config["setting"]))
    model = sum(one.numel() * one.element_size() for one in client.state_dict().values())
    assert found["bytes_up"] == 2 * model
    assert found["bytes_down"] == 0
    assert found["worst_client"] <= found["mean_client"]
    assert found["worst_barrier"] == max(details["barriers"])
    assert len(details["barriers"]) == 2
    common, _ = values(tiny("dirichlet0.5-trunk0/seed0/4-all_to_one-identity-mean"), tmp_path)
    assert common["bytes_down"] == common["bytes_up"] == found["bytes_up"]


def test_two_rounds_send_twice_as_much_and_flower_counts_as_much(tmp_path: Path) -> None:
    pytest.importorskip("flwr")
    once, _ = values(tiny("trunk0/seed0/4-all_to_one-identity-mean"), tmp_path)
    found, details = values(tiny("4-fedavg-5rounds"), tmp_path)
    assert found["bytes_up"] == 2 * once["bytes_up"]
    assert found["bytes_up"] <= details["flower_bytes"] < 1.1 * found["bytes_up"]
    assert [point["round"] for point in details["curve"]] == [0, 1, 2]
    again, _ = values(tiny("4-fedavg-5rounds"), tmp_path)
    assert again == found


def made(method: Combination, top1: float, worst: float, **config: Any) -> Record:
    """A record that was never run."""
    setting = {"split": "dirichlet", "concentration": 0.5} | config.pop("setting", {})
    many = config.pop("models", 4)
    numbers = {"top1": top1, "mean_client": top1, "worst_client": worst, "loss": 1.0}
    numbers |= {"bytes_up": 2.0**20, "bytes_down": 2.0**20}
    numbers |= {"peak_mib": float(many)} if method.align else {}
    one = record(method, numbers, profile="grid", experiment="federated", models=many)
    return one.model_copy(update={"config": {"setting": setting, **config}})


MEAN = Combination("mean", "permute", many=AT_ONCE)
NP = Combination("np_merge", "permute", many=IN_PAIRS)


@pytest.fixture
def some() -> list[Record]:
    once = [
        made(method, top1 + 3 * place, worst, setting={"concentration": concentration, **start})
        for place, concentration in enumerate((0.1, 0.5))
        for start in ({}, {"trunk": 0})
        for method, top1, worst in ((MEAN, 20, 5), (NP, 80, 60), (report.ENSEMBLE, 70, 50))
    ]
    more = [
        made(method, top1, 10, models=8, setting=start)
        for start in ({}, {"trunk": 0})
        for method, top1 in ((MEAN, 10), (NP, 60))
    ]
    rounds = [
        made(
            MEAN,
            50 + 10 * count,
            40,
            setting={"trunk": 0},
            rounds={"strategy": "fedavg", "rounds": count},
        )
        for count in (1, 2)
    ]
    more.append(made(report.BASE, 40, 90))  # at the usual concentration only
    alone = made(report.BASE, 90, 90, setting={"split": None}, models=1)
    return [*once, *more, *rounds, alone]


def test_what_is_told_of_the_records_is_computed_from_them(some: list[Record]) -> None:
    text = report.findings(some)
    assert "all images at one place 90.0 %" in text
    assert (
        "own initial weights: the best merge is NP-P 80.0 % at concentration 0.1 and NP-P 83.0 % at concentration 0.5; "
        "the ensemble has 70.0 % and" in text
    )
    assert "FedAvg 60.0 % and in 2 rounds FedAvg 70.0 %." in text
    table = report.methods_table(some)
    assert table["own", "accuracy"]["NP Merge"] == "83.00"
    assert table["common", "worst client"]["NP-P"] == "60.0"
    assert report.rounds_table(some).loc["FedAvg", "2 rounds"] == "70.00 (40.0)"


@pytest.mark.parametrize("name", ["concentrations", "rounds", "clients", "fairness"])
def test_a_figure_says_in_words_what_it_shows(some: list[Record], name: str) -> None:
    figure = getattr(report, f"plot_{name}")(some)
    said = {
        "concentrations": "best NP-P 83.0 %",
        "rounds": "The best of 1 round: FedAvg 60.0 %, 2 rounds: FedAvg 70.0 %",
        "clients": "From 4 to 8 clients the merge takes Permute 4.0 to 8.0 MiB",
        "fairness": "NP-P has 60.0 % at its worst client",
    }
    assert said[name] in figure.get_label()


def test_records_of_which_some_are_still_to_come_are_shown_as_far_as_they_are(
    some: list[Record],
) -> None:
    plots = [report.plot_concentrations, report.plot_rounds, report.plot_clients]
    for count in range(1, len(some) + 1):
        kept = [*some[-count:]]
        assert report.findings(kept)
        report.methods_table(kept)
        report.rounds_table(kept)
    assert [plot(some[-1:]) for plot in [*plots, report.plot_fairness]] == [None] * 4
    assert [plot(some[:1]) is None for plot in plots] == [False, True, True]
