"""Sinkhorn re-basin: soft maps act like permutations where they are some, and what is found is never worse."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable

import pytest
import torch
from architectures import (
    Attention,
    Drawn,
    Recurrent,
    Residual,
    images,
    plain,
    random_alignment,
    randomised,
)
from tiny import Snapshot, assert_same_state, loader, marked, net
from torch import Tensor, nn

from npmerge.aggregate import mean
from npmerge.align import Alignment, identity, permute, weight_matching
from npmerge.align.judging import corrected_loss
from npmerge.align.sinkhorn_rebasin import (
    DISTANCES,
    doubly_stochastic,
    sinkhorn,
    sinkhorn_loss,
)
from npmerge.data.streams import example_of
from npmerge.symmetry import symmetry_on
from npmerge.training import Learning

module = importlib.import_module("npmerge.align.sinkhorn_rebasin")

NETWORKS = [
    plain,
    Residual,
    Attention,
    Recurrent,
    lambda: Drawn([("plain", 4, True), ("depthwise", 4, True), ("concat", 3, False)]),
]


def inputs(model: nn.Module) -> Tensor:
    if isinstance(model, Attention | Recurrent):
        return torch.randn(4, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return images(4)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def same_maps(x: Alignment, y: Alignment) -> bool:
    return all(map(torch.equal, x.maps, y.maps))


def test_rows_and_columns_sum_to_one_and_the_order_of_scores_stays() -> None:
    scores = torch.randn(7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    soft = doubly_stochastic(scores, 100)
    for axis in (0, 1):
        assert torch.allclose(soft.sum(axis), torch.ones(7, dtype=torch.float64), rtol=0, atol=1e-6)
    shifted = scores + torch.arange(7.0) - torch.arange(7.0)[:, None]
    assert torch.allclose(doubly_stochastic(shifted, 100), soft)
    two = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)  # by hand: e / (e + 1)
    share = torch.e / (torch.e + 1)
    assert torch.allclose(doubly_stochastic(two, 1)[0], torch.tensor([share, 1 - share]).double())


@pytest.mark.parametrize("make", NETWORKS)
def test_permutation_matrices_do_what_permutations_do(make: Callable[[], nn.Module]) -> None:
    model = randomised(make())
    groups = symmetry_on(model, inputs(model)).groups
    planted = random_alignment(groups)
    hard = [torch.eye(len(p), dtype=torch.float64)[p] for p in planted.maps]
    mapped = module._mapped(weights(model), groups, hard)
    expected = planted.mapped(model.state_dict())
    assert set(mapped) == {name for name in expected if name in weights(model)}
    for name, value in mapped.items():
        assert torch.allclose(value, expected[name], rtol=0, atol=1e-12), name


@pytest.mark.parametrize("make", [Attention, Residual])
def test_soft_maps_have_the_gradient_of_finite_differences(make: Callable[[], nn.Module]) -> None:
    model = randomised(make())
    groups = symmetry_on(model, inputs(model)).groups
    generator = torch.Generator().manual_seed(0)
    maps = [
        torch.rand(g.size, g.size, dtype=torch.float64, generator=generator).requires_grad_()
        for g in groups
    ]

    def value(*given: Tensor) -> Tensor:
        mapped = module._mapped(weights(model), groups, given)
        return torch.stack([tensor.sin().sum() for tensor in mapped.values()]).sum()

    assert torch.autograd.gradcheck(value, maps, fast_mode=True)


@pytest.mark.parametrize(
    ("make", "distance"),
    [
        (plain, "inner"),
        (Residual, "inner"),
        (Recurrent, "inner"),
        (Residual, "l1"),
        (Residual, "l2"),
        (Attention, "l1"),
        (Attention, "l2"),
    ],
)
def test_a_planted_permutation_is_found(make: Callable[[], nn.Module], distance: str) -> None:
    a = randomised(make())
    planted = random_alignment(symmetry_on(a, inputs(a)))
    found = sinkhorn(a, planted.apply(a), inputs(a), distance=distance)
    assert same_maps(found, planted.inverse())


@pytest.mark.parametrize("distance", DISTANCES)
def test_it_is_never_farther_than_at_the_start(distance: str) -> None:
    def far(alignment: Alignment) -> float:
        moved = alignment.mapped(b.state_dict())
        return float(module._distance(weights(a), moved, distance))

    a, b = randomised(Residual()), randomised(Residual(), 1)
    matched = weight_matching(a, b, images())
    groups = matched.groups
    still = Alignment.from_permutations(groups, [torch.arange(g.size) for g in groups])
    found = sinkhorn(a, b, images(), distance=distance, groups=groups)
    assert found.is_permutation
    assert far(found) < far(still)
    wild = {"distance": distance, "start": "weight_matching", "steps": 5, "lr": 1e3}
    assert far(sinkhorn(a, b, images(), groups=groups, **wild)) <= min(far(matched), far(still))


def test_squares_are_least_where_soft_maps_average_channels_and_inner_products_are_not() -> None:
    """Why the inner product is the default: of noise, every channel's best partner is their mean."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 8, 400, dtype=torch.float64, generator=generator)
    hard, soft = torch.eye(8, dtype=torch.float64), torch.full((8, 8), 1 / 8, dtype=torch.float64)
    assert DISTANCES["l2"](x, soft @ y) < 0.7 * DISTANCES["l2"](x, hard @ y)
    best = weight_matching(*(linear(w) for w in (x, y)), torch.zeros(2, 400).double()).maps[0]
    assert DISTANCES["inner"](x, y[best]) < DISTANCES["inner"](x, soft @ y)


def linear(rows: Tensor) -> nn.Module:
    model = nn.Sequential(nn.Linear(400, 8, bias=False), nn.ReLU(), nn.Linear(8, 1, bias=False))
    model = model.double()
    with torch.no_grad():
        model[0].weight.copy_(rows)
        model[2].weight.zero_()
    return model


@pytest.mark.parametrize("point", ["midpoint", "random"])
@pytest.mark.parametrize("norm", [True, False])
def test_the_loss_at_the_rounded_maps_is_at_most_that_at_the_start(point: str, norm: bool) -> None:
    a, b = net(0, norm=norm), net(1, norm=norm)

    def loss(alignment: Alignment) -> float:
        return corrected_loss(mean(a, alignment.apply(b)), loader())

    losses = {
        start: loss(sinkhorn_loss(a, b, loader(), point=point, start=start, epochs=5))
        for start in ("identity", "weight_matching", "permute")
    }
    assert losses["identity"] < loss(identity(a, b))
    assert losses["weight_matching"] <= loss(weight_matching(a, b, example_of(loader())))
    assert losses["permute"] <= loss(permute(a, b, loader()))
    still = sinkhorn_loss(a, b, loader(), point=point, epochs=3, lr=1e-9, noise=0.0)
    assert loss(still) == loss(identity(a, b))


def test_between_the_models_it_is_the_average_with_what_the_soft_maps_make_of_b() -> None:
    a, b = randomised(Residual()), randomised(Residual(), 1)
    planted = random_alignment(symmetry_on(a, images()))
    soft = module._SoftMaps(planted, weights(a), 0.0, 1e-3, 20, 0)  # as good as hard
    between = module._Between(a, b, soft, None).train()
    expected = mean(a, planted.apply(b)).train()
    assert torch.allclose(between(images()), expected(images()), rtol=0, atol=1e-9)
    drawn = module._Between(a, b, soft, 5)
    first, second = drawn(images()), drawn(images())
    assert not torch.allclose(first, second)
    again = module._Between(a, b, soft, 5)
    again.load_state_dict(drawn.state_dict())
    assert torch.equal(again(images()), drawn(images()))  # the third point of both


def test_attention_learns_between_its_models_too() -> None:
    a, b = randomised(Attention()), randomised(Attention(), 1)
    data = [{"x": inputs(a), "labels": torch.arange(4)}]
    found = sinkhorn_loss(a, b, data, epochs=30)
    losses = [corrected_loss(mean(a, one.apply(b)), data) for one in (found, identity(a, b))]
    assert losses[0] < losses[1]


def test_models_stay_the_best_epoch_counts_and_only_the_seed_matters() -> None:
    a, b = marked(net(0)), marked(net(1))
    before, epochs = [Snapshot.of(a), Snapshot.of(b)], []
    torch.manual_seed(0)
    options = {"epochs": 3, "point": "random", "seed": 4}
    learning = Learning(on_epoch=lambda epoch, _: epochs.append(epoch))
    found = sinkhorn_loss(a, b, loader(), learning=learning, **options)
    weighed = sinkhorn(a, b, example_of(loader()), seed=4)
    before[0].assert_still(a)
    before[1].assert_still(b)
    assert epochs == [1, 2, 3]
    torch.manual_seed(1)
    assert same_maps(sinkhorn_loss(a, b, loader(), **options), found)
    assert same_maps(sinkhorn(a, b, example_of(loader()), seed=4), weighed)


def test_a_model_without_symmetry_stays() -> None:
    a, b = nn.Sequential(nn.Linear(3, 4)), nn.Sequential(nn.Linear(3, 4))
    data = [(torch.randn(8, 3), torch.arange(8) % 4)]
    for found in (sinkhorn(a, b, data[0][0]), sinkhorn_loss(a, b, data)):
        assert_same_state(found.apply(b).state_dict(), b.state_dict())


def test_senseless_options_and_broken_models_are_named() -> None:
    a, b, x = net(0), net(1), example_of(loader())
    for options in ({"distance": "cosine"}, {"start": "permute"}):
        with pytest.raises(ValueError, match="unknown"):
            sinkhorn(a, b, x, **options)
    for options in ({"temperature": 0.0}, {"iterations": 0}):
        with pytest.raises(ValueError, match="must be positive"):
            sinkhorn(a, b, x, **options)
    with pytest.raises(ValueError, match="unknown point 'end'"):
        sinkhorn_loss(a, b, loader(), point="end")
    broken = copy.deepcopy(b)
    broken[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        sinkhorn(a, broken, x)
