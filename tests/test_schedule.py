"""The schedule: one seed of everything first, no base model twice, and nothing that would not end in time."""

from __future__ import annotations

import time
from typing import Any

import pytest
from tiny import PROFILE

from npmerge.experiments import EXPERIMENTS
from npmerge.experiments.schedule import Durations, Schedule, Training, in_order, matching
from npmerge.results import Unit

CPU = "CPU (abacus)"


def units(*names: str, seeds: tuple[int, ...] = (0,)) -> list[Unit]:
    return [unit for name in names for unit in EXPERIMENTS[name].units(PROFILE, seeds)]


def content(unit: Unit, seconds: float, device: str = CPU, **more: Any) -> dict[str, Any]:
    return {
        "unit": {"experiment": unit.experiment, "setting": unit.setting},
        "provenance": {"device": device, "seconds": seconds} | more,
    }


def schedule(
    todo: list[Unit],
    *contents: dict[str, Any],
    trained: bool = False,
    rest: float | None = None,
    **options: Any,
) -> Schedule:
    return Schedule(
        todo,
        bases=lambda unit: EXPERIMENTS[unit.experiment].base_models(unit),
        there=lambda _: trained,
        durations=Durations(contents, CPU),
        deadline=None if rest is None else time.monotonic() + rest,
        **options,
    )


def take(plan: Schedule) -> list[Unit | Training]:
    """All that can begin side by side."""
    tasks = []
    while task := plan.next():
        tasks.append(task)
    return tasks


def test_the_order_is_seed_by_seed_as_asked_and_then_that_of_the_experiments() -> None:
    todo = units("same_data", "disjoint_splits", seeds=(2, 0))
    found = [(unit.seed, unit.experiment) for unit in in_order(todo, [2, 0])]
    one = ["same_data", "disjoint_splits", "disjoint_splits"]
    assert found == [(seed, name) for seed in (2, 0) for name in one]


@pytest.mark.parametrize(
    ("pattern", "count"),
    [(None, 6), ("*", 6), ("disjoint_splits/*dirichlet*", 2), ("*seed1", 3), ("same_data/*0", 1)],
)
def test_a_pattern_is_held_against_the_whole_name_below_the_profile(
    pattern: str | None, count: int
) -> None:
    assert len(matching(units("same_data", "disjoint_splits", seeds=(0, 1)), pattern)) == count


def test_a_pattern_that_matches_nothing_is_an_error_with_a_few_names() -> None:
    names = r"same_data/digits-vgg11x0.0625-seed0, .* and 1 more"
    with pytest.raises(ValueError, match=f"no unit matches 'seed0': there are {names}"):
        matching(units("same_data", seeds=(0, 1, 2, 3)), "seed0")


def test_what_a_unit_takes_is_known_from_its_setting_else_its_experiment_else_any_on_the_device() -> (
    None
):
    first, second = units("disjoint_splits")
    other = units("same_data")[0]
    assert Durations([], CPU).of(first) is None
    known = [content(first, 10), content(first, 20), content(second, 60), content(first, 9e9, "H")]
    durations = Durations(known, CPU)
    assert durations.of(first) == 15
    assert durations.of(second) == 60
    assert durations.of(units("data_size")[0]) == 30
    assert Durations([content(other, 7), content(first, 10)], CPU).of(second) == 10
    assert Durations(known, "another").of(first) is None
    assert durations.of_base_model(first) is None
    bases = {"base_models": {"trained": 2, "seconds": 8.0}}
    none = {"base_models": {"trained": 0, "seconds": 0.0}}
    durations = Durations([content(first, 10, **bases), content(first, 10, **none)], CPU)
    assert durations.of_base_model(other) == 4


def test_base_models_that_units_share_are_trained_once_and_before_them() -> None:
    _, dirichlet = units("disjoint_splits")
    sizes = units("data_size")
    plan = schedule([dirichlet, *sizes])
    trainings = take(plan)
    assert all(isinstance(task, Training) for task in trainings)
    addresses = [base.address for t in trainings if isinstance(t, Training) for base in t.bases]
    assert len(addresses) == len(set(addresses)) == 2
    plan.done(trainings[0], 4.0)
    assert take(plan) == []  # every unit waits for the other one
    plan.done(trainings[1], 6.0)
    assert take(plan) == [dirichlet, *sizes]
    assert plan.left == []
    assert plan.trained(sizes[0]) == {"trained": 2, "seconds": 10.0}


def test_a_unit_that_waits_for_base_models_keeps_no_other_from_beginning() -> None:
    same, split = units("same_data")[0], units("disjoint_splits")[0]
    ready = {base.address for base in EXPERIMENTS["disjoint_splits"].base_models(split)}
    plan = Schedule(
        [same, split],
        bases=lambda unit: EXPERIMENTS[unit.experiment].base_models(unit),
        there=lambda base: base.address in ready,
        durations=Durations([], CPU),
    )
    *trainings, last = take(plan)
    assert [type(task) for task in trainings] == [Training, Training]
    assert last == split


def test_together_all_seeds_of_a_setting_are_one_training_cut_to_what_fits() -> None:
    todo = units("same_data", seeds=(0, 1, 2))
    (training,) = take(schedule(todo, together=True))
    assert isinstance(training, Training)
    assert [base.seed for base in training.bases] == [0, 1, 10, 11, 20, 21]
    known = content(todo[0], 1, base_models={"trained": 1, "seconds": 10.0})
    plan = schedule(todo, known, together=True, rest=35)
    training = take(plan)[0]
    assert isinstance(training, Training)
    assert [base.seed for base in training.bases] == [0, 1, 10]


def test_what_would_not_end_in_time_does_not_begin_and_what_would_does() -> None:
    long, short = units("disjoint_splits")
    plan = schedule([long, short], content(long, 100), content(short, 10), trained=True, rest=50)
    assert take(plan) == [short]
    assert plan.left == [long]
    plan = schedule([long, short], content(long, 100), content(short, 10), trained=True, rest=500)
    assert take(plan) == [long, short]


def test_what_nobody_knows_the_time_of_begins_while_there_is_some() -> None:
    todo = units("disjoint_splits")
    assert take(schedule(todo, trained=True, rest=50)) == todo
    assert take(schedule(todo, trained=True, rest=0)) == []
    assert take(schedule(todo, rest=0)) == []


def test_a_run_learns_how_long_things_take_while_it_goes() -> None:
    todo = units("same_data", seeds=(0, 1))
    plan = schedule(todo, trained=True, rest=50)
    first = plan.next()
    assert first == todo[0]
    plan.done(first, 60.0)
    assert plan.next() is None
    plan = schedule(todo, rest=50)
    first = plan.next()
    assert isinstance(first, Training)
    plan.done(first, 60.0)
    assert plan.next() is None


def test_a_unit_that_measures_time_has_nothing_beside_it() -> None:
    same, (first, second) = units("same_data")[0], units("disjoint_splits")
    plan = schedule([same, first, second], trained=True, alone=lambda unit: unit == first)
    assert take(plan) == [same]
    plan.done(same, 1.0)
    assert take(plan) == [first]
    plan.done(first, 1.0)
    assert take(plan) == [second]


def test_what_the_rest_takes_counts_shared_base_models_once() -> None:
    _, dirichlet = units("disjoint_splits")
    size = units("data_size")[0]
    known = content(dirichlet, 10, base_models={"trained": 1, "seconds": 3.0})
    assert schedule([dirichlet, size], known).expected() == 26
    assert schedule([dirichlet, size], known, trained=True).expected() == 20
    assert schedule([dirichlet]).expected() is None
    assert schedule([]).expected() == 0
