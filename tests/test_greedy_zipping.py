"""ZipIt!: clusters by hand, and what they do to networks."""

from __future__ import annotations

import copy

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from tiny import Snapshot, assert_same_state, loader, marked, net
from torch import Tensor, nn

import npmerge as npm
from npmerge.zips.greedy_zipping import clusters, zipit


def symmetric(size: int, entries: dict[tuple[int, int], float]) -> Tensor:
    found = torch.eye(size, dtype=torch.float64)
    for (i, j), value in entries.items():
        found[i, j] = found[j, i] = value
    return found


def random_similarity(channels: int, models: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50, models * channels, generator=generator, dtype=torch.float64)
    return torch.corrcoef(x.T), torch.arange(models).repeat_interleave(channels)


def test_the_most_similar_two_are_merged_and_a_cluster_is_what_its_less_similar_half_is() -> None:
    entries = {(0, 2): 0.9, (0, 3): 0.8, (2, 3): 0.7, (0, 1): 0.6, (1, 2): 0.1, (1, 3): 0.2}
    origins = torch.tensor([0, 0, 1, 1])
    # 0 and 2 first; their cluster is 0.7 alike to 3 and 0.1 to 1, and 1 and 3 are 0.2 alike.
    found = clusters(symmetric(4, entries), origins, 2, alpha=1.0, beta=1.0)
    assert found.tolist() == [0, 1, 0, 0]
    # A penalty of 1/4 leaves 0.175 of the 0.7.
    found = clusters(symmetric(4, entries), origins, 2, alpha=0.25, beta=1.0)
    assert found.tolist() == [0, 1, 0, 1]


def test_merges_within_a_model_have_a_budget() -> None:
    entries = {(0, 1): 0.9, (2, 3): 0.8, (0, 2): 0.3, (1, 3): 0.2, (0, 3): 0.1, (1, 2): 0.1}
    origins = torch.tensor([0, 0, 1, 1])
    found = clusters(symmetric(4, entries), origins, 2, alpha=0.1, beta=1.0)
    assert found.tolist() == [0, 0, 1, 1]
    found = clusters(symmetric(4, entries), origins, 2, alpha=0.1, beta=0.0)
    assert found.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("seed", range(3))
def test_without_either_it_pairs_channels_of_two_models_no_better_than_an_assignment(
    seed: int,
) -> None:
    similarity, origins = random_similarity(12, 2, seed)
    found = clusters(similarity, origins, 12, alpha=0.0, beta=0.0)
    assert sorted(found[:12].tolist()) == sorted(found[12:].tolist()) == list(range(12))
    second = torch.argsort(found[12:])[found[:12]]
    between = similarity[:12, 12:]
    rows, columns = linear_sum_assignment(between, maximize=True)
    assert between[range(12), second].sum() <= between[rows, columns].sum() + 1e-12


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.0), (0.3, 0.125), (1.0, 1.0)])
@pytest.mark.parametrize("models", [2, 3, 5])
def test_it_agrees_with_a_search_of_all_pairs_at_every_step_and_stops_at_the_width(
    models: int, alpha: float, beta: float
) -> None:
    similarity, origins = random_similarity(7, models, 1)
    found = clusters(similarity, origins, 7, alpha=alpha, beta=beta)
    assert len(found.unique()) == 7

    parts = [{number} for number in range(len(origins))]
    similar = similarity.clone()
    left = [int(beta * 7 * (models - 1) / models)] * models
    while len(parts) > 7:

        def within(i: int, j: int) -> int | None:
            own = {int(origins[k]) for k in parts[i] | parts[j]}
            return own.pop() if len(own) == 1 else None

        pairs = [
            (float(similar[i, j]), i, j)
            for i in range(len(parts)) for j in range(i + 1, len(parts))
            if within(i, j) is None or left[within(i, j)]
        ]  # fmt: skip
        _, i, j = max(pairs)
        if (own := within(i, j)) is not None:
            left[own] -= 1
        row = torch.minimum(similar[i], similar[j])
        similar[i] = similar[:, i] = alpha * row if alpha else row - 2
        parts[i] |= parts.pop(j)
        keep = [k for k in range(len(similar)) if k != j]
        similar = similar[keep][:, keep]
    assert {frozenset(p) for p in parts} == {
        frozenset((found == k).nonzero()[:, 0].tolist()) for k in range(7)
    }


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_rows_of_both_matrices_sum_to_one(share: float) -> None:
    merged = zipit([net(seed) for seed in range(3)], loader(), share=share)
    found = merged.details["zip"]
    for merges, unmerges in zip(found.merges, found.unmerges, strict=True):
        assert torch.allclose(sum(m.sum(1) for m in merges), torch.ones(len(merges[0])).double())
        assert all((u.sum(1) == 1).all() for u in unmerges)


def test_a_model_and_itself_or_its_permutation_give_the_model() -> None:
    a = lively()
    x = torch.cat([x for x, _ in loader()])
    merged = zipit([a, a], loader()).model
    assert torch.allclose(merged(x), a(x), atol=1e-5)
    b = copy.deepcopy(a)
    groups = npm.symmetry.find_symmetry(a, x)
    npm.symmetry.permute_randomly(b, groups, torch.Generator().manual_seed(1))
    merged = zipit([a, b], loader(), groups=groups).model
    assert torch.allclose(merged(x), a(x), atol=1e-5)
    merged = zipit([a, b, a], loader(), alpha=1.0).model  # a penalty would part the third copy
    assert torch.allclose(merged(x), a(x), atol=1e-5)
    for name, value in merged.state_dict().items():
        assert value.shape == a.state_dict()[name].shape, name


def lively() -> nn.Sequential:
    """Channels of which no two are alike, and none is dead."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 6, 3), nn.GELU(),
        nn.Flatten(), nn.Linear(6 * 16, 5), nn.GELU(), nn.Linear(5, 4),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("count", [2, 3])
def test_nothing_zipped_is_the_mean_of_the_logits(count: int) -> None:
    models = [net(seed).eval() for seed in range(count)]
    merged = zipit(models, loader(), share=0.0).model.eval()
    x = torch.cat([x for x, _ in loader()])
    assert torch.allclose(merged(x), sum(m(x) for m in models) / count, atol=1e-4, rtol=1e-4)
    assert merged[3].weight.shape[:2] == (6 * count, 6 * count)


def test_a_partial_zip_is_one_trunk_with_the_models_own_heads_behind_it() -> None:
    models = [net(0).eval(), net(1).eval()]
    result = zipit(models, loader(), share=0.5)
    unmerges = result.details["zip"].unmerges
    merged, x = result.model.eval(), torch.cat([x for x, _ in loader()])
    widths = result.details["zip"].widths
    assert widths[0] == 6
    assert widths[-1] == 10
    number = sum(width == small for width, small in zip(widths, (6, 6, 5), strict=True))
    stop = (0, 3, 8)[number]
    trunk = merged[:stop](x)
    logits = [
        m[stop:](torch.tensordot(u.float(), trunk, ([1], [1])).movedim(0, 1))
        for m, u in zip(models, unmerges[number - 1], strict=True)
    ]
    assert torch.allclose(merged(x), sum(logits) / 2, atol=1e-4, rtol=1e-4)


def test_groups_that_allow_only_permutations_are_permuted() -> None:
    def depthwise(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
        )  # fmt: skip

    models = [depthwise(0), depthwise(1)]
    aligned = npm.align.permute(*models, loader()).apply(models[1])
    expected = npm.aggregate.mean(models[0], aligned)
    for share in (0.0, 1.0):
        merged = zipit(models, loader(), share=share).model
        for name, value in merged.state_dict().items():
            assert torch.allclose(value, expected.state_dict()[name], atol=1e-6), name


def test_the_models_stay_as_they_are() -> None:
    models = [marked(net(0)), marked(net(1))]
    before = [Snapshot.of(model) for model in models]
    zipit(models, loader())
    for model, snapshot in zip(models, before, strict=True):
        snapshot.assert_still(model)


def test_wrong_options_and_models_are_refused() -> None:
    models = [net(0), net(1)]
    for name in ("alpha", "beta", "share"):
        with pytest.raises(ValueError, match=rf"{name} is 1\.5: it must be from 0 to 1"):
            zipit(models, loader(), **{name: 1.5})
    with pytest.raises(ValueError, match="models has 1: give at least two"):
        zipit(models[:1], loader())
    with pytest.raises(ValueError, match="merge two models of one architecture"):
        zipit([net(0), net(0, width=8)], loader())


@pytest.mark.parametrize("count", [2, 3])
def test_it_is_a_method_like_any_other(count: int) -> None:
    models = [net(seed) for seed in range(count)]
    merged = npm.merge(models, loader(), aggregate="zipit").model
    expected = npm.correct.reset_batchnorm(zipit(models, loader()).model, loader())
    assert_same_state(merged.state_dict(), expected.state_dict())
