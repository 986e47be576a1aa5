"""Image sets: what they hold, and what happens where they are absent or damaged."""

from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from tiny import images
from torch import Tensor

import npmerge as npm
from npmerge.data import DataError, ImageData, Images, ImageSet, load
from npmerge.data.sets.cifar import cifar10, cifar100
from npmerge.data.sets.handwritten import digits
from npmerge.models import build
from npmerge.training import fit


def held_by(data: ImageData) -> tuple[object, ...]:
    assert isinstance(data, ImageData)
    return data.name, data.classes, data.channels, data.image_size, len(data.train.labels)


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_digits_are_1797_images_of_8x8_pixels_in_ten_classes() -> None:
    data = digits()
    assert data.train.pixels.shape == (1297, 1, 8, 8)
    assert data.test.pixels.shape == (500, 1, 8, 8)
    assert data.train.pixels.dtype == torch.uint8
    assert (data.classes, data.channels, data.image_size) == (10, 1, 8)
    assert data.train.pixels.max() == 255
    assert data.example().shape == (1, 1, 8, 8)


def test_digits_are_split_by_class_and_the_same_every_time() -> None:
    first, second = digits(), digits()
    assert torch.equal(first.test.pixels, second.test.pixels)
    assert torch.bincount(first.test.labels).tolist() == pytest.approx([50] * 10, abs=2)
    assert set(torch.cat([first.train.labels, first.test.labels]).tolist()) == set(range(10))


def test_digits_are_normalised_by_their_own_mean_and_deviation() -> None:
    data = digits()
    scaled = data.train.pixels / 255
    assert data.mean[0] == pytest.approx(float(scaled.mean()), abs=0.01)
    assert data.std[0] == pytest.approx(float(scaled.std()), abs=0.01)


def test_the_first_images_are_left() -> None:
    data, few = digits(), digits().first(7)
    assert torch.equal(few.train.pixels, data.train.pixels[:7])
    assert torch.equal(few.test.labels, data.test.labels[:7])
    assert held_by(few) == ("digits", 10, 1, 8, 7)
    assert held_by(load("digits")) == held_by(data) == ("digits", 10, 1, 8, 1297)


def naive_pool(pixels: Tensor, size: int) -> Tensor:
    factor = pixels.shape[2] // size
    pooled = torch.empty(*pixels.shape[:2], size, size)
    for row in range(size):
        for column in range(size):
            window = pixels[
                :, :, row * factor : (row + 1) * factor, column * factor : (column + 1) * factor
            ]
            pooled[:, :, row, column] = window.float().mean(dim=(2, 3))
    return pooled.round().to(torch.uint8)


def test_pooling_averages_the_pixels_and_keeps_the_labels() -> None:
    data, pooled = digits(), digits(image_size=4)
    assert torch.equal(pooled.train.pixels, naive_pool(data.train.pixels, 4))
    assert torch.equal(pooled.test.pixels, naive_pool(data.test.pixels, 4))
    assert torch.equal(pooled.train.labels, data.train.labels)
    assert pooled.image_size == 4
    assert torch.equal(digits(image_size=8).train.pixels, data.train.pixels)
    assert load("digits", image_size=4).image_size == 4


@pytest.mark.parametrize("size", [3, 0, -4, 16])
def test_a_size_that_does_not_divide_the_image_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"image_size is {size}: it must divide the 8 pixels"):
        load("digits", image_size=size)


def test_an_unknown_data_set_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="unknown data set 'mnist': choose one of digits, cifar10"):
        load("mnist")


def test_images_must_be_bytes_with_a_label_each() -> None:
    good = images()
    with pytest.raises(ValueError, match=r"need uint8 pixels .* got torch.float32"):
        Images(good.pixels.float(), good.labels)
    with pytest.raises(ValueError, match="and 23 labels"):
        Images(good.pixels, good.labels[1:])


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("cifar10", "cifar-10-batches-py/data_batch_1"),
        ("cifar100", "cifar-100-python/train"),
    ],
)
def test_absent_cifar_names_the_folder_the_file_and_the_ways_out(
    name: str, first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NPMERGE_DATA", str(tmp_path))
    with pytest.raises(DataError) as caught:
        load(name)
    message = str(caught.value)
    assert message.startswith(f"{name} is not in {tmp_path}: {tmp_path / first} is missing")
    assert f"put {first.split('/')[0]}/ there" in message
    assert "set NPMERGE_DATA to a folder that holds it" in message
    assert "unset NPMERGE_DATA to download it on first use" in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_a_folder_given_as_argument_goes_before_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NPMERGE_DATA", "elsewhere")
    with pytest.raises(DataError, match=f"cifar10 is not in {tmp_path}"):
        load("cifar10", folder=tmp_path)


def test_cifar_that_cannot_be_downloaded_names_the_folder_and_the_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise URLError("no route to host")

    monkeypatch.delenv("NPMERGE_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with pytest.raises(DataError) as caught:
        load("cifar100")
    message = str(caught.value)
    folder = tmp_path / ".cache" / "npmerge"
    assert (
        f"cifar100 is not in {folder} ({folder / 'cifar-100-python/train'} is missing)" in message
    )
    assert "no route to host" in message
    assert "set NPMERGE_DATA" in message


def damaged_cifar100(folder: Path) -> None:
    for name in ("train", "test", "meta"):
        path = folder / "cifar-100-python" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"these are not the bytes")


def test_damaged_cifar_is_named_never_unpickled_and_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged_cifar100(tmp_path)
    before = files_below(tmp_path)
    monkeypatch.setenv("NPMERGE_DATA", str(tmp_path))
    monkeypatch.setattr("pickle.load", lambda *_, **__: pytest.fail("unpickled"))
    with pytest.raises(DataError) as caught:
        load("cifar100")
    message = str(caught.value)
    assert f"cifar100 in {tmp_path / 'cifar-100-python'} is damaged" in message
    assert "delete that folder" in message
    assert files_below(tmp_path) == before


def test_a_missing_meta_file_is_missing_not_damaged(tmp_path: Path) -> None:
    damaged_cifar100(tmp_path)
    meta = tmp_path / "cifar-100-python" / "meta"
    meta.unlink()
    with pytest.raises(DataError, match=f"{meta} is missing"):
        load("cifar100", folder=tmp_path)


@pytest.fixture(scope="module")
def cifar() -> dict[str, ImageSet]:
    return {"cifar10": cifar10(), "cifar100": cifar100()}


def mean_and_std(pixels: Tensor) -> tuple[float, float]:
    """Of bytes / 255, exactly, from their histogram."""
    values = torch.arange(256).double() / 255
    share = torch.bincount(pixels.flatten(), minlength=256).double() / pixels.numel()
    mean = float(share @ values)
    return mean, float(share @ (values - mean) ** 2) ** 0.5


@pytest.mark.cifar
@pytest.mark.parametrize(
    ("name", "classes", "each"), [("cifar10", 10, 5000), ("cifar100", 100, 500)]
)
def test_real_cifar_has_its_shapes_classes_and_normalisation(
    name: str, classes: int, each: int, cifar: dict[str, ImageSet]
) -> None:
    data = cifar[name]
    assert data.train.pixels.shape == (50_000, 3, 32, 32)
    assert data.test.pixels.shape == (10_000, 3, 32, 32)
    assert data.classes == classes
    assert torch.bincount(data.train.labels).tolist() == [each] * classes
    assert torch.bincount(data.test.labels).tolist() == [each // 5] * classes
    found = [mean_and_std(data.train.pixels[:, channel]) for channel in range(3)]
    assert data.mean == pytest.approx([mean for mean, _ in found], abs=2e-4)
    assert data.std == pytest.approx([std for _, std in found], abs=2e-4)
    assert (data.padding, data.flip) == (4, True)


@pytest.mark.cifar
def test_real_cifar_is_pooled_to_16_pixels(cifar: dict[str, ImageSet]) -> None:
    pooled = cifar100(image_size=16)
    assert torch.equal(pooled.test.pixels[:99], naive_pool(cifar["cifar100"].test.pixels[:99], 16))
    assert torch.equal(pooled.train.labels, cifar["cifar100"].train.labels)
    assert (pooled.image_size, pooled.padding) == (16, 2)


@pytest.mark.cifar
def test_pooled_cifar_learns_aligns_and_merges_above_chance() -> None:
    """End to end on real images: 10 classes at 8x8 pixels, two narrow networks, a few steps each."""
    data = load("cifar10", image_size=8)
    batches = data.train_batches(100, indices=torch.arange(2000))
    pair = []
    for seed in range(2):
        model = build("resnet20", 10, width=0.25, in_channels=3, image_size=8, seed=seed)
        fit(model, batches, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), epochs=3)
        pair.append(model)
    test = data.plain_batches("test", 500, indices=torch.arange(2000))
    direct = npm.reset_batchnorm(npm.aggregate.mean(*pair), batches)
    merged = npm.merge(pair, batches, aggregate_options={"epochs": 1}).model
    found = npm.evaluate.accuracy(merged, test, topk=(1, 5))
    assert found[1] > 18  # chance is 10
    assert found[1] > npm.evaluate.accuracy(direct, test)[1]
    assert found[5] > 60  # chance is 50
