"""The schedule: one seed of everything first, no base model twice, and nothing that would not end in time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import reports
from tiny import PROFILE

from npmerge.experiments import EXPERIMENTS
from npmerge.experiments.listing import in_order, matching
from npmerge.methods import Combination
from npmerge.run.schedule import Durations, Schedule, Task, Training
from npmerge.run.work import base_models
from npmerge.store.records import Cell, Record
from npmerge.store.zoo import BaseModel

CPU = "CPU (abacus)"


def cells(*names: str, seeds: tuple[int, ...] = (0,), kind: str = "ensemble") -> list[Cell]:
    """The cells of some experiments, one of a kind for each setting and seed."""
    every = [cell for name in names for cell in EXPERIMENTS[name].list(PROFILE, seeds)]
    return [cell for cell in every if cell.name.endswith(kind)]


def bases(cell: Cell) -> list[BaseModel]:
    return base_models(cell)


def record(cell: Cell, seconds: float, device: str = CPU, *base_models: dict[str, Any]) -> Record:
    """A record of a cell that took so long."""
    where = {name: getattr(cell, name) for name in ("experiment", "setting", "name")}
    origin = {
        "device": device, "seconds": float(seconds),
        "base_models": {str(k): made for k, made in enumerate(base_models)},
    }  # fmt: skip
    made = reports.record(Combination("ensemble"), 50.0, origin=origin)
    return made.model_copy(update={"cell": made.cell.model_copy(update=where)})


def trained(seconds: float, device: str = CPU) -> dict[str, Any]:
    """What a record says of a base model."""
    return {"device": device, "seconds": seconds}


def schedule(
    todo: list[Cell],
    *records: Record,
    there: Callable[[BaseModel], bool] = lambda _: False,
    rest: float | None = None,
    **options: Any,
) -> Schedule:
    return Schedule(
        todo,
        bases=bases,
        there=there,
        durations=Durations(records, CPU),
        deadline=None if rest is None else time.monotonic() + rest,
        **options,
    )


def always(_: BaseModel) -> bool:
    return True


def take(plan: Schedule) -> list[Task]:
    """All that can begin side by side."""
    tasks = []
    while task := plan.next():
        tasks.append(task)
    return tasks


def test_the_order_is_seed_by_seed_as_asked_and_then_that_of_the_experiments() -> None:
    todo = cells("same_data", "disjoint_splits", seeds=(0, 2))
    found = [(cell.seed, cell.experiment) for cell in in_order(todo, [2, 0])]
    one = ["same_data", "disjoint_splits", "disjoint_splits"]
    assert found == [(seed, name) for seed in (2, 0) for name in one]


def test_a_profile_may_name_cells_that_come_before_all_others() -> None:
    todo = cells("same_data", "disjoint_splits", seeds=(0, 1))
    first = ["*/seed1/*", "same_data/*", "*-dirichlet/*"]
    found = [cell.label.rsplit("/", 1)[0] for cell in in_order(todo, [0, 1], first)]
    split = "disjoint_splits/digits-resnet20x0.125"
    assert list(dict.fromkeys(found)) == [
        "same_data/digits-vgg11x0.0625/seed1", f"{split}-80-20/seed1", f"{split}-dirichlet/seed1",
        "same_data/digits-vgg11x0.0625/seed0", f"{split}-dirichlet/seed0", f"{split}-80-20/seed0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        (None, 6), ("*", 6), ("disjoint_splits/*dirichlet*", 2), ("*/seed1/*", 3),
        ("same_data/*/ensemble", 2),
    ],
)  # fmt: skip
def test_a_pattern_is_held_against_the_whole_name_below_the_profile(
    pattern: str | None, count: int
) -> None:
    assert len(matching(cells("same_data", "disjoint_splits", seeds=(0, 1)), pattern)) == count


def test_a_pattern_that_matches_nothing_is_an_error_with_a_few_names() -> None:
    names = r"same_data/digits-vgg11x0.0625/seed0/ensemble, .* and 1 more"
    with pytest.raises(ValueError, match=f"no cell matches 'seed0': there are {names}"):
        matching(cells("same_data", seeds=(0, 1, 2, 3)), "seed0")


def test_what_a_cell_takes_is_known_from_its_kind_else_its_setting_experiment_or_device() -> None:
    first, second = cells("disjoint_splits")
    other = cells("disjoint_splits", kind="cca-mean")[0]
    assert Durations([], CPU).of(first) is None
    known = [record(first, 10), record(first, 20), record(second, 60), record(first, 9e8, "H")]
    durations = Durations(known, CPU)
    assert durations.of(first) == 15
    assert durations.of(second) == 60
    assert durations.of(other) == 15  # its setting's
    assert durations.of(cells("data_size")[0]) == 30
    same = record(cells("same_data")[0], 7)
    assert Durations([same, record(first, 10)], CPU).of(second) == 10  # its experiment's
    assert Durations(known, "another").of(first) is None


def test_what_a_base_model_takes_is_known_from_those_that_were_trained_on_the_device() -> None:
    cell = cells("disjoint_splits")[0]
    assert Durations([record(cell, 10)], CPU).of_base_model(cell) is None
    known = record(cell, 10, CPU, trained(3.0), trained(5.0), trained(900.0, "H"), {})
    durations = Durations([known], CPU)
    assert durations.of_base_model(cell) == 4
    assert durations.of_base_model(cells("same_data")[0]) == 4


def test_base_models_that_cells_share_are_trained_once_and_before_them() -> None:
    _, dirichlet = cells("disjoint_splits")
    sizes = cells("data_size")
    plan = schedule([dirichlet, *sizes])
    trainings = take(plan)
    assert [task.base for task in trainings if isinstance(task, Training)] == bases(dirichlet)
    assert len(trainings) == 2
    plan.done(trainings[0], 4.0)
    assert take(plan) == []  # every cell waits for the other one
    plan.done(trainings[1], 6.0)
    assert take(plan) == [dirichlet, *sizes]
    assert plan.left == []


def test_a_cell_that_waits_for_base_models_keeps_no_other_from_beginning() -> None:
    same, split = cells("same_data")[0], cells("disjoint_splits")[0]
    ready = bases(split)
    *trainings, last = take(schedule([same, split], there=lambda base: base in ready))
    assert [type(task) for task in trainings] == [Training, Training]
    assert last == split


def test_what_another_command_is_at_is_left_until_there_is_nothing_else() -> None:
    first, second = cells("disjoint_splits")
    plan = schedule([first, second], there=always, busy=lambda task: task == first)
    assert take(plan) == [second, first]
    waiting = bases(first)[0]
    plan = schedule([first], busy=lambda task: isinstance(task, Training) and task.base == waiting)
    found = [task.base for task in take(plan) if isinstance(task, Training)]
    assert found == [bases(first)[1], waiting]


def test_without_its_base_model_a_cell_is_dropped_and_nothing_is_trained_for_it() -> None:
    same, split, size = cells("same_data")[0], cells("disjoint_splits")[1], cells("data_size")[0]
    plan = schedule([split, same, size])
    training = plan.next()
    assert isinstance(training, Training)
    plan.done(training, None)
    assert plan.drop(training.base) == [split, size]
    assert plan.left == [same]
    assert [task.base for task in take(plan) if isinstance(task, Training)] == bases(same)


def test_what_would_not_end_in_time_does_not_begin_and_what_would_does() -> None:
    long, short = cells("disjoint_splits")
    known = (record(long, 100), record(short, 10))
    plan = schedule([long, short], *known, there=always, rest=50)
    assert take(plan) == [short]
    assert plan.left == [long]
    assert take(schedule([long, short], *known, there=always, rest=500)) == [long, short]
    slow = record(long, 1, CPU, trained(100.0))
    assert take(schedule([long], slow, rest=50)) == []


def test_what_nobody_knows_the_time_of_begins_while_there_is_some() -> None:
    todo = cells("disjoint_splits")
    assert take(schedule(todo, there=always, rest=50)) == todo
    assert take(schedule(todo, there=always, rest=0)) == []
    assert take(schedule(todo, rest=0)) == []


def test_a_run_learns_how_long_things_take_while_it_goes() -> None:
    todo = cells("same_data", seeds=(0, 1))
    plan = schedule(todo, there=always, rest=50)
    first = plan.next()
    assert first == todo[0]
    plan.done(first, 60.0)
    assert plan.next() is None
    plan = schedule(todo, rest=50)
    first = plan.next()
    assert isinstance(first, Training)
    plan.done(first, 60.0)
    assert plan.next() is None


def test_nothing_is_learnt_from_what_failed() -> None:
    first, second = cells("disjoint_splits")
    plan = schedule([first, second], there=always, rest=50)
    assert plan.next() == first
    plan.done(first, None)
    assert plan.next() == second
    assert plan.expected() == 0


def test_a_cell_that_measures_time_comes_last_and_has_nothing_beside_it() -> None:
    same, (first, second) = cells("same_data")[0], cells("disjoint_splits")
    plan = schedule([same, first, second], there=always, alone=lambda cell: cell != second)
    assert take(plan) == [second]
    plan.done(second, 1.0)
    assert take(plan) == [same]
    plan.done(same, 1.0)
    assert take(plan) == [first]


def test_what_the_rest_takes_counts_shared_base_models_once() -> None:
    _, dirichlet = cells("disjoint_splits")
    size = cells("data_size")[0]
    known = record(dirichlet, 10, CPU, trained(3.0))
    assert schedule([dirichlet, size], known).expected() == 26
    assert schedule([dirichlet, size], known, there=always).expected() == 20
    assert schedule([dirichlet]).expected() is None
    assert schedule([]).expected() == 0
