"""The ledger of the paper's claims, the report card and the page of numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reports import TABLE, record, records

from npmerge.aggregate import QUANTILES
from npmerge.methods import Combination
from npmerge.report import ledger as ledger_module
from npmerge.report.claims import FINETUNE, NP_MANY, NP_P, NP_WM, PERMUTE, WEIGHT_MATCHING
from npmerge.report.ledger import ENTRIES, Finding, Row, hold_claims
from npmerge.report.numbers import paper_numbers
from npmerge.report.report_card import (
    CHAPTERS,
    claims_page,
    every_number,
    first_page,
    numbers_page,
    what_held,
)
from npmerge.store.records import Record

MINUS = "\N{MINUS SIGN}"


def said(text: str, some: list[Record]) -> Finding:
    """What records of the profile ``short`` say about their experiment's claim with that text."""
    (row,) = [
        row
        for row in hold_claims({"short": some})
        if text in row.entry.text and row.entry.experiment == some[0].cell.experiment
    ]
    return row.ours["short"]


def here(values: Mapping[Combination, list[float]], **where: Any) -> list[Record]:
    return records(values, profile="short", **where)


def test_where_the_paper_disagrees_with_itself() -> None:
    """Found by hand in its Tables I to IV; all other claims with numbers are borne out."""
    rows = hold_claims({})
    found = {
        (row.entry.table, row.entry.text, row.paper.evidence)
        for row in rows
        if row.paper.status == "not borne out"
    }
    finetuned = "NP beats fine-tuning after the same alignment"
    assert found == {
        ("Table I", "NP beats fine-tuning, both at the paper's learning rate",
         f"NP-WM {MINUS} Finetune-WM, vgg11x1, cifar10: {MINUS}0.1"),
        ("Table II", "NP can beat the ensemble",
         f"NP-P {MINUS} Ensemble, resnet20x8, cifar100, 80-20: {MINUS}4.7"),
        ("Table II", "NP ends higher after Permute than after Weight Matching",
         f"NP-P {MINUS} NP-WM, resnet20x8, cifar100, Dirichlet: +0.0"),
        ("Table III", "NP-P and NP-WM beat CCA Merge", f"NP-WM {MINUS} CCA Merge: {MINUS}0.3"),
        ("Table III", "NP can beat the base models", f"NP-P {MINUS} Base models avg.: {MINUS}4.5"),
        ("Table III", "NP can beat the ensemble", f"NP-P {MINUS} Ensemble: {MINUS}13.7"),
        ("Table III", finetuned, f"NP-P {MINUS} Finetune-P: {MINUS}0.4"),
        ("Table IV", finetuned,
         f"NP-P {MINUS} Finetune-P, resnet20x8, cifar100, Dirichlet, 1 a class: {MINUS}0.5"),
        ("Table IV", "NP loses less than fine-tuning down to 5 images a class",
         f"loss of Finetune-WM {MINUS} loss of NP-WM, all to 5 a class: {MINUS}3.9"),
    }  # fmt: skip
    assert all(
        row.paper.status == "no numbers"
        for row in rows
        if row.entry.table == "Figure 1" or row.entry.section == "III-D"
    )
    assert sum(row.paper.status == "borne out" for row in rows) == 12


def test_every_claim_is_there_once_and_has_a_chapter() -> None:
    keys = [(entry.experiment, entry.text) for entry in ENTRIES]
    assert len(set(keys)) == len(keys) >= 25
    assert {entry.experiment for entry in ENTRIES} == set(CHAPTERS)
    assert not any(entry.section == "ours" for entry in ENTRIES)


def test_a_claim_has_to_hold_in_every_setting() -> None:
    values = {one: [50.0, 51.0, 52.0] for one in TABLE} | {NP_P: [60.0, 61.0, 62.0]}
    values[NP_WM] = [60.0, 61.5, 62.0]
    good = here(values, experiment="same_data", split=None)
    assert said("beat CCA Merge", good).status == "reproduced"
    assert (
        said("beat CCA Merge", good).evidence == f"NP-WM {MINUS} CCA Merge: +10.2 ± 0.7 (3 seeds)"
    )
    bad = here(
        values | {NP_P: [40.0, 41.0, 42.0]}, experiment="same_data", split=None, dataset="cifar10"
    )
    finding = said("beat CCA Merge", good + bad)
    assert finding.status == "not reproduced"
    assert finding.evidence.startswith(f"NP-P {MINUS} CCA Merge, resnet20x1, cifar10: {MINUS}10.0")


def test_what_np_merge_can_do_it_need_not_do_after_every_alignment() -> None:
    values = {one: [50.0, 51.0, 52.0] for one in TABLE}
    values |= {NP_P: [40.0, 41.0, 42.0], NP_WM: [53.0, 54.5, 55.0]}
    assert said("can beat the ensemble", here(values)).status == "reproduced"
    assert said("NP beats fine-tuning", here(values)).status == "not reproduced"
    values |= {NP_WM: [40.0, 41.5, 42.0]}
    assert said("can beat the ensemble", here(values)).status == "not reproduced"


def curves(**shift: float) -> list[Record]:
    """Few and many images, three seeds: all methods gain five points, but for some."""
    found = []
    for seed in range(3):
        for examples, gain in ((5, 0.0), ("all", 5.0)):
            for number, method in enumerate((PERMUTE, WEIGHT_MATCHING, NP_P, NP_WM, *FINETUNE)):
                extra = shift.get(method.aggregate, 0.0) if examples == 5 else 0.0
                value = 40 + number + gain + extra + 0.1 * seed * (number % 2)
                found.append(
                    record(
                        method,
                        value,
                        seed,
                        profile="short",
                        experiment="data_size",
                        examples=examples,
                    )
                )
    return found


@pytest.mark.parametrize(
    ("shift", "falls", "steadier"),
    [
        ({}, "reproduced", "inconclusive"),
        ({"finetune": -3.0}, "reproduced", "reproduced"),
        ({"np_merge": -3.0}, "reproduced", "not reproduced"),
        ({"mean": 9.0}, "not reproduced", "inconclusive"),
    ],
)
def test_losses_on_fewer_images(shift: dict[str, float], falls: str, steadier: str) -> None:
    some = curves(**shift)
    assert said("as the data shrink", some).status == falls
    assert said("loses less than fine-tuning", some).status == steadier


@pytest.mark.parametrize(
    ("change", "rises", "keeps"),
    [
        (4.0, "reproduced", "reproduced"),
        (-0.5, "not reproduced", "reproduced"),
        (-4.0, "not reproduced", "not reproduced"),
    ],
)
def test_more_models(change: float, rises: str, keeps: str) -> None:
    for split in (None, "dirichlet"):
        some = [
            one
            for models, shift in ((2, 0.0), (4, change / 2), (8, change))
            for number, method in enumerate(NP_MANY)
            for one in here(
                {method: [60 + number + shift + 0.1 * seed for seed in range(3)]},
                experiment="many_models", split=split, models=models,
            )
        ]  # fmt: skip
        if split is None:
            assert said("accuracy rises", some).status == rises
            assert said("keeps its accuracy", some).status == keeps
            assert said("unbalanced: NP's accuracy falls", some).status == "not run"
        else:
            falls = {"reproduced": "not reproduced", "not reproduced": "reproduced"}[rises]
            assert said("unbalanced: NP's accuracy falls", some).status == falls
            assert said("NP-WM is ahead", some).status == "reproduced"
            assert said("accuracy rises", some).status == "not run"


@pytest.mark.parametrize(
    ("lead", "status"),
    [([0.2, 0.1, 0.3], "reproduced"), ([3.0, 3.1, 3.2], "not reproduced"), ([0.0, 2.0, 1.0], "inconclusive")],
)  # fmt: skip
def test_two_accuracies_are_alike_within_a_point_either_way(lead: list[float], status: str) -> None:
    for first, second in ((NP_P, NP_WM), (NP_WM, NP_P)):
        values = {first: [60 + one for one in lead], second: [60.0] * 3}
        assert said("end alike", here(values)).status == status


def test_the_gain_of_residual_networks_is_held_against_that_of_vgg() -> None:
    def found(gain: float, **where: Any) -> list[Record]:
        values = {m: [50.0, 51.0, 52.5] for m in FINETUNE}
        values |= {m: [50.0 + gain, 51.1 + gain, 52.5 + gain] for m in (NP_P, NP_WM)}
        return here(values, experiment="same_data", split=None, **where)

    more, less = found(5.0), found(1.0, model="vgg11", dataset="cifar10")
    assert said("larger for ResNet20", more + less).status == "reproduced"
    assert said("larger for ResNet20", more).status == "not run"
    more, less = found(1.0), found(5.0, model="vgg11", dataset="cifar10")
    assert said("larger for ResNet20", more + less).status == "not reproduced"


@pytest.mark.parametrize(("np_gap", "status"), [(0.1, "reproduced"), (0.9, "not reproduced")])
def test_overfitting_is_how_far_the_test_loss_lies_above_the_training_loss(
    np_gap: float, status: str
) -> None:
    some = [
        record(
            method, {"top1": 50.0, "loss": 1.0 + gap + 0.01 * seed}, seed, profile="short",
            experiment="same_data", split=None, details={"history": [2.0, 1.0]},
        )
        for seed in range(3)
        for method, gap in ((NP_P, np_gap), (NP_WM, np_gap), *((one, 0.5) for one in FINETUNE))
    ]  # fmt: skip
    assert said("overfits less", some).status == status


@pytest.mark.parametrize(("reach", "status"), [(0.1, "reproduced"), (0.4, "not reproduced")])
def test_alpha_is_near_one_half_if_nine_tenths_of_it_are(reach: float, status: str) -> None:
    def details(seed: int) -> dict[str, Any]:
        ends = np.interp(QUANTILES, [0, 1], [0.5 - reach / 0.9, 0.5 + reach / 0.9])
        return {"spread": [[0.5] * len(QUANTILES), [float(x) + 0.001 * seed for x in ends]]}

    some = [
        record(m, 50.0, seed, profile="short", experiment="same_data", split=None, details=details(seed))
        for seed in range(3) for m in (NP_P, NP_WM)
    ]  # fmt: skip
    assert said("alpha stays near", some).status == status


def test_the_card_says_first_what_nobody_has_run_at_the_paper_s_scale() -> None:
    rows = hold_claims({})
    text = first_page(rows)
    assert text.startswith("**None of the paper's numbers has been reproduced at the paper's own")
    assert f"Of {len(rows)} empirical claims" in text
    assert f"{len(rows)} were not put to the test" in text
    assert "do not bear out 9 of these" in text
    assert sum(line.startswith("- ") for line in text.splitlines()) == len(rows)


def test_the_card_counts_and_shows_the_profile_that_says_most() -> None:
    values = {one: [50.0, 51.0, 52.0] for one in TABLE}
    values |= {NP_P: [60.0, 61.0, 62.5], NP_WM: [60.0, 61.5, 62.0]}
    where = {"experiment": "same_data", "split": None}
    paper = records({m: v[:1] for m, v in values.items()}, profile="paper", **where)
    rows = hold_claims({"paper": paper, "short": here(values, **where)})
    text = first_page(rows)
    assert "of the paper's claims have been put to the test at the paper's own scale" in text
    assert "**reproduced** (profile `short`): NP-P and NP-WM beat CCA Merge" in text
    row = next(row for row in rows if row.entry.text == "NP-P and NP-WM beat CCA Merge")
    assert row.ours["paper"].status == "1 seed: not judged"
    assert row.best[0] == "short"
    page = claims_page(rows)
    assert "profile `paper`: **1 seed: not judged** (NP-P" in page
    assert page.count("The paper's own numbers") == len(ENTRIES)


def test_a_row_without_a_profile_is_not_run() -> None:
    row = Row(ENTRIES[0], Finding("no numbers", ""), {})
    assert row.best == ("", Finding("not run", ""))


def test_every_number_of_the_paper_is_there_with_ours_beside_it() -> None:
    values = {NP_P: [60.0, 62.0], replace(NP_P, tuned=True): [70.0, 70.0]}
    some = here(values, experiment="same_data", split=None)
    numbers = every_number({"short": some, "digits": []})
    assert len(numbers) == len(paper_numbers()) == 90
    assert not [name for name in numbers.columns if name.startswith("digits")]
    (ours,) = numbers[numbers["short seeds"] > 0].to_dict("records")
    assert (ours["table"], ours["dataset"], ours["method"]) == ("I", "cifar100", "NP-P")
    assert (ours["short"], ours["short difference"]) == (61.0, round(61.0 - 62.88, 2))
    assert ours["short records"].split() == [
        f"short/same_data/cifar100-resnet20x1/seed{seed}/permute-np_merge.json" for seed in (0, 1)
    ]
    page = numbers_page(numbers)
    row = f"| NP-P | 62.88 ± 0.11 | 61.00 ± 1.41 ({MINUS}1.9; 2 seeds) |"
    assert row in page.replace("\N{NO-BREAK SPACE}", " ")
    assert page.count("\n| ") - page.count("| Method |") == 90


def test_the_thresholds_are_said_to_be_ours() -> None:
    ours = [entry.text for entry in ENTRIES if "our threshold" in entry.text]
    assert len(ours) == 3
    for name in ("WITHIN", "NEAR"):
        assert any(f"{getattr(ledger_module, name):g}" in text for text in ours)


def test_a_chapter_says_in_one_sentence_what_was_not_run(tmp_path: Path) -> None:
    text = what_held("many_models", folder=str(tmp_path))
    count = sum(entry.experiment == "many_models" for entry in ENTRIES)
    assert text == f"{count} claims have not been put to the test at a larger scale yet."
