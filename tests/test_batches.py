"""Batches: every image once, reproducible, and equal to a naive loop over single images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import images
from torch import Tensor
from torchvision import transforms

from npmerge.data import Batches, Images, load
from npmerge.data.batches import child_seed

few = settings(max_examples=20, deadline=None)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def numbered(count: int) -> Images:
    """Images whose label is their index."""
    return Images(images(count).pixels, torch.arange(count))


def make(data: Images, batch_size: int = 5, **options: Any) -> Batches:
    return Batches(data, batch_size, mean=MEAN, std=STD, **options)


def augmented(data: Images, seed: int = 0, batch_size: int = 5) -> Batches:
    return make(data, batch_size, shuffle=True, padding=2, flip=True, seed=seed)


def epoch(batches: Batches) -> tuple[Tensor, Tensor]:
    pixels, labels = zip(*batches, strict=True)
    return torch.cat(pixels), torch.cat(labels)


def equal(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(x[0], y[0]) and torch.equal(x[1], y[1])


@few
@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 2**40))
def test_a_shuffled_epoch_has_every_image_exactly_once(count: int, size: int, seed: int) -> None:
    batches = make(numbered(count), size, shuffle=True, seed=seed)
    parts = list(batches)
    labels = torch.cat([labels for _, labels in parts])
    assert torch.equal(labels.sort().values, torch.arange(count))
    assert len(parts) == len(batches) == -(-count // size)
    assert batches.images == count


def test_the_nth_epoch_is_the_same_whatever_ran_in_between() -> None:
    data = images()
    quiet, busy, other = augmented(data), augmented(data), augmented(data, seed=1)
    expected = [epoch(quiet) for _ in range(3)]
    for n in range(3):
        torch.manual_seed(n)
        torch.rand(7)
        epoch(other)
        assert equal(epoch(busy), expected[n])


def test_a_training_is_resumed_by_setting_the_epoch() -> None:
    batches = augmented(images())
    expected = [epoch(batches) for _ in range(3)]
    resumed = augmented(images())
    resumed.epoch = 2
    assert equal(epoch(resumed), expected[2])
    assert resumed.epoch == batches.epoch == 3


def test_a_place_has_its_own_seed_and_so_has_what_lies_below_it() -> None:
    seeds = [child_seed(s, *key) for s in range(3) for key in [(), (0,), (1,), (0, 0), (0, 1)]]
    assert len(set(seeds)) == len(seeds)
    with pytest.raises(ValueError, match="non-negative"):
        child_seed(-1, 0)


def test_epochs_and_seeds_differ() -> None:
    data = images()
    batches = augmented(data)
    first, second = epoch(batches), epoch(batches)
    assert not equal(first, second)
    assert not equal(first, epoch(augmented(data, seed=1)))
    # Seed 0's second epoch is not seed 1's first: neighbouring seeds share no stream.
    assert not equal(second, epoch(augmented(data, seed=1)))


def test_batches_leave_the_global_random_state_alone() -> None:
    state = torch.get_rng_state()
    epoch(augmented(images()))
    assert torch.equal(torch.get_rng_state(), state)


def naive_epoch(data: Images, seed: int, number: int, padding: int, flip: bool) -> Iterator[Tensor]:
    """The recipe for one image at a time, from the same random draws."""
    generator = torch.Generator().manual_seed(child_seed(seed, number))
    count, size = len(data.labels), data.pixels.shape[2]
    order = torch.randperm(count, generator=generator)
    corners = torch.randint(0, 2 * padding + 1, (2, count), generator=generator)
    flips = torch.rand(count, generator=generator) < 0.5 if flip else torch.zeros(count)
    for place, index in enumerate(order):
        image = torch.nn.functional.pad(data.pixels[index], [padding] * 4)
        top, left = corners[:, place].tolist()
        image = image[:, top : top + size, left : left + size]
        if flips[place]:
            image = image.flip(-1)
        scaled = image / 255
        yield (scaled - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)


@few
@given(st.integers(0, 1000), st.integers(1, 4), st.booleans())
def test_crop_and_flip_equal_a_loop_over_single_images(seed: int, padding: int, flip: bool) -> None:
    data = images(9)
    batches = make(data, 4, shuffle=True, padding=padding, flip=flip, seed=seed)
    for number in range(2):
        expected = torch.stack(list(naive_epoch(data, seed, number, padding, flip)))
        assert torch.allclose(epoch(batches)[0], expected, atol=1e-5)


def test_crops_reach_every_corner_and_half_of_the_images_are_flipped() -> None:
    white = Images(torch.full((4000, 3, 4, 4), 255, dtype=torch.uint8), torch.zeros(4000).long())
    plain = Batches(white, 4000, mean=(0.0,) * 3, std=(1.0,) * 3, padding=1)
    inside = epoch(plain)[0].sum(dim=(1, 2, 3)) / 3
    assert {round(v) for v in inside.tolist()} == {9, 12, 16}  # a corner, an edge, the centre
    ramp = torch.arange(4, dtype=torch.uint8).expand(4000, 3, 4, 4).contiguous()
    flipped = Batches(Images(ramp, white.labels), 4000, mean=(0.0,) * 3, std=(1.0,) * 3, flip=True)
    share = (epoch(flipped)[0][:, 0, 0, 0] > 0).float().mean()
    assert float(share) == pytest.approx(0.5, abs=0.05)


def test_normalisation_equals_torchvision_s() -> None:
    data = images(7)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    pixels = np.moveaxis(data.pixels.numpy(), 1, -1)
    expected = torch.stack([transform(Image.fromarray(image)) for image in pixels])
    found, labels = epoch(make(data, 3))
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.equal(labels, data.labels)


def test_a_short_last_batch_is_kept_or_left_out_as_asked() -> None:
    data = images(12)
    assert [len(labels) for _, labels in make(data, 5)] == [5, 5, 2]
    dropping = make(data, 5, drop_last=True)
    assert [len(labels) for _, labels in dropping] == [5, 5]
    assert (len(dropping), dropping.images) == (2, 10)


def test_a_batch_larger_than_the_data_is_the_data_even_when_dropping() -> None:
    assert [len(labels) for _, labels in make(images(3), 5, drop_last=True)] == [3]


def test_indices_choose_the_images() -> None:
    rows = torch.tensor([4, 1, 7])
    assert torch.equal(epoch(make(numbered(9), indices=rows))[1], rows)


def test_training_batches_follow_the_set_s_recipe_and_plain_ones_do_not() -> None:
    data = load("digits")
    train = data.train_batches(100)
    assert (train.shuffle, train.padding, train.flip, train.drop_last) == (True, 1, False, True)
    plain = data.plain_batches("test", 100)
    assert (plain.shuffle, plain.padding, plain.flip, plain.drop_last) == (False, 0, False, False)
    assert torch.equal(epoch(plain)[1], data.test.labels)
    assert equal(epoch(plain), epoch(plain))


def test_images_are_not_changed() -> None:
    data = images()
    before = data.pixels.clone()
    epoch(augmented(data))
    epoch(make(data))
    assert torch.equal(data.pixels, before)


def test_nothing_to_make_a_batch_of_is_refused() -> None:
    with pytest.raises(ValueError, match="the data is empty"):
        make(images(), indices=torch.tensor([], dtype=torch.int64))
    with pytest.raises(ValueError, match="batch_size is 0"):
        make(images(), 0)
