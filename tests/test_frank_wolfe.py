"""Frank-Wolfe matching, of two models and of many: what is climbed, and what is found at the top."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations, pairwise, permutations

import pytest
import torch
from architectures import (
    Attention,
    Recurrent,
    Residual,
    images,
    plain,
    random_alignment,
    randomised,
)
from tiny import Snapshot, loader, marked, net
from torch import Tensor, nn

import npmerge as npm
from npmerge import align
from npmerge.align import Alignment
from npmerge.align.correlation import assignment
from npmerge.align.joint_matching import (
    frank_wolfe,
    joint_ascent,
    parameters_of,
    rounded,
)
from npmerge.many import Models
from npmerge.many.cycle_consistent import c2m3, match_cycles
from npmerge.symmetry import find_symmetry

EXAMPLE = torch.zeros(1, 3, 8, 8)
WORDS = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
KINDS: list[tuple[Callable[[], nn.Module], Tensor]] = [
    (plain, images()), (Residual, images()), (Attention, WORDS), (Recurrent, WORDS),
]  # fmt: skip
kinds = pytest.mark.parametrize(
    ("make", "x"), KINDS, ids=["plain", "residual", "attention", "lstm"]
)


def pair(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    return randomised(make()), randomised(make(), 1)


def held(models: Sequence[nn.Module]) -> Models:
    """Models that are not loaded but there."""
    return [partial(_itself, model) for model in models]


def _itself(model: nn.Module) -> nn.Module:
    return model


def inner(*models: nn.Module) -> float:
    """The inner products of all pairs' parameters."""
    vectors = [nn.utils.parameters_to_vector(model.parameters()).detach() for model in models]
    return sum(float(one @ other) for one, other in combinations(vectors, 2))


def matrices(alignment: Alignment) -> list[Tensor]:
    return [torch.eye(len(own), dtype=torch.float64)[own] for own in alignment.maps]


def assert_same_maps(x: Alignment, y: Alignment) -> None:
    assert all(map(torch.equal, x.maps, y.maps))


# --- Two models --------------------------------------------------------------------------------


@kinds
def test_the_objective_is_the_inner_product_and_never_falls(
    make: Callable[[], nn.Module], x: Tensor
) -> None:
    a, b = pair(make)
    groups = find_symmetry(a, x)
    start = random_alignment(groups)
    (soft,), history = joint_ascent(
        parameters_of(a), [partial(parameters_of, b)], groups, [matrices(start)], max_steps=100
    )
    moving = {slot.name for group in groups for slot in group.slots}
    theirs = dict(b.named_parameters())
    still = sum(
        float((p * theirs[name]).detach().sum())
        for name, p in a.named_parameters()
        if name not in moving
    )
    assert history[0] + still == pytest.approx(inner(a, start.apply(b)))
    assert history[-1] > history[0]
    assert all(later >= earlier - 1e-12 for earlier, later in pairwise(history))
    for own in soft:
        for sums in (own.sum(0), own.sum(1)):
            assert torch.allclose(sums, torch.ones_like(sums))
        assert own.min() >= 0
    assert inner(a, rounded(groups, soft).apply(b)) > inner(a, start.apply(b))


def test_a_step_ends_where_no_other_length_gives_more() -> None:
    """Along a step from one alignment to another, soft maps are applied by hand, to a plain product of matrices."""
    torch.manual_seed(10)
    a, b = (
        nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(3))).double() for _ in range(2)
    )
    groups = find_symmetry(a, torch.zeros(1, 6, dtype=torch.float64))
    start = matrices(random_alignment(groups))
    (after,), (before, reached, *_) = joint_ascent(
        parameters_of(a), [partial(parameters_of, b)], groups, [start], max_steps=1
    )

    def product(maps: Sequence[Tensor]) -> float:
        (first, second, third), (u, v, w) = (
            [layer.weight.detach() for layer in model] for model in (a, b)
        )
        p, q = maps
        terms = first * (p @ u), second * (q @ v @ p.T), third * (w @ q.T)
        return float(sum(term.sum() for term in terms))

    assert product(start) == pytest.approx(before)
    assert product(after) == pytest.approx(reached)
    gradients = [own.clone().requires_grad_() for own in start]
    p, q = gradients
    (a0, a1, a2), (b0, b1, b2) = ([layer.weight.detach() for layer in m] for m in (a, b))
    ((a0 * (p @ b0)).sum() + (a1 * (q @ b1 @ p.T)).sum() + (a2 * (b2 @ q.T)).sum()).backward()
    goals = [
        torch.eye(6, dtype=torch.float64)[assignment(own.grad, group)]
        for own, group in zip(gradients, groups, strict=True)
    ]
    along = [
        product([torch.lerp(s, g, t) for s, g in zip(start, goals, strict=True)])
        for t in torch.linspace(0, 1, 101).tolist()
    ]
    assert max(along) <= reached + 1e-12
    assert reached > along[-1] + 1e-3, "a whole step would do"


@kinds
def test_the_value_along_a_step_is_that_of_the_maps_at_its_end(
    make: Callable[[], nn.Module], x: Tensor
) -> None:
    """Also where three groups meet in one tensor, as heads, their dimensions and the residual stream do."""
    a, b = pair(make)
    groups = find_symmetry(a, x)
    climb = partial(joint_ascent, parameters_of(a), [partial(parameters_of, b)], groups)
    maps = matrices(random_alignment(groups, 2))
    between = 0
    for _ in range(6):
        (maps,), (_, reached) = climb([maps], max_steps=1)
        _, (again, _) = climb([maps], max_steps=1)
        assert again == pytest.approx(reached, rel=1e-9)
        between += any(((own > 1e-6) & (own < 1 - 1e-6)).any() for own in maps)
    assert between


@kinds
def test_a_planted_permutation_is_found(make: Callable[[], nn.Module], x: Tensor) -> None:
    a = randomised(make())
    moved = random_alignment(find_symmetry(a, x)).apply(a)
    found = frank_wolfe(a, moved, x, starts=1)
    assert found.is_permutation
    torch.testing.assert_close(found.apply(moved).state_dict(), a.state_dict())


def test_one_hidden_layer_is_one_assignment() -> None:
    torch.manual_seed(0)
    a, b = (nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4)).double() for _ in range(2))
    x = torch.zeros(1, 3, dtype=torch.float64)
    gain = torch.outer(a[0].bias, b[0].bias)
    gain = (gain + a[0].weight @ b[0].weight.T + a[2].weight.T @ b[2].weight).detach()
    assert torch.equal(
        frank_wolfe(a, b, x, starts=1).maps[0], assignment(gain, find_symmetry(a, x)[0])
    )


def test_it_climbs_higher_than_one_group_at_a_time() -> None:
    def reached(method: Callable[..., Alignment], seed: int) -> float:
        a, b = randomised(Residual(8), seed), randomised(Residual(8), seed + 50)
        return inner(a, method(a, b, images()).apply(b))

    rises = [reached(frank_wolfe, s) - reached(align.weight_matching, s) for s in range(3)]
    assert min(rises) > 0


def test_more_starts_are_never_worse_and_depend_on_the_seed_only() -> None:
    a, b = randomised(Residual(8)), randomised(Residual(8), 1)
    found = {n: frank_wolfe(a, b, images(), starts=n, seed=3) for n in (1, 4)}
    assert inner(a, found[4].apply(b)) > inner(a, found[1].apply(b))
    torch.manual_seed(7)
    assert_same_maps(frank_wolfe(a, b, images(), starts=4, seed=3), found[4])
    assert_same_maps(frank_wolfe(a, b, images(), starts=1, seed=4), found[1])


def test_the_order_of_the_channels_does_not_matter() -> None:
    a, b = randomised(Residual()), randomised(Residual(), 1)
    other = random_alignment(find_symmetry(a, images()))
    found = frank_wolfe(a, b, images(), starts=1)
    again = frank_wolfe(a, other.apply(b), images(), starts=1)
    assert_same_maps(again.compose(other), found)


def test_nothing_that_is_given_is_changed_and_half_precision_does() -> None:
    a = marked(net(0).bfloat16())
    moved = marked(random_alignment(find_symmetry(a, EXAMPLE.bfloat16())).apply(a))
    before = [Snapshot.of(model) for model in (a, moved)]
    with torch.no_grad():
        found = frank_wolfe(a, moved, EXAMPLE.bfloat16())
    for snapshot, model in zip(before, (a, moved), strict=True):
        snapshot.assert_still(model)
    assert all(map(torch.equal, found.apply(moved).parameters(), a.parameters()))


# --- Many --------------------------------------------------------------------------------------


@kinds
def test_one_model_in_three_orders_is_found_again(make: Callable[[], nn.Module], x: Tensor) -> None:
    model = randomised(make())
    groups = find_symmetry(model, x)
    models = [random_alignment(groups, seed).apply(model) for seed in range(3)]
    found = match_cycles(held(models), groups=groups)
    first, *others = (own.apply(m).state_dict() for own, m in zip(found, models, strict=True))
    for other in others:
        torch.testing.assert_close(other, first)
    torch.testing.assert_close(c2m3(held(models), groups=groups)(x), model(x))


def test_every_round_over_models_ends_where_it_began() -> None:
    models = [randomised(Residual(), seed) for seed in range(4)]
    to_universe = match_cycles(held(models), example=images())
    assert sum(all(torch.equal(m, m.sort().values) for m in one.maps) for one in to_universe) == 1
    between = {(m, n): to_universe[m].inverse().compose(to_universe[n])
               for m, n in permutations(range(4), 2)}  # fmt: skip
    for m, n, o in permutations(range(4), 3):
        around = between[m, n].compose(between[n, o]).compose(between[o, m])
        assert all(torch.equal(own, torch.arange(len(own))) for own in around.maps)


def test_neither_the_order_of_the_models_nor_that_of_their_channels_matters() -> None:
    models = [randomised(Residual(), seed) for seed in range(4)]
    groups = find_symmetry(models[0], images())
    merged = c2m3(held(models), groups=groups)
    reversed_ = c2m3(held(models[::-1]), groups=groups)
    torch.testing.assert_close(reversed_.state_dict(), merged.state_dict())
    mixed = [random_alignment(groups, seed).apply(m) for seed, m in enumerate(models)]
    torch.testing.assert_close(c2m3(held(mixed), groups=groups)(images()), merged(images()))


def test_it_climbs_higher_than_merge_many_and_all_to_one() -> None:
    models = [randomised(Residual(8), seed) for seed in range(3)]
    groups = find_symmetry(models[0], images())

    def reached(alignments: Sequence[Alignment]) -> float:
        return inner(*(own.apply(m) for own, m in zip(alignments, models, strict=True)))

    found = reached(match_cycles(held(models), groups=groups))
    to_first = [frank_wolfe(models[0], m, None, groups=groups, starts=1) for m in models]
    assert found > reached(npm.many.match_many(held(models), seed=0, groups=groups))
    assert found > reached(to_first)


def test_of_two_models_it_is_the_match_of_the_pair() -> None:
    a, b = randomised(Residual(), 1), randomised(Residual())
    assert inner(a, a) > inner(b, b)
    still, found = match_cycles(held([a, b]), example=images())
    assert_same_maps(found, frank_wolfe(a, b, images(), starts=1))
    assert all(torch.equal(own, torch.arange(len(own))) for own in still.maps)


def test_what_is_merged_is_the_mean_and_one_model_is_itself() -> None:
    models = [net(seed) for seed in range(3)]
    aligned = [
        own.apply(m).state_dict()
        for own, m in zip(match_cycles(held(models), example=EXAMPLE), models, strict=True)
    ]
    merged = npm.merge(models, loader(), aggregate="mean", many="c2m3", correct=None).model
    for name, value in merged.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, torch.stack([m[name] for m in aligned]).mean(0))
    alone = c2m3(held(models[:1]), example=EXAMPLE)
    torch.testing.assert_close(alone.state_dict(), models[0].state_dict())


# --- Errors ------------------------------------------------------------------------------------


def broken() -> nn.Module:
    model = net(1)
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    return model


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "starts": (lambda: frank_wolfe(net(0), net(1), EXAMPLE, starts=0), "starts is 0: give at least 1"),
    "steps": (
        lambda: frank_wolfe(net(0), net(1), EXAMPLE, max_steps=0), "max_steps is 0: give at least 1",
    ),
    "architecture": (
        lambda: frank_wolfe(net(0), net(1, width=7), EXAMPLE), "has shape .* in the first model",
    ),
    "finite": (lambda: frank_wolfe(net(0), broken(), EXAMPLE), "values that are not finite"),
    "finite, many": (
        lambda: match_cycles(held([net(0), broken()]), example=EXAMPLE), "values that are not finite",
    ),
    "architectures": (
        lambda: c2m3(held([net(0), net(1, width=7)]), example=EXAMPLE), "in the first model",
    ),
    "none": (lambda: c2m3([]), "no models: give at least one"),
    "example": (lambda: c2m3(held([net(0), net(1)])), "neither groups nor an example"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_that_names_it(kind: str) -> None:
    call, message = BAD[kind]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
