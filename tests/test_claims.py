"""The paper's numbers and the verdicts on its claims."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
from reports import AS_TRAINED, BASE, ENSEMBLE, TABLE, record, records
from scipy import stats

from npmerge import experiments
from npmerge.experiments import EXPERIMENTS, load_profile
from npmerge.methods import Combination
from npmerge.report.claims import (
    CCA,
    CLAIMS,
    HALF_GAP,
    NP_P,
    NP_WM,
    PERMUTE,
    Claim,
    Midpoint,
    judge,
    verdicts,
)
from npmerge.report.margins import paired_margin
from npmerge.report.numbers import (
    Place,
    by_method,
    combination,
    paper_numbers,
    paper_summary,
    shown,
    summary,
)
from npmerge.store.records import table

X, Y, Z, W = TABLE[2:6]
BETTER = Claim("IV", "x beats y", (X,), (Y,))
HERE = {"experiment": "same_data", "split": None}


def found(*columns: list[float]) -> dict[Combination, pd.Series[float]]:
    return dict(zip((X, Y, Z, W), map(pd.Series, columns), strict=False))


def test_the_paper_has_90_numbers_of_methods_that_are_registered() -> None:
    rows = paper_numbers()
    assert len(rows) == 90
    assert rows["table"].value_counts().to_dict() == {"I": 20, "II": 20, "III": 20, "IV": 30}
    known = {combination(row) for row in rows.to_dict("records")}
    assert known == {method for method in TABLE if not method.tuned}
    assert rows["mean"].between(0, 100).all()
    assert not rows.drop(columns=["mean", "std"]).duplicated().any()


def test_numbers_read_off_the_paper_s_tables() -> None:
    first, second, third, fourth = map(paper_summary, ("I", "II", "III", "IV"))
    assert first[Place("cifar100", "resnet20x1")][NP_P] == (62.88, 0.11)
    assert first[Place("cifar10", "vgg11x1")][PERMUTE] == (54.39, 6.45)
    assert second[Place("cifar100", "resnet20x8", "80-20")][ENSEMBLE] == (77.84, 0.23)
    assert third[Place("imagenet200", "resnet18x4", "dirichlet")][ENSEMBLE][0] == 75.96
    few = Place("cifar100", "resnet20x8", "dirichlet", examples=1)
    assert fourth[few][PERMUTE] == (54.20, 0.26)
    assert paper_summary("V") == {}


def test_every_claim_is_of_an_experiment_and_compares_registered_methods() -> None:
    assert set(CLAIMS) < set(EXPERIMENTS)
    for each in CLAIMS.values():
        for claim in each:
            assert claim.text
            for side in (*claim.better, *claim.worse):
                ends = (side.low, side.high) if isinstance(side, Midpoint) else (side,)
                assert all(end.label for end in ends)


@pytest.mark.parametrize(
    ("x", "status"),
    [
        ([3.0, 2.0, 2.5], "reproduced"),
        ([0.0, 0.5, 0.2], "not reproduced"),
        ([0.0, 2.0, 1.5], "inconclusive"),
        ([0.0, 2.0, 0.5], "inconclusive"),
        ([9.0, 1.1, 1.2], "inconclusive"),  # ahead in every seed, by less than it is sure of
        ([1.0, 1.0, 1.0], "inconclusive"),
        ([3.0, 2.9], "2 seeds: not judged"),
        ([3.0], "1 seed: not judged"),
        ([3.0, 2.0, float("nan")], "2 seeds: not judged"),
        ([float("nan")], "not run"),
    ],
)
def test_a_claim_is_judged_by_three_seeds_whose_interval_leaves_out_zero(
    x: list[float], status: str
) -> None:
    assert judge(BETTER, found(x, [1.0] * len(x)))[0] == status


def test_seeds_are_compared_in_pairs() -> None:
    """A method that is one point ahead in every seed is ahead, however far the seeds are apart."""
    y = [10.0, 50.0, 90.0]
    assert judge(BETTER, found([11.0, 51.1, 90.9], y))[0] == "reproduced"
    assert judge(BETTER, found([90.9, 11.0, 51.1], y))[0] == "inconclusive"


def test_the_interval_is_student_s() -> None:
    values = pd.Series([1.0, 2.0, 4.0])
    margin = paired_margin(values)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (margin.low, margin.high) == (pytest.approx(low), pytest.approx(high))
    assert margin.text == "+2.3 ± 3.8 (3 seeds)"
    assert paired_margin(values[:1]).text == "+1.0 (1 seed)"


@pytest.mark.parametrize(
    ("x", "status"),
    [([3.0, 2.6], "ahead by 1.8"), ([-3.0] * 3, "behind by 4.0"), ([1.01], "level")],
)
def test_a_demonstration_shows_margins_and_gives_no_verdict(x: list[float], status: str) -> None:
    status_found, evidence = judge(BETTER, found(x, [1.0] * len(x)), demonstration=True)
    assert status_found == f"demonstration: {status}"
    assert "Direct averaging" in evidence
    assert judge(BETTER, found([1.0] * 3), demonstration=True) == ("not run", "")


def test_what_a_demonstration_is_stands_in_its_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {NP_P: [90.0, 91.0, 92.0], NP_WM: [90.0, 91.0, 92.0], CCA: [50.0, 51.0, 52.0]}

    def said(profile: str) -> set[str]:
        return {v.status for v in verdicts(records(values, profile=profile, **HERE))}

    assert said("digits") == {"demonstration: ahead by 40.0", "not run"}
    assert said("short") == {"reproduced", "not run"}
    short = load_profile("short").model_copy(update={"demonstration": True})
    monkeypatch.setattr(experiments, "load_profile", lambda _: short)
    assert said("short") == {"demonstration: ahead by 40.0", "not run"}


def test_a_claim_without_its_numbers_is_not_run() -> None:
    assert judge(BETTER, found([1.0] * 3)) == ("not run", "")
    assert judge(Claim("IV", "", (X,), (Y, Z)), found([1.0] * 3, [0.0] * 3))[0] == "not run"
    assert judge(Claim("IV", "", (X,), (HALF_GAP,)), found([1.0] * 3, [0.0] * 3))[0] == "not run"


def test_the_evidence_is_the_comparison_that_decides() -> None:
    claim = Claim("IV", "x beats y and z", (X,), (Y, Z))
    minus = "Direct averaging \N{MINUS SIGN}"
    x = [5.0, 5.0, 5.0]
    close, sure = [4.0, 4.1, 4.2], [1.0, 1.0, 1.0]
    assert judge(claim, found(x, sure, close)) == (
        "reproduced", f"{minus} Weight Matching: +0.9 ± 0.2 (3 seeds)",
    )  # fmt: skip
    unsure = [-9.0, 0.0, 4.0]  # further behind than the other, but not by more than chance
    assert judge(claim, found(x, unsure, close))[0] == "inconclusive"
    assert f"{minus} Permute" in judge(claim, found(x, unsure, close))[1]
    assert judge(claim, found(x, unsure, [5.5, 5.6, 5.7])) == (
        "not reproduced", f"{minus} Weight Matching: \N{MINUS SIGN}0.6 ± 0.2 (3 seeds)",
    )  # fmt: skip
    assert judge(claim, found(x[:1], [3.0], [4.0]))[1] == f"{minus} Weight Matching: +1.0 (1 seed)"


def test_as_many_better_as_worse_methods_are_compared_one_to_one() -> None:
    """x beats its own baseline and z its own; x against z's baseline is not asked."""
    rows = found([2.0] * 3, [1.0] * 3, [9.0] * 3, [8.0] * 3)
    assert judge(Claim("IV", "each beats its own", (X, Z), (Y, W)), rows)[0] == "reproduced"
    each_all = Claim("IV", "each beats all", (X, Z), (Y, W, W))
    assert judge(each_all, rows)[0] == "not reproduced"


def test_one_failed_comparison_fails_the_claim() -> None:
    claim = Claim("IV", "x beats y and z", (X,), (Y, Z))
    assert judge(claim, found([2.0] * 3, [1.0] * 3, [2.5] * 3))[0] == "not reproduced"


def test_the_middle_is_half_way_between_permute_and_the_ensemble() -> None:
    claim = Claim("IV", "half of the gap", (NP_P,), (HALF_GAP,))
    values = {NP_P: [26.0] * 3, PERMUTE: [10.0, 20.0, 15.0], ENSEMBLE: [30.0] * 3}
    rows = {method: pd.Series(each) for method, each in values.items()}
    assert judge(claim, rows)[1].startswith("NP-P \N{MINUS SIGN} half-way to the ensemble: +3.5 ±")


def test_verdicts_come_for_every_claim_and_setting() -> None:
    values = {method: [50.0, 51.0, 52.0] for method in TABLE}
    values |= {NP_P: [90.0, 91.0, 92.0], NP_WM: [90.0, 91.0, 92.0]}
    both = records(values, **HERE) + records(values, dataset="cifar10", **HERE)
    found_verdicts = verdicts(both)
    assert len(found_verdicts) == 2 * len(CLAIMS["same_data"])
    assert {v.place for v in found_verdicts} == {"resnet20x1, cifar100", "resnet20x1, cifar10"}
    assert found_verdicts[0].status == "reproduced"
    assert verdicts(records({X: [1.0, 2.0]}, **HERE))[0].status == "not run"


@pytest.mark.parametrize("name", CLAIMS)
def test_cca_stands_in_claims_of_its_own(name: str) -> None:
    for claim in CLAIMS[name]:
        rivals = {side.align for side in claim.worse if isinstance(side, Combination)}
        assert rivals == {"cca"} or "cca" not in rivals


@pytest.mark.parametrize("name", CLAIMS)
def test_no_claim_gives_one_side_a_tuning_that_the_other_has_not(name: str) -> None:
    for claim in CLAIMS[name]:
        for better, worse in claim.pairs:
            if isinstance(worse, Combination) and worse.tuned:
                assert isinstance(better, Combination)
                assert better == replace(worse, aggregate="np_merge")


def test_an_experiment_without_claims_has_no_verdicts() -> None:
    assert verdicts(records({NP_P: [1.0, 2.0], X: [0.0, 1.0]}, experiment="cost")) == []


@pytest.mark.parametrize(
    ("method", "ours"),
    [
        (Combination("finetune", "identity"), "NP-P and NP-WM beat"),
        (Combination("mean", "permute", correct=None), "NP-P beats"),
    ],
)
def test_a_method_that_no_claim_names_is_held_against_np_merge(
    method: Combination, ours: str
) -> None:
    values = {one: [50.0, 51.0, 52.0] for one in (*TABLE, AS_TRAINED)} | {method: [10.0] * 3}
    *known, last = verdicts(records(values, **HERE))
    assert len(known) == len(CLAIMS["same_data"])
    assert last.claim.text == f"{ours} {method.label}"
    assert (last.claim.section, last.status) == ("ours", "reproduced")


def test_splits_and_numbers_of_examples_are_places_of_their_own() -> None:
    values = {m: [3.0, 4.0, 5.0] if m.family == "np" else [1.0, 2.0, 3.0] for m in TABLE}
    found_verdicts = verdicts(
        [
            one
            for examples in ("all", 5)
            for one in records(values, experiment="data_size", examples=examples)
        ]
    )
    assert {v.place for v in found_verdicts} == {
        "resnet20x1, cifar100, Dirichlet, all images",
        "resnet20x1, cifar100, Dirichlet, 5 a class",
    }
    assert {v.status for v in found_verdicts} == {"reproduced"}


def test_the_number_of_models_is_a_place_of_its_own() -> None:
    where = {"experiment": "many_models", "split": None}
    many = {
        replace(method, many="tournament" if method.family == "np" else "all_to_one"): [value] * 3
        for method, value in zip(TABLE, range(len(TABLE)), strict=True)
        if not method.tuned
    }
    two, four = (records(many, models=count, **where) for count in (2, 4))
    assert {v.place for v in verdicts(two + four)} == {
        "resnet20x1, cifar100, 2 models",
        "resnet20x1, cifar100, 4 models",
    }
    assert verdicts(two)[0].claim.text == "NP-P and NP-WM in a tournament beat Permute, all to one"
    assert verdicts(two)[0].status == "reproduced"


def test_numbers_of_one_metric_stand_side_by_side_in_the_registry_s_order() -> None:
    kept = table(records({PERMUTE: [10.0, 20.0], ENSEMBLE: [30.0]}))
    (here,) = by_method(kept).values()
    assert list(here) == [ENSEMBLE, PERMUTE]
    assert here[PERMUTE].to_list() == [10.0, 20.0]
    assert here[ENSEMBLE].isna().to_list() == [False, True]
    assert next(iter(by_method(kept, "loss").values()))[PERMUTE].to_list() == [1.0, 1.0]


def test_two_numbers_for_one_thing_are_refused() -> None:
    twice = [record(PERMUTE, 1.0), record(PERMUTE, 2.0, profile="paper")]
    with pytest.raises(ValueError, match="two numbers for Permute"):
        by_method(table(twice))


def test_a_summary_leaves_out_base_models_as_they_were_trained() -> None:
    kept = table(records({method: [1.0, 3.0] for method in (AS_TRAINED, *TABLE)}))
    (here,) = summary(kept).values()
    assert set(here) == set(TABLE)
    assert here[BASE] == (2.0, pytest.approx(2**0.5))
    assert shown(BASE)
    assert not shown(AS_TRAINED)
    assert summary(table([])) == {}
