"""CCA Merge: what its algebra promises, and what a linear map does to a batch norm."""

from __future__ import annotations

from dataclasses import replace

import torch
from architectures import images, randomised
from torch import Tensor, nn

from npmerge import align
from npmerge.aggregate import mean
from npmerge.align import Alignment, Covariances
from npmerge.correct import reset_batchnorm
from npmerge.data import ImageData, load
from npmerge.evaluate import score
from npmerge.models import build
from npmerge.symmetry import find_symmetry
from npmerge.training import fit, piecewise_linear

Batches = list[tuple[Tensor, Tensor]]


def batches(count: int = 64) -> Batches:
    x = images(count, seed=5)
    return [(part, torch.zeros(len(part), dtype=torch.int64)) for part in x.split(16)]


def linear() -> nn.Module:
    """No non-linearity and no normalisation: every invertible map of its channels keeps its function."""
    layers = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3), nn.Flatten(), nn.Linear(80, 4)
    return randomised(nn.Sequential(*layers))


def normalised() -> nn.Module:
    """Batch norm and no non-linearity."""
    layers = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(216, 4)
    return randomised(nn.Sequential(*layers))


def planted(model: nn.Module, seed: int = 3) -> Alignment:
    """A well-conditioned random matrix for every group."""
    generator = torch.Generator().manual_seed(seed)
    groups = find_symmetry(model, images())
    eyes = [torch.eye(group.size, dtype=torch.float64) for group in groups]
    maps = [e + 0.2 * torch.randn(e.shape, generator=generator, dtype=e.dtype) for e in eyes]
    return Alignment(groups, tuple(maps), tuple(map(torch.linalg.inv, maps)))


def matched(statistics: Covariances, ridge: float) -> tuple[Tensor, ...]:
    model = linear()  # what is looked at are the statistics
    return align.cca(model, model, [], ridge=ridge, statistics=statistics).maps


def statistics(data: Batches | None = None) -> Covariances:
    return align.covariances(linear(), randomised(linear(), 9), data or batches())


def test_a_planted_linear_map_is_undone_to_the_last_parameter() -> None:
    a = linear()
    b = planted(a).apply(a)
    found = align.cca(a, b, batches(), ridge=0)
    for T, inverse in zip(found.maps, planted(a).inverses, strict=True):
        torch.testing.assert_close(T, inverse, rtol=0, atol=1e-5)
    aligned = found.apply(b).state_dict()
    for name, tensor in a.state_dict().items():
        torch.testing.assert_close(aligned[name], tensor, rtol=0, atol=1e-5)
    transposed = replace(found, maps=tuple(T.T for T in found.maps)).apply(b)
    assert not torch.allclose(transposed(images()), a(images()), atol=1e-2)


def test_without_a_ridge_the_scale_of_either_model_does_not_matter() -> None:
    a = linear()
    groups = find_symmetry(a, images())
    eyes = [torch.eye(group.size, dtype=torch.float64) for group in groups]
    larger = Alignment(groups, tuple(10 * e for e in eyes), tuple(e / 10 for e in eyes))
    for T in align.cca(a, larger.apply(a), batches(), ridge=0).maps:
        torch.testing.assert_close(T, torch.eye(len(T), dtype=T.dtype) / 10, rtol=0, atol=1e-6)


def test_a_large_ridge_leaves_the_best_rotation() -> None:
    found = statistics()
    for T, xy in zip(matched(found, 1e9), found.xy, strict=True):
        torch.testing.assert_close(T @ T.T, torch.eye(len(T), dtype=T.dtype), rtol=0, atol=1e-6)
        nuclear = torch.linalg.svdvals(xy).sum()
        torch.testing.assert_close((T @ xy.T).trace(), nuclear, rtol=1e-5, atol=0)


def test_the_ridge_counts_in_the_units_of_the_variances_however_many_images_there_are() -> None:
    once, twice = statistics(), statistics(batches() * 2)
    quadrupled = replace(
        once, **{key: tuple(4 * s for s in getattr(once, key)) for key in ("xx", "yy", "xy")}
    )
    for one, two, four, other in zip(
        matched(once, 0.1),
        matched(twice, 0.1),
        matched(quadrupled, 0.4),
        matched(quadrupled, 0.1),
        strict=True,
    ):
        torch.testing.assert_close(two, one, rtol=0, atol=1e-4)
        torch.testing.assert_close(four, one, rtol=0, atol=1e-9)
        assert not torch.allclose(other, one, rtol=0, atol=1e-4)


def test_scaled_and_flipped_channels_keep_the_function_through_a_batch_norm() -> None:
    model, x = normalised(), images()
    model[1].eps = 0.0
    with torch.no_grad():
        model[1].weight[1].neg_()
    groups = find_symmetry(model, x)
    d = torch.tensor([2.0, -1.0, -0.5, 1.0, 3.0, -2.0], dtype=torch.float64)
    order = torch.tensor([3, 0, 1, 5, 2, 4])
    T = torch.diag(d)[order]
    moved = Alignment(groups, (T,), (torch.linalg.inv(T),)).apply(model)
    torch.testing.assert_close(moved(x), model(x))
    with torch.no_grad():
        moved[1].weight.copy_(T @ model[1].weight)
    assert not torch.allclose(moved(x), model(x)), "T @ scale counts the signs twice"


def test_a_positive_scale_stays_positive_and_is_a_standard_deviation() -> None:
    model = normalised()
    alignment = planted(model)
    T, scale = -alignment.maps[0].abs(), model[1].weight.detach()
    found = replace(alignment, maps=(T,)).apply(model)[1].weight.detach()
    assert float((T @ scale).max()) < 0 < float(found.min())
    torch.testing.assert_close(found, ((T * T) @ (scale * scale)).sqrt())


def test_what_matches_already_stays_as_it_is_through_a_batch_norm() -> None:
    model = normalised()
    aligned = align.cca(model, model, batches(), ridge=1e-3).apply(model)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(aligned.state_dict()[name], tensor, rtol=0, atol=1e-6)


def trained(data: ImageData, seed: int) -> nn.Module:
    model = build("resnet20", 10, width=0.5, in_channels=1, image_size=8, seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=5e-4)
    batches = data.train_batches(100, seed=seed)
    fit(model, batches, optimizer, epochs=8, schedule=piecewise_linear(8, 2))
    return model.eval()


def test_trained_networks_average_better_when_the_scale_is_mapped_as_a_deviation() -> None:
    data = load("digits")
    train, test = (data.plain_batches(split, 100) for split in ("train", "test"))
    a, b = (trained(data, seed) for seed in (10, 11))
    alignment = align.cca(a, b, train, ridge=10.0)
    aligned = alignment.apply(b)
    scales = {
        slot.name: T
        for group, T in zip(alignment.groups, alignment.maps, strict=True)
        for slot in group.slots
        if slot.role == "scale"
    }
    assert len(scales) == 21
    multiplied = alignment.apply(b)
    for name, T in scales.items():
        multiplied.state_dict()[name].copy_(T @ b.state_dict()[name].double())

    def merged(model: nn.Module) -> float:
        return score(reset_batchnorm(mean(a, model), train), test).top1

    assert merged(aligned) > merged(multiplied) + 15
