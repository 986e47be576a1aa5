"""Data sets and models by name: known without PyTorch, true to what they say, and one registration each."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CLASSES, images
from torch import nn

import npmerge
from npmerge.catalogue import DATASETS, MODELS, dataset, model
from npmerge.data import DataError, ImageSet, load
from npmerge.models import build

ALONE = """
import sys, types
package = sys.modules["npmerge"] = types.ModuleType("npmerge")
package.__path__ = [sys.argv[1]]
from npmerge.catalogue import DATASETS, MODELS
print(*DATASETS, *MODELS, DATASETS["cifar100"].classes, MODELS["vgg11"].label)
print(*{"torch", "torchvision", "numpy"} & set(sys.modules))
"""


def test_names_are_known_without_importing_anything_heavy() -> None:
    folder = str(Path(npmerge.__file__).parent)
    run = subprocess.run(
        [sys.executable, "-c", ALONE, folder], capture_output=True, text=True, check=True
    )
    known, heavy = run.stdout.split("\n")[:2]
    assert (
        known
        == "digits cifar10 cifar100 imagenet200 character_names vgg11 resnet20 resnet18 vit text_encoder 100 VGG11"
    )
    assert heavy == ""


def check_what_it_says(name: str) -> None:
    says, data = DATASETS[name], load(name)
    found = data.name, data.classes, data.channels, data.image_size
    assert found == (name, says.classes, says.channels, says.image_size)
    each = torch.bincount(data.train.labels)
    assert len(each) == says.classes
    assert says.examples_per_class == round(float(each.float().mean()))


def test_digits_are_what_their_registration_says() -> None:
    check_what_it_says("digits")
    assert DATASETS["digits"].at_hand


@pytest.mark.cifar
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_real_cifar_is_what_its_registration_says(name: str) -> None:
    check_what_it_says(name)


def test_only_imagenet_needs_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [name for name, one in DATASETS.items() if not one.at_hand] == ["imagenet200"]
    assert (DATASETS["imagenet200"].topk, DATASETS["cifar100"].topk) == ((1, 5), (1,))
    monkeypatch.delenv("NPMERGE_IMAGENET", raising=False)
    with pytest.raises(DataError, match="imagenet200 has no folder"):
        load("imagenet200")


def test_the_folder_given_goes_before_the_variable_and_a_tilde_is_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says = DATASETS["cifar10"]
    monkeypatch.setenv("NPMERGE_DATA", "~/elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert says.folder("here") == Path("here")
    assert says.folder() == tmp_path / "elsewhere"
    monkeypatch.delenv("NPMERGE_DATA")
    assert says.folder() is None


@pytest.mark.parametrize(("name", "says"), MODELS.items())
def test_a_model_takes_the_sizes_that_it_says(name: str, says: Any) -> None:
    for size in (*says.sizes, says.smallest):
        network = build(name, 3, width=0.0625, in_channels=1, image_size=size, seed=0).eval()
        texts = torch.zeros(2, size, dtype=torch.int64)
        example = texts if says.takes == "texts" else torch.zeros(2, 1, size, size)
        assert network(example).shape == (2, 3)
    with pytest.raises(ValueError, match=f"{name} needs images of at least {says.smallest} pixels"):
        says.check(3, 1, in_channels=1, image_size=says.smallest - 1)


@pytest.fixture
def toys() -> Iterator[None]:
    """A data set and a model of somebody else's program."""

    @dataset(label="noise", classes=CLASSES, image_size=8, channels=3)
    def noise(_folder: str | None = None, *, image_size: int = 8) -> ImageSet:
        """Random pixels."""
        half, of = images(), (0.5,) * 3
        data = ImageSet("noise", half, half, CLASSES, of, of, padding=0, flip=False)
        return data.pooled(image_size)

    @model(label="linear", family="shallow")
    def linear(
        classes: int, width: float, *, in_channels: int, image_size: int, generator: torch.Generator
    ) -> nn.Module:
        """One layer."""
        return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size**2, classes))

    yield
    DATASETS.remove("noise")
    MODELS.remove("linear")


@pytest.mark.usefixtures("toys")
def test_what_is_registered_elsewhere_is_loaded_and_built_by_name() -> None:
    data = load("noise", image_size=4)
    network = build(
        "linear", data.classes, width=1, in_channels=3, image_size=data.image_size, seed=0
    )
    assert network(data.example()).shape == (1, CLASSES)
    assert (DATASETS["noise"].summary, MODELS["linear"].family) == ("Random pixels.", "shallow")
    assert list(DATASETS)[-1] == "noise"


def test_a_name_that_there_is_already_is_refused() -> None:
    def digits() -> None:
        """Not ours."""

    digits.__module__ = "elsewhere"
    with pytest.raises(ValueError, match=r"there is a data set 'digits' already, in npmerge\.data"):
        dataset(label="", classes=1, image_size=1, channels=1)(digits)
