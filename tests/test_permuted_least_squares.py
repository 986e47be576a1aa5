"""PLeaS: between the average and the ensemble, and never worse than what it starts from."""

from __future__ import annotations

import pytest
import torch
from tiny import Snapshot, loader, marked, net, same_parameters
from torch import Tensor, nn

import npmerge as npm
from npmerge.aggregate import mean
from npmerge.align import covariances
from npmerge.zips.permuted_least_squares import pleas


def inputs() -> Tensor:
    return torch.cat([x for x, _ in loader()])


def small(seed: int) -> nn.Sequential:
    """A map of 3x3 is flattened before the last layer but one."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 2, bias=False),
        nn.ReLU(), nn.Flatten(), nn.Linear(6 * 9, 5), nn.ReLU(), nn.Linear(5, 4),
    ).double()  # fmt: skip


def data(count: int = 200) -> list[tuple[Tensor, Tensor]]:
    return loader(count, 50, dtype=torch.float64)


def test_equal_models_at_their_own_width_give_the_model() -> None:
    a = net(0)
    assert same_parameters(pleas([a, a], loader()).model, a)


@pytest.mark.parametrize("count", [2, 3])
def test_all_kept_apart_it_is_the_ensemble(count: int) -> None:
    models = [net(seed).eval() for seed in range(count)]
    merged = pleas(models, loader(), ratio=1.0).model.eval()
    logits = sum(model(inputs()) for model in models)
    assert torch.allclose(merged(inputs()), logits / count, atol=1e-4, rtol=1e-4)
    assert torch.equal(merged(inputs()).argmax(1), logits.argmax(1))


def test_widths_grow_by_the_ratio_for_each_further_model() -> None:
    for count in (2, 3):
        models = [net(seed) for seed in range(count)]
        found = pleas(models, loader(), ratio=0.5).details["zip"]
        assert found.widths == (6 + 3 * (count - 1), 6 + 3 * (count - 1), 5 + 2 * (count - 1))


def test_the_pairs_that_correlate_least_are_kept_apart() -> None:
    a, b = small(0), small(1)
    groups = npm.symmetry.find_symmetry(a, data()[0][0])
    found = pleas([a, b], data(), groups=groups, ratio=0.5).details["zip"]
    measured = covariances(a, b, data(), groups=groups).correlations()
    for correlation, (first, second) in zip(measured, found.unmerges, strict=True):
        joined = (first == second).all(1)
        alike = correlation.diagonal()
        assert 0 < joined.sum() < len(alike)
        assert alike[joined].min() >= alike[~joined].max()


def seen(model: nn.Sequential, place: int) -> Tensor:
    return model[:place](data()[0][0]).detach()


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_each_layer_is_the_least_squares_of_what_was_merged(ratio: float) -> None:
    models = [small(0), small(1)]
    one = data()[:1]
    result = pleas(models, one, ratio=ratio, ridge=0.0)
    start = result.details["zip"].apply(models)
    merges = result.details["zip"].merges

    def joined(group: int | None, place: int) -> Tensor:
        rows = [seen(model, place) for model in models]
        if group is None:
            return (rows[0] + rows[1]) / 2
        return sum(
            torch.tensordot(m, x.unflatten(1, (m.shape[1], -1)), ([1], [1]))
            .movedim(0, 1)
            .flatten(1)
            if x.ndim == 2
            else torch.tensordot(m, x, ([1], [1])).movedim(0, 1)
            for m, x in zip(merges[group], rows, strict=True)
        )

    for place, before, after in ((0, None, 0), (2, 0, 1), (5, 1, 2), (7, 2, None)):
        z, t = joined(before, place), joined(after, place + 1 if place != 2 else 3)
        layer = result.model[place]
        layer.zero_grad()
        loss = (layer(z) - t).square().sum()
        loss.backward()
        zipped = (start[place](z) - t).square().sum()
        assert loss <= zipped + 1e-9
        assert all(p.grad.abs().max() < 1e-6 * (1 + zipped) for p in layer.parameters()), place


@pytest.mark.parametrize("ridge", [1e-3, 1.0])
def test_the_residual_is_never_above_the_average_s(ridge: float) -> None:
    models = [small(0), small(1)]
    merged, plain = pleas(models, data(), ridge=ridge).model, mean(*models)
    for place in (0, 2, 5, 7):
        errors = []
        for model in (merged, plain):
            error = torch.zeros((), dtype=torch.float64)
            for x, _ in data():
                z = sum(m[:place](x) for m in models) / 2
                t = sum(m[: place + 1](x) for m in models) / 2
                error += (model[place](z) - t).square().sum().detach()
            errors.append(float(error))
        assert errors[0] <= (0.99 * errors[1] if place else 1e-20), (
            place
        )  # of the first it is exact


def test_a_strong_ridge_leaves_the_average() -> None:
    a, b = small(0), small(1)
    strong = pleas([a, b], data(), ridge=1e12).model
    for p, q in zip(strong.parameters(), mean(a, b).parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-8)
    assert not torch.allclose(
        pleas([a, b], data()).model[2].weight, mean(a, b)[2].weight, atol=0.01
    )


def test_groups_that_allow_only_permutations_keep_their_width() -> None:
    def depthwise(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4),
        )  # fmt: skip

    merged = pleas([depthwise(0), depthwise(1)], loader(), ratio=0.5).model
    assert [p.shape[0] for n, p in merged.named_parameters() if n.endswith("weight")] == [
        6,
        6,
        12,
        4,
    ]


def test_the_models_stay_as_they_are_and_no_hook_is_left() -> None:
    models = [marked(net(0)), marked(net(1))]
    before = [Snapshot.of(model) for model in models]
    merged = pleas(models, loader(), ratio=0.5).model
    for model, snapshot in zip(models, before, strict=True):
        snapshot.assert_still(model)
    assert not any(m._forward_hooks for model in (*models, merged) for m in model.modules())


def test_wrong_options_and_models_are_refused() -> None:
    models = [net(0), net(1)]
    with pytest.raises(ValueError, match=r"ratio is 1\.5: it must be from 0 to 1"):
        pleas(models, loader(), ratio=1.5)
    with pytest.raises(ValueError, match=r"ridge is -1\.0: it must not be negative"):
        pleas(models, loader(), ridge=-1.0)
    with pytest.raises(ValueError, match="examples is 0"):
        pleas(models, loader(), examples=0)
    with pytest.raises(ValueError, match="models has 1: give at least two"):
        pleas(models[:1], loader())
    with pytest.raises(ValueError, match="merge two models of one architecture"):
        pleas([net(0), net(0, width=8)], loader())


@pytest.mark.parametrize("count", [2, 3])
def test_it_takes_models_that_any_method_has_aligned(count: int) -> None:
    models = [net(seed) for seed in range(count)]
    merged = npm.merge(
        models, loader(), align="weight_matching", aggregate="pleas",
        aggregate_options={"ratio": 0.5},
    )  # fmt: skip
    assert torch.isfinite(merged.model(inputs())).all()
    assert merged.details["zip"].widths[0] == 6 + 3 * (count - 1)
