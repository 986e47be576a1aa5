"""Optimal transport of channels: an assignment between equal widths, copies given back between others."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from test_zips import alignment, indicators, widened
from tiny import Snapshot, assert_same_state, loader, marked, net
from torch import Tensor, nn

import npmerge as npm
from npmerge.aggregate import mean
from npmerge.align.transport import ot, plans
from npmerge.methods import METHODS
from npmerge.models import resnet20
from npmerge.symmetry import symmetry_on
from npmerge.zips.optimal_transport import ot_fusion

DATA = loader(dtype=torch.float64)
IMAGES = DATA[0][0]


def convnet(seed: int = 0) -> nn.Module:
    return net(seed).double().eval()


def doubled(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """The same function: every channel twice, shuffled, the weights behind them shared out."""
    groups = symmetry_on(model, IMAGES)
    found = []
    for group, (_, unmerge) in zip(groups, indicators(groups, {}, seed), strict=True):
        twice = unmerge.repeat(2, 1)[torch.randperm(2 * group.size)]
        found.append((twice.T / 2, twice))
    return widened(model, groups, found)


def two_layers(*weights: Tensor) -> nn.Module:
    model = nn.Sequential()
    for weight in weights:
        layer = nn.Linear(weight.shape[1], len(weight), bias=False, dtype=torch.float64)
        layer.weight.data.copy_(weight)
        model.append(layer)
    return model


def test_between_equal_widths_it_is_the_assignment_of_least_distance_layer_by_layer() -> None:
    """The second layer's weights are compared once their inputs are carried."""
    torch.manual_seed(0)
    first, second = ([torch.randn(n, 7).double() for n in (7, 7, 3)] for _ in range(2))
    a, b = two_layers(*first), two_layers(*second)
    data = [(torch.randn(20, 7).double(), torch.zeros(20))]
    one = torch.from_numpy(linear_sum_assignment(cdist(first[0], second[0]))[1])
    two = torch.from_numpy(linear_sum_assignment(cdist(first[1], second[1][:, one]))[1])
    other = torch.from_numpy(linear_sum_assignment(cdist(first[1], second[1]))[1])
    assert not torch.equal(two, other)
    found = ot(a, b, data, cost="weights")
    assert [m.tolist() for m in found.maps] == [one.tolist(), two.tolist()]


def test_activations_are_compared_on_so_many_examples() -> None:
    torch.manual_seed(0)
    a, b = (two_layers(torch.randn(5, 4).double(), torch.randn(2, 5).double()) for _ in range(2))
    x = torch.randn(40, 4).double()
    data = [(part, torch.zeros(len(part))) for part in x.split(7)]
    for examples, metric in ((10, "euclidean"), (40, "sqeuclidean"), (40, "cosine")):
        u, v = (model.get_submodule("0")(x[:examples]).detach().T for model in (a, b))
        expected = linear_sum_assignment(cdist(u, v, metric))[1]  # type: ignore[call-overload]
        found = ot(a, b, data, metric=metric, examples=examples)
        assert found.maps[0].tolist() == expected.tolist()


@pytest.mark.parametrize("cost", ["activations", "weights"])
@pytest.mark.parametrize("build", [convnet, lambda: resnet20(4, 0.25, image_size=8).double()])
def test_a_permuted_copy_is_put_back_in_order(build, cost: str) -> None:  # type: ignore[no-untyped-def]
    a = build()
    groups = symmetry_on(a, IMAGES)
    b = alignment(groups, 1).apply(a)
    assert_same_state(ot(a, b, DATA, cost=cost).apply(b).state_dict(), a.state_dict())
    merged = ot_fusion([a, b, b], DATA, cost=cost).model
    assert torch.allclose(merged(IMAGES), a(IMAGES), atol=1e-9)
    assert not torch.allclose(mean(a, b)(IMAGES), a(IMAGES), atol=1e-3)


def test_of_equal_widths_fusion_is_the_mean_of_the_aligned_models() -> None:
    a, b = convnet(0), convnet(1)
    expected = mean(a, ot(a, b, DATA).apply(b))
    assert_same_state(ot_fusion([a, b], DATA).model.state_dict(), expected.state_dict())
    paper = ot_fusion([a, b], DATA, inputs="paper").model
    assert_same_state(paper.state_dict(), expected.state_dict())


@pytest.mark.parametrize("cost", ["activations", "weights"])
def test_a_copy_with_doubled_channels_fuses_back_exactly_as_the_papers_inputs_do_not(
    cost: str,
) -> None:
    narrow = convnet()
    wide = doubled(narrow)
    assert torch.allclose(wide(IMAGES), narrow(IMAGES), atol=1e-9)
    fused = ot_fusion([narrow, wide], DATA, cost=cost).model
    assert torch.allclose(fused(IMAGES), narrow(IMAGES), atol=1e-9)
    paper = ot_fusion([narrow, wide], DATA, cost=cost, inputs="paper").model
    assert not torch.allclose(paper(IMAGES), narrow(IMAGES), atol=1e-2)


def test_the_anchors_width_is_kept_whichever_it_is() -> None:
    narrow, wide = convnet(0), doubled(convnet(1))
    for onto, anchor in ((0, narrow), (1, wide), (-1, wide)):
        fused = ot_fusion([narrow, wide], DATA, onto=onto).model
        shapes = [p.shape for p in fused.parameters()]
        assert shapes == [p.shape for p in anchor.parameters()]
        assert fused(IMAGES).isfinite().all()


def test_plans_have_uniform_marginals_exact_or_not() -> None:
    narrow, wide = convnet(0), doubled(convnet(1))
    many, few = (symmetry_on(model, IMAGES).groups for model in (wide, narrow))
    for regularisation in (0.0, 0.5):
        found = plans(wide, narrow, many, few, DATA, regularisation=regularisation)
        for plan in found:
            for side in (0, 1):
                share = torch.full((plan.shape[1 - side],), 1 / plan.shape[1 - side]).double()
                assert torch.allclose(plan.sum(side), share, atol=1e-9)
        if not regularisation:
            assert all(int((plan > 0).sum()) <= sum(plan.shape) - 1 for plan in found)
    sharp = plans(wide, wide, many, many, DATA, regularisation=2.0)
    assert all(bool((plan > 0).all()) for plan in sharp)


def test_heads_and_depthwise_channels_stay_permutations_under_regularisation() -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Flatten()
    a = nn.Sequential(*layers, nn.Linear(144, 2)).double()
    b = copy.deepcopy(a)
    for parameter in b.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    zipped = ot_fusion([a, b], DATA, regularisation=1.0).details["zip"]
    assert all(torch.equal(2 * merge, (merge > 0).double()) for merge in zipped.merges[0])


def test_without_pot_equal_widths_do_and_others_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    a, b = convnet(0), convnet(1)
    ot_fusion([a, b], DATA)
    with pytest.raises(ValueError, match=r"pip install npmerge\[ot\]"):
        ot_fusion([a, doubled(b)], DATA)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"cost": "loss"}, "unknown cost 'loss': choose one of activations, weights"),
        ({"metric": "l1"}, "unknown metric 'l1'"),
        ({"inputs": "both"}, "unknown inputs 'both'"),
        ({"examples": 0}, "examples is 0"),
        ({"regularisation": -1.0}, r"regularisation is -1.0"),
        ({"onto": 2}, "onto is 2, but there are 2 models"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ot_fusion([convnet(0), convnet(1)], DATA, **options)  # type: ignore[arg-type]


def test_weights_that_are_not_finite_are_named() -> None:
    models: Sequence[nn.Module] = convnet(0), convnet(1)
    models[1].get_parameter("0.weight").data[0] = float("nan")
    for others in (models, (models[1], doubled(convnet(0)))):
        with pytest.raises(ValueError, match="not finite"):
            ot_fusion(others, DATA, cost="weights")
    with pytest.raises(ValueError, match="models has 1"):
        ot_fusion(models[:1], DATA)


def test_models_and_their_modes_stay_and_both_are_methods() -> None:
    a, b = (marked(net(seed)) for seed in (0, 1))
    before = [Snapshot.of(model) for model in (a, b)]
    ot_fusion([a, b], loader())
    for snapshot, model in zip(before, (a, b), strict=True):
        snapshot.assert_still(model)
    assert METHODS["ot"].kind == "align"
    merged = npm.merge([a, doubled(b)], loader(), aggregate="ot_fusion")
    assert [p.shape for p in merged.model.parameters()] == [p.shape for p in a.parameters()]
    assert merged.details["zip"].widths == (6, 6, 5)
