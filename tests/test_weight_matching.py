"""Weight matching: what it must do, and that what it skips and takes in float32 changes nothing."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise

import pytest
import torch
from architectures import Drawn, Residual, images, plain, random_alignment, randomised
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import assert_same_state
from torch import Tensor, nn

from npmerge import align
from npmerge.align import Alignment
from npmerge.align.correlation import assignment
from npmerge.symmetry import Group, find_symmetry

module = importlib.import_module("npmerge.align.rebasin")


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_maps(x: Alignment, y: Alignment) -> None:
    assert all(map(torch.equal, x.maps, y.maps))


def objective(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return sum(float((p * q).detach().sum()) for p, q in pairs)


def test_weight_matching_finds_a_planted_permutation_of_a_plain_network() -> None:
    a = randomised(plain(16))
    planted = random_alignment(find_symmetry(a, images()))
    found = align.weight_matching(a, planted.apply(a), images())
    assert_same_state(found.apply(planted.apply(a)).state_dict(), a.state_dict())


class Skipping(nn.Module):
    """Both axes of the inner convolution's weight belong to one group: a quadratic assignment."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        logits: Tensor = self.head((x + self.conv(x)).relu())
        return logits


@pytest.mark.parametrize("make", [Residual, plain, Skipping])
def test_the_objective_never_falls(make: type[nn.Module], caplog: pytest.LogCaptureFixture) -> None:
    a, b = randomised(make()), randomised(make(), 1)
    with caplog.at_level(logging.ERROR):
        values = [
            objective(a, align.weight_matching(a, b, images(), max_sweeps=sweeps, seed=2).apply(b))
            for sweeps in range(8)
        ]
    assert values[0] == objective(a, b)
    assert values[-1] > values[0]
    assert all(later >= earlier for earlier, later in pairwise(values))


def test_at_the_end_no_single_swap_helps() -> None:
    a, b = randomised(Residual()), randomised(Residual(), 1)
    found = align.weight_matching(a, b, images())
    best = objective(a, found.apply(b))
    for index, mapping in enumerate(found.maps):
        swapped = mapping.clone()
        swapped[[0, 1]] = mapping[[1, 0]]
        maps = [*found.maps[:index], swapped, *found.maps[index + 1 :]]
        worse = Alignment.from_permutations(found.groups, maps).apply(b)
        assert objective(a, worse) <= best


def test_weight_matching_depends_on_its_seed_only() -> None:
    a, b = randomised(Residual()), randomised(Residual(), 1)
    torch.manual_seed(0)
    first = align.weight_matching(a, b, images(), seed=3)
    torch.manual_seed(1)
    assert_same_maps(align.weight_matching(a, b, images(), seed=3), first)


def test_weight_matching_ignores_running_statistics() -> None:
    a, b = randomised(Residual()), randomised(Residual(), 1)
    expected = align.weight_matching(a, b, images())
    for name, buffer in b.named_buffers():
        if "running" in name:
            buffer.copy_(buffer.flip(0) * 100)
    assert_same_maps(align.weight_matching(a, b, images()), expected)


def test_weight_matching_says_when_it_has_not_converged(caplog: pytest.LogCaptureFixture) -> None:
    a, b = randomised(Residual()), randomised(Residual(), 1)
    with caplog.at_level(logging.WARNING):
        align.weight_matching(a, b, images(), max_sweeps=1)
    assert "after 1 sweeps" in caplog.text


def plainly(
    fixed: Mapping[str, Tensor], moved: dict[str, Tensor], groups: Sequence[Group], seed: int
) -> list[Tensor]:
    """Algorithm 1 as it is written: every group in every sweep, all in float64, on copies."""
    permutations = [torch.arange(group.size) for group in groups]
    generator = torch.Generator().manual_seed(seed)
    changed = True
    while changed:
        changed = False
        for index in torch.randperm(len(groups), generator=generator).tolist():
            group = groups[index]
            slots = [slot for slot in group.slots if slot.name in fixed]
            gain = torch.zeros(group.size, group.size, dtype=torch.float64)
            for slot in slots:
                x, y = (slot.view(t[slot.name], group.size).flatten(1) for t in (fixed, moved))
                gain += x @ y.T
            step = assignment(gain, group)
            trial = dict(moved)
            for slot in slots:
                trial[slot.name] = slot.permuted(trial[slot.name], step)
            rise = sum(float((fixed[name] * (trial[name] - moved[name])).sum()) for name in fixed)
            if rise > 1e-9:
                moved.update(trial)
                permutations[index] = permutations[index][step]
                changed = True
    return permutations


blocks = st.lists(
    st.tuples(
        st.sampled_from(["plain", "residual", "concat", "depthwise"]),
        st.integers(2, 6),
        st.booleans(),
    ),
    min_size=1,
    max_size=5,
)


def assert_as_plainly(a: nn.Module, b: nn.Module, seed: int) -> None:
    groups, fixed, moved, expected = find_symmetry(a, images()), *map(parameters, (a, b, b))
    found = module.match_tensors(fixed, moved, groups, seed=seed)
    assert all(map(torch.equal, found, plainly(fixed, expected, groups, seed)))
    assert all(torch.equal(moved[name], expected[name]) for name in moved)


@settings(max_examples=30, deadline=None)
@given(blocks, st.integers(0, 99))
def test_it_finds_what_the_algorithm_as_written_finds(
    drawn: list[tuple[str, int, bool]], seed: int
) -> None:
    layers = [("plain", 4, True), *drawn]
    a, b = (randomised(Drawn(layers), seed + number) for number in range(2))
    assert_as_plainly(a, b, seed)


@pytest.mark.parametrize("make", [Residual, lambda: plain(9), Skipping])
def test_it_does_so_with_blocks_and_two_axes_of_one_tensor(make: type[nn.Module]) -> None:
    for seed in range(5):
        assert_as_plainly(randomised(make(), seed), randomised(make(), seed + 50), seed)


def test_the_given_tensors_are_not_changed() -> None:
    a, b = randomised(Residual()).float(), randomised(Residual(), 1).float()
    fixed, moved = parameters(a), parameters(b)
    given_, kept = dict(moved), {name: t.clone() for name, t in moved.items()}
    before = parameters(a)
    found = module.match_tensors(
        fixed, moved, find_symmetry(a, images(dtype=torch.float32)), seed=0
    )
    assert any(not torch.equal(p, torch.arange(len(p))) for p in found)
    for name in fixed:
        assert torch.equal(fixed[name], before[name])
        assert torch.equal(given_[name], kept[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_precisions_do(dtype: torch.dtype) -> None:
    a = randomised(plain(16)).to(dtype)
    x = images(dtype=dtype)
    planted = random_alignment(find_symmetry(a, x))
    assert_same_maps(align.weight_matching(a, planted.apply(a), x), planted.inverse())


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_the_weights_scale_does_not_matter(factor: float) -> None:
    a, b = randomised(Residual()), randomised(Residual(), 1)
    expected = align.weight_matching(a, b, images())
    with torch.no_grad():
        for parameter in a.parameters():
            parameter.mul_(factor)
    assert_same_maps(align.weight_matching(a, b, images()), expected)


def test_a_model_of_zeros_stays_as_it_is() -> None:
    a = randomised(Residual())
    with torch.no_grad():
        for parameter in a.parameters():
            parameter.zero_()
    for one, other in ((a, randomised(Residual())), (randomised(Residual()), a), (a, a)):
        found = align.weight_matching(one, other, images())
        assert all(torch.equal(p, torch.arange(len(p))) for p in found.maps)


def test_a_group_is_solved_again_only_if_a_neighbour_has_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    solved: list[str] = []

    def counting(gain: Tensor, group: Group) -> Tensor:
        solved.append(group.name)
        return assignment(gain, group)

    monkeypatch.setattr(module, "assignment", counting)
    one, two = (
        randomised(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4)), s) for s in (0, 1)
    )
    align.weight_matching(one, two, torch.zeros(2, 3))
    assert len(solved) == 1
    solved.clear()
    a = randomised(Residual())
    align.weight_matching(a, a, images())
    assert len(solved) == len(find_symmetry(a, images()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_is_named(value: float) -> None:
    a, b = randomised(plain()), randomised(plain(), 1)
    with torch.no_grad():
        b.get_parameter("4.weight")[0, 0] = value
    for pair in ((a, b), (b, a)):
        with pytest.raises(ValueError, match=r"'4\.weight' has values that are not finite"):
            align.weight_matching(*pair, images())


def test_tensors_of_another_shape_are_refused() -> None:
    groups = find_symmetry(Residual(), images())
    wide = parameters(Residual(width=7))
    with pytest.raises(ValueError, match="has shape"):
        module.match_tensors(wide, dict(wide), groups, seed=0)
