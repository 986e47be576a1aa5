"""The zoo: models addressed by all that made them, trained once and under exactly these conditions, or made again."""

from __future__ import annotations

import json
import logging
import math
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import stored
import torch
from safetensors import safe_open
from tiny import assert_same_state, same_parameters
from torch import nn

from npmerge.catalogue import SAMPLING
from npmerge.data import ImageData, load
from npmerge.data.partition import Partition
from npmerge.device import kernels_label, threads
from npmerge.store import zoo as module
from npmerge.store.checkpoints import read_checked
from npmerge.store.origins import device_label
from npmerge.store.zoo import BaseModel, Recipe, Zoo
from npmerge.training import TrainingError, fit

BASE = BaseModel("digits", 4, "resnet20", 0.125, Recipe(1, 200, 0.1), "same", seed=3, threads=1)


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load("digits", image_size=4)


def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "fit", lambda *_, **__: pytest.fail("trained"))


def program(*words: str | Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, stored.__file__, *map(str, words)]
    return subprocess.Popen(command)


def digest(folder: Path, base: BaseModel) -> str:
    """Stands for the tensors of a model and what made them."""
    found: str = Zoo(folder).provenance(base)["digest"]
    return found


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_a_model_is_trained_once_and_then_read_from_its_file(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo = Zoo(tmp_path / "zoo")
    assert not zoo.there(BASE)
    first = zoo.load(BASE, digits)
    assert zoo.there(BASE)
    assert visible(zoo.folder) == [zoo.path(BASE).name]
    no_training(monkeypatch)
    assert Zoo(tmp_path / "zoo").ensure(BASE, digits) == zoo.path(BASE)
    second = Zoo(tmp_path / "zoo").load(BASE, digits)
    (third,) = (load() for load in zoo.loaders([BASE], digits))
    assert_same_state(first.state_dict(), second.state_dict())
    assert_same_state(first.state_dict(), third.state_dict())
    assert not any(m.training for m in second.modules())


def test_training_again_elsewhere_gives_the_same_bits_and_another_seed_does_not(
    digits: ImageData, tmp_path: Path
) -> None:
    first = Zoo(tmp_path / "x").load(BASE, digits)
    torch.manual_seed(17)
    Zoo(tmp_path / "y").ensure(BASE, digits)
    assert digest(tmp_path / "x", BASE) == digest(tmp_path / "y", BASE)
    other = Zoo(tmp_path / "x").load(replace(BASE, seed=4), digits)
    assert not same_parameters(first, other)


def test_training_leaves_the_caller_s_random_numbers_and_threads(
    digits: ImageData, tmp_path: Path
) -> None:
    with threads(2):
        before = torch.get_rng_state()
        Zoo(tmp_path).ensure(BASE, digits)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.get_num_threads() == 2


def test_the_caller_s_threads_do_not_change_a_bit_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []

    def noted(*args: Any, **options: Any) -> list[float]:
        used.append(torch.get_num_threads())
        return fit(*args, **options)

    monkeypatch.setattr(module, "fit", noted)
    monkeypatch.setattr(module, "gains_from_bfloat16", lambda _: True)
    base = replace(BASE, image_size=8, width=0.5)
    data = load("digits")
    for count in (1, 2):
        with threads(count):
            Zoo(tmp_path / str(count)).ensure(base, data)
    assert used == [1, 1]
    assert digest(tmp_path / "1", base) == digest(tmp_path / "2", base)


def test_threads_that_nobody_fixed_are_part_of_the_address(tmp_path: Path) -> None:
    zoo, base = Zoo(tmp_path), replace(BASE, threads=None)
    with threads(1):
        one = zoo.path(base)
    with threads(2):
        two = zoo.path(base)
        assert zoo.path(BASE) == Zoo(tmp_path).path(BASE)
    assert one != two


def test_only_the_partition_s_images_train_the_model(digits: ImageData, tmp_path: Path) -> None:
    everything = Zoo(tmp_path).load(BASE, digits)
    part = replace(BASE, partition=Partition("dirichlet", 0, 2, seed=0))
    assert not same_parameters(everything, Zoo(tmp_path).load(part, digits))


def test_precision_decides_whether_training_is_in_bfloat16(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def noted(*_: Any, mixed_precision: bool, **__: Any) -> None:
        seen.append(mixed_precision)

    monkeypatch.setattr(module, "fit", noted)
    monkeypatch.setattr(module, "gains_from_bfloat16", lambda _: True)
    Zoo(tmp_path).ensure(BASE, digits)
    Zoo(tmp_path).ensure(replace(BASE, precision="auto"), digits)
    assert seen == [False, True]


def test_two_processes_that_ask_for_one_model_at_a_time_train_it_once(tmp_path: Path) -> None:
    both = [program("meet", tmp_path, name) for name in ("x", "y")]
    assert [process.wait() for process in both] == [0, 0]
    assert len(list(tmp_path.glob("*.asks"))) == 2
    assert len(list(tmp_path.glob("*.trains"))) == 1
    assert visible(tmp_path / "zoo") == [Zoo(tmp_path).path(stored.BASE).name]


def test_a_training_that_was_killed_goes_on_to_the_same_bits(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = program("kill", tmp_path)
    assert killed.wait() == -signal.SIGKILL
    zoo, epochs = Zoo(tmp_path / "zoo"), []
    assert visible(zoo.folder) == []
    monkeypatch.setattr(module, "fit", partial(fit, on_epoch=lambda epoch, _: epochs.append(epoch)))
    zoo.ensure(stored.BASE, digits)
    assert epochs == [3, 4]
    Zoo(tmp_path / "whole").ensure(stored.BASE, digits)
    assert epochs == [3, 4, 1, 2, 3, 4]
    assert digest(zoo.folder, stored.BASE) == digest(tmp_path / "whole", stored.BASE)
    left = {path.name for path in zoo.folder.iterdir()}
    assert left == {".locks", zoo.path(stored.BASE).name}  # the partial state is gone


@pytest.mark.parametrize("kept", [0, 7, 900])
def test_a_truncated_checkpoint_is_named_in_a_warning_and_made_again(
    kept: int, digits: ImageData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    zoo = Zoo(tmp_path)
    whole, path, before = zoo.load(BASE, digits), zoo.path(BASE), digest(tmp_path, BASE)
    path.write_bytes(path.read_bytes()[:kept])
    with caplog.at_level(logging.WARNING, logger="npmerge"):
        again = zoo.load(BASE, digits)
    (record,) = caplog.records
    assert f"{path} is damaged" in record.getMessage()
    assert "making it again" in record.getMessage()
    assert digest(tmp_path, BASE) == before
    assert_same_state(whole.state_dict(), again.state_dict())


def test_another_seed_s_file_under_the_address_is_not_taken(
    digits: ImageData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    zoo, other = Zoo(tmp_path), replace(BASE, seed=4)
    wanted = zoo.load(BASE, digits)
    shutil.copy(zoo.ensure(other, digits), zoo.path(BASE))
    assert_same_state(zoo.load(BASE, digits).state_dict(), wanted.state_dict())
    assert "it is the file of something else" in caplog.text


def test_a_checkpoint_says_what_made_it_and_nothing_is_unpickled(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.load", lambda *_, **__: pytest.fail("unpickled"))
    zoo = Zoo(tmp_path)
    path = zoo.ensure(BASE, digits)
    zoo.load(BASE, digits)
    with safe_open(path, framework="pt") as file:
        said = json.loads(file.metadata()["npmerge"])
    made_by = said["says"]["made_of"]["base_model"]
    assert made_by.pop("sampling") == SAMPLING
    assert BaseModel(**made_by | {"recipe": Recipe(**made_by["recipe"])}) == BASE
    assert zoo.provenance(BASE) == {
        "file": path.name,
        "digest": said["says"]["digest"],
        "kernels": kernels_label(torch.device("cpu")),
        "versions": {"npmerge": "0.1.0", "torch": torch.__version__},
        "device": device_label(torch.device("cpu")),
        "seconds": said["says"]["seconds"],
    }


def test_a_model_that_is_not_there_has_no_provenance(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"digits-resnet20x0.125-seed3.* is missing"):
        Zoo(tmp_path).provenance(BASE)


def test_a_published_model_is_taken_whatever_kernels_made_it_and_nothing_is_written(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = tmp_path / "models"
    monkeypatch.setattr(module, "kernels_label", lambda _: "cuda-sm_90")
    there = Zoo(published).load(BASE, digits)
    shutil.rmtree(published / ".locks")
    monkeypatch.undo()
    no_training(monkeypatch)
    zoo = Zoo(tmp_path / "zoo", published=[tmp_path / "none", published])
    assert zoo.there(BASE)
    assert zoo.ensure(BASE, digits).parent == published
    assert_same_state(zoo.load(BASE, digits).state_dict(), there.state_dict())
    assert zoo.provenance(BASE)["kernels"] == "cuda-sm_90"
    assert [path.name for path in tmp_path.iterdir()] == ["models"]
    assert len(list(published.iterdir())) == 1


def test_a_damaged_published_model_is_named_left_alone_and_not_used(
    digits: ImageData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    published = Zoo(tmp_path / "models").ensure(BASE, digits)
    published.write_bytes(published.read_bytes()[:-1])
    zoo = Zoo(tmp_path / "zoo", published=[tmp_path / "models"])
    assert zoo.ensure(BASE, digits) == zoo.path(BASE)
    assert f"{published} is damaged" in caplog.text
    assert "it is not used" in caplog.text
    with pytest.raises(ValueError, match="is damaged"):
        read_checked(published, {})


def test_a_model_that_diverges_is_named_and_not_kept(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wild = replace(BASE, recipe=Recipe(2, 200, 1e30, warmup_epochs=0))
    with pytest.raises(
        TrainingError, match=r"base model digits-resnet20x0.125-seed3-.* the loss is"
    ):
        Zoo(tmp_path).ensure(wild, digits)

    def broken(model: nn.Module, *_: Any, **__: Any) -> None:
        torch.nn.init.constant_(next(model.parameters()), math.nan)

    monkeypatch.setattr(module, "fit", broken)
    with pytest.raises(TrainingError, match=r"not finite after training at learning rate 0.1: try"):
        Zoo(tmp_path).ensure(BASE, digits)
    assert visible(tmp_path) == []


def test_a_zoo_that_cannot_be_written_is_named_before_training(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_training(monkeypatch)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/digits-.* cannot be written \(Not a directory"):
        Zoo(tmp_path / "file").ensure(BASE, digits)


@pytest.mark.parametrize(
    "change",
    [
        {"dataset": "cifar10"},
        {"image_size": 8},
        {"model": "vgg11"},
        {"width": 0.25},
        {"recipe": replace(BASE.recipe, lr=0.2)},
        {"recipe": replace(BASE.recipe, weight_decay=0.0)},
        {"recipe": replace(BASE.recipe, schedule="cosine")},
        {"partition": Partition("80-20", 0, 2, seed=0)},
        {"seed": 4},
        {"threads": 2},
        {"precision": "auto"},
    ],
)
def test_everything_that_makes_a_model_is_in_its_address(change: dict[str, Any]) -> None:
    zoo = Zoo("zoo")
    assert zoo.path(replace(BASE, **change)) != zoo.path(BASE)
    assert zoo.path(replace(BASE)) == zoo.path(BASE)


def test_the_kernels_that_make_a_model_are_in_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Zoo("zoo").path(BASE)
    assert here.name == f"{BASE.name}-{kernels_label(torch.device('cpu'))}.safetensors"
    monkeypatch.setattr(module, "kernels_label", lambda _: "cpu-other")
    assert Zoo("zoo").path(BASE) != here
