"""Zip: which channels of which model make a merged one, held against copies of one function."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import Snapshot, assert_same_state, marked, net
from torch import Tensor, nn

from npmerge.aggregate import mean
from npmerge.align import Alignment
from npmerge.models import resnet20
from npmerge.symmetry import Group, symmetry_on
from npmerge.zips.widths import resized
from npmerge.zips.zipped import Zip, matched_groups

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()


def mlp(seed: int = 0, width: int = 6) -> nn.Module:
    torch.manual_seed(seed)
    layers = nn.Linear(192, width), nn.ReLU(), nn.Linear(width, 5), nn.ReLU(), nn.Linear(5, 4)
    return nn.Sequential(nn.Flatten(), *layers).double()


def convnet(seed: int = 0) -> nn.Module:
    return net(seed).double().eval()


def flat(seed: int = 0) -> nn.Module:
    """Its linear layer reads channels and positions, in one."""
    torch.manual_seed(seed)
    conv, pool = nn.Conv2d(3, 4, 3, padding=1), nn.AvgPool2d(4)
    return nn.Sequential(conv, nn.ReLU(), pool, nn.Flatten(), nn.Linear(16, 4)).double()


def residual(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = resnet20(4, 0.25, image_size=8).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in module.state_dict().values():
                if tensor.is_floating_point():
                    tensor.add_(torch.rand_like(tensor) / 2)
    return model


class Dense(nn.Module):
    """Two layers beside each other on one axis, each of its own width."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 3, 3)
        self.norm, self.last = nn.BatchNorm2d(10), nn.Linear(10, 4)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.one(x), x[..., 1:-1, 1:-1], self.two(x)], 1)
        out: Tensor = self.last(self.norm(both).relu().mean((2, 3)))
        return out


class Separable(nn.Module):
    """A depthwise convolution."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.deep = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6)
        self.last = nn.Conv2d(6, 4, 1)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.deep(self.first(x).relu()).relu()).mean((2, 3))
        return out


class Attention(nn.Module):
    """Heads around the dimensions of a head, three times on one axis."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.sizes = 2, 3, 4  # heads, dimensions of their keys, and of their values
        self.into, self.qkv, self.out = nn.Linear(24, 5), nn.Linear(5, 20), nn.Linear(8, 4)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x.reshape(len(x), 8, 24)).tanh()
        heads, keys, values = self.sizes
        q, k, v = (
            part.unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in self.qkv(x).split([heads * n for n in (keys, keys, values)], -1)
        )
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2)).mean(1)
        return out


Build = Callable[[int], nn.Module]
MODELS: list[Build] = [mlp, convnet, flat, residual, Dense, Separable, Attention]


def alignment(groups: Sequence[Group], seed: int) -> Alignment:
    generator = torch.Generator().manual_seed(seed)
    permutations = [torch.randperm(group.size, generator=generator) for group in groups]
    return Alignment.from_permutations(groups, permutations)


def indicators(
    groups: Sequence[Group], extra: Mapping[str, int], seed: int
) -> list[tuple[Tensor, Tensor]]:
    """Of each group the merge and the unmerge of a model with extra copies of channels, all of them shuffled."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for group in groups:
        copies = torch.randint(group.size, (extra.get(group.name, 0),), generator=generator)
        origin = torch.cat([torch.arange(group.size), copies])
        unmerge = torch.eye(group.size, dtype=torch.float64)[
            origin[torch.randperm(len(origin), generator=generator)]
        ]
        found.append((unmerge.T / unmerge.sum(0)[:, None], unmerge))
    return found


def widened(
    model: nn.Module, groups: Sequence[Group], found: Sequence[tuple[Tensor, Tensor]]
) -> nn.Module:
    """The same function with extra channels: what :func:`indicators` merges, the other way round."""
    free = tuple(replace(group, permutations_only="") for group in groups)
    zipped = Zip((free,), tuple((u,) for _, u in found), tuple((m,) for m, _ in found))
    return zipped.apply([model])


@pytest.mark.parametrize("build", MODELS)
def test_of_permutations_it_is_the_mean_of_the_aligned_models_bit_by_bit(build: Build) -> None:
    a, b = build(0).float(), build(1).float()
    groups = symmetry_on(a, IMAGES.float())
    aligned = alignment(groups, 3)
    for models in ((a, b), (copy.deepcopy(a).double(), copy.deepcopy(b).double())):
        found = Zip.of(aligned).apply(models)
        expected = mean(models[0], aligned.apply(models[1]))
        assert_same_state(expected.state_dict(), found.state_dict())


@pytest.mark.parametrize("build", MODELS)
def test_copies_with_doubled_and_shuffled_channels_become_the_function_again(build: Build) -> None:
    model = build(0)
    groups = symmetry_on(model, IMAGES)
    names = [g.name for g in groups] if build is not Attention else ["tanh"]
    sources = [
        indicators(groups, dict.fromkeys(names, extra), seed)
        for seed, extra in enumerate((0, 3, 1))
    ]
    models = [widened(model, groups, found) for found in sources]
    for other in models:
        assert torch.allclose(other(IMAGES), model(IMAGES), atol=1e-9)
        names_of = matched_groups([model, other], IMAGES)[1]
        assert [g.name for g in names_of] == [g.name for g in groups]
    zipped = Zip(
        matched_groups(models, IMAGES),
        tuple(tuple(m / 3 for m, _ in of) for of in zip(*sources, strict=True)),
        tuple(tuple(u for _, u in of) for of in zip(*sources, strict=True)),
    )
    merged = zipped.apply(models)
    assert torch.allclose(merged(IMAGES), model(IMAGES), atol=1e-9)
    assert {n: t.shape for n, t in merged.state_dict().items()} == {
        n: t.shape for n, t in model.state_dict().items()
    }


def test_heads_and_their_dimensions_are_joined_on_one_axis() -> None:
    model = Attention()
    groups = symmetry_on(model, IMAGES)
    heads, keys, values = sorted((g for g in groups if g.name != "tanh"), key=lambda g: g.size)
    found = indicators(groups, {heads.name: 1, values.name: 3}, 1)
    wide = widened(model, groups, found)
    assert isinstance(wide, Attention)
    wide.sizes = 3, keys.size, 7
    assert torch.allclose(wide(IMAGES), model(IMAGES), atol=1e-9)
    back = Zip(
        matched_groups([wide], IMAGES), tuple((m,) for m, _ in found), tuple((u,) for _, u in found)
    ).apply([wide])
    assert isinstance(back, Attention)
    back.sizes = model.sizes
    assert torch.allclose(back(IMAGES), model(IMAGES), atol=1e-9)


def test_where_nothing_is_produced_by_a_group_models_count_equally() -> None:
    """Classes stay: the last weights are divided by the number of models, the last bias is a mean."""
    a, b = mlp(0), mlp(1)
    groups = symmetry_on(a, IMAGES)
    sizes = [group.size for group in groups]
    eyes = [torch.eye(n, dtype=torch.float64) for n in sizes]
    zipped = Zip(
        (tuple(groups),) * 2, tuple((0.9 * e, 0.1 * e) for e in eyes), tuple((e, e) for e in eyes)
    )
    state, first, second = (model.state_dict() for model in (zipped.apply([a, b]), a, b))
    for name in first:
        share = 0.5 if name.startswith("5") else 0.9
        assert torch.allclose(state[name], share * first[name] + (1 - share) * second[name]), name


def test_where_two_groups_produce_one_entry_its_weights_sum_to_one() -> None:
    """A head's share times a dimension's: 0.9 * 0.9 to 0.1 * 0.1, which is 81 of 82."""
    a, b = Attention(0), Attention(1)
    groups = symmetry_on(a, IMAGES)
    eyes = [torch.eye(group.size, dtype=torch.float64) for group in groups]
    zipped = Zip(
        (tuple(groups),) * 2, tuple((0.9 * e, 0.1 * e) for e in eyes), tuple((e, e) for e in eyes)
    )
    bias = zipped.apply([a, b]).get_parameter("qkv.bias")
    expected = (81 * a.qkv.bias + b.qkv.bias) / 82
    assert torch.allclose(bias, expected)
    assert not torch.allclose(bias, 0.9 * a.qkv.bias + 0.1 * b.qkv.bias, atol=1e-3)


def test_a_running_variance_is_the_mean_of_the_variances_and_integers_are_the_first_models() -> (
    None
):
    a, b = convnet(0), convnet(1)
    b.get_buffer("1.num_batches_tracked").fill_(7)
    groups = symmetry_on(a, IMAGES)
    still = Alignment.from_permutations(groups, [torch.arange(g.size) for g in groups])
    merged = Zip.of(still).apply([a, b])
    variances = [model.get_buffer("1.running_var") for model in (a, b)]
    assert torch.equal(merged.get_buffer("1.running_var"), torch.stack(variances).mean(0))
    assert int(merged.get_buffer("1.num_batches_tracked")) == 0


@pytest.mark.parametrize("build", [convnet, flat, residual, Separable])
def test_a_model_of_another_width_says_so_runs_learns_and_is_stored(
    build: Build, tmp_path: Path
) -> None:
    """Its layers' fields are those of a layer that was built so; batch norm in training shows it."""
    model = build(0).float()
    groups = symmetry_on(model, IMAGES.float())
    found = indicators(groups, {g.name: 2 for g in groups}, 0)
    wide = widened(model, groups, found).train()
    copied = copy.deepcopy(wide)
    for module in wide.modules():
        if isinstance(module, nn.Conv2d):
            width, per = module.weight.shape[:2]
            assert (module.out_channels, module.in_channels) == (width, per * module.groups)
        if isinstance(module, nn.BatchNorm2d):
            assert module.num_features == len(
                module.running_mean if module.running_mean is not None else ()
            )
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == module.weight.shape
    wide(IMAGES.float()).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in wide.parameters())
    torch.save(copied.state_dict(), tmp_path / "wide.pt")
    wide.load_state_dict(torch.load(tmp_path / "wide.pt"))
    assert torch.equal(wide.eval()(IMAGES.float()), copied.eval()(IMAGES.float()))


def test_what_is_given_stays_and_frozen_and_shared_parameters_stay_so() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.two.weight, self.last = self.one.weight, nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.two(self.one(self.first(x).relu()).relu()).relu())
            return out

    model = Shared().double()
    x = torch.randn(5, 3, dtype=torch.float64)
    model.first.bias.requires_grad_(False)  # noqa: FBT003
    groups = symmetry_on(model, x)
    found = indicators(groups, {group.name: 2 for group in groups}, 0)
    wide = widened(model, groups, found)
    assert torch.allclose(wide(x), model(x), atol=1e-9)
    assert wide.get_parameter("one.weight") is wide.get_parameter("two.weight")
    assert wide.get_submodule("two").in_features == wide.get_submodule("one").in_features == 6
    assert [p.requires_grad for p in wide.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    a, b = marked(net(0)), marked(net(1))
    before = [Snapshot.of(m) for m in (a, b)]
    Zip.of(alignment(symmetry_on(a, IMAGES.float()), 0)).apply([a, b])
    for snapshot, m in zip(before, (a, b), strict=True):
        snapshot.assert_still(m)


def test_mixed_heads_or_depthwise_channels_and_odd_weights_are_refused() -> None:
    a = Separable()
    groups = symmetry_on(a, IMAGES)
    half = torch.full((6, 6), 1 / 6, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"mixed in group 'deep', but 'convolution'|mixed in group"
    ):
        Zip((groups.groups,), ((half,),) * len(groups), ((half,),) * len(groups))
    plain = symmetry_on(mlp(), IMAGES).groups
    eyes = [torch.eye(g.size, dtype=torch.float64) for g in plain]
    for merges, match in (
        ([(2 * e,) for e in eyes], "sum to one but for 1"),
        ([(e.float(),) for e in eyes], "must be float64"),
        ([(e[:-1, :-1],) for e in eyes], "must be float64"),
        ([(e * float("nan"),) for e in eyes], "not finite"),
        ([(e, e) for e in eyes], "2 merges"),
        ([(e,) for e in eyes[1:]], "give one of each"),
    ):
        with pytest.raises(ValueError, match=match):
            Zip((plain,), tuple(merges), tuple((e,) for e in eyes))
    with pytest.raises(ValueError, match="2 models for a zip of 1"):
        Zip((plain,), tuple((e,) for e in eyes), tuple((e,) for e in eyes)).apply([mlp(), mlp()])


def test_models_that_differ_in_more_than_widths_are_refused_with_what_differs() -> None:
    with pytest.raises(ValueError, match="only the second model has the module '6'"):
        matched_groups([mlp(), nn.Sequential(*mlp().children(), nn.ReLU())], IMAGES)
    with pytest.raises(ValueError, match="has 2 symmetry groups and number 2 has 1"):
        matched_groups([mlp(), mlp(1, 1)], IMAGES)
    other = mlp(1)
    other.register_module("5", nn.Linear(5, 3).double())
    groups = matched_groups([mlp(), other], IMAGES)
    eyes = tuple((torch.eye(g.size, dtype=torch.float64) / 2,) * 2 for g in groups[0])
    unmerges = tuple(tuple(2 * e for e in of) for of in eyes)
    with pytest.raises(ValueError, match=r"'5.weight' becomes \(4, 5\) of the first"):
        Zip(groups, eyes, unmerges).apply([mlp(), other])


def test_widths_that_code_splits_are_refused() -> None:
    attention = nn.MultiheadAttention(8, 2)
    state = attention.state_dict() | {"out_proj.bias": torch.zeros(9)}
    with pytest.raises(ValueError, match="splits its width among heads"):
        resized(attention, state)
    norm = nn.Sequential(nn.GroupNorm(2, 4))
    with pytest.raises(ValueError, match="'0' has 5 channels, which its groups do not divide"):
        resized(norm, {"0.weight": torch.ones(5), "0.bias": torch.ones(5)})
    layer = resized(nn.LayerNorm(4), {"weight": torch.ones(5), "bias": torch.ones(5)})
    assert layer(torch.zeros(2, 5)).shape == (2, 5)
    with pytest.raises(ValueError, match="has 1 axes and would have 2"):
        resized(nn.LayerNorm(4), {"weight": torch.ones(5, 1), "bias": torch.ones(5)})
