"""The front door: the steps of the README, one call for all, and models that are never changed."""

from __future__ import annotations

import copy
import csv
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import killed
import pytest
import torch
from tiny import CLASSES, Snapshot, assert_same_state, loader, marked, net, same_parameters
from torch import nn
from torch.nn.functional import one_hot
from torch.utils.data import DataLoader, TensorDataset

import npmerge as npm
from npmerge import Choice, HeldOut, training
from npmerge._resume import Resume
from npmerge.aggregate import Aggregated
from npmerge.data import Batches
from npmerge.evaluate import Ensemble, path, score
from npmerge.methods import METHODS, of_kind
from npmerge.training import TrainingError

EXAMPLE = torch.zeros(1, 3, 8, 8)


def test_the_steps_of_the_front_door_work_together() -> None:
    a, b = net(0), net(1)
    pixels, labels = (torch.cat(part) for part in zip(*loader(), strict=True))
    data = DataLoader(TensorDataset(pixels, labels), batch_size=8)
    groups = npm.find_symmetry(a, EXAMPLE)
    assert [group.size for group in groups] == [6, 6, 5]
    alignment = npm.align.permute(a, b, data)
    assert alignment.groups == groups.groups
    aligned = alignment.apply(b)
    assert torch.allclose(aligned.eval()(pixels), net(1).eval()(pixels), atol=1e-4)
    result = npm.aggregate.np_merge(a, aligned, data, epochs=2, lr=1e-2)
    npm.reset_batchnorm(result.model, data)
    assert set(npm.evaluate.accuracy(result.model, data, topk=(1, 2))) == {1, 2}


ALIGN = list(of_kind("align"))
AGGREGATE = list(of_kind("aggregate"))


def options_of(aggregate: str, **options: Any) -> dict[str, Any]:
    """Those of the options that an aggregation has."""
    return {name: value for name, value in options.items() if name in METHODS[aggregate].options}


PAIRED = [(name, METHODS[name].default_alignment) for name in AGGREGATE]
PAIRED += [(name, align) for align in ALIGN for name in ("mean", "np_merge")]


@pytest.mark.parametrize(("aggregate", "align"), sorted(set(PAIRED)))
def test_one_call_is_align_aggregate_and_correct(aggregate: str, align: str) -> None:
    a, b, data, base = net(0), net(1), loader(), net(2)
    options = options_of(aggregate, epochs=2, lr=0.05)
    first, last = METHODS[align], METHODS[aggregate]
    merged = npm.merge(
        [a, b], data, align=align, aggregate=aggregate, aggregate_options=options, base=base
    )
    needs = {"data": data, "example": EXAMPLE, "base": base}
    given = {name: value for name, value in needs.items() if name in first.parameters}
    aligned = first.function(a, b, **given).apply(b)
    given = {name: value for name, value in needs.items() if name in last.parameters}
    models = {"models": [a, aligned]} if last.several else {"a": a, "b": aligned}
    result = last.function(**models, **given, **options)
    result = result if isinstance(result, Aggregated) else Aggregated(result)
    assert_same_state(
        merged.model.state_dict(), npm.reset_batchnorm(result.model, data).state_dict()
    )
    assert not any(module.training for module in merged.model.modules())
    assert (merged.alpha is None) == (result.alpha is None)
    assert merged.history == pytest.approx(result.history)
    assert merged.alignment is not None
    assert merged.alignment.is_permutation == (align != "cca")
    assert set(merged.seconds) == {"alignment", "learning", "reset"}


@pytest.mark.parametrize("align", ["identity", "permute", "weight_matching"])
@pytest.mark.parametrize("aggregate", ["mean", "np_merge"])
@pytest.mark.parametrize("norm", [True, False])
def test_merging_a_model_with_itself_gives_itself(align: str, aggregate: str, norm: bool) -> None:
    data = loader()
    a = npm.reset_batchnorm(net(norm=norm), data)
    ways = {"align": align, "aggregate": aggregate}
    options = options_of(aggregate, epochs=2, lr=0.1)
    merged = npm.merge([a, a], data, **ways, aggregate_options=options)
    assert_same_state(merged.model.state_dict(), a.state_dict())
    options = options_of(aggregate, epochs=1)
    other = npm.merge([a, net(1, norm=norm)], data, **ways, aggregate_options=options)
    assert not same_parameters(other.model, a)


def test_models_may_be_functions_that_load_them_and_an_alignment_one_that_was_found() -> None:
    a, b, data = net(0), net(1), loader()
    first = npm.merge([a, b], data, aggregate="mean")
    again = npm.merge(
        [lambda: net(0), lambda: net(1)], data, align=first.alignment, aggregate="mean"
    )
    assert_same_state(first.model.state_dict(), again.model.state_dict())
    assert again.alignment is first.alignment


def test_without_a_correction_the_model_is_the_aggregation_s_own() -> None:
    a, b, data = net(0), net(1), loader()
    raw = npm.merge([a, b], data, align="identity", aggregate="mean", correct=None)
    assert_same_state(raw.model.state_dict(), npm.aggregate.mean(a, b).state_dict())
    corrected = npm.merge([a, b], data, align="identity", aggregate="mean")
    assert not torch.equal(raw.model[1].running_mean, corrected.model[1].running_mean)


@pytest.mark.parametrize("many", list(of_kind("many")))
def test_more_than_two_models_become_one(many: str) -> None:
    models, data = [net(seed) for seed in range(3)], loader()
    merged = npm.merge(models, data, aggregate="mean", many=many, seed=1)
    with torch.no_grad():
        assert merged.model(EXAMPLE).isfinite().all()
    again = npm.merge(models, data, aggregate="mean", many=many, seed=1)
    assert_same_state(merged.model.state_dict(), again.model.state_dict())
    assert not any(same_parameters(merged.model, model) for model in models)


def test_a_tournament_is_the_default_and_learns_at_each_of_its_merges_on_data_of_its_own() -> None:
    seeds: list[int] = []

    def learn_on(seed: int) -> list[Any]:
        seeds.append(seed)
        return loader(seed=seed % 7)

    models = [net(seed) for seed in range(4)]
    merged = npm.merge(models, loader(), learn_on=learn_on, aggregate_options={"epochs": 1})
    assert seeds[::2] == seeds[1::2]  # a merge's batch norm is reset on what it learned from
    assert len(set(seeds)) == 3
    assert len(merged.history) == 1


def test_a_choice_is_made_on_held_out_data_and_diverging_values_are_not_chosen() -> None:
    a, b, data = net(0), net(1), loader(48)
    held_out = HeldOut(data[:4], data[4:])
    merged = npm.merge(
        [a, b], data, aggregate="finetune", held_out=held_out,
        aggregate_options={"lr": Choice((0.05, 1e30), {"epochs": 1}), "epochs": 2},
    )  # fmt: skip
    found = merged.chosen["lr"]
    assert found["chosen"] == 0.05
    assert list(found["trials"]) == ["0.05"]
    plain = npm.merge(
        [a, b], data, aggregate="finetune", aggregate_options={"lr": 0.05, "epochs": 2}
    )
    assert_same_state(merged.model.state_dict(), plain.model.state_dict())
    with pytest.raises(TrainingError, match=r"every lr of .* diverged"):
        npm.merge(
            [a, b], data, aggregate="finetune", held_out=held_out,
            aggregate_options={"lr": Choice((1e30,), {"epochs": 1})},
        )  # fmt: skip


def test_the_value_chosen_is_the_one_that_scores_best_on_what_is_held_out() -> None:
    a, b, data = net(0), net(1), loader(64)
    held_out = HeldOut(data[:5], data[5:])
    ridges = (1e-3, 1e-1, 10.0)
    found = npm.merge(
        [a, b], data, align="cca", aggregate="mean", align_options={"ridge": Choice(ridges)},
        held_out=held_out,
    ).chosen["ridge"]  # fmt: skip
    by_hand = {}
    for ridge in ridges:
        mean = npm.aggregate.mean(a, npm.align.cca(a, b, data, ridge=ridge).apply(b))
        by_hand[f"{ridge:g}"] = score(npm.reset_batchnorm(mean, data[:5]), data[5:]).top1
    assert found["trials"] == pytest.approx(by_hand)
    assert by_hand[f"{found['chosen']:g}"] == max(by_hand.values())


class Interrupted(Batches):
    """Batches whose reader is interrupted in the middle of the third epoch."""

    def __iter__(self) -> Iterator[Any]:
        for step, batch in enumerate(super().__iter__()):
            if (self.epoch, step) == (3, 1):
                raise KeyboardInterrupt
            yield batch


@pytest.mark.parametrize("aggregate", ["np_merge", "finetune"])
@pytest.mark.parametrize("count", [2, 3])
def test_a_merge_that_was_cut_off_goes_on_to_the_same_bits_and_repeats_no_trial(
    aggregate: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        training, "Resume", lambda path, every, *rest: Resume(path, min(every, 0), *rest)
    )
    seen: list[int] = []

    def merged(
        kind: type[Batches], saved: Path | None, on_epoch: Callable[..., None] | None = None
    ) -> npm.Merged:
        torch.manual_seed(0)  # of dropout
        plain = killed.batches()
        return npm.merge(
            [killed.network(seed) for seed in range(count)], plain, align="identity",
            aggregate=aggregate, saved=saved, on_epoch=on_epoch,
            aggregate_options={"lr": Choice((0.01, 0.1), {"epochs": 2}), "epochs": 4},
            learn_on=lambda seed: killed.batches(kind, seed=seed % 100),
            held_out=HeldOut(lambda seed: killed.batches(seed=seed % 100 + 1), plain),
        )  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        merged(Interrupted, tmp_path)
    resumed = merged(Batches, tmp_path, lambda epoch, _: seen.append(epoch))
    assert seen == [3, 4, *[1, 2, 3, 4] * (count - 2)]
    whole = merged(Batches, None)
    assert_same_state(resumed.model.state_dict(), whole.model.state_dict())
    assert (resumed.history, resumed.chosen) == (whole.history, whole.chosen)
    assert resumed.details.get("spread") == whole.details.get("spread")
    assert len(whole.details.get("spread", [None] * 4)) == 4


def test_a_loss_of_one_s_own_and_batches_that_are_dictionaries() -> None:
    batches = [{"input": images, "labels": labels} for images, labels in loader()]
    calls: list[tuple[int, float]] = []

    def squares(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return (outputs.softmax(1) - one_hot(batch["labels"], CLASSES)).square().mean()

    merged = npm.merge(
        [net(0), net(1)], batches, loss=squares, aggregate_options={"epochs": 2, "lr": 0.05},
        on_epoch=lambda epoch, loss: calls.append((epoch, loss)),
    )  # fmt: skip
    assert calls == [(1, merged.history[0]), (2, merged.history[1])]
    assert merged.history[1] < merged.history[0] < 1


PUBLIC: dict[str, Callable[[nn.Module, nn.Module, Any], object]] = {
    "find_symmetry": lambda a, *_: npm.find_symmetry(a, EXAMPLE),
    "align.identity": lambda a, b, _: npm.align.identity(a, b),
    "align.permute": lambda a, b, data: npm.align.permute(a, b, data),
    "align.weight_matching": lambda a, b, _: npm.align.weight_matching(a, b, EXAMPLE),
    "align.cca": lambda a, b, data: npm.align.cca(a, b, data, ridge=0.1),
    "Alignment.apply": lambda a, b, _: npm.align.identity(a, b).apply(b),
    "mean": lambda a, b, _: npm.aggregate.mean(a, b),
    "np_merge": lambda a, b, data: npm.aggregate.np_merge(a, b, data, epochs=1, lr=0.1),
    "finetune": lambda a, b, data: npm.aggregate.finetune(a, b, data, epochs=1),
    "evaluate.accuracy": lambda a, b, data: [npm.evaluate.accuracy(m, data) for m in (a, b)],
    "evaluate.Ensemble": lambda a, b, data: score(Ensemble([a, b]), data),
    "evaluate.path": lambda a, b, data: path(
        a, b, data, points=3, correct=lambda model: npm.reset_batchnorm(model, data)
    ),
    "merge": lambda a, b, data: npm.merge([a, b], data, aggregate_options={"epochs": 1}),
    "merge of three": lambda a, b, data: npm.merge([a, b, a], data, aggregate="mean"),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_and_b_are_never_changed(name: str) -> None:
    """Not their parameters, buffers, modes, requires_grad or gradients."""
    a, b = marked(net(0)), marked(net(1))
    before = Snapshot.of(a), Snapshot.of(b)
    PUBLIC[name](a, b, loader())
    before[0].assert_still(a)
    before[1].assert_still(b)


@pytest.mark.parametrize("name", PUBLIC)
def test_results_share_no_memory_with_a_and_b(name: str) -> None:
    a, b = net(0), net(1)
    result = PUBLIC[name](a, b, loader())
    model = getattr(result, "model", result)
    if not isinstance(model, nn.Module):
        return
    mine = {tensor.data_ptr() for m in (a, b) for tensor in m.state_dict().values()}
    assert not mine & {tensor.data_ptr() for tensor in model.state_dict().values()}


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "alignment": (
        lambda: npm.merge([net(0), net(1)], loader(), align="magic"),
        "unknown alignment 'magic': choose one of identity, permute, weight_matching, cca",
    ),
    "aggregation": (
        lambda: npm.merge([net(0), net(1)], loader(), aggregate="sum"),
        "unknown aggregation 'sum': choose one of mean, ",
    ),
    "shape": (
        lambda: npm.merge([net(0), net(1, width=7)], loader()),
        r"has shape \(6, 3, 3, 3\) in the first model and \(7, 3, 3, 3\) in the second",
    ),
    "architecture": (lambda: npm.merge([net(0), net(1, norm=False)], loader()), "one architecture"),
    "empty": (lambda: npm.merge([net(0), net(1)], []), "the data is empty"),
    "one-shot": (lambda: npm.merge([net(0), net(1)], iter(loader())), "one-shot list_iterator"),
    "labels": (
        lambda: npm.merge([net(0), net(1)], [(torch.zeros(4, 3, 8, 8), torch.full((4,), CLASSES))]),
        "label 4 is out of range: the model has 4 outputs",
    ),
    "one model": (lambda: npm.merge([net(0)], loader()), "models has 1: give at least two"),
    "option": (
        lambda: npm.merge([net(0), net(1)], loader(), align_options={"colour": 1}),
        "permute has no option 'colour': its options are none",
    ),
    "no value": (
        lambda: npm.merge([net(0), net(1)], loader(), aggregate_options={"lr": Choice(())}),
        "lr of np_merge has no value to choose from",
    ),
    "nothing held out": (
        lambda: npm.merge([net(0), net(1)], loader(), aggregate_options={"lr": Choice((0.1,))}),
        "a choice needs held-out training data: give held_out",
    ),
    "many and learning": (
        lambda: npm.merge([net(0)] * 3, loader(), many="all_to_one"),
        "'all_to_one' takes the mean of all models: aggregate must be 'mean', not 'np_merge'",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_that_names_it(kind: str) -> None:
    call, message = BAD[kind]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_progress_is_shown_only_when_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    npm.merge([net(0), net(1)], loader(), aggregate_options={"epochs": 1})
    assert capfd.readouterr() == ("", "")
    npm.merge([net(0), net(1)], loader(), aggregate_options={"epochs": 1}, progress=True)
    assert "NP Merge" in capfd.readouterr().err


def test_everything_exported_is_there_and_documented() -> None:
    for name in npm.__all__:
        assert (getattr(npm, name).__doc__ or "").strip(), name


# Models as users have them


def wrapped(seed: int) -> dict[str, nn.Module]:
    return {
        "compiled": torch.compile(net(seed)),
        "data parallel": nn.DataParallel(net(seed)),
        "both": torch.compile(nn.DataParallel(net(seed))),
    }


@pytest.mark.parametrize("kind", ["compiled", "data parallel", "both"])
def test_compiled_and_parallel_models_are_unwrapped(kind: str) -> None:
    options: dict[str, Any] = {"aggregate_options": {"epochs": 1}}
    merged = npm.merge([wrapped(0)[kind], lambda: wrapped(1)[kind]], loader(), **options)
    assert type(merged.model) is nn.Sequential
    plain = npm.merge([net(0), net(1)], loader(), **options)
    assert_same_state(merged.model.state_dict(), plain.model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [2, 3])
def test_half_precision_is_computed_in_float32_and_comes_back(
    dtype: torch.dtype, count: int
) -> None:
    models = [net(seed).to(dtype) for seed in range(count)]
    before = [Snapshot.of(model) for model in models]
    options: dict[str, Any] = {"aggregate_options": {"epochs": 2, "lr": 0.05}}
    merged = npm.merge([models[0], *(lambda m=m: m for m in models[1:])], loader(), **options)
    exact = npm.merge([model.float() for model in map(copy.deepcopy, models)], loader(), **options)
    assert_same_state(merged.model.state_dict(), exact.model.to(dtype).state_dict())
    assert merged.history == exact.history
    assert score(merged.model, loader()).loss < 10  # float32 images into a model in half precision
    for snapshot, model in zip(before, models, strict=True):
        snapshot.assert_still(model)


@pytest.mark.gpu
def test_a_merge_on_a_gpu_gives_a_model_on_the_cpu() -> None:
    a, b = net(0).half(), net(1).half()
    merged = npm.merge([a, b], loader(), device="cuda", aggregate_options={"epochs": 1})
    assert {(t.device.type, t.dtype) for t in merged.model.parameters()} == {("cpu", torch.float16)}
    on_cpu = npm.merge([a, b], loader(), aggregate_options={"epochs": 1}, mixed_precision=False)
    assert merged.history == pytest.approx(on_cpu.history, rel=0.05)


def test_what_is_frozen_is_averaged() -> None:
    a, b = net(0), net(1)
    a[0].weight.requires_grad_(requires_grad=False)
    merged = npm.merge([a, b], loader(), align="identity", aggregate_options={"lr": 0.1})
    assert torch.equal(merged.model[0].weight, npm.aggregate.mean(a, b)[0].weight)
    assert not merged.model[0].weight.requires_grad


class Unknown(nn.Module):
    """An operation that nobody knows the symmetry of: it leaves PyTorch."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.net = net(seed)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.net(images)
        return logits + torch.from_numpy(logits.detach().numpy())


@pytest.mark.parametrize("aggregate", ["mean", "np_merge"])
def test_without_an_alignment_any_model_is_merged(aggregate: str) -> None:
    merged = npm.merge([Unknown(0), Unknown(1)], loader(), align="identity", aggregate=aggregate)
    assert isinstance(merged.model, Unknown)
    many = npm.merge(
        [Unknown(s) for s in range(3)], loader(), align="identity", aggregate=aggregate
    )
    assert isinstance(many.model, Unknown)
    with pytest.raises(npm.SymmetryError, match="numpy"):
        npm.merge([Unknown(0), Unknown(1)], loader(), aggregate="mean")


@torch.library.custom_op("npmerge_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


class Twice(nn.Module):
    """An operation without a rule."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.npmerge_tests.twice(x)


def test_channels_that_an_unknown_operation_touches_may_be_held_fixed() -> None:
    a, b = ([*net(seed)[:3], Twice(), *net(seed)[3:]] for seed in range(2))
    models, data = [nn.Sequential(*a), nn.Sequential(*b)], loader()
    with pytest.raises(npm.SymmetryError, match="twice"):
        npm.merge(models, data, aggregate="mean")
    merged = npm.merge(models, data, aggregate="mean", strict=False)
    assert merged.alignment is not None
    slots = {slot.name for group in merged.alignment.groups for slot in group.slots}
    assert "0.weight" not in slots
    assert "4.weight" in slots
    found = npm.inspect(*models, data, strict=False)
    assert "held fixed by: " in str(found)
    assert "no symmetry: " in str(npm.inspect(*models, data))


class TwoInputs(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.net = net(seed)

    def forward(self, images: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.net(images * scale.view(-1, 1, 1, 1))}


@pytest.mark.parametrize("align", ["permute", "weight_matching", "identity"])
def test_models_may_take_several_inputs_by_place_or_by_name(align: str) -> None:
    ones = [torch.ones(len(y)) for _, y in loader()]
    pairs = loader()
    tuples = [(x, one, y) for (x, y), one in zip(pairs, ones, strict=True)]
    named = [{"scale": s, "images": x, "labels": y} for x, s, y in tuples]
    options: dict[str, Any] = {"align": align, "aggregate_options": {"epochs": 1}}
    plain = npm.merge([net(0), net(1)], pairs, **options).model.state_dict()
    for data in (tuples, named):
        merged = npm.merge([TwoInputs(0), TwoInputs(1)], data, **options)
        assert_same_state(merged.model.net.state_dict(), plain)


# Validation, a metric, a history


def hits(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
    return (outputs.argmax(1) == batch[1]).float().mean()


def test_the_best_epoch_on_validation_data_is_what_comes_back() -> None:
    """Validated as the result is: corrected. Here the learning rate is far too high, so the best is not the last."""
    a, b, data = net(0), net(1), loader(48)
    options: dict[str, Any] = {"align": "identity", "aggregate": "finetune", "seed": 3}
    learning = {"epochs": 6, "lr": 0.5}
    merged = npm.merge([a, b], data[:4], validation=data[4:], aggregate_options=learning, **options)
    losses = [row["validation"] for row in merged.epochs]
    best = losses.index(min(losses)) + 1
    assert best < 6 == len(merged.history)
    assert score(merged.model, data[4:]).loss == pytest.approx(min(losses), rel=1e-5)
    shorter = npm.merge([a, b], data[:4], aggregate_options={"epochs": best, "lr": 0.5}, **options)
    assert_same_state(merged.model.state_dict(), shorter.model.state_dict())
    stopped = npm.merge(
        [a, b], data[:4], validation=data[4:], patience=1, aggregate_options=learning, **options
    )
    assert len(stopped.history) < 6
    with pytest.raises(ValueError, match="give validation or saved"):
        npm.merge([a, b], data, validation=data, saved=Path("x"), aggregate_options=learning)


def test_a_metric_of_one_s_own_chooses_the_epoch_the_higher_the_better() -> None:
    data = loader(48)
    merged = npm.merge(
        [net(0), net(1)], data, validation=data, metric=hits, aggregate="finetune",
        aggregate_options={"epochs": 5, "lr": 0.2},
    )  # fmt: skip
    values = [row["validation"] for row in merged.epochs]
    assert max(values) > min(values)
    assert score(merged.model, data).top1 == pytest.approx(100 * max(values), abs=1e-3)


def test_options_are_chosen_by_the_loss_or_the_metric_of_one_s_own() -> None:
    data = loader(48)

    def squares(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return (outputs.sigmoid()[:, 0] - batch[1]).square().mean()

    pairs = [(x, x.mean((1, 2, 3))) for x, _ in data]  # labels that are no classes
    held_out = HeldOut(pairs[:4], pairs[4:])
    choice: dict[str, Any] = {"aggregate_options": {"epochs": 3, "lr": Choice((1e-6, 0.1))}}
    by_loss = npm.merge([net(0), net(1)], pairs, loss=squares, held_out=held_out, **choice)
    assert by_loss.chosen["lr"]["chosen"] == 0.1
    assert all(value < 0 for value in by_loss.chosen["lr"]["trials"].values())
    by_metric = npm.merge(
        [net(0), net(1)], pairs, loss=squares, metric=squares, held_out=held_out, **choice
    )
    assert by_metric.chosen["lr"]["chosen"] == 1e-6


@pytest.mark.parametrize("ending", ["csv", "json"])
def test_the_history_of_every_merge_is_written(ending: str, tmp_path: Path) -> None:
    data, path_ = loader(), tmp_path / f"history.{ending}"
    options: dict[str, Any] = {"aggregate_options": {"epochs": 2}}
    merged = npm.merge([net(seed) for seed in range(3)], data, validation=data, **options)
    merged.save_history(path_)
    if ending == "csv":
        with path_.open(encoding="utf-8", newline="") as file:
            rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    else:
        rows = json.loads(path_.read_text())
    assert rows == merged.epochs
    assert [(row["merge"], row["epoch"]) for row in rows] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert [row["loss"] for row in rows[2:]] == merged.history
    assert all(math.isfinite(row["validation"]) for row in rows)
    with pytest.raises(ValueError, match=r"history is .*x.txt: give a name that ends in .csv or"):
        merged.save_history(tmp_path / "x.txt")
    npm.merge([net(0), net(1)], data, aggregate="mean").save_history(path_)  # nothing was learned
    assert path_.read_text().strip() in ("merge,epoch,loss", "[]")


# Before a merge


def test_an_inspection_tells_groups_barriers_and_batch_norm() -> None:
    a, data = net(0), loader(64)
    training.fit(a, data, torch.optim.Adam(a.parameters(), lr=0.05), epochs=10)
    groups = npm.find_symmetry(a, EXAMPLE)
    generator = torch.Generator().manual_seed(0)
    perms = [torch.randperm(group.size, generator=generator) for group in groups]
    b = npm.align.Alignment.from_permutations(groups, perms).apply(a)
    found = npm.inspect(a, b, data)
    before, after = found.barriers
    assert before > 0.01 > after  # B is A with its channels shuffled: aligned, they are one point
    assert found.symmetry is not None
    assert len(found.symmetry) == 3
    assert found.batchnorms == 2
    text = str(found)
    assert "groups of channels            3" in text
    assert f"barrier before the alignment  {before:.4f}" in text
    other = npm.inspect(net(0, norm=False), net(1, norm=False), data, align="weight_matching")
    assert other.batchnorms == 0


def test_an_inspection_of_models_without_a_known_symmetry_says_which_operation() -> None:
    found = npm.inspect(Unknown(0), Unknown(1), loader())
    assert found.symmetry is None
    assert "numpy" in found.unknown
    assert found.unknown in str(found)
    assert found.before == found.after


NOT_MODELS: dict[str, tuple[Any, str]] = {
    "state dict": ([net().state_dict()] * 2, r"models\[0\] is a OrderedDict: give a module"),
    "path": ([net(), Path("b.pt")], r"models\[1\] is a PosixPath: give a module, or a function"),
    "text": (["a.pt", "b.pt"], r"models\[0\] is a str: give a module, .*`npmerge merge` takes"),
    "one text": ("a.pt", "models is a str: give a list of two models or more"),
    "one model": (net(norm=False)[0], "models is a Conv2d: give a list"),
    "a function of no model": ([net(), lambda: 3], "a model is a int: give a module"),
}


@pytest.mark.parametrize("kind", NOT_MODELS)
def test_what_is_no_model_is_named_in_one_line(kind: str) -> None:
    models, message = NOT_MODELS[kind]
    with pytest.raises(ValueError, match=message) as caught:
        npm.merge(models, loader(), aggregate="mean")
    assert "\n" not in str(caught.value)
