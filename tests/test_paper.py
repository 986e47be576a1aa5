"""The paper's numbers and the verdicts on its claims."""

from __future__ import annotations

import pandas as pd
import pytest

from npmerge.experiments import EXPERIMENTS
from npmerge.paper import (
    CLAIMS,
    METHODS,
    Claim,
    judge,
    label,
    numbers,
    scores,
    verdicts,
)
from npmerge.results import COLUMNS

BETTER = Claim("IV", "x beats y", ("x",), ("y",))


def found(**values: list[float]) -> pd.DataFrame:
    return pd.DataFrame(values)


def records(values: dict[str, list[float]], dataset: str = "digits") -> pd.DataFrame:
    rows = [
        {"table": "I", "dataset": dataset, "model": "vgg11x1", "setting": "same", "method": method,
         "examples_per_class": None, "metric": "top1", "value": value, "seed": seed}
        for method, list_ in values.items() for seed, value in enumerate(list_)
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=[*COLUMNS, "seed"])


def test_the_paper_has_90_numbers_with_known_methods() -> None:
    rows = numbers()
    assert len(rows) == 90
    assert rows["table"].value_counts().to_dict() == {"I": 20, "II": 20, "III": 20, "IV": 30}
    ours = {method for method, text in METHODS.items() if "(ours)" in text}
    assert set(rows["method"]) == set(METHODS) - ours
    assert rows["mean"].between(0, 100).all()
    assert not rows.duplicated(
        ["table", "dataset", "setting", "method", "examples_per_class", "metric"]
    ).any()


def test_numbers_read_off_the_paper_s_tables() -> None:
    rows = numbers().rename(columns={"mean": "value"}).assign(seed="mean")
    wide = scores(rows[rows["table"].isin(["I", "II", "III"])][[*COLUMNS, "seed"]])
    row = wide.loc[("cifar100", "resnet20x1", "same", "", "mean")]
    assert row["np_permute"] == 62.88
    assert row["half_gap"] == pytest.approx((28.76 + 73.51) / 2)
    assert wide.loc[("cifar10", "vgg11x1", "same", "", "mean"), "permute"] == 54.39
    assert wide.loc[("imagenet200", "resnet18x4", "dirichlet", "", "mean"), "ensemble"] == 75.96


def test_every_claim_compares_methods_that_there_are() -> None:
    assert set(CLAIMS) == set(EXPERIMENTS)
    for claims in CLAIMS.values():
        for claim in claims:
            assert set(claim.better + claim.worse) <= set(METHODS) | {"half_gap"}
            assert claim.text


@pytest.mark.parametrize(
    ("x", "y", "status"),
    [
        ([3.0, 2.0], [1.0, 1.0], "reproduced"),
        ([0.0, 1.0], [1.0, 1.0], "not reproduced"),
        ([0.0, 2.0], [1.0, 1.0], "inconclusive"),
        ([3.0], [1.0], "inconclusive"),
        ([3.0, float("nan")], [1.0, 1.0], "not run"),
    ],
)
def test_a_claim_is_judged_by_every_seed(x: list[float], y: list[float], status: str) -> None:
    assert judge(BETTER, found(x=x, y=y))[0] == status


def test_a_claim_without_its_numbers_is_not_run() -> None:
    assert judge(BETTER, found(x=[1.0, 2.0])) == ("not run", "")
    assert (
        judge(Claim("IV", "", ("x",), ("y", "z")), found(x=[1.0] * 2, y=[0.0] * 2))[0] == "not run"
    )


def test_the_evidence_is_the_tightest_comparison() -> None:
    claim = Claim("IV", "x beats permute and cca", ("np_permute",), ("permute", "cca"))
    status, evidence = judge(
        claim, found(np_permute=[5.0, 5.0], permute=[1.0, 1.0], cca=[4.0, 4.5])
    )
    assert status == "reproduced"
    assert evidence == "NP-P \N{MINUS SIGN} CCA Merge: +0.8"
    assert "one seed" in judge(BETTER, found(x=[2.0], y=[1.0]))[1]
    assert "seeds disagree" in judge(BETTER, found(x=[0.0, 2.0], y=[1.0, 1.0]))[1]


def test_as_many_better_as_worse_methods_are_compared_one_to_one() -> None:
    """x beats its own baseline and z its own; x against z's baseline is not asked."""
    claim = Claim("IV", "each beats its own", ("x", "z"), ("y", "w"))
    rows = found(x=[2.0, 2.0], y=[1.0, 1.0], z=[9.0, 9.0], w=[8.0, 8.0])
    assert judge(claim, rows)[0] == "reproduced"
    each_all = Claim("IV", "each beats all", ("x", "z"), ("y", "w", "w"))
    assert judge(each_all, rows)[0] == "not reproduced"


def test_one_failed_comparison_fails_the_claim() -> None:
    claim = Claim("IV", "x beats y and z", ("x",), ("y", "z"))
    assert judge(claim, found(x=[2.0] * 3, y=[1.0] * 3, z=[2.5] * 3))[0] == "not reproduced"


def test_verdicts_come_for_every_claim_and_setting() -> None:
    values = {method: [50.0, 51.0] for method in METHODS} | {"np_permute": [90.0, 91.0]}
    both = pd.concat([records(values), records(values, "cifar10")])
    found_verdicts = verdicts("same_data", both)
    assert len(found_verdicts) == 2 * len(CLAIMS["same_data"])
    assert {v.place for v in found_verdicts} == {"vgg11x1, digits", "vgg11x1, cifar10"}
    assert found_verdicts[0].status == "reproduced"
    assert verdicts("same_data", records({"direct": [1.0, 2.0]}))[0].status == "not run"


def test_splits_and_numbers_of_examples_are_places_of_their_own() -> None:
    low, high = ([1.0, 2.0], [3.0, 4.0])
    rows = pd.concat(
        records({m: high if m.startswith("np") else low for m in METHODS}).assign(
            setting="dirichlet", examples_per_class=examples
        )
        for examples in ("all", 5)
    )
    found_verdicts = verdicts("data_size", rows)
    assert {v.place for v in found_verdicts} == {
        "vgg11x1, digits, Dirichlet, all images",
        "vgg11x1, digits, Dirichlet, 5 a class",
    }
    assert {v.status for v in found_verdicts} == {"reproduced"}


def test_scores_take_top_1_only_and_put_methods_side_by_side() -> None:
    rows = records({"permute": [10.0, 20.0], "ensemble": [30.0, 40.0]})
    rows = pd.concat([rows, rows.assign(metric="loss", value=0.5)])
    wide = scores(rows)
    assert wide["permute"].tolist() == [10.0, 20.0]
    assert wide["half_gap"].tolist() == [20.0, 30.0]
    assert "half_gap" not in scores(records({"permute": [1.0]})).columns


def test_methods_are_labelled_as_in_the_paper() -> None:
    assert label("np_weight_matching") == "NP-WM"
    assert label("half_gap") == "half-way to the ensemble"
    assert label("something") == "something"
