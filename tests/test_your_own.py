"""The page *Merge your own models*: every piece of code on it runs, in its order, and does what it says."""

from __future__ import annotations

import csv
import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torchvision.models import resnet18

import npmerge as npm
from npmerge.cli import main
from npmerge.data.user import Preprocessing, open_data
from npmerge.store.checkpoints import load_into

PAGE = Path(__file__).parent.parent / "book" / "merge_your_own.md"
BLOCK = re.compile(r"^```(?P<head>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
CAPTION = re.compile(r"\A:caption: (?P<file>\S+)\n")


def blocks() -> list[tuple[str, str, str]]:
    """Language, file name if any, and code of each block of the page."""
    found = []
    for match in BLOCK.finditer(PAGE.read_text(encoding="utf-8")):
        caption = CAPTION.match(match["body"])
        body = match["body"][caption.end() :] if caption else match["body"]
        language = match["head"].removeprefix("{code-block}").strip()
        found.append((language, caption["file"] if caption else "", body))
    return found


def commands(text: str) -> list[list[str]]:
    lines = text.replace("\\\n", " ").splitlines()
    assert all(line.startswith("$ ") for line in lines), text
    return [shlex.split(line[2:]) for line in lines]


@pytest.fixture(scope="module")
def done(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Path, dict[str, Any], list[list[str]]]]:
    """The page was followed in an empty folder: the folder, the names of its Python, and its commands."""
    folder, names, run = tmp_path_factory.mktemp("own"), {}, []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend("")
        patch.setattr(
            torch.hub, "load_state_dict_from_url", lambda *_, **__: pytest.fail("download")
        )
        torch.manual_seed(0)
        for language, file, code in blocks():
            if file:
                Path(file).write_text(code, encoding="utf-8")
            elif language == "python":
                exec(compile(code, str(PAGE), "exec"), names)  # noqa: S102
            else:
                assert language == "console"
                for command in commands(code):
                    run.append(command)
                    if command[0] == "npmerge":
                        assert main([*command[1:], "--device", "cpu"]) == 0, command
                    elif command[0] == "python":
                        runpy.run_path(command[1], run_name="__main__")
                    else:
                        assert command[:2] == ["pip", "install"]
        yield folder, names, run
    for name in ("make", "mine"):
        sys.modules.pop(name, None)


def test_the_page_names_every_option_that_there_is_for_one_s_own(done: Any) -> None:
    words = {word for command in done[2] for word in command}
    for option in (
        "--report",
        "--output",
        "--model",
        "--data",
        "--validation",
        "--patience",
        "--history",
    ):
        assert option in words
    files = {path.name for path in done[0].iterdir()}
    assert {
        "merged.md",
        "merged.safetensors",
        "merged_vit.md",
        "merged",
        "tuned.md",
        "mean.md",
    } <= files


def test_the_merged_network_knows_what_neither_knew_alone(done: Any) -> None:
    folder, names, _ = done
    test = open_data(str(folder / "images"), Preprocessing(16), batch_size=200).judged[1]
    alone = [load_into(resnet18(num_classes=10), folder / f"{name}.pth") for name in "ab"]
    both = load_into(resnet18(num_classes=10), folder / "merged.safetensors")
    scores = [npm.evaluate.score(model, test).top1 for model in (*alone, both)]
    assert max(scores[:2]) < 60  # half of the classes
    assert scores[2] > max(scores[:2]) + 10
    merged = transformers.AutoModelForImageClassification.from_pretrained(folder / "merged")
    first = transformers.AutoModelForImageClassification.from_pretrained(folder / "a")
    assert npm.evaluate.score(merged, test).top1 > npm.evaluate.score(first, test).top1
    assert names["model"].config.num_labels == 10


def test_the_files_beside_it_say_how_it_was_made(done: Any) -> None:
    folder, names, _ = done
    with (folder / "history.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["merge", "epoch", "loss", "validation"]
    assert json.loads((folder / "history.json").read_text()) == names["merged"].epochs
    card = (folder / "merged.md").read_text()
    assert "`torchvision:resnet18`" in card
    assert "| align | `found.safetensors` | defaults |" in (folder / "mean.md").read_text()
    bert = transformers.BertForSequenceClassification.from_pretrained(folder / "merged_bert")
    assert all(
        torch.equal(value, bert.state_dict()[name])
        for name, value in names["merged"].model.state_dict().items()
    )
    assert type(names["three"].model) is transformers.BertForSequenceClassification
    assert names["merged"].alignment.groups
    assert not names["three"].alignment.groups
