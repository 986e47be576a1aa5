"""The command line: what it prints, and one line for what is wrong."""

from __future__ import annotations

import csv
import runpy
import shutil
from pathlib import Path

import pytest
from tiny import PROFILE, tiny_profile

import npmerge
from npmerge.cli import main
from npmerge.experiments import EXPERIMENTS
from npmerge.report.words import duration
from npmerge.store.records import STATES, Row


def lines(text: str) -> list[str]:
    return text.strip().splitlines()


def folders(tmp_path: Path) -> list[str]:
    return ["--results", str(tmp_path / "results"), "--zoo", str(tmp_path / "zoo")]


def test_run_prints_its_record_files_and_claims_hold_them_against_the_paper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_profile(monkeypatch)
    words = ["run", "same_data", "--profile", "tiny", "--seeds", "0", "--quiet"]
    assert main([*words, *folders(tmp_path)]) == 0
    paths = [Path(line) for line in lines(capsys.readouterr().out)]
    assert all(path.is_file() for path in paths)
    below = tmp_path / "results" / "tiny" / "same_data" / "digits-vgg11x0.0625" / "seed0"
    assert {path.parent for path in paths} == {below}
    assert "permute-np_merge.json" in {path.name for path in paths}
    claims = ["claims", "--profile", "tiny", *folders(tmp_path)[:2]]
    assert main(claims) == 0
    printed = capsys.readouterr().out
    assert "NP beats fine-tuning" in printed
    assert "1 seed: not judged" in printed
    assert "data_size: no records" in lines(printed)
    assert main([*claims, "same_data"]) == 0
    assert "data_size" not in capsys.readouterr().out


def test_records_are_printed_with_their_columns_seed_device_and_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_profile(monkeypatch)
    words = ["--profile", "tiny", "--quiet", "--results", str(tmp_path / "results")]
    run = ["run", "same_data", "--seeds", "3", "--cells", "*/ensemble", *words]
    assert main([*run, "--zoo", str(tmp_path / "zoo")]) == 0
    capsys.readouterr()
    assert main(["records", "--csv", *words]) == 0
    rows = list(csv.DictReader(lines(capsys.readouterr().out)))
    assert list(rows[0]) == [
        *("profile", "experiment", "setting", "seed"), *Row.model_fields, "device", "revision",
    ]  # fmt: skip
    assert [row["metric"] for row in rows] == ["top1", "loss"]
    assert {row["seed"] for row in rows} == {"3"}
    assert all(row["device"].startswith("CPU") and row["revision"] for row in rows)
    assert main(["records", *words]) == 0
    assert len(lines(capsys.readouterr().out)) == 2
    assert main(["records", "--csv", "--results", str(tmp_path / "none")]) == 0
    assert len(lines(capsys.readouterr().out)) == 1  # the columns


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "magic"], "unknown experiment 'magic': choose one of same_data"),
        (["run", "same_data", "--profile", "huge"], "unknown profile 'huge': choose one of paper"),
        (["run", "ALL", "magic"], "unknown experiment 'magic'"),
        (["run", "ALL", "--cells", "x*"], "no cell matches 'x*': there are same_data/digits"),
        (["run", "ALL", "--time-budget", "0"], "time_budget is 0: give more than 0"),
        (["status", "magic"], "unknown experiment 'magic': choose one of same_data"),
        (["status", "--cells", "x*"], "no cell matches 'x*'"),
        (
            ["run", "ALL", "--workers", "0", "--cells", "*seed0/ensemble"],
            "workers is 0: give more than 0",
        ),
        (["records", "--profile", "huge"], "unknown profile 'huge'"),
        (["claims", "magic"], "unknown experiment 'magic'"),
        (["run", "same_data", "--seeds", "1", "1"], "seed 1 is given twice"),
        (["run", "same_data", "--device", "abacus"], "device 'abacus' is not here"),
        (["run", "same_data", "--device", "a b"], "device is 'a b': give auto, cpu, cuda"),
        (["data", "mnist"], "unknown data set 'mnist': choose one of digits"),
        (["claims", "--results", "empty"], "no records of same_data, disjoint_splits"),
        (["claims", "same_data", "--results", "empty"], "no records of same_data at 'digits'"),
        (["book", "--profile", "huge"], "unknown profile 'huge': choose one of paper"),
        (["book", "--seeds", "1", "1"], "seed 1 is given twice"),
        (["book", "--root", "nowhere"], "nowhere is not the project's folder"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_nothing_changes_on_disk(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 1
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = lines(err)
    assert line.startswith("npmerge: ")
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_absent_data_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NPMERGE_DATA", str(tmp_path / "empty"))
    words = ["run", "same_data", "--profile", "short", "--seeds", "0", "--quiet"]
    assert main([*words, *folders(tmp_path)]) == 1
    (line,) = lines(capsys.readouterr().err)
    assert f"npmerge: cifar100 is not in {tmp_path / 'empty'}" in line
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_status_is_a_table_of_the_experiments_and_a_budget_that_is_over_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_profile(monkeypatch)
    where = ["--profile", "tiny", "--seeds", "0", "1", "--device", "cpu", *folders(tmp_path)]
    assert main(["run", "ALL", *where, "--time-budget", "1e-9", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    words = ["status", "disjoint_splits", "same_data", *where, "--cells", "*/seed1/ensemble"]
    assert main(words) == 0
    header, *rows = [line.split() for line in lines(capsys.readouterr().out)]
    assert header == [*STATES, "time", "left"]
    counts = ["0" if state != "missing" else "{}" for state in STATES]
    for row, (name, count) in zip(rows, [("disjoint_splits", 2), ("same_data", 1)], strict=True):
        assert row == [name, *(text.format(count) for text in counts), "unknown"]
    assert main(["status", *where]) == 0
    names = [line.split()[0] for line in lines(capsys.readouterr().out)]
    assert names[1:] == [name for name in EXPERIMENTS if name in PROFILE.sections]
    assert not list(tmp_path.rglob("*.json"))


def test_a_folder_with_something_else_in_it_is_not_emptied_for_the_book(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    kept = tmp_path / "source" / "thesis.tex"
    kept.parent.mkdir()
    kept.write_text("years of work")
    assert main(["book", "--output", str(tmp_path), *folders(tmp_path / "new")]) == 1
    (line,) = lines(capsys.readouterr().err)
    assert line.startswith(f"npmerge: {tmp_path} is not empty and holds no book of ours")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [kept]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "unknown"), (0, "0 s"), (99, "99 s"), (600, "10 min"), (9000, "2.5 h")],
)
def test_a_duration_is_said_in_a_fitting_unit(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_data_says_what_a_set_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "digits"]) == 0
    assert capsys.readouterr().out == "digits: 1297 training and 500 test images, 10 classes\n"


def test_an_interrupt_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("npmerge.run.engine.run_experiments", interrupt)
    assert main(["run", "same_data", *folders(tmp_path)]) == 130
    assert "finished cells are kept" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError(28, "No space left on device", "a.md"), "a.md: No space left on device"),
        (OSError("a.md cannot be written"), "a.md cannot be written"),
        (shutil.Error([("a", "b", "no space: 'b'"), ("c", "d", "no")]), "no space: 'b'"),
    ],
)
def test_what_the_system_refuses_is_said_without_numbers_and_lists(
    error: OSError, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("npmerge.book.make_book", refuse)
    assert main(["book"]) == 1
    assert capsys.readouterr().err == f"npmerge: {line}\n"


def test_an_unknown_option_is_an_error_with_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["run", "same_data", "--colour", "red"])
    assert caught.value.code == 2
    assert "--colour" in capsys.readouterr().err


def test_the_module_is_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["npmerge", "--version"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("npmerge", run_name="__main__")
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"npmerge {npmerge.__version__}\n"
