"""A group's channels can be permuted without changing the function, and no group is missed or made up."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision.models
from architectures import (
    Attention,
    Drawn,
    Recurrent,
    Residual,
    images,
    plain,
    random_alignment,
    randomised,
    without_slot,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Snapshot, marked
from torch import Tensor, nn

from npmerge.models import resnet18, resnet20, vgg11
from npmerge.symmetry import (
    RULES,
    Group,
    SymmetryError,
    check_same_architecture,
    check_symmetry,
    find_symmetry,
    rule,
    symmetry_on,
)


@torch.no_grad()
def assert_permutable(model: nn.Module, x: Tensor, groups: tuple[Group, ...] | None = None) -> None:
    """Permuting every group changes every tensor that has a slot and no output."""
    groups = find_symmetry(model, x).groups if groups is None else groups
    moved = random_alignment(groups).apply(model)
    before, after = model.state_dict(), moved.state_dict()
    touched = {slot.name for group in groups for slot in group.slots}
    assert touched
    assert [name for name in touched if torch.equal(before[name], after[name])] == []
    expected = model(x)
    assert float(expected.std()) > 1e-3, "the test could not fail"
    torch.testing.assert_close(moved(x), expected, rtol=0, atol=1e-9)


def torchvision_model(name: str) -> nn.Module:
    """Torchvision's model; VGG's two hidden linear layers are narrowed, which spares a gigabyte."""
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(num_classes=10)
        if name.startswith("vgg"):
            model.classifier[0] = nn.Linear(512 * 7 * 7, 32)
            model.classifier[3] = nn.Linear(32, 16)
            model.classifier[6] = nn.Linear(16, 10)
    return randomised(model.to_empty(device="cpu"))


@pytest.mark.parametrize(
    "name", ["vgg11", "vgg16_bn", "resnet18", "resnet50", "mobilenet_v2", "densenet121"]
)
def test_torchvision_models_keep_their_function(name: str) -> None:
    assert_permutable(torchvision_model(name), images(size=32))


@pytest.mark.parametrize(
    ("name", "count"),
    [("vgg11", 10), ("vgg16_bn", 15), ("resnet18", 12), ("resnet50", 37), ("mobilenet_v2", 25)],
)
def test_torchvision_models_as_they_are_have_all_their_groups(name: str, count: int) -> None:
    with torch.device("meta"):
        model = getattr(torchvision.models, name)()
    assert len(find_symmetry(model, images(size=64))) == count


@pytest.mark.parametrize("model", [Residual(), plain()], ids=["residual", "plain"])
def test_every_slot_is_needed(model: nn.Module) -> None:
    """The function changes as soon as any one slot is left out."""
    model, x = randomised(model), images()
    groups = find_symmetry(model, x)
    assert_permutable(model, x, groups)
    for index, group in enumerate(groups):
        for slot in range(len(group.slots)):
            with pytest.raises(AssertionError, match="not close"):
                assert_permutable(model, x, tuple(without_slot(groups, index, slot)))


def test_resnet20_has_twelve_groups_measured_after_the_relu() -> None:
    model = randomised(resnet20(4, 0.25))
    groups = find_symmetry(model, images(size=16))
    assert [group.size for group in groups] == [4] * 4 + [8] * 4 + [16] * 4
    assert {group.tap.operation for group in groups} == {"relu"}
    ends = [group.tap for group in groups if len(group.slots) > 6]
    assert [tap.path for tap in ends] == [f"stages.{stage}.2.relu" for stage in range(3)]
    assert {tap.occurrence for tap in ends} == {1}, "the second of two, after the addition"
    assert_permutable(model, images(size=16), groups)


def test_resnet18_has_torchvision_s_twelve_groups_measured_after_the_relu() -> None:
    model, x = randomised(resnet18(4, 0.125)), images(size=64)
    groups = find_symmetry(model, x)
    assert [group.size for group in groups] == [8] * 3 + [16] * 3 + [32] * 3 + [64] * 3
    assert {group.tap.operation for group in groups} == {"relu_"}
    ends = [group.tap.path for group in groups if len(group.slots) > 6]
    assert ends == [f"layer{stage}.1.relu" for stage in range(1, 5)]
    assert_permutable(model, x, groups)


def test_vgg11_has_eight_groups_measured_between_relu_and_pooling() -> None:
    model = randomised(vgg11(4, 0.125))
    groups = find_symmetry(model, images(size=32))
    assert len(groups) == 8
    modules = dict(model.named_modules())
    measured = [modules[group.tap.path] for group in groups]
    assert all(isinstance(module, nn.ReLU) for module in measured)
    assert_permutable(model, images(size=32), groups)


def test_names_are_unique_and_the_same_for_equal_models() -> None:
    groups = find_symmetry(Residual(), images())
    assert groups.groups == find_symmetry(randomised(Residual()), images(7)).groups
    assert len({group.name for group in groups}) == len(groups) == 4


class Part(nn.Module):
    """A stem, one thing under test, and a head that mixes what comes out."""

    def __init__(
        self, outputs: int, body: Callable[[nn.Module, Tensor], Tensor], **parts: nn.Module
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.parts = nn.ModuleDict(parts)
        self.body = body
        self.head = nn.Conv2d(outputs, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.parts, self.stem(x)))
        return logits


def two(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=1)
    return torch.cat([second, first.relu()], 1)


def conv(inputs: int = 6, outputs: int = 6, **options: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def tied(p: nn.Module, x: Tensor) -> Tensor:
    return p["a"](p["a"](x).relu())


def functional(p: nn.Module, x: Tensor) -> Tensor:
    y = F.conv2d(x, p["c"].weight, p["c"].bias, 1, 1, 1, 1)
    n = p["n"]
    return F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, training=False)


def squeeze_excite(p: nn.Module, x: Tensor) -> Tensor:
    return x * torch.sigmoid(p["b"](F.relu(p["a"](F.adaptive_avg_pool2d(x, 1)))))


PARTS: dict[str, tuple[list[int], Part]] = {
    "relu method": ([6], Part(6, lambda _, x: x.relu())),
    "relu in place": ([6], Part(6, lambda _, x: x.relu_().add_(1))),
    "augmented assignment": ([6], Part(6, lambda p, x: operator.iadd(x, p["c"](x)), c=conv())),
    "relu module used twice": (
        [6, 6],
        Part(6, lambda p, x: p["r"](p["c"](p["r"](x))), c=conv(), r=nn.ReLU()),
    ),
    "functional layers": ([6, 6], Part(6, functional, c=conv(), n=nn.BatchNorm2d(6))),
    "layer used twice": ([6], Part(6, tied, a=conv())),
    "depthwise": ([6], Part(6, lambda p, x: p["d"](x), d=conv(groups=6))),
    "depthwise multiplier": ([6, 3], Part(18, lambda p, x: p["d"](x), d=conv(6, 18, groups=6))),
    "transposed": ([6, 5], Part(5, lambda p, x: p["t"](x), t=nn.ConvTranspose2d(6, 5, 2, 2))),
    "transposed depthwise": (
        [6],
        Part(6, lambda p, x: p["t"](x), t=nn.ConvTranspose2d(6, 6, 2, 2, groups=6)),
    ),
    "squeeze and excite": ([6, 3], Part(6, squeeze_excite, a=conv(6, 3), b=conv(3, 6))),
    "gate of one channel": ([6], Part(6, lambda p, x: x * p["g"](x), g=conv(6, 1))),
    "channel mean": ([6], Part(6, lambda _, x: x - x.mean(1, keepdim=True))),
    "prelu": ([6], Part(6, lambda p, x: p["a"](x), a=nn.PReLU(6))),
    "group norm of one group": ([6], Part(6, lambda p, x: p["n"](x), n=nn.GroupNorm(1, 6))),
    "instance norm": ([6], Part(6, lambda p, x: p["n"](x), n=nn.InstanceNorm2d(6, affine=True))),
    "layer norm": ([6], Part(6, lambda p, x: p["n"](x), n=nn.LayerNorm([6, 8, 8]))),
    "layer norm of rows": ([6], Part(6, lambda p, x: p["n"](x), n=nn.LayerNorm(8))),
    "concatenation": (
        [6, 5],
        Part(11, lambda p, x: torch.cat([p["c"](x), x.relu()], dim=1), c=conv(6, 5)),
    ),
    "halves": ([3, 3], Part(6, lambda _, x: two(x))),
    "slices": ([2, 4], Part(6, lambda _, x: torch.cat([x[:, 2:], x[:, :2].exp()], 1))),
    "sum of halves": ([3], Part(3, lambda _, x: x[:, :3] + x[:, 3:])),
    "strided, padded shortcut": (
        [6, 2, 2],
        Part(
            10,
            lambda p, x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)) + p["c"](x).relu(),
            c=conv(6, 10, stride=2),
        ),
    ),
    "sum of concatenations": (
        [2, 4],
        Part(6, lambda p, x: torch.cat([p["a"](x), p["b"](x)], 1) + x, a=conv(6, 2), b=conv(6, 4)),
    ),
    "flattened and back": (
        [6],
        Part(6, lambda _, x: x.view(x.size(0), -1).relu().unflatten(1, (6, 8, 8))),
    ),
    "flattened positions": ([6], Part(6, lambda _, x: x.flatten(2).unsqueeze(-1))),
    "blocks meet channels": (
        [6],
        Part(
            6,
            lambda p, x: (p["l"](x.flatten(1)) + x.flatten(1)).view(-1, 6, 8, 8),
            l=nn.Linear(384, 384),
        ),
    ),
}


@pytest.mark.parametrize("case", PARTS)
def test_operations_keep_the_function(case: str) -> None:
    sizes, model = PARTS[case]
    model, x = randomised(model), images()
    groups = find_symmetry(model, x).groups
    assert sorted(group.size for group in groups) == sorted(sizes)
    assert_permutable(model, x, groups)


class TiedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.encode = nn.Conv2d(6, 6, 1)
        self.decode = nn.Conv2d(6, 6, 1)
        self.decode.weight = self.encode.weight
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor | tuple[Tensor, ...]]:
        x = self.decode(self.encode(self.stem(x)).relu())
        return {"logits": self.head(x), "more": (x.mean((2, 3))[:, :1],)}


def test_tied_weights_move_together_and_dictionary_outputs_are_pinned() -> None:
    model = randomised(TiedAutoencoder())
    x = images()
    (group,) = find_symmetry(model, x)
    assert {slot.name for slot in group.slots} >= {"encode.weight", "decode.weight"}
    assert group.size == 5, "the first channel is an output"
    moved = random_alignment([group]).apply(model)
    assert moved.encode.weight is moved.decode.weight
    assert not torch.equal(moved.encode.weight, model.encode.weight)
    torch.testing.assert_close(moved(x), model(x), rtol=0, atol=1e-12)


def test_a_model_without_hidden_channels_has_no_group() -> None:
    assert find_symmetry(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), images()).groups == ()


block = st.tuples(
    st.sampled_from(["plain", "residual", "concat", "depthwise"]), st.integers(2, 6), st.booleans()
)


@settings(max_examples=25, deadline=None)
@given(st.lists(block, min_size=1, max_size=5), st.integers(0, 99))
def test_generated_architectures_keep_their_function(
    blocks: list[tuple[str, int, bool]], seed: int
) -> None:
    model, x = randomised(Drawn([("plain", 4, True), *blocks]), seed), images(seed=seed)
    assert_permutable(model, x)


def test_heads_and_their_dimensions_are_groups_of_their_own() -> None:
    """Queries and keys share a head's dimensions, values have their own; all three share the heads."""
    model, x = randomised(Attention()), torch.randn(2, 5, 7, dtype=torch.float64)
    groups = find_symmetry(model, x).groups
    assert sorted(group.size for group in groups) == [3, 4, 4, 12]
    heads = next(group for group in groups if group.size == 3)
    assert not heads.tap.mixed, "an attention pattern does not depend on a head's dimensions"
    assert "'bmm' in module 'attention'" in heads.permutations_only
    where = [s.offset for s in heads.slots if s.name == "attention.in_proj_bias"]
    assert where == [0, 12, 24]
    inner = [group for group in groups if group.size == 4]
    assert all(group.tap.mixed and group.slots[0].repeats == ((3, 4),) for group in inner)
    assert_permutable(model, x, groups)


def test_the_layers_of_a_recurrent_network_are_groups_of_their_own() -> None:
    model, x = randomised(Recurrent()), torch.randn(2, 6, 7, dtype=torch.float64)
    groups = find_symmetry(model, x)
    assert [group.size for group in groups] == [5] * 4
    assert_permutable(model, x, groups.groups)


def test_a_product_of_two_weights_has_a_group_that_no_activation_shows() -> None:
    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.u, self.v = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3, 7))

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.u @ self.v).T

    model, x = LowRank().double(), torch.randn(2, 7, dtype=torch.float64)
    (group,) = find_symmetry(model, x)
    assert (group.size, group.tap) == (3, None)
    assert_permutable(model, x, (group,))


class Branching(nn.Module):
    """Its course depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(7, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.hidden(x)
        logits: Tensor = self.head(x if x.sum() > 0 else -x)
        return logits


def test_what_decides_the_course_is_held_fixed() -> None:
    x = torch.randn(2, 7, dtype=torch.float64)
    model = randomised(Branching())
    assert [group.size for group in find_symmetry(model, x)] == [6], (
        "a sum does not depend on the order"
    )
    model.forward = lambda x: model.head(model.hidden(x) * float(model.hidden(x)[0, 0] > 0))
    assert find_symmetry(model, x).groups == ()


@torch.library.custom_op("npmerge_tests::turned", mutates_args=())
def turned(x: Tensor) -> Tensor:
    return x.flip(1)


@turned.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_operation_without_a_rule_is_a_named_error_or_held_fixed() -> None:
    model = randomised(Part(11, lambda p, x: torch.cat([turned(x), p["c"](x)], 1), c=conv(6, 5)))
    with pytest.raises(
        SymmetryError,
        match=r"'npmerge_tests\.turned' in the model's own forward has no symmetry rule",
    ) as error:
        find_symmetry(model, images())
    assert "\n" not in str(error.value)
    found = find_symmetry(model, images(), strict=False)
    assert found.pinned == {"npmerge_tests.turned in the model": 1}
    assert "held fixed by npmerge_tests.turned in the model" in str(found)
    assert [group.size for group in found] == [5]
    assert_permutable(model, images(), found.groups)


def test_an_operation_can_be_taught() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("npmerge.symmetry.watch.RULES", rules := {**RULES})
        patch.setattr("npmerge.symmetry.rules.RULES", rules)

        @rule("npmerge_tests.turned")
        def reversed_channels(call: Any) -> Any:
            """The channels have an order, the other axes stay."""
            layout = list(call.of(call.inputs[0]))
            call.atoms.pin(layout[1])
            return [layout]

        model = randomised(Part(6, lambda p, x: p["c"](turned(x)).relu(), c=conv()))
        assert [group.size for group in find_symmetry(model, images())] == [6]


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "numpy": (
        Part(6, lambda _, x: torch.from_numpy(x.numpy() * 2)),
        "numpy in the model's own forward takes channels out of PyTorch's sight",
    ),
    "data": (
        Part(6, lambda _, x: setattr(y := torch.zeros_like(x), "data", x) or y),
        "data = in the model's own forward takes channels",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_leaves_pytorch_is_a_named_error(case: str) -> None:
    model, message = REFUSED[case]
    with pytest.raises(SymmetryError, match=message) as error:
        find_symmetry(model, images())
    assert "\n" not in str(error.value)


def test_an_input_that_does_not_fit_is_a_named_error() -> None:
    with pytest.raises(SymmetryError, match=r"'stem' \(Conv2d\) fails on the example input"):
        find_symmetry(Part(6, lambda _, x: x), torch.zeros(1, 5, 8, 8))


def test_finding_groups_leaves_the_model_as_it_is() -> None:
    model = marked(Residual())
    before = Snapshot.of(model)
    find_symmetry(model, images())
    before.assert_still(model)


def test_parameters_without_values_have_the_same_groups() -> None:
    with torch.device("meta"):
        empty = resnet18(4, 0.125)
    found = find_symmetry(empty, images(size=64))
    assert found.groups == find_symmetry(resnet18(4, 0.125), images(size=64)).groups


def test_what_the_pass_does_not_use_is_named() -> None:
    model = Part(6, lambda _, x: x, unused=conv())
    with pytest.warns(UserWarning, match=r"Part does not use parts\.unused in evaluation"):
        found = find_symmetry(model, images())
    assert found.unused == ("parts.unused.weight", "parts.unused.bias")
    assert 0 < found.movable < 1


def test_a_symmetry_that_is_wrong_is_refused_before_anything_is_aligned() -> None:
    model = randomised(Part(6, lambda p, x: p["c"](x).relu(), c=conv()))
    symmetry_on(model, images())
    with pytest.MonkeyPatch.context() as patch:
        convolution = RULES["convolution"]

        def careless(call: Any) -> Any:
            layouts = convolution.function(call)
            return [[layouts[0][0], call.atoms.fresh(call.outputs[0].shape[1]), *layouts[0][2:]]]

        wrong = {**RULES, "convolution": replace(convolution, function=careless)}
        patch.setattr("npmerge.symmetry.watch.RULES", wrong)
        with pytest.raises(SymmetryError, match="the permuted Part answers otherwise"):
            symmetry_on(model, images())


def test_the_check_sees_a_slot_that_is_missing() -> None:
    """The whole symmetry passes; any one slot left out would not (see also the test of every slot above)."""
    check = check_symmetry(Residual(), images())
    assert check.difference < 1e-12
    assert check.groups == len(check.symmetry) == 4
    assert check.moved > 0.9


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Residual(width=7), r"'stem.0.weight' has shape \(6, 3, 3, 3\) .* \(7, 3, 3, 3\)"),
        (
            Residual(norm=False),
            r"tensor 'stem.1.weight'|type BatchNorm2d .* Identity|first model has",
        ),
        (plain(), "only the first model has the module 'stem'"),
    ],
)
def test_the_first_difference_between_architectures_is_named(
    other: nn.Module, message: str
) -> None:
    check_same_architecture(Residual(), Residual())
    with pytest.raises(ValueError, match=message):
        check_same_architecture(Residual(), other)


def test_a_difference_in_geometry_or_type_is_named() -> None:
    def net(stride: int, act: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3, stride), act)

    for left, right in itertools.permutations([net(1, nn.ReLU()), net(2, nn.ReLU())]):
        with pytest.raises(ValueError, match="module '0' has stride"):
            check_same_architecture(left, right)
    with pytest.raises(ValueError, match="module '1' has type ReLU"):
        check_same_architecture(net(1, nn.ReLU()), net(1, nn.GELU()))


class Hidden(nn.Module):
    """Two hidden layers with something between them."""

    def __init__(self, body: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 6), nn.Linear(6, 6)
        self.head, self.body = nn.Linear(6, 4), body

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self, self.first(x).relu()))
        return logits


ROWS = torch.tensor([1, 0])
INDEXED: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "index_add": lambda m, x: torch.zeros_like(x).index_add_(0, ROWS, m.second(x)),
    "index_copy": lambda m, x: torch.zeros_like(x).index_copy(0, ROWS, m.second(x)),
    "index_put": lambda m, x: torch.zeros_like(x).index_put((ROWS,), m.second(x)),
    "scatter_add": lambda m, x: torch.zeros_like(x).scatter_add(
        0, ROWS[:, None].expand(2, 6), m.second(x)
    ),
    "gather": lambda m, x: m.second(x).gather(0, ROWS[:, None].expand(2, 6)),
    "index_select": lambda m, x: m.second(x).index_select(0, ROWS),
    "every second": lambda m, x: m.second(x)[:, ::2].repeat(1, 2),
    "windows": lambda m, x: (
        m.second(x)
        .repeat(1, 4)
        .view(2, 4, 6)
        .contiguous()
        .as_strided((2, 3, 2, 6), (24, 6, 6, 1))
        .sum((1, 2))
    ),
    "stacked and selected": lambda m, x: torch.stack([x, m.second(x)])[1],
}


@pytest.mark.parametrize("case", INDEXED)
def test_rows_may_be_taken_by_number(case: str) -> None:
    model = randomised(Hidden(INDEXED[case]))
    x = torch.randn(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    check = check_symmetry(model, x)
    assert check.groups >= 2
    assert check.difference < 1e-12


def test_windows_hold_the_axis_they_run_over_fixed() -> None:
    def windows(m: nn.Module, x: Tensor) -> Tensor:
        parts = m.second(x).contiguous().as_strided((2, 5, 2), (6, 1, 1))
        return parts.sum(2).repeat(1, 2)[:, :6]

    model, x = randomised(Hidden(windows)), torch.randn(2, 7, dtype=torch.float64)
    check = check_symmetry(model, x)
    assert check.groups == 1, "that of the first layer"
    assert check.difference < 1e-12


def test_a_frozen_batch_norm_follows_its_channels() -> None:
    norm = torchvision.ops.FrozenBatchNorm2d(8)
    model = randomised(nn.Sequential(nn.Conv2d(3, 8, 1), norm, nn.ReLU(), nn.Conv2d(8, 4, 1)))
    (group,) = find_symmetry(model, images())
    assert {slot.name for slot in group.slots} >= {"1.weight", "1.running_mean", "1.running_var"}
    assert_permutable(model, images(), (group,))
