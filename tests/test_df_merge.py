"""DF-Merge: the search, the average that it searches, and its ends."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from tiny import Snapshot, assert_same_state, loader, marked, net, same_parameters

import npmerge as npm
from npmerge.aggregate import diagonal_fisher, mean
from npmerge.aggregate.dynamic_fisher import df_merge, search, weighted
from npmerge.correct import reset_batchnorm
from npmerge.evaluate import score


def test_the_search_finds_the_maximum_of_a_concave_function_in_61_trials() -> None:
    top = np.array([0.3, 0.8, 0.55])

    def worth(point: Sequence[float]) -> float:
        return 0.9 - float(((np.array(point) - top) ** 2).sum())

    tried = search(worth, 3, trials=50, seed=0)
    assert tried[0][0] == [1, 1, 1]
    assert len(tried) == 61
    best = max(value for _, value in tried)
    by_chance = np.random.default_rng(0).random((61, 3)).tolist()
    assert best > max(map(worth, by_chance))
    assert best > 0.89
    assert search(worth, 3, trials=4, seed=0) == tried[:15]


def test_the_average_is_weighted_as_by_hand() -> None:
    models = [net(seed).double() for seed in range(3)]
    data = [(x.double(), y) for x, y in loader(8)]
    known = [diagonal_fisher(model, data, expectation="exact") for model in models]
    merged = weighted(models, known, [0.5, 0.2, 1.0])
    for name, value in merged.named_parameters():
        a, b, c = (model.get_parameter(name).detach() for model in models)
        f, g, h = (fisher[name] + 1e-6 for fisher in known)
        expected = (0.5 * f * a + 0.2 * g * b + h * c) / (0.5 * f + 0.2 * g + h)
        assert torch.allclose(value, expected, rtol=1e-12)


def test_with_one_model_and_all_of_it_the_average_is_the_model() -> None:
    a = net(0)
    known = [diagonal_fisher(a, loader(8))]
    for mine, own in zip(weighted([a], known).parameters(), a.parameters(), strict=True):
        assert torch.allclose(mine, own, rtol=1e-6)


def test_with_equal_information_and_a_base_it_is_task_arithmetic() -> None:
    """Of equal models each gives ``c_i`` of the same task vector: the best of all sums is found."""
    base, a = net(0, norm=False).double(), net(1, norm=False).double()
    data = [(x.double(), y) for x, y in loader(16)]
    found = df_merge([a, a], data, base=base, trials=0)
    c = found.details["chosen"]
    scaled = [mean(a, base, alpha=share) for share in c]
    f, g = (diagonal_fisher(m, data, expectation="sampled", examples=30) for m in scaled)
    for name, value in found.model.named_parameters():
        p, q = base.get_parameter(name), a.get_parameter(name)
        weights = f[name] + 1e-6, g[name] + 1e-6
        share = 2 * (weights[0] * c[0] + weights[1] * c[1]) / (weights[0] + weights[1])
        assert torch.allclose(value, p + share * (q - p), rtol=1e-9), name


def test_the_ends_of_a_pair_are_the_models_and_its_best_is_no_worse() -> None:
    a, b, data = net(0), net(1), loader(64)
    found = df_merge([a, b], data)
    assert len(found.details["trials"]) == 21
    worth = {round(c[0], 2): value for c, value in found.details["trials"]}
    for share, model in ((1.0, a), (0.0, b)):
        plain = reset_batchnorm(mean(model, model), data)
        assert worth[share] == pytest.approx(score(plain, data).top1 / 100)
    best = score(reset_batchnorm(found.model, data), data).top1 / 100
    assert best == pytest.approx(max(worth.values()))


def test_where_nothing_differs_the_middle_is_taken_and_the_model_is_kept() -> None:
    a = net(0)
    found = df_merge([a, a], loader())
    assert found.details["chosen"] == [0.5, 0.5]
    for mine, own in zip(found.model.parameters(), a.parameters(), strict=True):
        assert torch.allclose(mine, own, rtol=1e-5)


def test_the_search_begins_with_the_fisher_average_and_ends_no_worse() -> None:
    models, data = [net(seed) for seed in range(3)], loader(48)
    found = df_merge(models, data, trials=3)
    (first, worth), *others = found.details["trials"]
    assert first == [1, 1, 1]
    assert len(others) == 13
    again = df_merge(models, data, trials=3)
    assert_same_state(again.model.state_dict(), found.model.state_dict())
    assert score(reset_batchnorm(found.model, data), data).top1 / 100 >= worth


def test_models_and_base_are_not_changed() -> None:
    models = [marked(net(seed)) for seed in range(3)]
    before = [Snapshot.of(model) for model in models]
    df_merge(models[:2], loader())
    df_merge(models[:2], loader(), base=models[2], trials=1)
    for model, snapshot in zip(models, before, strict=True):
        snapshot.assert_still(model)


def test_one_model_and_a_negative_number_of_trials_are_refused() -> None:
    with pytest.raises(ValueError, match="1 models and trials 50: give at least two models"):
        df_merge([net(0)], loader())
    with pytest.raises(ValueError, match="trials -1"):
        df_merge([net(0), net(1)], loader(), trials=-1)


@pytest.mark.parametrize("count", [2, 3])
def test_it_is_a_method_like_any_other(count: int) -> None:
    models = [net(seed) for seed in range(count)]
    ways = {"aggregate": "df_merge", "aggregate_options": {"trials": 1}}
    merged = npm.merge(models, loader(), **ways)
    assert torch.isfinite(merged.model(torch.zeros(1, 3, 8, 8))).all()
    assert not same_parameters(merged.model, models[0])
