"""What the experiment on cost measures, and how memory is counted."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from tiny import DIRICHLET, OPTIMISATION, PROFILE, loader, net

from npmerge.catalogue import profile_names
from npmerge.experiments import EXPERIMENTS, load_profile
from npmerge.memory import allocated
from npmerge.models import build
from npmerge.run.costs import AVERAGE, FINETUNE, NP, measure
from npmerge.run.work import Bench, base_models, do_cell
from npmerge.store.records import Cell, Outcome, Row
from npmerge.store.zoo import Zoo

CPU = torch.device("cpu")
EPOCHS = 2
METHODS = (AVERAGE, FINETUNE, NP)
SETTINGS = [DIRICHLET | {"split": None, "width": width} for width in (0.25, 0.125)]
OPTIONS = OPTIMISATION | {
    "options": {name: {"epochs": EPOCHS} for name in ("np_merge", "finetune")}
}
TINY = PROFILE.model_copy(
    update={
        "sections": {
            "same_data": {"settings": SETTINGS, "optimisation": OPTIONS},
            "cost": {
                "settings": SETTINGS, "optimisation": OPTIONS, "epochs": EPOCHS, "counts": [2, 3],
            },
        }
    }
)  # fmt: skip
CELLS = EXPERIMENTS["cost"].list(TINY, [0])


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench.at(Zoo(tmp_path_factory.mktemp("zoo")), CPU)


@pytest.fixture(scope="module")
def pairs(bench: Bench) -> dict[float, Outcome]:
    """What was measured of the pair of each width."""
    return {
        cell.config["setting"]["width"]: measure(cell, bench)
        for cell in CELLS
        if cell.name == "pair"
    }


def values(outcome: Outcome) -> dict[tuple[str, str], float]:
    rows = [row for row in outcome.rows if isinstance(row, Row)]
    assert len(rows) == len(outcome.rows)
    return {(row.aggregate, row.metric): row.value for row in rows}


def size(width: float) -> int:
    model = build("resnet20", 10, width=width, in_channels=1, image_size=4, seed=0)
    return sum(p.numel() for p in model.parameters())


def test_every_method_has_its_costs_and_its_accuracy(pairs: dict[float, Outcome]) -> None:
    common = {"top1", "loss", "seconds", "parameters", "held_mib", "peak_mib"}
    for outcome in pairs.values():
        wanted = {(method, metric) for method in METHODS for metric in common}
        wanted |= {(method, "seconds_per_epoch") for method in (NP, FINETUNE)}
        assert set(values(outcome)) == wanted
        assert all(value >= 0 for value in values(outcome).values())


def test_np_merge_optimises_as_many_numbers_as_fine_tuning_and_averaging_none(
    pairs: dict[float, Outcome],
) -> None:
    for width, outcome in pairs.items():
        found = values(outcome)
        assert [found[method, "parameters"] for method in METHODS] == [0, size(width), size(width)]


def test_np_merge_holds_three_parameter_sized_buffers_more_than_fine_tuning(
    pairs: dict[float, Outcome],
) -> None:
    """Four for fine-tuning: weights, gradient, two moments. One for averaging: the model."""
    for width, outcome in pairs.items():
        mib, found = 4 * size(width) / 2**20, values(outcome)
        held = {method: found[method, "held_mib"] for method in METHODS}
        assert held[NP] - held[FINETUNE] == pytest.approx(3 * mib, rel=0.02)
        assert 4 * mib < held[FINETUNE] < 4.5 * mib
        assert mib < held[AVERAGE] < 1.5 * mib
        assert all(found[method, "peak_mib"] > held[method] for method in METHODS)


def test_both_curves_start_at_the_average_and_end_at_the_recorded_accuracy(
    pairs: dict[float, Outcome],
) -> None:
    for outcome in pairs.values():
        found, curves = values(outcome), outcome.details["curves"]
        for method in (NP, FINETUNE):
            points = curves[method]
            assert [point["epoch"] for point in points] == list(range(EPOCHS + 1))
            for point, source in ((points[0], AVERAGE), (points[-1], method)):
                for metric in ("top1", "loss", "seconds"):
                    assert point[metric] == found[source, metric]
            spent = outcome.details["epochs"][method]
            steps = [b["seconds"] - a["seconds"] for a, b in pairwise(points)]
            assert steps == pytest.approx(spent)
            assert found[method, "seconds_per_epoch"] == spent[-1]  # the first is left out


def test_the_merged_models_are_those_of_same_data(
    bench: Bench, pairs: dict[float, Outcome]
) -> None:
    cells = {
        cell.name: cell
        for cell in EXPERIMENTS["same_data"].list(TINY, [0])
        if cell.config["setting"]["width"] == SETTINGS[0]["width"]
    }
    ours = values(pairs[0.25])
    for method in METHODS:
        theirs = values(do_cell(cells[f"permute-{method}"], bench))
        assert ours[method, "loss"] == pytest.approx(theirs[method, "loss"], rel=1e-4)


def test_tournaments_are_measured_at_the_narrowest_width_and_need_no_more_memory(
    bench: Bench,
) -> None:
    cells = [cell for cell in CELLS if cell.name != "pair"]
    assert {cell.config["setting"]["width"] for cell in cells} == {0.125}
    found = {cell.config["copies"]: values(measure(cell, bench)) for cell in cells}
    assert [found[count][NP, "merges"] for count in (2, 3)] == [1, 2]
    two, three = (found[count][NP, "peak_mib"] for count in (2, 3))
    assert three == pytest.approx(two, rel=0.05)


def test_cells_are_every_width_with_as_many_seeds_as_the_profile_says() -> None:
    def seeds(limit: int | None) -> list[int]:
        section = TINY.sections["cost"] | {"seeds": limit, "counts": []}
        profile = TINY.model_copy(update={"sections": {"cost": section}})
        return [cell.seed for cell in EXPERIMENTS["cost"].list(profile, [3, 1])]

    assert seeds(None) == [3, 1, 3, 1]
    assert seeds(1) == [3, 3]


@pytest.mark.parametrize(
    "name", [name for name in profile_names() if EXPERIMENTS["cost"].parameters(load_profile(name))]
)
def test_one_width_of_each_profile_shares_the_base_models_of_same_data(name: str) -> None:
    def bases(cells: list[Cell]) -> set[str]:
        return {base.name for cell in cells for base in base_models(cell)}

    profile = load_profile(name)
    ours, theirs = (bases(EXPERIMENTS[e].list(profile, [0])) for e in ("cost", "same_data"))
    assert len(ours & theirs) == 2
    widths = {cell.config["setting"]["width"] for cell in EXPERIMENTS["cost"].list(profile, [0])}
    assert len(widths) > 1


def test_memory_counts_what_is_held_and_what_was_there_at_one_time() -> None:
    def work() -> torch.Tensor:
        for _ in range(3):
            torch.zeros(1000, dtype=torch.uint8)  # one after the other
        first, second = (torch.zeros(2000, dtype=torch.uint8) for _ in range(2))
        return (first + second)[:1]  # a view keeps the whole

    there = torch.zeros(5000)
    used = allocated(work, CPU)
    assert used.held == 2000
    assert used.peak == 6000
    assert len(there) == 5000


def test_memory_of_a_model_is_that_of_its_tensors() -> None:
    model = net()
    state = model.state_dict().values()
    used = allocated(lambda: net(), CPU)
    assert used.held == sum(tensor.nbytes for tensor in state)
    batch = loader()[0][0]
    assert allocated(lambda: model(batch), CPU).peak > batch.nbytes
