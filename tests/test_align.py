"""Every alignment method's defining property, and what an `Alignment` promises."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Snapshot, assert_same_state, marked
from torch import Tensor, nn

from npmerge import align
from npmerge.align import Alignment
from npmerge.data.streams import Data
from npmerge.merging import Merger
from npmerge.methods import METHODS, of_kind
from npmerge.symmetry import Group, activations, find_symmetry

Batches = list[tuple[Tensor, Tensor]]
ALIGN = list(of_kind("align"))
UNLABELLED = [name for name in ALIGN if "labels" not in METHODS[name].needs]
ON_DATA = [name for name in ALIGN if "data" in METHODS[name].needs]


def batches(sizes: tuple[int, ...] = (40, 24), seed: int = 5) -> Batches:
    x = images(sum(sizes), seed=seed)
    labels = torch.zeros(sum(sizes), dtype=torch.int64)
    return list(zip(x.split(list(sizes)), labels.split(list(sizes)), strict=True))


def from_statistics(
    method: Callable[..., Alignment], statistics: align.Covariances, **options: float
) -> Alignment:
    """What a method finds by what was measured; it may look at neither models nor data."""
    return method(None, None, None, statistics=statistics, **options)


@pytest.fixture(params=["residual", "plain"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return randomised(Residual() if request.param == "residual" else plain())


def other(model: nn.Module, seed: int = 9) -> nn.Module:
    return randomised(random_alignment(()).apply(model), seed)


def assert_maps_close(x: Alignment, y: Alignment, atol: float = 0) -> None:
    for left, right in zip(x.maps, y.maps, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=atol)


def as_matrix(mapping: Tensor) -> Tensor:
    return mapping if mapping.ndim > 1 else torch.eye(len(mapping), dtype=torch.float64)[mapping]


def as_matrices(alignment: Alignment) -> Alignment:
    """The same maps, written as matrices."""
    maps = tuple(map(as_matrix, alignment.maps))
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
    groups = find_symmetry(model, images())
    first, second = random_alignment(groups, seed), random_alignment(groups, seed + 1)
    undone = first.inverse().apply(first.apply(model))
    assert_same_state(undone.state_dict(), model.state_dict())
    at_once, one_by_one = second.compose(first).apply(model), second.apply(first.apply(model))
    assert_same_state(at_once.state_dict(), one_by_one.state_dict())


def test_matrices_invert_and_compose_like_permutations(model: nn.Module) -> None:
    groups = find_symmetry(model, images())
    first, second = random_matrices(groups), as_matrices(random_alignment(groups))
    assert not first.is_permutation
    at_once, one_by_one = second.compose(first).apply(model), second.apply(first.apply(model))
    undone = first.inverse().apply(first.apply(model))
    inexact = [slot.name for g in groups for slot in g.slots if slot.role in ("scale", "variance")]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(at_once.state_dict()[name], one_by_one.state_dict()[name])
        if name not in inexact:
            torch.testing.assert_close(undone.state_dict()[name], tensor)


def test_permutations_and_matrices_compose(model: nn.Module) -> None:
    groups = find_symmetry(model, images())
    permutation, matrix = random_alignment(groups), random_matrices(groups)
    expected = as_matrices(permutation)
    assert_maps_close(permutation.compose(matrix), expected.compose(matrix), 1e-12)
    assert_maps_close(matrix.compose(permutation), matrix.compose(expected), 1e-12)


def test_a_permutation_as_matrices_does_the_same(model: nn.Module) -> None:
    alignment = random_alignment(find_symmetry(model, images()))
    expected = alignment.apply(model).state_dict()
    for name, tensor in as_matrices(alignment).apply(model).state_dict().items():
        torch.testing.assert_close(tensor, expected[name])


def test_a_matrix_keeps_the_function_of_a_linear_network() -> None:
    layers = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3), nn.Flatten(), nn.Linear(80, 4)
    linear = randomised(nn.Sequential(*layers))
    x = images()
    moved = random_matrices(find_symmetry(linear, x)).apply(linear)
    assert not torch.allclose(moved.get_parameter("0.weight"), linear.get_parameter("0.weight"))
    torch.testing.assert_close(moved(x), linear(x))
    bent = nn.Sequential(linear[0], nn.ReLU(), *linear[1:])
    moved = random_matrices(find_symmetry(bent, x)).apply(bent)
    assert not torch.allclose(moved(x), bent(x)), "through a ReLU it cannot"


def test_a_running_variance_stays_a_variance() -> None:
    model = randomised(Residual())
    groups = find_symmetry(model, images())
    maps = tuple(-torch.eye(g.size, dtype=torch.float64) for g in groups)
    moved = Alignment(groups, maps, maps).apply(model)
    before, after = model.state_dict(), moved.state_dict()
    torch.testing.assert_close(after["stem.1.running_var"], before["stem.1.running_var"])
    torch.testing.assert_close(after["stem.1.running_mean"], -before["stem.1.running_mean"])


def test_no_matrix_can_be_applied_to_a_depthwise_convolution() -> None:
    model = randomised(Drawn([("plain", 4, True), ("depthwise", 4, True)]))
    groups = find_symmetry(model, images())
    random_alignment(groups).apply(model)
    with pytest.raises(
        ValueError, match=r"'convolution' in module 'convs.1'.* allows only permutations"
    ):
        random_matrices(groups).apply(model)


def test_apply_keeps_the_model_its_type_and_dtype(model: nn.Module) -> None:
    model = marked(model.float())
    before = Snapshot.of(model)
    groups = find_symmetry(model, images())
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
    alignment = random_alignment(find_symmetry(Residual(), images()))
    with pytest.raises(ValueError, match=r"has no tensor '.*weight'"):
        alignment.apply(plain())
    with pytest.raises(ValueError, match=r"'.*' has shape .*expects length 6"):
        alignment.apply(Residual(width=12))
    with pytest.raises(ValueError, match="different symmetry groups"):
        alignment.compose(random_alignment(find_symmetry(plain(), images())))


def test_maps_that_do_not_fit_are_refused() -> None:
    (group, *_) = find_symmetry(plain(), images())
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
    groups = find_symmetry(model, images())
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
    random_alignment(find_symmetry(plain(), images())).save(path)
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
    planted = random_alignment(find_symmetry(model, images()))
    found = align.permute(model, planted.apply(model), batches())
    assert found.is_permutation
    assert_maps_close(found, planted.inverse())
    assert_same_state(found.apply(planted.apply(model)).state_dict(), model.state_dict())


def test_permute_finds_it_behind_noise(model: nn.Module) -> None:
    planted = random_alignment(find_symmetry(model, images()))
    noisy = planted.apply(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in noisy.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.add_(noise, alpha=0.02 * float(p.std()))
    assert_maps_close(align.permute(model, noisy, batches()), planted.inverse())


def reference_correlations(a: nn.Module, b: nn.Module, data: Batches) -> list[Tensor]:
    """Pearson correlations the slow way: all activations at once, in float64."""
    groups, x = find_symmetry(a, data[0][0]), torch.cat([x for x, _ in data])
    result = []
    for left, right in zip(activations(a, groups, x), activations(b, groups, x), strict=True):
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
    b = random_alignment(find_symmetry(a, images())).apply(a)
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


def found(method: str, a: nn.Module, b: nn.Module, data: Data) -> Alignment:
    """What the method finds, given what it needs."""
    return Merger(data, align=method).align(a, b)


@pytest.mark.parametrize("method", ALIGN)
def test_methods_leave_the_models_alone_and_use_groups_that_are_known(
    method: str, model: nn.Module
) -> None:
    a, b = marked(model), marked(other(model))
    before = [Snapshot.of(a), Snapshot.of(b)]
    alignment = found(method, a, b, batches())
    before[0].assert_still(a)
    before[1].assert_still(b)
    groups = find_symmetry(a, images()).groups
    assert type(alignment.apply(b)) is type(b)
    if method == "identity":  # it asks for no symmetry
        assert alignment.groups == ()
        return
    assert alignment.groups == groups
    step = METHODS[method]
    given = batches() if method in ON_DATA else images()
    assert step.function(a, b, given, groups=groups[:1]).groups == groups[:1]


@pytest.mark.parametrize("method", ["permute", "cca"])
def test_data_are_gone_through_once(method: str, model: nn.Module) -> None:
    data = Counted(batches())
    METHODS[method].function(model, other(model), data)
    assert data.passes == 1


@pytest.mark.parametrize("method", ALIGN)
def test_methods_refuse_what_cannot_be_aligned(method: str) -> None:
    with pytest.raises(ValueError, match=r"'stem.0.weight' has shape"):
        found(method, Residual(), Residual(width=5), batches())
    if method == "identity":  # it looks at no data
        return
    with pytest.raises(ValueError, match="empty"):
        found(method, Residual(), Residual(), [])
    with pytest.raises(ValueError, match="one-shot"):
        found(method, Residual(), Residual(), iter(batches()))


@pytest.mark.parametrize("method", ON_DATA)
def test_the_functions_themselves_refuse_data_they_cannot_use(method: str) -> None:
    for data, message in (([], "empty"), (iter(batches()), "one-shot")):
        with pytest.raises(ValueError, match=message):
            METHODS[method].function(Residual(), Residual(), data)


@pytest.mark.parametrize("method", sorted({*ALIGN} - {"identity"}))
def test_a_model_that_is_not_finite_is_named(method: str) -> None:
    a, b = randomised(plain()), randomised(plain(), 1)
    with torch.no_grad():
        b[4].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        found(method, a, b, batches())


@pytest.mark.parametrize("method", UNLABELLED)
@pytest.mark.parametrize("labels", [{"labels"}, {"label"}, set()])
def test_batches_may_be_dictionaries_whose_labels_nobody_needs(
    method: str, labels: set[str], model: nn.Module
) -> None:
    b = other(model)
    name = next(iter(inspect.signature(model.forward).parameters))
    data = [{name: x} | dict.fromkeys(labels, y) for x, y in batches()]
    assert_maps_close(found(method, model, b, data), found(method, model, b, batches()))


class Two(nn.Module):
    """Two inputs, one of them by its name alone, and several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 8), nn.Linear(3, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, left: Tensor, *, right: Tensor | None = None) -> dict[str, Any]:
        x = self.left(left) if right is None else self.left(left) + self.right(right)
        return {"logits": self.head(x.relu()), "more": (left, None)}


@pytest.mark.parametrize("method", sorted({*UNLABELLED} - {"identity"}))
def test_models_may_take_several_inputs_by_name(method: str) -> None:
    model = randomised(Two())
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.randn(50, n, generator=draw, dtype=torch.float64) for n in (5, 3))
    data = [{"left": left, "right": right, "labels": torch.zeros(50, dtype=torch.int64)}]
    planted = random_alignment(find_symmetry(model, left, right=right))
    alignment, expected = found(method, model, planted.apply(model), data), planted.inverse()
    if method == "cca":
        expected = as_matrices(expected)
    assert_maps_close(alignment, expected, atol=1e-2)


def test_identity_is_direct_averaging(model: nn.Module) -> None:
    alignment = align.identity(model, other(model))
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
    measured, hidden = activations(model, find_symmetry(model, x), x)
    torch.testing.assert_close(measured, model.conv(x))
    assert float(measured.min()) < 0 < float(hidden.min())


def test_what_comes_after_the_last_group_is_not_computed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))
    groups = find_symmetry(model, images())
    with torch.no_grad():
        model[3].weight = nn.Parameter(torch.zeros(0))
    (measured,) = activations(model, groups, images(dtype=torch.float32))
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


def test_groups_that_share_an_activation_are_measured_at_their_offsets() -> None:
    model = randomised(Padded())
    groups = find_symmetry(model, images())
    assert sorted((group.size, group.tap.offset) for group in groups) == [(2, 0), (3, 6), (4, 0)]
    planted = random_alignment(groups)
    assert_maps_close(align.permute(model, planted.apply(model), batches()), planted.inverse())


@pytest.mark.parametrize("network", [Attention, Recurrent])
@pytest.mark.parametrize("method", ["permute", "weight_matching", "cca"])
def test_heads_and_recurrent_units_are_found_again(
    method: str, network: Callable[[], nn.Module]
) -> None:
    """A head's dimensions are measured once the heads are aligned."""
    model = randomised(network())
    x = torch.randn(64, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    planted = random_alignment(find_symmetry(model, x))
    b, data = planted.apply(model), [(x, torch.zeros(64, dtype=torch.int64))]
    options = {"align_options": {"ridge": 1e-9}} if method == "cca" else {}
    alignment = Merger(data, align=method, **options).align(model, b)
    torch.testing.assert_close(alignment.apply(b)(x), model(x), rtol=0, atol=1e-6)
    for found, wanted in zip(alignment.maps, planted.inverse().maps, strict=True):
        torch.testing.assert_close(as_matrix(found), as_matrix(wanted), rtol=0, atol=1e-6)


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
    planted = random_alignment(find_symmetry(model, images()))
    found = align.cca(model, planted.apply(model), batches(), ridge=1e-6)
    assert_maps_close(found, as_matrices(planted.inverse()), 1e-6)


def test_cca_maps_b_s_covariance_onto_a_s(model: nn.Module) -> None:
    ridge = 0.05
    statistics = align.covariances(model, other(model), batches())
    alignment = from_statistics(align.cca, statistics, ridge=ridge)
    for xx, yy, T, inverse in zip(
        statistics.xx, statistics.yy, alignment.maps, alignment.inverses, strict=True
    ):
        eye = torch.eye(len(T), dtype=torch.float64)
        torch.testing.assert_close(T @ (yy + ridge * eye) @ T.T, xx + ridge * eye)
        torch.testing.assert_close(T @ inverse, eye, rtol=0, atol=1e-9)


def test_cca_correlates_better_than_any_permutation(model: nn.Module) -> None:
    statistics = align.covariances(model, other(model), batches())
    alignment = from_statistics(align.cca, statistics, ridge=0.01)
    permutation = from_statistics(align.permute, statistics)
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
        assert_maps_close(from_statistics(align.cca, statistics, ridge=ridge), expected)
    assert_maps_close(from_statistics(align.permute, statistics), align.permute(model, b, data))


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
        from_statistics(align.cca, statistics)
