"""Partitions: disjoint, complete, reproducible; per-class subsets are nested."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from npmerge.data.partition import Partition, dirichlet, holdout, per_class, same, split_80_20

few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31)
label_lists = st.lists(st.integers(0, 5), min_size=1, max_size=60).map(torch.tensor)


def assert_disjoint_and_complete(parts: list[Tensor], labels: Tensor) -> None:
    """Every image is in exactly one part."""
    together = torch.cat(parts)
    assert torch.equal(together.sort().values, torch.arange(len(labels)))
    for part in parts:
        assert torch.equal(part, part.sort().values)


SPLITS: dict[str, Callable[[Tensor, int], list[Tensor]]] = {
    "80-20": lambda labels, seed: split_80_20(labels, seed=seed),
    "dirichlet(2)": lambda labels, seed: dirichlet(labels, seed=seed),
    "dirichlet(5)": lambda labels, seed: dirichlet(labels, 5, seed=seed),
    "holdout": lambda labels, seed: list(holdout(labels, 0.2, seed=seed)),
}


@few
@given(label_lists, seeds, st.sampled_from(sorted(SPLITS)))
def test_a_split_is_disjoint_and_complete(labels: Tensor, seed: int, name: str) -> None:
    assert_disjoint_and_complete(SPLITS[name](labels, seed), labels)


@pytest.mark.parametrize("name", SPLITS)
def test_a_split_is_a_function_of_its_seed_alone(name: str) -> None:
    labels = torch.arange(300) % 5
    first = SPLITS[name](labels, 3)
    torch.manual_seed(99)
    again = SPLITS[name](labels, 3)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    other = SPLITS[name](labels, 4)
    assert not all(torch.equal(x, y) for x, y in zip(first, other, strict=True))


def test_the_same_data_setting_gives_every_model_every_image() -> None:
    labels = torch.arange(20) % 4
    for part in same(labels, 3):
        assert torch.equal(part, torch.arange(20))
    assert len(same(labels, 3)) == 3


def test_model_a_gets_80_percent_of_the_first_half_of_the_classes_and_20_of_the_rest() -> None:
    labels = torch.arange(400) % 4
    a, b = split_80_20(labels, seed=0)
    assert torch.bincount(labels[a]).tolist() == [80, 80, 20, 20]
    assert torch.bincount(labels[b]).tolist() == [20, 20, 80, 80]


def test_a_dirichlet_draw_may_leave_a_model_without_a_class_and_is_still_a_partition() -> None:
    labels = torch.arange(30) % 10
    parts = dirichlet(labels, 4, seed=1, concentration=0.05)
    counts = torch.stack([torch.bincount(labels[part], minlength=10) for part in parts])
    assert (counts == 0).any()
    assert_disjoint_and_complete(parts, labels)


def test_dirichlet_shares_are_unequal_and_spread_as_the_concentration_says() -> None:
    """The variance of a share of Dir(c, c) is 1 / (4 (2c + 1)); a uniform split would have none."""
    labels = torch.arange(100_000) % 1000
    for concentration in (0.5, 5.0):
        a, _ = dirichlet(labels, seed=0, concentration=concentration)
        shares = torch.bincount(labels[a], minlength=1000) / 100
        assert float(shares.mean()) == pytest.approx(0.5, abs=0.05)
        assert float(shares.var()) == pytest.approx(1 / (4 * (2 * concentration + 1)), rel=0.15)


@few
@given(seeds, st.integers(1, 9), st.integers(1, 9))
def test_fewer_images_per_class_are_a_subset_of_more(seed: int, x: int, y: int) -> None:
    labels = torch.arange(60) % 6
    small, large = (per_class(labels, n, seed=seed) for n in sorted((x, y)))
    assert set(small.tolist()) <= set(large.tolist())
    assert torch.bincount(labels[small]).tolist() == [min(x, y)] * 6


def test_per_class_depends_on_the_seed() -> None:
    labels = torch.arange(600) % 6
    assert torch.equal(per_class(labels, 5, seed=0), per_class(labels, 5, seed=0))
    assert not torch.equal(per_class(labels, 5, seed=0), per_class(labels, 5, seed=1))


@pytest.mark.parametrize("count", [11, 0, -1])
def test_a_count_that_a_class_cannot_give_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} images per class asked for, but class 0 has 10"):
        per_class(torch.arange(40) % 4, count, seed=0)


def test_held_out_images_are_a_part_of_every_class_at_least_one() -> None:
    labels = torch.cat([torch.zeros(50), torch.ones(3)]).long()
    kept, aside = holdout(labels, 0.1, seed=0)
    assert torch.bincount(labels[aside]).tolist() == [5, 1]
    assert torch.bincount(labels[kept]).tolist() == [45, 2]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_a_held_out_fraction_lies_between_0_and_1(fraction: float) -> None:
    with pytest.raises(ValueError, match=f"fraction is {fraction}"):
        holdout(torch.zeros(10).long(), fraction, seed=0)


def test_a_part_is_held_out_even_where_a_class_has_one_image_only() -> None:
    labels = torch.arange(100)
    kept, aside = holdout(labels, 0.1, seed=0)
    assert len(aside) == 10
    assert torch.cat([kept, aside]).sort().values.tolist() == list(range(100))


@pytest.mark.parametrize("split", ["80-20", "dirichlet"])
def test_a_partition_is_a_share_of_its_split(split: Any) -> None:
    labels = torch.arange(400) % 10
    shares = [Partition(split, part, 2, seed=3).indices(labels) for part in range(2)]
    assert torch.cat(shares).sort().values.tolist() == list(range(400))
    whole = dirichlet(labels, seed=3) if split == "dirichlet" else split_80_20(labels, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(shares, whole, strict=True))
    with pytest.raises(ValueError, match="no split '80-20' for 3 models"):
        Partition("80-20", 0, 3, seed=0).indices(labels)
