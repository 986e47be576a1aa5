"""Methods with task vectors: what all of them must do, and each against its definition by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import pytest
import torch
from tiny import Snapshot, loader, marked, net, same_parameters
from torch import Tensor, nn

import npmerge as npm
from npmerge.aggregate import Aggregated
from npmerge.methods import METHODS
from npmerge.tasks import (
    NO_BASE,
    breadcrumbs,
    dare,
    della,
    emr,
    iso_c,
    iso_cts,
    model_stock,
    opcm,
    pcb,
    task_arithmetic,
    ties,
    tsv,
    wise_ft,
    wise_ft_curve,
)

EVERY = [name for name, one in METHODS.items() if one.module.startswith("npmerge.tasks.")]
RANDOM = {"dare", "della"}


class Odd(nn.Module):
    """A shared weight, a frozen bias, a scalar, and batch norm."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight
        self.temperature = nn.Parameter(torch.randn(()))
        self.one.bias.requires_grad_(requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        out: Tensor = self.two(self.one(x)) * self.temperature
        return out


class Point(nn.Module):
    """Parameters and nothing else."""

    def __init__(self, *values: Any) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(torch.as_tensor(v, dtype=torch.float64) for v in values)


def branches(count: int = 3) -> tuple[nn.Module, list[nn.Module]]:
    base = Odd(0)
    models = []
    for seed in range(1, count + 1):
        model = copy.deepcopy(base)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in (*model.parameters(), model.norm.running_mean, model.norm.running_var):
                p += 0.1 * torch.randn(p.shape, generator=generator).abs().add(0.3)
        model.norm.num_batches_tracked.fill_(seed)
        models.append(model)
    return base, models


def merged(name: str, models: Sequence[nn.Module], base: nn.Module, **options: Any) -> nn.Module:
    result = METHODS[name].function(models, base=base, **options)
    return result.model if isinstance(result, Aggregated) else result


def point(model: nn.Module | Aggregated) -> list[float]:
    """What was added to a base of zeros, where the model is one vector."""
    model = model.model if isinstance(model, Aggregated) else model
    return next(model.parameters()).flatten().tolist()


def close(x: nn.Module, y: nn.Module, atol: float = 1e-5) -> bool:
    pairs = zip(x.parameters(), y.parameters(), strict=True)
    return all(torch.allclose(p, q, atol=atol) for p, q in pairs)


def points(*rows: Sequence[float]) -> list[nn.Module]:
    return [Point(row) for row in rows]


def matrices(count: int, rows: int = 6, columns: int = 8, rank: int | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(count, rows, columns, generator=generator, dtype=torch.float64)
    if rank is None:
        return list(made)
    u, s, v = torch.linalg.svd(made, full_matrices=False)
    return list(u[:, :, :rank] * s[:, None, :rank] @ v[:, :rank])


def of_matrices(method: Any, given: Sequence[Tensor], **options: Any) -> Tensor:
    """What a method adds to a base of zeros."""
    result = method([Point(m) for m in given], base=Point(torch.zeros_like(given[0])), **options)
    found: Tensor = next(result.parameters()).detach()
    return found


# What all of them do.


@pytest.mark.parametrize("name", EVERY)
def test_models_that_learned_nothing_give_the_base(name: str) -> None:
    base = Odd(0)
    result = merged(name, [copy.deepcopy(base) for _ in range(3)], base)
    assert close(result, base, atol=1e-7)
    one_moved = merged(name, [*branches(1)[1], copy.deepcopy(base)], base)
    assert all(p.isfinite().all() for p in one_moved.parameters())


@pytest.mark.parametrize("name", EVERY)
def test_the_order_of_the_models_makes_no_difference(name: str) -> None:
    base, models = branches()
    same = [close(merged(name, list(m), base), merged(name, models, base)) for m in permutations(models)]  # fmt: skip
    assert all(same) == (name not in RANDOM | {"opcm"})


@pytest.mark.parametrize("name", EVERY)
def test_nothing_that_is_given_changes(name: str) -> None:
    base, models = branches()
    before = [(m, Snapshot.of(marked(m))) for m in (base, *models)]
    result = merged(name, models, base)
    for model, snapshot in before:
        snapshot.assert_still(model)
    own = {p.data_ptr() for m in (base, *models) for p in m.state_dict().values()}
    assert not own & {p.data_ptr() for p in result.state_dict().values()}


@pytest.mark.parametrize("name", EVERY)
def test_the_seed_decides_what_is_drawn_and_nothing_else_does(name: str) -> None:
    base, models = branches()
    first = merged(name, models, base)
    torch.manual_seed(99)
    assert same_parameters(first, merged(name, models, base))
    if name in RANDOM:
        assert not same_parameters(first, merged(name, models, base, seed=1))


@pytest.mark.parametrize("name", EVERY)
def test_ties_frozen_parameters_modes_and_buffers_are_those_of_the_first(name: str) -> None:
    base, models = branches()
    models[0].norm.eval()
    result: Any = merged(name, models, base)
    assert result.two.weight is result.one.weight
    assert not result.one.bias.requires_grad
    assert result.training
    assert not result.norm.training
    assert int(result.norm.num_batches_tracked) == 1
    mean = torch.stack([model.norm.running_var for model in models]).mean(0)
    if name == "wise_ft":
        mean = (mean + base.norm.running_var) / 2
    assert torch.allclose(result.norm.running_var, mean)
    assert all(p.isfinite().all() for p in result.parameters())


@pytest.mark.parametrize("name", EVERY)
def test_half_precision_is_computed_in_more_and_comes_back(name: str) -> None:
    base, models = branches(2)
    exact = merged(name, models, base)
    result = merged(name, [m.bfloat16() for m in models], base.bfloat16())
    assert all(p.dtype == torch.bfloat16 for p in result.parameters())
    assert all(p.isfinite().all() for p in result.parameters())
    assert name in RANDOM | {"ties", "pcb", "breadcrumbs", "iso_cts"} or close(
        result.float(), exact, atol=0.1
    )


def test_differences_that_half_precision_rounds_away_are_not_lost() -> None:
    given, base = [p.bfloat16() for p in points([1], [-1])], Point([2**-9]).bfloat16()
    assert point(task_arithmetic(given, base=base, scale=1.0)) == [-(2**-9)]


@pytest.mark.parametrize("name", EVERY)
def test_without_a_base_that_fits_an_error_says_what_to_give(name: str) -> None:
    base, models = branches(2)
    with pytest.raises(ValueError, match="base is None: give base") as error:
        merged(name, models, None)  # type: ignore[arg-type]
    assert NO_BASE in str(error.value)
    with pytest.raises(ValueError, match="the base, here the second model, does not fit"):
        merged(name, models, net(0))
    with pytest.raises(ValueError, match="only the first model has"):
        merged(name, [models[0], net(0)], base)
    with pytest.raises(ValueError, match="no models"):
        merged(name, [], base)


@pytest.mark.parametrize("name", [name for name in EVERY if name != "wise_ft"])
def test_the_mean_of_the_models_is_no_base(name: str) -> None:
    _, models = branches(2)
    with pytest.raises(ValueError, match="the base is the mean of the models"):
        merged(name, models, npm.aggregate.mean(*models))


@pytest.mark.parametrize("name", EVERY)
def test_they_are_methods_like_any_other(name: str) -> None:
    a = net(0)
    models = [npm.aggregate.mean(net(seed), a, alpha=0.1) for seed in (1, 2)]
    result = npm.merge(models, loader(), aggregate=name, base=a)
    assert torch.isfinite(result.model(torch.zeros(1, 3, 8, 8))).all()


COPIES: dict[str, dict[str, Any]] = {
    "task_arithmetic": {"scale": 1 / 3},
    "wise_ft": {"alpha": 1.0},
    "ties": {"keep": 1.0},
    "dare": {"drop": 0.0, "scale": 1 / 3},
    "della": {"drop": 0.0, "window": 0.0, "scale": 1.0},
    "breadcrumbs": {"density": 1.0, "gamma": 0.0, "scale": 1 / 3},
    "emr": {},
    "model_stock": {},
}


@pytest.mark.parametrize("name", COPIES)
def test_where_nothing_is_left_out_copies_of_one_model_give_that_model(name: str) -> None:
    base, (model,) = branches(1)
    assert close(merged(name, [model] * 3, base, **COPIES[name]), model)


@pytest.mark.parametrize("name", ["wise_ft", "emr", "model_stock", "tsv", "opcm"])
def test_a_single_model_is_itself(name: str) -> None:
    base, (model,) = branches(1)
    assert close(merged(name, [model], base, **COPIES.get(name, {})), model)


# Each against its definition.


def test_task_arithmetic_is_a_sum_and_with_one_kth_the_mean() -> None:
    given, base = points([1, 2], [5, -2]), Point([1, 1])
    assert point(task_arithmetic(given, base=base, scale=0.5)) == [3, 0]
    assert point(task_arithmetic(given, base=base, scale=1.0)) == [5, -1]
    assert point(task_arithmetic(given[:1], base=base, scale=-1.0)) == [1, 0]


def test_wise_ft_begins_at_the_base_and_ends_at_the_model_exactly() -> None:
    base, models = branches(2)
    curve = dict(wise_ft_curve(models[:1], base=base, points=3))
    assert list(curve) == [0, 0.5, 1]
    for alpha, end in ((0, base), (1, models[0])):
        states = [m.state_dict() for m in (curve[alpha], end)]
        assert all(torch.equal(x, states[1][n]) for n, x in states[0].items() if x.ndim)
    given = points([2], [4])
    assert point(wise_ft(given, base=Point([1]), alpha=0.25)) == [1.5]
    with pytest.raises(ValueError, match="points is 1"):
        list(wise_ft_curve(models, base=base, points=1))


def test_ties_trims_over_all_parameters_elects_and_averages_what_agrees() -> None:
    first, second = [4.0, 1, -3, 0.1, 2], [2.0, -5, -1, 0.2, -2.5]
    base = Point([0] * 5)
    result = point(ties(points(first, second), base=base, keep=0.6))
    # Kept are 4, -3, 2 and 2, -5, -2.5.
    assert result == pytest.approx([3, -5, -3, 0, -2.5])
    half = point(ties(points(first, second), base=base, keep=0.6, scale=0.5))
    assert half == pytest.approx([value / 2 for value in result])
    # Another tensor has larger entries: it takes them all.
    both = [Point([4.0, 1], [100.0, 90]) for _ in range(2)]
    spent = ties(both, base=Point([0, 0], [0, 0]), keep=0.5)
    assert [p.tolist() for p in spent.parameters()] == [[0, 0], [100, 90]]


def test_ties_takes_the_most_frequent_sign_where_a_sum_is_zero() -> None:
    given = points([1.0, 2, 3], [-1.0, 2, 3])
    assert point(ties(given, base=Point([0] * 3), keep=1.0)) == [1, 2, 3]


def test_ties_never_leaves_the_range_of_the_agreeing_entries() -> None:
    rows = torch.randn(4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = torch.tensor(point(ties([Point(r) for r in rows], base=Point([0.0] * 50), keep=1.0)))
    agreeing = torch.where(rows.sign() == rows.sum(0).sign(), rows.abs(), torch.nan)
    assert torch.equal(result.sign(), rows.sum(0).sign().to(result))
    assert (result.abs() <= agreeing.nan_to_num(0).amax(0) + 1e-6).all()
    assert (result.abs() >= agreeing.nan_to_num(9).amin(0) - 1e-6).all()


def test_dare_is_task_arithmetic_on_average_over_the_seeds() -> None:
    rows = torch.tensor([[1.0, -2, 3], [2.0, 2, -1]])
    given, base, seeds = [Point(row.repeat(40)) for row in rows], Point(torch.zeros(120)), 50
    drawn = torch.tensor([point(dare(given, base=base, drop=0.4, seed=s)) for s in range(seeds)])
    drawn = drawn.view(-1, 3)
    expected = 0.8 * rows.sum(0)
    # Each entry is tau / 0.6 with probability 0.6: its variance is tau^2 0.4 / 0.6.
    error = 0.8 * (rows.square().sum(0) * 0.4 / 0.6 / len(drawn)).sqrt()
    assert ((drawn.mean(0) - expected).abs() < 4 * error).all()
    assert ((drawn - expected).abs().amax(0) > 0.5).all()
    assert len({tuple(row) for row in drawn[:40].tolist()}) > 4


def test_della_keeps_large_entries_of_a_row_more_often_and_divides_by_how_often() -> None:
    row = torch.tensor([0.5, -1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    sizes = torch.logspace(-3, 3, 2000, dtype=torch.float64)[:, None]
    given, base = [Point(row * sizes)], Point(torch.zeros(2000, 5))
    (drawn,) = della(given, base=base, drop=0.4, window=0.4, scale=1.0).parameters()
    drawn = drawn.detach() / sizes
    probabilities = torch.tensor([0.4, 0.5, 0.6, 0.7, 0.8], dtype=torch.float64)
    kept = (drawn != 0).double().mean(0)
    assert (kept - probabilities).abs().max() < 4 * 0.5 / math.sqrt(2000)
    for entry, value, probability in zip(drawn.T, row, probabilities, strict=True):
        assert torch.allclose(entry[entry != 0], value / probability)


def test_della_averages_what_has_the_sign_of_the_sum() -> None:
    given = points([4.0, 1], [-1.0, 3])
    assert point(della(given, base=Point([0, 0]), drop=0.0, window=0.0)) == pytest.approx(
        [1.1 * 4, 1.1 * 2]
    )


def test_breadcrumbs_keeps_exactly_the_share_in_the_middle_of_each_tensor() -> None:
    given = [Point([float(i) for i in range(1, 21)], [-1000.0, 1, 2, 3, 4])]
    result = breadcrumbs(
        given, base=Point([0.0] * 20, [0.0] * 5), density=0.6, gamma=0.2, scale=1.0
    )
    first, second = (p.tolist() for p in result.parameters())
    assert first == [0] * 4 + list(range(5, 17)) + [0] * 4
    assert second == [0, 0, 2, 3, 4]


def test_pcb_is_its_definition_by_hand() -> None:
    rows, keep, scale = [[1.0, -2, 3, 0.5, 0, 4], [2.0, -1, 2, -1, 0.2, 3]], 0.5, 1.2
    total = [x + y for x, y in zip(*rows, strict=True)]
    weights = []
    for row in rows:
        low, high = min(map(abs, row)), max(map(abs, row))
        score = [
            math.exp(2 * ((abs(x) - low) / (high - low)) ** 2) * math.tanh(x * t)
            for x, t in zip(row, total, strict=True)
        ]
        edge, top = sorted(score)[2], max(score)
        weights.append([max(0, (s - edge) / (top - edge)) for s in score])
    expected = [
        scale * sum(w * x for w, x in pairs) / max(1e-12, sum(w for w, _ in pairs))
        for pairs in (
            [(weights[m][i], rows[m][i]) for m in range(2)] for i in range(6)
        )
    ]  # fmt: skip
    result = point(pcb(points(*rows), base=Point([0.0] * 6), keep=keep, scale=scale))
    assert result == pytest.approx(expected)
    assert any(
        all(weights[m][i] > 0 for m in range(2)) and rows[0][i] != rows[1][i] for i in range(6)
    )


def test_pcb_of_one_model_is_its_largest_entries() -> None:
    row = [1.0, -2, 3, 0.5, 0.1, -4, 0.2, 0.3, 0.4, 0.6]
    result = point(pcb(points(row), base=Point([0.0] * 10), keep=0.3, scale=1.0))
    assert result == pytest.approx([0, -2, 3, 0, 0, -4, 0, 0, 0, 0])


def test_emr_elects_one_vector_and_gives_each_task_its_signs_and_its_size_back() -> None:
    rows = [[1.0, -2, 3, 0.5], [2.0, 1, -1, 1.5], [-0.5, -1, 3.5, 0]]
    result = emr(points(*rows), base=Point([0.0] * 4))
    unified = [2.0, -2, 3.5, 1.5]
    assert point(result) == unified
    assert len(result.details["models"]) == 3
    assert result.details["bits"] == 64 + 3
    for row, model in zip(rows, result.details["models"], strict=True):
        masked = [u if u * x > 0 else 0 for u, x in zip(unified, row, strict=True)]
        factor = sum(map(abs, row)) / sum(map(abs, masked))
        assert point(model) == pytest.approx([factor * m for m in masked])
        assert sum(map(abs, point(model))) == pytest.approx(sum(map(abs, row)))


def test_emr_gives_a_single_task_its_model_with_its_own_statistics() -> None:
    base, models = branches(2)
    only = emr(models[:1], base=base).details["models"][0]
    assert close(only, models[0])
    both = emr(models, base=base).details["models"]
    for own, model in zip(both, models, strict=True):
        assert torch.equal(own.norm.running_var, model.norm.running_var)


def test_model_stock_goes_as_far_as_the_angle_says_tensor_by_tensor() -> None:
    base = Point([0.0, 0], [0.0, 0], [0.0, 0])
    given = [Point([1.0, 0], [1.0, 0], [1.0, 0]), Point([1.0, 1], [0.0, 1], [-1.0, 0.5])]
    acute, orthogonal, opposed = (p.tolist() for p in model_stock(given, base=base).parameters())
    cosine = 1 / math.sqrt(2)
    t = 2 * cosine / (1 + cosine)
    assert acute == pytest.approx([t, t / 2])
    assert orthogonal == opposed == [0, 0]


def test_model_stock_is_nearest_to_the_centre_of_a_shell_around_many_models() -> None:
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(20_000, generator=generator, dtype=torch.float64)
    around = [Point(centre + torch.randn(20_000, generator=generator)) for _ in range(3)]
    result = next(model_stock(around, base=Point(torch.zeros(20_000))).parameters()).detach()
    mean = torch.stack([next(m.parameters()).detach() for m in around]).mean(0)
    assert (result - centre).norm() < 0.9 * (mean - centre).norm()
    best = centre @ mean / (mean @ mean)
    assert float(result @ mean / (mean @ mean)) == pytest.approx(float(best), abs=0.02)


def test_tsv_adds_up_tasks_in_orthogonal_directions() -> None:
    square = torch.linalg.qr(matrices(1, 6, 6)[0]).Q
    other = torch.linalg.qr(matrices(1, 8, 8)[0]).Q
    values = torch.tensor([3.0, 2, 1], dtype=torch.float64)
    first = square[:, :3] * values @ other[:3]
    second = square[:, 3:] * values @ other[3:6]
    assert torch.allclose(of_matrices(tsv, [first, second]), first + second)
    assert torch.allclose(of_matrices(tsv, [first, second], scale=0.5), (first + second) / 2)


def test_tsv_keeps_the_singular_values_of_the_share_of_each_task() -> None:
    given = matrices(2)
    found = torch.linalg.svdvals(of_matrices(tsv, given))
    kept = torch.cat([torch.linalg.svdvals(m)[:3] for m in given]).sort(descending=True).values
    assert torch.allclose(found, kept)


def test_tsv_of_copies_is_the_best_approximation_of_that_rank() -> None:
    (matrix,) = matrices(1)
    (best,) = matrices(1, rank=3)
    assert torch.allclose(of_matrices(tsv, [matrix, matrix]), best)


def test_matrices_of_a_task_that_learned_nothing_do_not_turn_those_of_others() -> None:
    (matrix,) = matrices(1, rank=2)
    idle = torch.zeros_like(matrix)
    assert torch.allclose(of_matrices(tsv, [idle, matrix]), matrix)
    spread = of_matrices(iso_c, [idle, matrix])
    assert torch.linalg.matrix_rank(spread) == 2


def test_a_convolution_is_a_matrix_of_patches_and_a_vector_is_averaged() -> None:
    given = matrices(2, 4, 18)
    models = [Point(m.view(4, 2, 3, 3), m[0]) for m in given]
    base = Point(torch.zeros(4, 2, 3, 3), torch.zeros(18))
    for method in (tsv, iso_c, iso_cts):
        weight, bias = (p.detach() for p in method(models, base=base).parameters())
        assert torch.allclose(weight.flatten(1), of_matrices(method, given))
        assert torch.allclose(bias, (given[0][0] + given[1][0]) / 2)


def test_iso_c_makes_all_singular_values_equal_and_keeps_their_sum_and_directions() -> None:
    given = matrices(2)
    found, total = of_matrices(iso_c, given), given[0] + given[1]
    values = torch.linalg.svdvals(found)
    assert torch.allclose(values, torch.linalg.svdvals(total).mean().expand(6))
    u, _, v = torch.linalg.svd(total, full_matrices=False)
    assert torch.allclose(u.T @ found @ v.T, torch.diag(values))


def test_iso_cts_replaces_the_weakest_common_directions_by_those_of_the_tasks() -> None:
    assert torch.allclose(
        of_matrices(iso_cts, matrices(2), common=1.0), of_matrices(iso_c, matrices(2))
    )
    assert torch.allclose(of_matrices(iso_cts, matrices(1)), of_matrices(iso_c, matrices(1)))
    # Two tasks share a strong direction; each has a weak one that the sum's strong ones do not hold.
    square = torch.eye(4, dtype=torch.float64)
    strong = [5 * torch.outer(square[i], square[i]) for i in range(2)]
    weak = [torch.outer(square[i], square[i]) for i in (2, 3)]
    given = [sum(strong) + w for w in weak]
    found = of_matrices(iso_cts, given, common=0.5)
    assert torch.allclose(found, (10 + 10 + 1 + 1) / 4 * square)


def test_opcm_has_the_mean_norm_of_the_task_vectors() -> None:
    base, models = branches(3)
    vectors = npm.tasks.task_vectors(models, base)
    norms = [math.sqrt(sum(float(t[i].norm()) ** 2 for t in vectors.values())) for i in range(3)]
    found = npm.tasks.task_vectors([opcm(models, base=base)], base)
    size = math.sqrt(sum(float(t.norm()) ** 2 for t in found.values()))
    assert size == pytest.approx(sum(norms) / 3, rel=1e-5)


def test_opcm_leaves_out_what_lies_in_the_directions_so_far() -> None:
    (matrix,) = matrices(1)
    assert torch.allclose(of_matrices(opcm, [matrix, matrix]), matrix)  # the diagonal
    old = torch.diag(torch.tensor([4.0, 3, 1], dtype=torch.float64))
    new = torch.arange(1.0, 10, dtype=torch.float64).view(3, 3)
    # 4 of 8 are not more than a half, 7 are: the block is 2 by 2.
    beside = torch.tensor([[0.0, 0, 3], [0, 0, 6], [7, 8, 0]], dtype=torch.float64)
    total = old + beside
    expected = total / total.norm() * (old.norm() + new.norm()) / 2
    assert torch.allclose(of_matrices(opcm, [old, new]), expected)


def test_opcm_counts_the_vectors_of_a_copy_twice_and_its_matrices_once() -> None:
    (matrix,) = matrices(1)
    given = [Point(matrix, [1.0, 2]) for _ in range(2)]
    weight, bias = opcm(given, base=Point(torch.zeros_like(matrix), [0.0, 0])).parameters()
    ratio = weight.norm() / matrix.norm()
    assert ratio < 1
    assert torch.allclose(bias, 2 * ratio * torch.tensor([1.0, 2], dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ties", {"keep": 0.0}, "keep is 0.0: give a share, from more than 0 to 1"),
        ("pcb", {"keep": 1.5}, "keep is 1.5"),
        ("dare", {"drop": 1.0}, "drop is 1.0: give a share, from 0 to less than 1"),
        ("della", {"drop": 0.95}, "drop is 0.95 and window 0.14"),
        ("della", {"window": -0.1}, "window -0.1"),
        ("breadcrumbs", {"density": 0.9, "gamma": 0.2}, "density is 0.9 and gamma 0.2"),
        ("breadcrumbs", {"density": 0.0}, "density is 0.0"),
        ("iso_cts", {"common": 2.0}, "common is 2.0"),
        ("opcm", {"threshold": 1.0}, "threshold is 1.0"),
    ],
)
def test_an_option_out_of_range_is_an_error_that_names_it(
    name: str, options: dict[str, float], message: str
) -> None:
    base, models = branches(2)
    with pytest.raises(ValueError, match=message):
        merged(name, models, base, **options)
