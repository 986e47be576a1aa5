"""Record files: whole, current and with the paper's columns, or made again."""

from __future__ import annotations

import json
import logging
import subprocess
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from npmerge.paper import numbers
from npmerge.results import COLUMNS, Outcome, Results, Unit, provenance, revision, table

UNIT = Unit("digits", "same_data", "digits-vgg11x1", 0, {"lr": 0.1, "seed": 0})


def record(value: float) -> dict[str, Any]:
    keys = dict.fromkeys(COLUMNS, "x")
    return keys | {"metric": "top1", "examples_per_class": None, "value": value}


def write(results: Results, unit: Unit = UNIT, value: float = 50.0) -> Path:
    outcome = Outcome([record(value)], {"curve": [1, 2]})
    return results.write(unit, outcome, provenance(torch.device("cpu"), 1.25, "r1"))


def test_the_columns_are_the_paper_s_with_a_value_for_mean_and_deviation() -> None:
    assert [*numbers().columns[:-2], "value"] == COLUMNS
    assert list(numbers().columns[-2:]) == ["mean", "std"]


def test_a_record_file_is_where_its_unit_says_and_holds_everything(tmp_path: Path) -> None:
    path = write(Results(tmp_path))
    assert path == tmp_path / "digits" / "same_data" / "digits-vgg11x1-seed0.json"
    content = json.loads(path.read_text())
    assert list(content) == ["unit", "config", "config_hash", "records", "details", "provenance"]
    assert content["unit"] == {
        "profile": "digits", "experiment": "same_data", "setting": "digits-vgg11x1", "seed": 0,
    }  # fmt: skip
    assert content["config"] == UNIT.config
    assert content["config_hash"] == UNIT.config_hash
    assert content["records"] == [record(50.0)]
    assert content["details"] == {"curve": [1, 2]}
    assert list(path.parent.iterdir()) == [path]


def test_provenance_names_revision_device_versions_and_cost() -> None:
    found = provenance(torch.device("cpu"), 1.26, "r1")
    assert found["revision"] == "r1"
    assert found["device"].startswith("CPU")
    assert found["versions"]["torch"] == version("torch")
    assert found["seconds"] == 1.3
    assert found["peak_memory_mib"] > 10


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=x", "-c", "user.email=x"]
    done = subprocess.run(
        ["git", "-C", str(folder), *who, *words], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_the_revision_is_the_commit_and_says_if_the_source_was_changed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tmp_path / "results.py"
    source.write_text("committed")
    monkeypatch.setattr("npmerge.results.__file__", str(source))
    git(tmp_path, "init")
    assert revision() == "version 0.1.0"  # inside somebody else's repository
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "x")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert revision() == head
    source.write_text("changed")
    assert revision() == f"{head}+"


def test_outside_a_checkout_the_revision_is_the_package_s_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("npmerge.results.__file__", str(tmp_path / "results.py"))
    monkeypatch.delenv("NPMERGE_REVISION", raising=False)
    assert revision() == "version 0.1.0"
    monkeypatch.setenv("NPMERGE_REVISION", "abc123")  # of what the copy was made
    assert revision() == "abc123"


def test_a_written_unit_is_finished_and_another_is_not(tmp_path: Path) -> None:
    results = Results(tmp_path)
    assert not results.finished(UNIT)
    write(results)
    assert results.finished(UNIT)
    assert not results.finished(replace(UNIT, seed=1))


DAMAGE = {
    "empty": lambda _: "",
    "truncated": lambda text: text[: len(text) // 2],
    "no record": lambda _: "[1, 2]",
    "a part": lambda _: json.dumps({"records": []}),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_record_is_not_finished_named_in_a_warning_and_not_read(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results = Results(tmp_path)
    path = write(results)
    path.write_text(DAMAGE[kind](path.read_text()))
    with caplog.at_level(logging.WARNING, logger="npmerge"):
        assert not results.finished(UNIT)
    assert [r.getMessage() for r in caplog.records] == [f"{path} is damaged: making it again"]
    for units in (None, [UNIT]):
        with pytest.raises(ValueError, match="is damaged: run `npmerge run same_data --profile"):
            results.read("digits", "same_data", units)


def test_a_record_that_is_not_text_is_damaged(tmp_path: Path) -> None:
    results = Results(tmp_path)
    write(results).write_bytes(b"\xff\xfe\x00broken")
    assert not results.finished(UNIT)


def test_a_record_of_another_configuration_is_stale_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results = Results(tmp_path)
    path = write(results)
    with caplog.at_level(logging.WARNING, logger="npmerge"):
        assert not results.finished(replace(UNIT, config={"lr": 0.2, "seed": 0}))
    assert [r.getMessage() for r in caplog.records] == [
        f"{path} was made under another configuration: making it again"
    ]


def test_reading_gives_all_records_or_those_asked_for(tmp_path: Path) -> None:
    results = Results(tmp_path)
    assert results.read("digits", "same_data") == []
    units = [replace(UNIT, seed=seed) for seed in range(3)]
    for unit in units:
        write(results, unit, value=float(unit.seed))
    found = table(results.read("digits", "same_data"))
    assert list(found.columns) == [*COLUMNS, "seed"]
    assert found["value"].tolist() == [0.0, 1.0, 2.0]
    assert found["seed"].tolist() == [0, 1, 2]
    assert table(results.read("digits", "same_data", units[1:2]))["value"].tolist() == [1.0]


def test_a_unit_without_a_record_is_named_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"seed0.json is missing: run `npmerge run same_d"):
        Results(tmp_path).read("digits", "same_data", [UNIT])
    assert list(tmp_path.iterdir()) == []


def test_no_records_are_an_empty_table_with_the_columns() -> None:
    assert list(table([]).columns) == [*COLUMNS, "seed"]
