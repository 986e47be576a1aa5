"""Every alignment method's defining property, and what an `Alignment` promises."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from architectures import Drawn, Residual, images, plain, random_alignment, randomised
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Snapshot, assert_same_state, marked
from torch import Tensor, nn

from npmerge import align
from npmerge.align import METHODS, Alignment, cca_from_covariances, permute_from_covariances
from npmerge.symmetry import Group, symmetry

Batches = list[tuple[Tensor, Tensor]]


def batches(sizes: tuple[int, ...] = (40, 24), seed: int = 5) -> Batches:
    x = images(sum(sizes), seed=seed)
    labels = torch.zeros(sum(sizes), dtype=torch.int64)
    return list(zip(x.split(list(sizes)), labels.split(list(sizes)), strict=True))


@pytest.fixture(params=["residual", "plain"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return randomised(Residual() if request.param == "residual" else plain())


def other(model: nn.Module, seed: int = 9) -> nn.Module:
    return randomised(random_alignment(()).apply(model), seed)


def assert_maps_close(x: Alignment, y: Alignment, atol: float = 0) -> None:
    for left, right in zip(x.maps, y.maps, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=atol)


def as_matrices(alignment: Alignment) -> Alignment:
    """The same maps, written as matrices."""
    maps = tuple(torch.eye(len(m), dtype=torch.float64)[m] for m in alignment.maps)
    return Alignment(alignment.groups, maps, tuple(m.T for m in maps))


def random_matrices(groups: tuple[Group, ...], seed: int = 3) -> Alignment:
    generator = torch.Generator().manual_seed(seed)
    maps = [
        torch.eye(g.size, dtype=torch.float64)
        + 0.3 * torch.rand(g.size, g.size, generator=generator, dtype=torch.float64)
        for g in groups
    ]
    return Alignment(groups, tuple(maps), tuple(torch.linalg.inv(m) for m in maps))


# --- The value ---------------------------------------------------------------------------------


drawn = st.tuples(
    st.lists(
        st.tuples(
            st.sampled_from(["plain", "residual", "concat", "depthwise"]),
            st.integers(2, 5),
            st.booleans(),
        ),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 99),
)


@settings(max_examples=15, deadline=None)
@given(drawn)
def test_the_inverse_undoes_and_composition_is_successive_application(
    case: tuple[list[tuple[str, int, bool]], int],
) -> None:
    blocks, seed = case
    model = randomised(Drawn([("plain", 3, True), *blocks]), seed)
    groups = symmetry(model, images())
    first, second = random_alignment(groups, seed), random_alignment(groups, seed + 1)
    undone = first.inverse().apply(first.apply(model))
    assert_same_state(undone.state_dict(), model.state_dict())
    at_once, one_by_one = second.compose(first).apply(model), second.apply(first.apply(model))
    assert_same_state(at_once.state_dict(), one_by_one.state_dict())


def test_matrices_invert_and_compose_like_permutations(model: nn.Module) -> None:
    groups = symmetry(model, images())
    first, second = random_matrices(groups), as_matrices(random_alignment(groups))
    assert not first.is_permutation
    at_once, one_by_one = second.compose(first).apply(model), second.apply(first.apply(model))
    undone = first.inverse().apply(first.apply(model))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(at_once.state_dict()[name], one_by_one.state_dict()[name])
        if not name.endswith("running_var"):
            torch.testing.assert_close(undone.state_dict()[name], tensor)


def test_permutations_and_matrices_compose(model: nn.Module) -> None:
    groups = symmetry(model, images())
    permutation, matrix = random_alignment(groups), random_matrices(groups)
    expected = as_matrices(permutation)
    assert_maps_close(permutation.compose(matrix), expected.compose(matrix), 1e-12)
    assert_maps_close(matrix.compose(permutation), matrix.compose(expected), 1e-12)


def test_a_permutation_as_matrices_does_the_same(model: nn.Module) -> None:
    alignment = random_alignment(symmetry(model, images()))
    expected = alignment.apply(model).state_dict()
    for name, tensor in as_matrices(alignment).apply(model).state_dict().items():
        torch.testing.assert_close(tensor, expected[name])


def test_a_matrix_keeps_the_function_of_a_linear_network() -> None:
    layers = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3), nn.Flatten(), nn.Linear(80, 4)
    linear = randomised(nn.Sequential(*layers))
    x = images()
    moved = random_matrices(symmetry(linear, x)).apply(linear)
    assert not torch.allclose(moved.get_parameter("0.weight"), linear.get_parameter("0.weight"))
    torch.testing.assert_close(moved(x), linear(x))
    bent = nn.Sequential(linear[0], nn.ReLU(), *linear[1:])
    moved = random_matrices(symmetry(bent, x)).apply(bent)
    assert not torch.allclose(moved(x), bent(x)), "through a ReLU it cannot"


def test_a_running_variance_stays_a_variance() -> None:
    model = randomised(Residual())
    groups = symmetry(model, images())
    maps = tuple(-torch.eye(g.size, dtype=torch.float64) for g in groups)
    moved = Alignment(groups, maps, maps).apply(model)
    before, after = model.state_dict(), moved.state_dict()
    torch.testing.assert_close(after["stem.1.running_var"], before["stem.1.running_var"])
    torch.testing.assert_close(after["stem.1.running_mean"], -before["stem.1.running_mean"])


def test_no_matrix_can_be_applied_to_a_depthwise_convolution() -> None:
    model = randomised(Drawn([("plain", 4, True), ("depthwise", 4, True)]))
    groups = symmetry(model, images())
    random_alignment(groups).apply(model)
    with pytest.raises(ValueError, match=r"'convs.1.weight' is consumed and produced"):
        random_matrices(groups).apply(model)


def test_apply_keeps_the_model_its_type_and_dtype(model: nn.Module) -> None:
    model = marked(model.float())
    before = Snapshot.of(model)
    groups = symmetry(model, images())
    for alignment in (random_alignment(groups), random_matrices(groups)):
        moved = alignment.apply(model)
        before.assert_still(model)
        assert type(moved) is type(model)
        assert {p.dtype for p in moved.parameters()} == {torch.float32}
        assert [m.training for m in moved.modules()] == [m.training for m in model.modules()]
        assert not {p.data_ptr() for p in moved.parameters()} & {
            p.data_ptr() for p in model.parameters()
        }


def test_a_model_of_another_architecture_is_refused() -> None:
    alignment = random_alignment(symmetry(Residual(), images()))
    with pytest.raises(ValueError, match=r"has no tensor '.*weight'"):
        alignment.apply(plain())
    with pytest.raises(ValueError, match=r"'.*' has shape .*expects length 6"):
        alignment.apply(Residual(width=12))
    with pytest.raises(ValueError, match="different symmetry groups"):
        alignment.compose(random_alignment(symmetry(plain(), images())))


def test_maps_that_do_not_fit_are_refused() -> None:
    (group, *_) = symmetry(plain(), images())
    eye = torch.eye(6, dtype=torch.float64)
    good = torch.arange(6)
    for bad, message in (
        (torch.tensor([0, 1, 2, 3, 4, 4]), "not a permutation of 6 channels"),
        (torch.arange(5), "not a permutation of 6 channels"),
        (torch.arange(6.0), "not a permutation of 6 channels"),
        (eye[:5], r"shape \(5, 6\)"),
        (eye / 0, "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            Alignment((group,), (bad,), (good,))
    with pytest.raises(ValueError, match="one map and one inverse per group"):
        Alignment((group,), (good,), ())


def test_a_saved_alignment_is_read_back(tmp_path: Path, model: nn.Module) -> None:
    groups = symmetry(model, images())
    identity = Alignment.from_permutations(groups, [torch.arange(g.size) for g in groups])
    for alignment in (identity, random_alignment(groups), random_matrices(groups)):
        alignment.save(tmp_path / "x.safetensors")
        read = Alignment.load(tmp_path / "x.safetensors")
        assert read.groups == alignment.groups
        assert_maps_close(read, alignment)
        assert_maps_close(read.inverse(), alignment.inverse())
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match=r"x\.safetensors"):
        Alignment.load(path)
    random_alignment(symmetry(plain(), images())).save(path)
    whole = path.read_bytes()
    for size in (0, 5, 200, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(
            ValueError, match=r"x\.safetensors is not a complete alignment"
        ) as error:
            Alignment.load(path)
        assert "\n" not in str(error.value)


# --- Permute -----------------------------------------------------------------------------------


def test_permute_finds_a_planted_permutation(model: nn.Module) -> None:
    planted = random_alignment(symmetry(model, images()))
    found = align.permute(model, planted.apply(model), batches())
    assert found.is_permutation
    assert_maps_close(found, planted.inverse())
    assert_same_state(found.apply(planted.apply(model)).state_dict(), model.state_dict())


def test_permute_finds_it_behind_noise(model: nn.Module) -> None:
    planted = random_alignment(symmetry(model, images()))
    noisy = planted.apply(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in noisy.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.add_(noise, alpha=0.02 * float(p.std()))
    assert_maps_close(align.permute(model, noisy, batches()), planted.inverse())


def reference_correlations(a: nn.Module, b: nn.Module, data: Batches) -> list[Tensor]:
    """Pearson correlations the slow way: all activations at once, in float64."""
    groups, x = symmetry(a, data[0][0]), torch.cat([x for x, _ in data])
    result = []
    for left, right in zip(
        align.activations(a, x, groups), align.activations(b, x, groups), strict=True
    ):
        rows = torch.cat([left, right], 1).movedim(1, 0).flatten(1)
        result.append(torch.corrcoef(rows)[: left.shape[1], left.shape[1] :].nan_to_num(0))
    return result


@pytest.mark.parametrize("variances_only", [False, True])
def test_correlations_are_pearsons(model: nn.Module, variances_only: bool) -> None:
    b, data = other(model), batches()
    statistics = align.covariances(model, b, data, variances_only=variances_only)
    for found, expected in zip(
        statistics.correlations(), reference_correlations(model, b, data), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_float32_is_enough_even_far_from_zero() -> None:
    """Channels whose mean is a thousand times their deviation keep their correlations."""
    a = randomised(plain())
    with torch.no_grad():
        a[1].bias.fill_(1000)
        a[4].bias.fill_(1000)
    b = random_alignment(symmetry(a, images())).apply(a)
    data = batches()
    expected = reference_correlations(a, b, data)
    single = [(x.float(), y) for x, y in data]
    found = align.covariances(a.float(), b.float(), single).correlations()
    for index in (0, 1):
        torch.testing.assert_close(found[index], expected[index], rtol=0, atol=2e-3)


def test_a_dead_channel_correlates_with_nothing() -> None:
    a = randomised(plain())
    with torch.no_grad():
        a[4].weight[0], a[4].bias[0] = 0, -1
    b = other(a)
    correlation = align.covariances(a, b, batches()).correlations()[1]
    assert bool((correlation[0] == 0).all())
    assert bool(correlation.isfinite().all())
    assert float(correlation[1:].abs().min()) > 0
    assert align.permute(a, b, batches()).is_permutation


def test_the_division_into_batches_does_not_matter(model: nn.Module) -> None:
    b = other(model)
    whole, parts = batches((64,)), batches((1, 30, 33))
    left, right = align.covariances(model, b, whole), align.covariances(model, b, parts)
    assert left.counts == right.counts
    for x, y in zip((*left.xx, *left.yy, *left.xy), (*right.xx, *right.yy, *right.xy), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


class Counted:
    """Data that counts how often it is gone through."""

    def __init__(self, data: Batches) -> None:
        self.data, self.passes = data, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        return iter(self.data)


@pytest.mark.parametrize("method", METHODS)
def test_methods_take_data_once_and_leave_the_models_alone(method: str, model: nn.Module) -> None:
    a, b = marked(model), marked(other(model))
    before, data = [Snapshot.of(a), Snapshot.of(b)], Counted(batches())
    alignment = METHODS[method](a, b, data)
    assert data.passes == 1
    before[0].assert_still(a)
    before[1].assert_still(b)
    assert alignment.groups == symmetry(a, images())
    assert type(alignment.apply(b)) is type(b)


@pytest.mark.parametrize("method", METHODS)
def test_methods_refuse_what_cannot_be_aligned(method: str) -> None:
    align_ = METHODS[method]
    with pytest.raises(ValueError, match=r"'stem.0.weight' has shape"):
        align_(Residual(), Residual(width=5), batches())
    with pytest.raises(ValueError, match="empty"):
        align_(Residual(), Residual(), [])
    with pytest.raises(ValueError, match="one-shot"):
        align_(Residual(), Residual(), iter(batches()))


@pytest.mark.parametrize("method", ["permute", "cca", "weight_matching"])
def test_a_model_that_is_not_finite_is_named(method: str) -> None:
    a, b = randomised(plain()), randomised(plain(), 1)
    with torch.no_grad():
        b[4].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        METHODS[method](a, b, batches())


def test_identity_is_direct_averaging(model: nn.Module) -> None:
    alignment = align.identity(model, other(model), images())
    assert_same_state(alignment.apply(model).state_dict(), model.state_dict())


def test_statistics_ignore_autocast(model: nn.Module) -> None:
    a, b = model.float(), other(model).float()
    data = [(x.float(), y) for x, y in batches()]
    expected = align.covariances(a, b, data)
    with torch.autocast("cpu", torch.bfloat16):
        found = align.covariances(a, b, data)
    for x, y in zip(expected.xy, found.xy, strict=True):
        assert torch.equal(x, y)


class FlattenedInPlace(nn.Module):
    """The convolution's activation represents its group, but a later ReLU overwrites it through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True)
        self.hidden, self.head = nn.Linear(256, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(torch.flatten(self.conv(x), 1))
        logits: Tensor = self.head(torch.sigmoid(self.hidden(x)))
        return logits


def test_in_place_operations_do_not_reach_the_measured_activations() -> None:
    model, x = randomised(FlattenedInPlace()), images()
    measured, hidden = align.activations(model, x, symmetry(model, x))
    torch.testing.assert_close(measured, model.conv(x))
    assert float(measured.min()) < 0 < float(hidden.min())


def test_what_comes_after_the_last_group_is_not_computed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))
    groups = symmetry(model, images())
    with torch.no_grad():
        model[3].weight = nn.Parameter(torch.zeros(0))
    (measured,) = align.activations(model, images(dtype=torch.float32), groups)
    assert measured.shape == (2, 4, 6, 6)


class Padded(nn.Module):
    """Four channels padded to nine are added to nine others: three groups share the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 9, 1)
        self.head = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        padded = nn.functional.pad(self.narrow(x), (0, 0, 0, 0, 2, 3))
        logits: Tensor = self.head((padded + self.wide(x)).relu().mean((2, 3)))
        return logits


def test_groups_that_share_a_node_are_measured_at_their_offsets() -> None:
    model = randomised(Padded())
    groups = symmetry(model, images())
    assert sorted((group.size, group.offset) for group in groups) == [(2, 0), (3, 6), (4, 0)]
    planted = random_alignment(groups)
    assert_maps_close(align.permute(model, planted.apply(model), batches()), planted.inverse())


# --- Weight matching ---------------------------------------------------------------------------


def objective(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return sum(float((p * q).detach().sum()) for p, q in pairs)


def test_weight_matching_finds_a_planted_permutation_of_a_plain_network() -> None:
    a = randomised(plain(16))
    planted = random_alignment(symmetry(a, images()))
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
    assert_maps_close(align.weight_matching(a, b, images(), seed=3), first)


def test_weight_matching_ignores_running_statistics() -> None:
    a, b = randomised(Residual()), randomised(Residual(), 1)
    expected = align.weight_matching(a, b, images())
    for name, buffer in b.named_buffers():
        if "running" in name:
            buffer.copy_(buffer.flip(0) * 100)
    assert_maps_close(align.weight_matching(a, b, images()), expected)


def test_weight_matching_says_when_it_has_not_converged(caplog: pytest.LogCaptureFixture) -> None:
    a, b = randomised(Residual()), randomised(Residual(), 1)
    with caplog.at_level(logging.WARNING):
        align.weight_matching(a, b, images(), max_sweeps=1)
    assert "after 1 sweeps" in caplog.text


# --- CCA ---------------------------------------------------------------------------------------


def test_cca_of_identical_models_is_the_identity(model: nn.Module) -> None:
    for ridge in (1e-6, 1e-2):
        alignment = align.cca(model, model, batches(), ridge=ridge)
        for mapping in (*alignment.maps, *alignment.inverses):
            torch.testing.assert_close(
                mapping, torch.eye(len(mapping), dtype=torch.float64), rtol=0, atol=1e-6
            )


def test_cca_of_identical_models_is_the_identity_for_dead_channels_too() -> None:
    model = randomised(plain())
    with torch.no_grad():
        model[4].weight[:2], model[4].bias[:2] = 0, -1
    mapping = align.cca(model, model, batches(), ridge=1e-3).maps[1]
    torch.testing.assert_close(mapping, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-6)


def test_cca_finds_a_planted_permutation(model: nn.Module) -> None:
    planted = random_alignment(symmetry(model, images()))
    found = align.cca(model, planted.apply(model), batches(), ridge=1e-6)
    assert_maps_close(found, as_matrices(planted.inverse()), 1e-6)


def test_cca_maps_b_s_covariance_onto_a_s(model: nn.Module) -> None:
    ridge = 0.05
    statistics = align.covariances(model, other(model), batches())
    alignment = cca_from_covariances(statistics, ridge)
    for xx, yy, T, inverse in zip(
        statistics.xx, statistics.yy, alignment.maps, alignment.inverses, strict=True
    ):
        eye = torch.eye(len(T), dtype=torch.float64)
        torch.testing.assert_close(T @ (yy + ridge * eye) @ T.T, xx + ridge * eye)
        torch.testing.assert_close(T @ inverse, eye, rtol=0, atol=1e-9)


def test_cca_correlates_better_than_any_permutation(model: nn.Module) -> None:
    statistics = align.covariances(model, other(model), batches())
    alignment = cca_from_covariances(statistics, 0.01)
    permutation = permute_from_covariances(statistics)
    for xx, yy, xy, T, order in zip(
        statistics.xx, statistics.yy, statistics.xy, alignment.maps, permutation.maps, strict=True
    ):
        aligned = replace(statistics, xx=(xx,), yy=(T @ yy @ T.T,), xy=(xy @ T.T,)).correlations()
        permuted = replace(statistics, xx=(xx,), yy=(yy,), xy=(xy,)).correlations()[0][:, order]
        assert float(aligned[0].diagonal().sum()) > float(permuted.diagonal().sum())


def test_one_pass_serves_every_ridge_and_both_methods(model: nn.Module) -> None:
    b, data = other(model), batches()
    statistics = align.covariances(model, b, data)
    for ridge in (0.001, 0.1):
        expected = align.cca(model, b, data, ridge=ridge)
        assert_maps_close(cca_from_covariances(statistics, ridge), expected)
    assert_maps_close(permute_from_covariances(statistics), align.permute(model, b, data))


def test_a_singular_covariance_without_ridge_is_named() -> None:
    model = randomised(plain())
    with torch.no_grad():
        model[4].weight[0], model[4].bias[0] = 0, -1
    with pytest.raises(ValueError, match=r"model A at group '.*' is singular.*use a ridge above"):
        align.cca(model, model, batches(), ridge=0)
    assert not align.cca(model, model, batches()).is_permutation


def test_a_senseless_ridge_is_refused_before_the_pass() -> None:
    data = Counted(batches())
    for ridge in (-1e-3, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="ridge is"):
            align.cca(Residual(), Residual(), data, ridge=ridge)
    assert data.passes == 0
    statistics = align.covariances(plain(), plain(), batches(), variances_only=True)
    with pytest.raises(ValueError, match="variances only"):
        cca_from_covariances(statistics)
