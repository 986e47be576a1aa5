"""The zoo: checkpoints addressed by what made them, whole or made again."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny import assert_same_state, same_parameters
from torch import nn

from npmerge.data import ImageSet, load
from npmerge.data.partition import Partition
from npmerge.zoo import BaseModel, Recipe, Zoo, config_hash, write_atomically

BASE = BaseModel("digits", 4, "resnet20", 0.125, Recipe(1, 200, 0.1), "same", seed=3)


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return load("digits", image_size=4)


def get(zoo: Zoo, base: BaseModel, data: ImageSet) -> nn.Module:
    (model,) = zoo.get_all([base], data)
    return model


def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npmerge.zoo.fit_together", lambda *_, **__: pytest.fail("trained"))


def test_a_model_is_trained_once_and_then_read_from_its_file(
    digits: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo = Zoo(tmp_path / "zoo")
    first = get(zoo, BASE, digits)
    assert [path.name for path in zoo.folder.iterdir()] == [BASE.address]
    no_training(monkeypatch)
    second = get(Zoo(tmp_path / "zoo"), BASE, digits)
    assert_same_state(first.state_dict(), second.state_dict())
    assert not any(module.training for module in second.modules())


def test_training_again_elsewhere_gives_the_same_bytes_and_another_seed_does_not(
    digits: ImageSet, tmp_path: Path
) -> None:
    first = get(Zoo(tmp_path / "x"), BASE, digits)
    torch.manual_seed(17)
    assert_same_state(first.state_dict(), get(Zoo(tmp_path / "y"), BASE, digits).state_dict())
    x, y = (tmp_path / name / BASE.address for name in "xy")
    assert x.read_bytes() == y.read_bytes()
    other = get(Zoo(tmp_path / "x"), replace(BASE, seed=4), digits)
    assert not same_parameters(first, other)


def test_only_the_partition_s_images_train_the_model(digits: ImageSet, tmp_path: Path) -> None:
    everything = get(Zoo(tmp_path), BASE, digits)
    part = replace(BASE, partition=Partition("dirichlet", 0, 2, seed=0))
    some = get(Zoo(tmp_path), part, digits)
    assert not same_parameters(everything, some)


@pytest.mark.parametrize("kept", [0, 7, 900])
def test_a_truncated_checkpoint_is_named_in_a_warning_and_made_again(
    kept: int, digits: ImageSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    zoo = Zoo(tmp_path)
    whole = get(zoo, BASE, digits)
    path = tmp_path / BASE.address
    content = path.read_bytes()
    path.write_bytes(content[:kept])
    with caplog.at_level(logging.WARNING, logger="npmerge"):
        again = get(zoo, BASE, digits)
    (record,) = caplog.records
    assert f"{path} is damaged" in record.getMessage()
    assert "training it again" in record.getMessage()
    assert path.read_bytes() == content
    assert_same_state(whole.state_dict(), again.state_dict())


def test_a_checkpoint_says_what_made_it_and_nothing_is_unpickled(
    digits: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.load", lambda *_, **__: pytest.fail("unpickled"))
    zoo = Zoo(tmp_path)
    get(zoo, BASE, digits)
    get(zoo, BASE, digits)
    with safe_open(tmp_path / BASE.address, framework="pt") as file:
        made_by = json.loads(file.metadata()["base_model"])
    assert BaseModel(**made_by | {"recipe": Recipe(**made_by["recipe"])}) == BASE


@pytest.mark.parametrize(
    "change",
    [
        {"dataset": "cifar10"},
        {"image_size": 8},
        {"model": "vgg11"},
        {"width": 0.25},
        {"recipe": replace(BASE.recipe, lr=0.2)},
        {"recipe": replace(BASE.recipe, weight_decay=0.0)},
        {"partition": Partition("80-20", 0, 2, seed=0)},
        {"seed": 4},
    ],
)
def test_everything_that_makes_a_model_is_in_its_address(change: dict[str, Any]) -> None:
    assert replace(BASE, **change).address != BASE.address
    assert replace(BASE).address == BASE.address


def test_a_configuration_s_hash_does_not_depend_on_the_order_of_its_keys() -> None:
    assert config_hash({"a": 1, "b": [2]}) == config_hash({"b": [2], "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 2})
    assert len(config_hash({})) == 12


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    write_atomically(path, lambda part: part.write_text("old"))

    def fail(part: Path) -> None:
        part.write_text("half of the n")
        assert path.read_text() == "old"  # nobody sees the new one before it is whole
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]
