"""A group's channels can be permuted without changing the function, and no group is missed or made up."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision.models
from architectures import (
    Drawn,
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
from torch import Tensor, fx, nn

from npmerge.models import resnet18, resnet20, vgg11
from npmerge.symmetry import Group, SymmetryError, check_same_architecture, find_symmetry, trace


@torch.no_grad()
def assert_permutable(model: nn.Module, x: Tensor, groups: tuple[Group, ...] | None = None) -> None:
    """Permuting every group changes every tensor that has a slot and no output."""
    groups = find_symmetry(model, x) if groups is None else groups
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
    nodes = {node.name: node for node in trace(model).graph.nodes}
    assert all(nodes[group.node].target.endswith("relu") for group in groups)
    streams = [group for group in groups if len(group.slots) > 6]
    ends = [str(nodes[group.node].target) for group in streams]
    assert ends == [f"stages.{stage}.2.relu" for stage in range(3)]
    assert all(nodes[g.node].args[0].name.startswith("add") for g in streams)
    assert_permutable(model, images(size=16), groups)


def test_resnet18_has_torchvision_s_twelve_groups_measured_after_the_relu() -> None:
    model, x = randomised(resnet18(4, 0.125)), images(size=64)
    groups = find_symmetry(model, x)
    assert [group.size for group in groups] == [8] * 3 + [16] * 3 + [32] * 3 + [64] * 3
    nodes = {node.name: node for node in trace(model).graph.nodes}
    assert all(nodes[group.node].target.endswith("relu") for group in groups)
    ends = [str(nodes[group.node].target) for group in groups if len(group.slots) > 6]
    assert ends == [f"layer{stage}.1.relu" for stage in range(1, 5)]
    assert_permutable(model, x, groups)


def test_vgg11_has_eight_groups_measured_between_relu_and_pooling() -> None:
    model = randomised(vgg11(4, 0.125))
    groups = find_symmetry(model, images(size=32))
    assert len(groups) == 8
    modules = dict(model.named_modules())
    nodes = {node.name: node for node in trace(model).graph.nodes}
    measured = [modules[str(nodes[group.node].target)] for group in groups]
    assert all(isinstance(module, nn.ReLU) for module in measured)
    assert_permutable(model, images(size=32), groups)


def test_names_are_unique_and_the_same_for_equal_models() -> None:
    groups = find_symmetry(Residual(), images())
    assert groups == find_symmetry(randomised(Residual()), images(7))
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
    "depthwise multiplier": ([6], Part(18, lambda p, x: p["d"](x), d=conv(6, 18, groups=6))),
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
    groups = find_symmetry(model, x)
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
    assert find_symmetry(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), images()) == ()


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


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x.flatten(2), x.flatten(2), x.flatten(2))[0]
        return y


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


UNKNOWN: dict[str, tuple[nn.Module, str]] = {
    "grouped convolution": (
        Part(6, lambda p, x: p["c"](x), c=conv(groups=2)),
        r"'parts\.c' \(Conv2d\).*2 groups",
    ),
    "group norm": (
        Part(6, lambda p, x: p["n"](x), n=nn.GroupNorm(2, 6)),
        r"'parts\.n' \(GroupNorm\).*2 groups",
    ),
    "channel shuffle": (
        Part(6, lambda _, x: x.view(-1, 2, 3, 8, 8).transpose(1, 2).reshape(-1, 6, 8, 8)),
        "'view' in the model's own forward",
    ),
    "local response norm": (
        Part(6, lambda p, x: p["n"](x), n=nn.LocalResponseNorm(2)),
        r"'parts\.n' \(LocalResponseNorm\)",
    ),
    "linear on rows": (
        Part(6, lambda p, x: p["l"](x), l=nn.Linear(8, 8)),
        r"'parts\.l' \(Linear\)",
    ),
    "attention": (Attention(), r"'attention' \(MultiheadAttention\)"),
    "computed weight": (
        Part(6, lambda p, x: F.conv2d(x, p["c"].weight * 2, padding=1), c=conv()),
        "'mul'.*computes a new weight",
    ),
    "weight norm": (
        Part(6, lambda p, x: p["c"](x), c=nn.utils.parametrizations.weight_norm(conv())),
        r"'parts\.c'",
    ),
    "interleaved": (
        Part(6, lambda p, x: p["d"](x) + torch.cat([x, x], 1), d=conv(6, 12, groups=6)),
        "'add'",
    ),
    "control flow": (Branching(), "cannot trace Branching"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_is_not_understood_is_a_named_error(case: str) -> None:
    model, message = UNKNOWN[case]
    with pytest.raises(SymmetryError, match=message) as error:
        find_symmetry(model, images())
    assert "\n" not in str(error.value)


def test_an_input_that_does_not_fit_is_a_named_error() -> None:
    with pytest.raises(SymmetryError, match=r"'stem' \(Conv2d\) fails on the example input"):
        find_symmetry(Part(6, lambda _, x: x), torch.zeros(1, 5, 8, 8))
    with pytest.raises(ValueError, match=r"shape \(8,\)"):
        find_symmetry(Residual(), torch.zeros(8))


def test_finding_groups_leaves_the_model_as_it_is() -> None:
    model = marked(Residual())
    before = Snapshot.of(model)
    find_symmetry(model, images())
    before.assert_still(model)


def test_the_trace_is_a_copy() -> None:
    model = randomised(plain())
    copy = trace(model)
    assert isinstance(copy, fx.GraphModule)
    assert not copy.training
    assert not {p.data_ptr() for p in model.parameters()} & {
        p.data_ptr() for p in copy.parameters()
    }


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
