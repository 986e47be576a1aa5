"""More than two models: what comes out, in which order it is made, and that two models in memory are enough."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from architectures import Residual, images, plain, random_alignment, randomised
from safetensors import safe_open
from tiny import Snapshot, assert_same_state, loader, marked, net
from torch import fx, nn

from npmerge import align
from npmerge.aggregate import mean
from npmerge.align import Alignment
from npmerge.evaluate import base_models, ensemble
from npmerge.many import (
    Models,
    Pairing,
    all_to_one,
    c2m3,
    match_many,
    merge_many,
    tournament,
)
from npmerge.symmetry import find_symmetry

EXAMPLE = torch.zeros(1, 3, 8, 8)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def _unfrozen_at_the_end() -> Iterator[None]:
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _quick_collections(_unfrozen_at_the_end: None) -> None:
    """Garbage collections look at what the test makes only, and not at all that was imported by then."""
    gc.collect()
    gc.freeze()


def held(*models: nn.Module) -> Models:
    """Models that are not loaded but there."""
    return [partial(_itself, model) for model in models]


def _itself(model: nn.Module) -> nn.Module:
    return model


def nets(count: int, **options: bool) -> Models:
    return [partial(net, seed, **options) for seed in range(count)]


def weights(a: nn.Module, b: nn.Module) -> Alignment:
    return align.weight_matching(a, b, EXAMPLE)


def unaligned(a: nn.Module, b: nn.Module) -> Alignment:
    return align.identity(a, b)


def halves(a: nn.Module, b: nn.Module, pairing: Pairing) -> nn.Module:
    return mean(a, weights(a, b).apply(b))


def shares(a: nn.Module, b: nn.Module, pairing: Pairing) -> nn.Module:
    """The mean of two means, by how many models each is of."""
    return mean(a, b, alpha=len(pairing.a) / len(pairing.a + pairing.b))


@cache
def played(count: int, seed: int = 0) -> list[Pairing]:
    """The pairings of a tournament of models that hold nothing."""
    pairings: list[Pairing] = []

    def merge(a: nn.Module, b: nn.Module, pairing: Pairing) -> nn.Module:
        pairings.append(pairing)
        return a

    tournament([nn.Flatten] * count, merge, seed=seed)
    return pairings


# --- What comes out ----------------------------------------------------------------------------


def permuted(model: nn.Module, count: int) -> Models:
    """The model, its channels in another order each time."""
    groups = find_symmetry(model, EXAMPLE)
    return held(model, *(random_alignment(groups, s).apply(model) for s in range(1, count)))


MERGED: dict[str, Callable[[Models], nn.Module]] = {
    "tournament": lambda models: tournament(models, halves, seed=0),
    "all_to_one": lambda models: all_to_one(models, weights),
    "merge_many": lambda models: merge_many(models, seed=0, example=EXAMPLE),
    "c2m3": lambda models: c2m3(models, example=EXAMPLE),
}


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("name", MERGED)
def test_a_model_in_many_orders_of_its_channels_is_found_again(name: str, count: int) -> None:
    model = randomised(plain()).float().double()  # sums of few such numbers are exact
    merged = MERGED[name](permuted(model, count))
    assert_same_state(weights(model, merged).apply(merged).state_dict(), model.state_dict())
    torch.testing.assert_close(merged(images()), model(images()))
    unmatched = mean(model, permuted(model, 2)[1]())
    assert not torch.allclose(unmatched(images()), model(images()))


@pytest.mark.parametrize("reference", [0, 2])
def test_all_to_one_is_the_mean_of_the_aligned_models(reference: int) -> None:
    models = [net(seed) for seed in range(3)]
    a = models[reference]
    aligned = [model if model is a else weights(a, model).apply(model) for model in models]
    merged = all_to_one(held(*models), weights, reference=reference)
    for name, value in merged.state_dict().items():
        every = torch.stack([model.state_dict()[name] for model in aligned])
        by_hand = every.double().mean(0).to(value.dtype)
        assert torch.equal(value, by_hand), name


@pytest.mark.parametrize("device", DEVICES)
def test_the_mean_is_of_the_reference_s_kind(device: str) -> None:
    """Its device, dtypes, memory format, modes, and its buffers that are no floating-point numbers."""
    models = [net(seed).to(device, memory_format=torch.channels_last) for seed in range(3)]
    models[1].bfloat16().eval()
    for number, model in enumerate(models):
        model[1].num_batches_tracked.fill_(number)
    merged = all_to_one(held(*models), unaligned, reference=1)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert {p.device.type for p in merged.parameters()} == {device}
    assert merged[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not merged[0].weight.is_contiguous()
    assert not merged.training
    assert merged[1].num_batches_tracked == 1
    running = torch.stack([model[1].running_var.double() for model in models]).mean(0)
    torch.testing.assert_close(merged[1].running_var, running.bfloat16())


def test_matrices_align_all_to_one_too() -> None:
    models, data = nets(3), loader()
    merged = all_to_one(models, lambda a, b: align.cca(a, b, data, ridge=0.1))
    moved = [align.cca(net(0), net(seed), data, ridge=0.1).apply(net(seed)) for seed in (1, 2)]
    by_hand = mean(net(0), mean(*moved), alpha=1 / 3)
    for x, y in zip(merged.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(x, y)


# --- The tournament ----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 6, 7])
def test_every_model_is_in_the_tournament_once(count: int) -> None:
    pairings = played(count)
    assert len(pairings) == count - 1
    entrants = {(number,) for number in range(count)}
    for pairing in pairings:  # both are there, and give way to what they become
        entrants = (entrants - {pairing.a, pairing.b}) | {pairing.a + pairing.b}
    (members,) = entrants
    assert sorted(members) == list(range(count))


@pytest.mark.parametrize("count", [2, 3, 6, 7])
def test_with_an_odd_number_of_entrants_one_has_a_bye(count: int) -> None:
    left, sizes = count, []
    while left > 1:
        sizes.append(left // 2)
        left -= left // 2
    pairings = played(count)
    expected = [(r, i) for r, size in enumerate(sizes) for i in range(size)]
    assert [(p.round, p.index) for p in pairings] == expected


def test_any_model_may_have_the_bye() -> None:
    byes = set()
    for seed in range(12):
        first = played(3, seed)[0]
        byes |= {0, 1, 2} - {*first.a, *first.b}
    assert byes == {0, 1, 2}


def test_pairings_depend_on_the_seed_only() -> None:
    torch.manual_seed(0)
    first, other = played(8, seed=1), played(8, seed=2)
    played.cache_clear()
    torch.manual_seed(1)
    assert played(8, seed=1) == first
    assert [(p.a, p.b) for p in other] != [(p.a, p.b) for p in first]
    assert len({p.seed for p in first + other}) == 14
    assert first[-1].label == "round 3, pair 1"


def test_what_is_merged_is_what_the_pairing_says() -> None:
    models = [net(seed, norm=False) for seed in range(5)]
    merged = tournament(held(*models), shares, seed=3)
    for name, value in merged.state_dict().items():
        every = torch.stack([model.state_dict()[name] for model in models])
        torch.testing.assert_close(value, every.mean(0))


def test_one_model_is_returned_as_it_is() -> None:
    model = net()
    assert tournament(held(model), halves, seed=0) is model


class Odd(nn.Module):
    """Tied weights, a buffer that is in no state dict, and parameters of several kinds."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(4)
        self.first, self.second = nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.norm.weight.requires_grad_(requires_grad=False)
        self.register_buffer("scale", torch.rand(4, generator=generator), persistent=False)
        self.norm.eval()


@pytest.mark.parametrize("device", DEVICES)
def test_a_merged_model_comes_back_from_its_file_as_it_was(device: str) -> None:
    made: list[nn.Module] = []

    def merge(a: nn.Module, b: nn.Module, pairing: Pairing) -> nn.Module:
        made.append(Odd(seed=pairing.index))
        return made[-1].to(device)

    back = tournament([Odd, Odd], merge, seed=0)
    (model,) = made
    assert isinstance(back, Odd)
    assert back is not model
    assert_same_state(back.state_dict(), model.state_dict())
    assert torch.equal(back.scale, model.scale)
    assert back.second.weight is back.first.weight
    assert [m.training for m in back.modules()] == [m.training for m in model.modules()]
    for x, y in zip(back.parameters(), model.parameters(), strict=True):
        assert (x.dtype, x.device, x.stride(), x.requires_grad) == (
            y.dtype, y.device, y.stride(), y.requires_grad
        )  # fmt: skip
        assert x.data_ptr() != y.data_ptr()


def test_merged_models_are_kept_in_the_folder_that_is_given(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    merged = tournament(nets(5), shares, seed=0, folder=folder)
    names = ["round0-pair0", "round0-pair1", "round1-pair0", "round2-pair0"]
    assert sorted(path.name for path in folder.iterdir()) == [f"{n}.safetensors" for n in names]
    with safe_open(folder / f"{names[-1]}.safetensors", "pt") as file:
        pairing = json.loads(file.metadata()["pairing"])
        assert torch.equal(file.get_tensor("0.weight"), merged[0].weight)
    assert sorted(pairing["a"] + pairing["b"]) == list(range(5))


def test_no_file_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    seen: list[int] = []

    def merge(a: nn.Module, b: nn.Module, pairing: Pairing) -> nn.Module:
        seen.append(len(list(tmp_path.rglob("*.safetensors"))))
        return a

    tournament(nets(4), merge, seed=0)
    assert seen == [0, 1, 2]
    assert not list(tmp_path.iterdir())


# --- MergeMany ---------------------------------------------------------------------------------


def objective(models: list[nn.Module]) -> float:
    """The inner products of all pairs' parameters."""
    flat = torch.stack([nn.utils.parameters_to_vector(m.parameters()) for m in models]).detach()
    products = flat @ flat.T
    return float((products.sum() - products.trace()) / 2)


def different(count: int) -> list[nn.Module]:
    return [randomised(Residual(), seed) for seed in range(count)]


def test_another_sweep_over_matched_models_changes_nothing() -> None:
    models = different(4)
    found = match_many(held(*models), seed=0, example=EXAMPLE)
    aligned = [alignment.apply(model) for alignment, model in zip(found, models, strict=True)]
    assert any(not torch.equal(m, torch.arange(len(m))) for a in found for m in a.maps)
    for seed in range(3):
        for again in match_many(held(*aligned), seed=seed, example=EXAMPLE):
            assert all(torch.equal(m, torch.arange(len(m))) for m in again.maps)
    once = match_many(held(*models), seed=0, example=EXAMPLE, max_sweeps=1)
    aligned = [alignment.apply(model) for alignment, model in zip(once, models, strict=True)]
    again = match_many(held(*aligned), seed=0, example=EXAMPLE)
    assert any(not torch.equal(m, torch.arange(len(m))) for a in again for m in a.maps)


def test_every_sweep_brings_the_models_closer() -> None:
    models = different(4)
    values = [objective(models)]
    for sweeps in range(1, 6):
        found = match_many(held(*models), seed=0, example=EXAMPLE, max_sweeps=sweeps)
        values.append(objective([x.apply(m) for x, m in zip(found, models, strict=True)]))
    assert values == sorted(values)
    assert values[-1] > values[0]


def test_merge_many_is_the_mean_of_the_matched_models() -> None:
    models = different(3)
    merged = merge_many(held(*models), seed=1, example=EXAMPLE)
    found = match_many(held(*models), seed=1, groups=find_symmetry(models[0], EXAMPLE))
    aligned = [alignment.apply(model) for alignment, model in zip(found, models, strict=True)]
    for name, value in merged.state_dict().items():
        if value.is_floating_point():
            every = torch.stack([model.state_dict()[name] for model in aligned])
            torch.testing.assert_close(value, every.mean(0), rtol=1e-14, atol=1e-15)


def test_matching_depends_on_its_seed_only() -> None:
    models = different(3)

    def maps(seed: int) -> list[list[int]]:
        found = match_many(held(*models), seed=seed, example=EXAMPLE)
        return [mapping.tolist() for alignment in found for mapping in alignment.maps]

    torch.manual_seed(0)
    first = maps(0)
    torch.manual_seed(1)
    assert maps(0) == first
    assert any(maps(seed) != first for seed in range(1, 6))


def test_too_few_sweeps_are_told(caplog: pytest.LogCaptureFixture) -> None:
    models = held(*different(3))
    with caplog.at_level(logging.WARNING):
        match_many(models, seed=0, example=EXAMPLE, max_sweeps=1)
    assert "after 1 sweeps" in caplog.text
    caplog.clear()
    match_many(models, seed=0, example=EXAMPLE)
    assert not caplog.text


# --- What all have in common -------------------------------------------------------------------


REFERENCES = ("base_models", "ensemble")
PUBLIC: dict[str, Callable[[Models], object]] = {
    **MERGED,
    "match_many": lambda models: match_many(models, seed=0, example=EXAMPLE),
    "ensemble": lambda models: ensemble(models, loader()),
    "base_models": lambda models: base_models(models, loader()),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_models_are_never_changed(name: str) -> None:
    """Not their parameters, buffers, modes, requires_grad or gradients, nor do results share their memory."""
    models = [marked(net(seed)) for seed in range(3)]
    before = [Snapshot.of(model) for model in models]
    result = PUBLIC[name](held(*models))
    for snapshot, model in zip(before, models, strict=True):
        snapshot.assert_still(model)
    if isinstance(result, nn.Module):
        mine = {tensor.data_ptr() for m in models for tensor in m.state_dict().values()}
        assert not mine & {tensor.data_ptr() for tensor in result.state_dict().values()}


class Tracked(nn.Sequential):
    """A network whose instances are counted, copies too."""


def tracked(seed: int) -> nn.Module:
    return Tracked(*net(seed, norm=False))


def alive(kind: type[nn.Module] = Tracked) -> int:
    """Networks with data: not those on the meta device."""
    found = [o for o in gc.get_objects() if type(o) is kind]
    return sum(next(o.parameters()).device.type != "meta" for o in found)


class Watched:
    """Loads models, and looks at every load how many there are by then, the new one included."""

    def __init__(self, count: int) -> None:
        self.most = self.loads = 0
        self.models = [partial(self._load, seed) for seed in range(count)]

    def _load(self, seed: int) -> nn.Module:
        model = tracked(seed)
        self.loads += 1
        self.most = max(self.most, alive())
        return model


@pytest.mark.parametrize(("name", "most"), [
    ("tournament", 2), ("all_to_one", 2), ("merge_many", 1), ("c2m3", 1), ("match_many", 1),
    ("ensemble", 1), ("base_models", 1),
])  # fmt: skip
@pytest.mark.parametrize("count", [2, 5])
def test_two_models_are_in_memory_however_many_there_are(name: str, most: int, count: int) -> None:
    gc.collect()
    gc.disable()  # what is given up is free at once, and waits for no garbage collection
    try:
        watched = Watched(count)
        result = PUBLIC[name](watched.models)
        assert watched.loads >= count
        assert watched.most <= most
        assert alive() == isinstance(result, nn.Module)
    finally:
        gc.enable()


@pytest.mark.parametrize("count", [2, 5])
def test_two_models_are_alive_while_they_are_merged(count: int) -> None:
    seen: list[int] = []

    def merge(a: nn.Module, b: nn.Module, pairing: Pairing) -> nn.Module:
        seen.append(alive())
        return mean(a, b)

    def seen_and_aligned(a: nn.Module, b: nn.Module) -> Alignment:
        seen.append(alive())
        return unaligned(a, b)

    gc.collect()
    models = [partial(tracked, seed) for seed in range(count)]
    tournament(models, merge, seed=0)
    assert seen == [2] * (count - 1)
    all_to_one(models, seen_and_aligned)
    assert seen[count - 1 :] == [2] * (count - 1)


def test_what_alignment_has_traced_is_given_up_before_the_next_models_come() -> None:
    """Traced copies of models refer to themselves, so that they live until a garbage collection."""
    seen: list[int] = []

    def traced_and_aligned(a: nn.Module, b: nn.Module) -> Alignment:
        found = [o for o in gc.get_objects() if issubclass(type(o), fx.GraphModule)]
        seen.append(sum(p.device.type != "meta" for o in found for p in o.parameters()))
        return align.permute(a, b, loader())

    def merge(a: nn.Module, b: nn.Module, pairing: Pairing) -> nn.Module:
        return mean(a, traced_and_aligned(a, b).apply(b))

    gc.disable()
    try:
        tournament(nets(4), merge, seed=0)
        all_to_one(nets(4), traced_and_aligned)
    finally:
        gc.enable()
    assert seen == [0] * 6


BAD: dict[str, tuple[Callable[[], object], str]] = {
    **{name: (partial(call, []), "no models: give at least one") for name, call in PUBLIC.items()},
    **{
        f"{name}, a module": (
            partial(call, [net()]),
            r"models\[0\] is a Sequential: give functions that load the models",
        )
        for name, call in PUBLIC.items()
    },
    **{
        f"{name}, architectures": (
            partial(call, [net, partial(net, norm=False)]),
            "merge two models of one architecture",
        )
        for name, call in PUBLIC.items()
        if name not in REFERENCES
    },
    "a careless merge": (
        lambda: tournament([net, partial(net, width=7)], lambda *models: models[0], seed=0),
        "has shape .* in the first model and .* in the second",
    ),
    "reference": (
        lambda: all_to_one(nets(2), weights, reference=2),
        "reference is 2: give the number of one of the models, 0 to 1",
    ),
    "no example": (lambda: merge_many(nets(2), seed=0), "neither groups nor an example"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_that_names_it(kind: str) -> None:
    call, message = BAD[kind]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
