"""ImageNet-200 from files: which images, in which order, cut how; and training, aligning and merging on them."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import datasets, transforms

import npmerge as npm
from npmerge.data import Batches, DataError, ImageData, load
from npmerge.data.folders import FileBatches, FolderSet
from npmerge.data.partition import dirichlet, holdout, per_class
from npmerge.data.sets.imagenet import imagenet200
from npmerge.data.streams import check_labels, stream
from npmerge.experiments import EXPERIMENTS, load_profile
from npmerge.models import resnet18
from npmerge.report.numbers import combination, paper_numbers
from npmerge.run.work import Bench, do_cell
from npmerge.store.zoo import Zoo
from npmerge.training import fit

torch.set_num_threads(1)  # tensors are too small to share out

CLASSES = 4
WIDTH = 0.25
"""A narrower network may crash while it trains; see :func:`npmerge.models.resnet18`."""
EACH = {"train": 12, "val": 3}


def synset(label: int) -> str:
    return f"n{10 * label + 1440764:08d}"


def save(path: Path, pixels: np.ndarray, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, "JPEG", **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy gradients in the colour of their class, of many sizes; a fifth class that is to be left out."""
    root = tmp_path_factory.mktemp("imagenet")
    draw = np.random.default_rng(0)
    colours = np.array([[220, 60, 60], [60, 220, 60], [60, 60, 220], [200, 200, 40], [9, 9, 9]])
    for split, count in EACH.items():
        for label, colour in enumerate(colours):
            for number in range(count):
                height, width = draw.integers(40, 90, 2)
                slope = np.linspace(-40, 40, width)[None, :, None]
                noise = draw.normal(0, 30, (height, width, 3))
                pixels = (colour + slope + noise).clip(0, 255).astype(np.uint8)
                save(root / split / synset(label) / f"{number:04d}.JPEG", pixels)
    (root / "train" / "lost+found").mkdir()
    (root / "train" / synset(0) / "._0000.JPEG").write_bytes(b"of another system")
    (root / "train" / synset(0) / "notes.txt").write_text("no image")
    return root


def make(folder: Path, *, workers: int = 0, image_size: int = 32) -> FolderSet:
    return imagenet200(folder, synsets=CLASSES, image_size=image_size, workers=workers)


def epoch(batches: Batches) -> tuple[Tensor, Tensor]:
    pixels, labels = zip(*batches, strict=True)
    return torch.cat(pixels), torch.cat(labels)


def equal(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(x[0], y[0]) and torch.equal(x[1], y[1])


def test_the_classes_are_the_first_200_synsets_in_sorted_order(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for label in reversed(range(202)):
            path = tmp_path / split / synset(label) / "a.JPEG"
            path.parent.mkdir(parents=True)
            path.touch()  # listing does not decode
    data = load("imagenet200", folder=tmp_path)
    assert isinstance(data, FolderSet)
    assert isinstance(data, ImageData)
    assert data.names == tuple(synset(label) for label in range(200))
    assert data.train.labels.tolist() == data.test.labels.tolist() == list(range(200))
    assert data.train.samples[7] == (str(tmp_path / "train" / synset(7) / "a.JPEG"), 7)
    assert (data.name, data.classes, data.channels, data.image_size) == (
        "imagenet200",
        1000,
        3,
        224,
    )
    assert data.example().shape == (1, 3, 224, 224)


def test_files_and_labels_are_torchvision_s_without_the_other_classes(folder: Path) -> None:
    data = make(folder)
    assert data.train.labels.dtype == torch.int64
    for split, half in (("train", data.train), ("val", data.test)):
        whole = datasets.ImageFolder(str(folder / split), allow_empty=True)
        named = [(path, whole.classes[label]) for path, label in whole.samples]
        expected = [(p, name) for p, name in named if name in data.names and "._" not in p]
        assert [(path, data.names[label]) for path, label in half.samples] == expected
        assert half.labels.tolist() == [label for _, label in half.samples]
        assert len(expected) == CLASSES * EACH[split]


def test_the_folder_is_taken_from_the_variable(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NPMERGE_IMAGENET", str(folder))
    assert imagenet200(synsets=CLASSES).train.samples == make(folder).train.samples
    with pytest.raises(DataError, match="imagenet200 is not in elsewhere"):
        imagenet200("elsewhere")


@pytest.mark.parametrize(("image_size", "resized"), [(224, 256), (64, 73), (32, 37)])
def test_plain_images_are_torchvision_s_resize_centre_crop_and_normalise(
    folder: Path, image_size: int, resized: int
) -> None:
    data = make(folder, image_size=image_size)
    transform = transforms.Compose(
        [
            transforms.Resize(resized),
            transforms.CenterCrop(image_size),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    some = torch.tensor([0, 4, 11])
    found, labels = epoch(data.plain_batches("test", 2, indices=some))
    expected = [transform(Image.open(data.test.samples[row][0])) for row in some.tolist()]
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-5)
    assert labels.tolist() == [0, 1, 3]
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_plain_passes_are_equal_complete_and_in_order(folder: Path) -> None:
    batches = make(folder).plain_batches("train", 5)
    first = epoch(batches)
    assert equal(first, epoch(batches))
    assert torch.equal(first[1], make(folder).train.labels)
    assert [len(labels) for _, labels in batches] == [5] * 9 + [3]
    assert (len(batches), batches.images, batches.label_range) == (10, 48, (0, 3))


def test_workers_change_nothing_and_neither_do_other_passes_or_instances(folder: Path) -> None:
    with_workers, alone = make(folder, workers=2), make(folder)
    batches, plain = (d.train_batches(7, seed=3) for d in (with_workers, alone))
    state = torch.get_rng_state()
    passes = [epoch(batches) for _ in range(2)]
    epoch(with_workers.train_batches(5, seed=9))
    next(iter(with_workers.plain_batches("test", 2)))  # breaks off
    passes.append(epoch(batches))
    assert all(equal(found, epoch(plain)) for found in passes)
    assert torch.equal(torch.get_rng_state(), state)


def test_passes_at_the_same_time_do_not_disturb_each_other(folder: Path) -> None:
    data = make(folder, workers=1)
    one, two = data.train_batches(7, seed=1), data.train_batches(7, seed=2)
    expected = [epoch(batches.reseeded(batches.seed)) for batches in (one, two)]
    pairs = list(zip(one, two, strict=True))
    for side in range(2):
        pixels, labels = zip(*(pair[side] for pair in pairs), strict=True)
        assert equal((torch.cat(pixels), torch.cat(labels)), expected[side])


def test_worker_processes_stay_for_the_next_pass_and_end_with_the_set(folder: Path) -> None:
    data = make(folder, workers=1)
    epoch(data.plain_batches("train", 5))
    ((_, loader),) = data._readers["train"]._idle[False]
    (process,) = loader._iterator._workers
    epoch(data.train_batches(5))
    assert data._readers["train"]._idle[False][0][1] is loader
    assert process.is_alive()
    del data, loader
    process.join(20)
    assert not process.is_alive()


def test_every_epoch_and_seed_has_its_own_order_and_augmentation(folder: Path) -> None:
    batches = make(folder).train_batches(12, seed=1)
    first, second = epoch(batches), epoch(batches)
    assert not torch.equal(first[1], second[1])
    assert not equal(first, epoch(batches.reseeded(2)))
    resumed = make(folder).train_batches(12, seed=1)
    resumed.epoch = 1
    assert equal(second, epoch(resumed))
    again = batches.reseeded(1)
    assert (again.seed, again.epoch, batches.epoch) == (1, 0, 2)
    assert equal(first, epoch(again))


def test_an_image_s_augmentation_changes_with_the_epoch_and_does_not_depend_on_the_others(
    folder: Path,
) -> None:
    data = make(folder)
    row = torch.tensor([17])
    alone = data.train_batches(1, indices=row, seed=1)
    views = [epoch(alone)[0][0] for _ in range(3)]
    assert not any(torch.equal(x, y) for x, y in pairwise(views))
    crowd, _ = epoch(data.train_batches(4, indices=torch.tensor([2, 17, 40, 41]), seed=1))
    assert sum(torch.equal(image, views[0]) for image in crowd) == 1


def test_training_images_are_crops_and_half_of_them_are_flipped(folder: Path) -> None:
    """The images get brighter to the right: the sign of the slope tells a flip, and its size how much was cropped."""
    batches = make(folder).train_batches(48, seed=0)
    slopes = []
    for _ in range(6):
        pixels = epoch(batches)[0]
        slopes.append((pixels[..., 16:] - pixels[..., :16]).mean(dim=(1, 2, 3)))
    slope = torch.cat(slopes)
    assert 0.4 < float((slope < 0).float().mean()) < 0.6
    plain = epoch(make(folder).plain_batches("train", 48))[0]
    whole = (plain[..., 16:] - plain[..., :16]).mean()
    assert 0.4 * whole < slope.abs().mean() < 0.95 * whole


def test_subsets_take_their_own_images_and_the_last_small_batch_is_left_out(folder: Path) -> None:
    data = make(folder)
    indices = per_class(data.train.labels, 5, seed=0)
    batches = data.train_batches(8, indices=indices)
    assert (len(batches), batches.images, batches.drop_last) == (2, 16, True)
    assert [len(labels) for _, labels in batches] == [8, 8]
    small = data.train_batches(500, indices=indices[:5])
    assert (len(small), small.images, small.label_range) == (1, 5, (0, 0))
    kept, aside = holdout(data.train.labels, 0.25, seed=0)
    assert torch.equal(
        epoch(data.plain_batches("train", 9, indices=aside))[1], data.train.labels[aside]
    )
    assert len(kept) == 36


def test_the_set_is_thinned_evenly(folder: Path) -> None:
    few = make(folder).first(8)
    assert few.train.labels.tolist() == few.test.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert epoch(few.plain_batches("test", 8))[0].shape == (8, 3, 32, 32)
    assert len(make(folder).first(999).test.labels) == 12


def test_the_loop_takes_them_for_batches(folder: Path) -> None:
    """Labels are checked without waiting for the device."""
    data = make(folder)
    batches = data.train_batches(24)
    assert isinstance(batches, FileBatches)
    assert all(len(images) == 24 for images, _ in stream(batches, "cpu"))
    with pytest.raises(ValueError, match="label 3 is out of range: the model has 3 outputs"):
        check_labels(batches, torch.tensor([0]), 3)
    model = resnet18(width=WIDTH, image_size=32)
    shared = data.train_batches(24, seed=5)
    assert len(fit(model, shared, torch.optim.SGD(model.parameters(), lr=0.01), epochs=2)) == 2
    assert shared.epoch == 2


def broken(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:700])


def not_an_image(path: Path) -> None:
    path.write_text("<html>404</html>")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", [broken, not_an_image, Path.unlink])
def test_a_file_that_cannot_be_decoded_is_named(
    damage: Callable[[Path], None], workers: int, folder: Path, tmp_path: Path
) -> None:
    root = tmp_path / "imagenet"
    shutil.copytree(folder, root)
    data = make(root, workers=workers)
    path = root / "val" / synset(2) / "0001.JPEG"
    damage(path)
    with pytest.raises(DataError) as caught:
        epoch(data.plain_batches("test", 4))
    message = str(caught.value)
    assert message.startswith(f"{path} cannot be decoded (")
    assert message.endswith(": copy it again from its archive")
    assert "\n" not in message
    assert epoch(data.plain_batches("test", 4, indices=torch.arange(4)))[1].tolist() == [0, 0, 0, 1]


def without(*parts: str) -> Callable[[Path], None]:
    return lambda root: shutil.rmtree(root.joinpath(*parts))


def emptied(root: Path) -> None:
    for path in (root / "train" / synset(1)).iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without(), "imagenet200 is not in {root}: {root}/train is missing; "),
        (without("train"), "imagenet200 is not in {root}: {root}/train is missing; "),
        (without("val"), "imagenet200 is not in {root}: {root}/val is missing; "),
        (without("train", synset(3)), "{root}/train has 4 synset folders, 5 are needed; "),
        (without("val", synset(1)), f"{{root}}/val/{synset(1)} holds no image; "),
        (emptied, f"{{root}}/train/{synset(1)} holds no image; "),
    ],
)
def test_a_folder_that_is_not_imagenet_says_what_is_missing_and_what_to_do(
    spoil: Callable[[Path], None], message: str, folder: Path, tmp_path: Path
) -> None:
    root = tmp_path / "imagenet"
    shutil.copytree(folder, root)
    spoil(root)
    with pytest.raises(DataError) as caught:
        imagenet200(root, synsets=5)
    found = str(caught.value)
    assert found.startswith(message.format(root=root))
    assert "set NPMERGE_IMAGENET to it, that holds train/n01440764/*.JPEG and val/" in found
    assert "\n" not in found


def test_no_folder_is_an_error_that_says_how_to_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NPMERGE_IMAGENET", raising=False)
    with pytest.raises(
        DataError, match="imagenet200 has no folder: give the folder, or set NPMERGE_IMAGENET"
    ):
        imagenet200()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0, "synsets": 1}, "image_size is 0: it must be positive"),
        ({"workers": -1, "synsets": 1}, "workers is -1: it cannot be negative"),
        ({"synsets": 0}, r"synsets is 0: it must lie between 1 and classes \(1000\)"),
        (
            {"synsets": 11, "classes": 10},
            r"synsets is 11: it must lie between 1 and classes \(10\)",
        ),
    ],
)
def test_a_number_out_of_range_is_refused(
    options: dict[str, int], message: str, folder: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        imagenet200(folder, **options)


def test_batches_of_nothing_are_refused(folder: Path) -> None:
    data = make(folder)
    with pytest.raises(ValueError, match="the data is empty: no image is left"):
        data.plain_batches("train", 4, indices=torch.arange(0))
    with pytest.raises(ValueError, match="batch_size is 0"):
        data.train_batches(0)


@pytest.mark.gpu
def test_batches_on_a_gpu_are_those_of_the_cpu(folder: Path) -> None:
    data = make(folder, workers=2)
    for _ in range(2):  # the second pass has the workers and the pinning thread of the first
        found, labels = epoch(data.train_batches(7, device="cuda", seed=1))
        assert (found.device.type, labels.device.type) == ("cuda", "cuda")
        expected = epoch(make(folder).train_batches(7, seed=1))
        torch.testing.assert_close(found.cpu(), expected[0])
        assert torch.equal(labels.cpu(), expected[1])


def test_two_resnet18_from_a_dirichlet_split_are_aligned_merged_and_scored(folder: Path) -> None:
    """End to end, with the head of 1000 outputs: NP Merge after alignment is above chance and direct averaging."""
    data = make(folder)
    pair: list[nn.Module] = []
    for seed, indices in enumerate(dirichlet(data.train.labels, seed=2)):
        generator = torch.Generator().manual_seed(seed)
        model = resnet18(data.classes, WIDTH, image_size=32, generator=generator)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        fit(model, data.train_batches(8, indices=indices, seed=seed), optimizer, epochs=4)
        pair.append(model)
    train, test = data.train_batches(12, seed=9), data.plain_batches("test", 12)
    plain = data.plain_batches("train", 24)
    a, b = (npm.reset_batchnorm(model, plain) for model in pair)
    aligned = npm.align.permute(a, b, plain).apply(b)
    merged = npm.aggregate.np_merge(a, aligned, train, epochs=8, lr=0.01).model
    found = npm.evaluate.score(npm.reset_batchnorm(merged, plain), test, topk=(1, 5))
    direct = npm.reset_batchnorm(npm.aggregate.mean(a, b), plain)
    assert math.isfinite(found.loss)
    assert found.top1 > 30  # chance is 25
    assert found.accuracy[5] > 99  # four of the 1000 outputs were ever a label
    assert found.loss < npm.evaluate.score(direct, test).loss


def test_the_experiment_of_table_iii_runs_on_an_image_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command's own path: 200 synsets, a Dirichlet split, the ImageNet recipe, top-1 and top-5 of every method."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 2), ("val", 1)):
        for label in range(200):
            for number in range(count):
                pixels = draw.integers(0, 256, (36, 40, 3), dtype=np.uint8)
                save(tmp_path / "data" / split / synset(label) / f"{number}.JPEG", pixels)
    monkeypatch.setenv("NPMERGE_IMAGENET", str(tmp_path / "data"))
    values = copy.deepcopy(load_profile("paper").sections["imagenet"])
    (setting,) = values["settings"]
    setting |= {"image_size": 32, "width": WIDTH}
    setting["recipe"] |= {"epochs": 1, "batch_size": 64}
    few = {"epochs": 1}
    values["optimisation"] = {
        "batch_size": 100,
        "options": {"np_merge": few, "finetune": few, "cca": {"ridge": {"choose": [1.0]}}},
        "tuned": {"finetune": {"lr": {"choose": [1e-3], "trial": few}}},
    }
    profile = load_profile("paper").model_copy(update={"sections": {"imagenet": values}})
    cells = EXPERIMENTS["imagenet"].list(profile, [0])
    assert cells[0].config["setting"]["recipe"]["schedule"] == "cosine"
    bench = Bench.at(Zoo(tmp_path / "zoo"), torch.device("cpu"))
    rows = [row.model_dump() for cell in cells for row in do_cell(cell, bench).rows]
    theirs = paper_numbers()
    wanted = {
        (combination(row), row["metric"])
        for row in theirs[theirs["table"] == "III"].to_dict("records")
    }
    values = {(combination(row), row["metric"]): row["value"] for row in rows}
    assert wanted <= values.keys()
    assert all(values[method, "top5"] >= values[method, "top1"] for method, _ in wanted)
    assert all(math.isfinite(value) for value in values.values())
