"""The command line: what it prints, and one line for what is wrong."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from tiny import PROFILE

import npmerge
from npmerge import experiments
from npmerge.cli import main
from npmerge.experiments.schedule import duration


def lines(text: str) -> list[str]:
    return text.strip().splitlines()


def folders(tmp_path: Path) -> list[str]:
    return ["--results", str(tmp_path / "results"), "--zoo", str(tmp_path / "zoo")]


def test_run_prints_its_record_files_and_claims_hold_them_against_the_paper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(experiments, "load_profile", lambda _: PROFILE)
    words = ["run", "same_data", "--profile", "tiny", "--seeds", "0", "--quiet"]
    assert main([*words, *folders(tmp_path)]) == 0
    (path,) = lines(capsys.readouterr().out)
    assert Path(path).is_file()
    assert Path(path).parent == tmp_path / "results" / "tiny" / "same_data"
    claims = ["claims", "--profile", "tiny", *folders(tmp_path)[:2]]
    assert main(claims) == 0
    printed = capsys.readouterr().out
    assert "NP beats fine-tuning" in printed
    assert "inconclusive" in printed  # there is one seed
    assert "data_size: no records" in lines(printed)
    assert main([*claims, "same_data"]) == 0
    assert "data_size" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "magic"], "unknown experiment 'magic': choose one of same_data"),
        (["run", "same_data", "--profile", "huge"], "unknown profile 'huge': choose one of digits"),
        (["run", "ALL", "magic"], "unknown experiment 'magic'"),
        (["run", "ALL", "--units", "x*"], "no unit matches 'x*': there are same_data/digits"),
        (["run", "ALL", "--time-budget", "0"], "the time budget is 0 seconds: give more than 0"),
        (["status", "magic"], "unknown experiment 'magic': choose one of same_data"),
        (["status", "--units", "x*"], "no unit matches 'x*'"),
        (["claims", "magic"], "unknown experiment 'magic'"),
        (["run", "same_data", "--seeds", "1", "1"], "seed 1 is given twice"),
        (["run", "same_data", "--device", "abacus"], "device 'abacus' is not here"),
        (["data", "mnist"], "unknown data set 'mnist': choose one of digits"),
        (["claims", "--results", "empty"], "no records of same_data, disjoint_splits"),
        (["claims", "same_data", "--results", "empty"], "no records of same_data at 'digits'"),
        (["book", "--profile", "huge"], "parameter profile is 'huge'"),
        (["book", "--seeds", "1", "1"], "give each once"),
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
    words = ["run", "same_data", "--profile", "lite", "--seeds", "0", "--quiet"]
    assert main([*words, *folders(tmp_path)]) == 1
    (line,) = lines(capsys.readouterr().err)
    assert f"npmerge: cifar100 is not in {tmp_path / 'empty'}" in line
    assert list(tmp_path.iterdir()) == []


def test_status_is_a_table_of_the_experiments_and_a_budget_that_is_over_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(experiments, "load_profile", lambda _: PROFILE)
    where = ["--profile", "tiny", "--seeds", "0", "1", "--device", "cpu", *folders(tmp_path)]
    assert main(["run", "ALL", *where, "--time-budget", "1e-9", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    known = experiments.EXPERIMENTS
    words = ["status", "disjoint_splits", "same_data", *where, "--units", "*seed1"]
    assert main(words) == 0
    assert [line.split() for line in lines(capsys.readouterr().out)] == [
        ["done", "running", "missing", "stale", "damaged", "time", "left"],
        ["disjoint_splits", "0", "0", "2", "0", "0", "unknown"],
        ["same_data", "0", "0", "1", "0", "0", "unknown"],
    ]
    assert main(["status", *where]) == 0
    names = [line.split()[0] for line in lines(capsys.readouterr().out)]
    assert names[1:] == [name for name, module in known.items() if module.units(PROFILE, [0])]
    assert list(tmp_path.iterdir()) == []


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

    monkeypatch.setattr(experiments, "run", interrupt)
    assert main(["run", "same_data", *folders(tmp_path)]) == 130
    assert "finished units are kept" in capsys.readouterr().err


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
