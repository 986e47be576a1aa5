"""The command line: what it prints, and one line for what is wrong."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from tiny import PROFILE

import npmerge
from npmerge import experiments
from npmerge.cli import main


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
    claims = ["claims", "--profile", "tiny", "--results", str(tmp_path / "results")]
    assert main(claims) == 0
    printed = capsys.readouterr().out
    assert "NP beats fine-tuning" in printed
    assert "inconclusive" in printed  # there is one seed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "magic"], "unknown experiment 'magic': choose one of same_data"),
        (["run", "same_data", "--profile", "huge"], "unknown profile 'huge': choose one of digits"),
        (["run", "same_data", "--seeds", "1", "1"], "seed 1 is given twice"),
        (["run", "same_data", "--device", "abacus"], "device 'abacus' is not here"),
        (["data", "mnist"], "unknown data set 'mnist': choose one of digits"),
        (["claims", "--results", "empty"], "no records of same_data at 'digits'"),
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
