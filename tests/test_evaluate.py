"""Scores, the ensemble, and the path between two models."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from tiny import CLASSES, Snapshot, loader, marked, net
from torch import Tensor, nn

from npmerge.aggregate import mean
from npmerge.correct import reset_batchnorm
from npmerge.evaluate import (
    Ensemble,
    PathPoint,
    Score,
    accuracy,
    barrier,
    base_models,
    class_accuracy,
    ensemble,
    measure,
    path,
    score,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def naive(model: nn.Module, data: list[tuple[Tensor, Tensor]], k: int) -> tuple[float, float]:
    """Top-k accuracy and loss, one image at a time."""
    hits, losses = [], []
    for pixels, labels in data:
        for image, label in zip(pixels, labels.tolist(), strict=True):
            logits = model.eval()(image[None])[0].tolist()
            hits.append(label in sorted(range(CLASSES), key=lambda c: -logits[c])[:k])
            losses.append(math.log(sum(map(math.exp, logits))) - logits[label])
    return 100 * sum(hits) / len(hits), sum(losses) / len(losses)


def test_a_score_equals_a_naive_count_over_batches_of_unequal_size() -> None:
    model, data = net(), loader(21)
    found = score(model, data, topk=(1, 2, 3))
    for k in (1, 2, 3):
        hits, loss = naive(model, data, k)
        assert found.accuracy[k] == pytest.approx(hits)
        assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.top1 == found.accuracy[1]
    assert accuracy(model, data, topk=(1, 2)) == {k: found.accuracy[k] for k in (1, 2)}


def test_among_all_classes_every_label_is_found() -> None:
    assert accuracy(net(), loader(), topk=(CLASSES,)) == {CLASSES: 100.0}


@pytest.mark.parametrize("topk", [(0,), (1, 5), ()])
def test_a_k_that_is_no_number_of_classes_is_refused(topk: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="each k must lie between 1 and the model's 4 classes"):
        score(net(), loader(), topk=topk)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "the data is empty"),
        (iter(loader()), "one-shot list_iterator"),
        ([(torch.zeros(1, 3, 8, 8), torch.tensor([9]))], "label 9 is out of range"),
    ],
)
def test_bad_data_is_refused_and_the_model_left_alone(data: Any, message: str) -> None:
    model = marked(net())
    before = Snapshot.of(model)
    with pytest.raises(ValueError, match=message):
        score(model, data)
    before.assert_still(model)


def test_a_model_is_scored_in_evaluation_mode() -> None:
    training = net().train()
    assert score(training, loader()) == score(net().eval(), loader())


def test_an_ensemble_answers_with_the_mean_of_the_logits() -> None:
    a, b = net(0).eval(), net(1).eval()
    pixels, _ = loader(8)[0]
    assert torch.equal(Ensemble([a, b]).eval()(pixels), (a(pixels) + b(pixels)) / 2)
    assert score(Ensemble([a]), loader()) == score(a, loader())
    with pytest.raises(ValueError, match="an ensemble needs at least one model"):
        Ensemble([])


def test_scoring_an_ensemble_leaves_its_members_modes_alone() -> None:
    a, b = net(0).eval(), net(1).train()
    score(Ensemble([a, b]), loader())
    assert not any(module.training for module in a.modules())
    assert all(module.training for module in b.modules())


def test_the_ends_of_a_path_are_the_models_own_scores_and_the_middle_is_the_mean() -> None:
    a, b, data = net(0), net(1), loader()
    points = path(a, b, data, points=5)
    assert [point.alpha for point in points] == [0, 0.25, 0.5, 0.75, 1]
    for point, model in ((points[0], b), (points[-1], a), (points[2], mean(a, b))):
        own = score(model, data)
        assert (point.accuracy, point.loss) == (own.top1, own.loss)


def test_the_model_of_every_point_is_corrected_when_asked_for() -> None:
    a, b, data = net(0), net(1), loader()
    points = path(a, b, data, points=3, correct=partial(reset_batchnorm, data=data))
    for point in points:
        model = reset_batchnorm(mean(a, b, alpha=point.alpha), data)
        assert point.loss == score(model, data).loss
    assert points[1].loss != path(a, b, data, points=3)[1].loss
    other = path(a, b, data, points=3, correct=lambda _: a)  # what it returns is scored
    assert {point.loss for point in other} == {score(a, data).loss}


def test_a_path_has_its_two_ends() -> None:
    with pytest.raises(ValueError, match="points is 1: give a whole number from 2"):
        path(net(0), net(1), loader(), points=1)


def test_the_barrier_between_identical_models_is_zero() -> None:
    assert barrier(path(net(), net(), loader(), points=5)) == pytest.approx(0, abs=1e-6)


def test_a_barrier_is_the_greatest_height_over_the_line_between_the_ends() -> None:
    losses = [1.0, 2.0, 3.0, 3.5, 3.0]
    points = [PathPoint(i / 4, 0.0, loss) for i, loss in enumerate(losses)]
    assert barrier(points) == pytest.approx(1.0)  # 3.5 - 2.5, 3 - 2 and not the 2.5 over the start
    convex = [PathPoint(i / 2, 0.0, loss) for i, loss in enumerate([2.0, 1.0, 2.0])]
    assert barrier(convex) == 0


def test_class_accuracies_are_those_of_the_classes_alone() -> None:
    model, data = net().train(), loader(60, 20)
    found = class_accuracy(model, data, CLASSES + 1)
    for label in range(CLASSES):
        part = [(x[y == label], y[y == label]) for x, y in data]
        assert found[label] == pytest.approx(accuracy(model, part)[1])
    assert math.isnan(found[CLASSES])
    assert model.training


def test_a_label_out_of_range_has_no_class_accuracy() -> None:
    with pytest.raises(ValueError, match="label 4 is out of range"):
        class_accuracy(net(), [(torch.zeros(1, 3, 8, 8), torch.tensor([4]))], CLASSES)


def test_dictionaries_and_several_inputs_are_scored_as_the_same_images_are() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: Tensor, shift: Tensor) -> dict[str, Tensor]:
            return {"logits": self.inner(x + shift.view(-1, 1, 1, 1))}

    pairs = loader(21)
    tuples = [(x, torch.zeros(len(x)), y) for x, y in pairs]
    named = [{"labels": y, "shift": shift, "x": x} for x, shift, y in tuples]
    for data in (tuples, named):
        assert score(Two(), data, topk=(1, 2)) == score(net(), pairs, topk=(1, 2))
        assert torch.equal(class_accuracy(Two(), data, 4), class_accuracy(net(), pairs, 4))
        assert score(Ensemble([Two()]), data) == score(net(), pairs)
        assert ensemble([Two, Two], data) == score(net(), pairs)


# What merged models are held against


def nets(count: int) -> list[Callable[[], nn.Module]]:
    return [partial(net, seed) for seed in range(count)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_ensemble_scored_one_model_at_a_time_scores_the_same(count: int, device: str) -> None:
    data, topk = loader(40, 16), (1, 2)
    models = [net(seed).to(device) for seed in range(count)]
    found = ensemble([lambda model=model: model for model in models], data, topk=topk)
    whole = score(Ensemble(models), data, topk=topk)
    assert found.accuracy == whole.accuracy
    assert found.loss == pytest.approx(whole.loss, rel=1e-6)
    if count > 1:
        assert found.loss != pytest.approx(score(models[0], data).loss)


def test_base_models_score_the_mean_of_their_scores() -> None:
    data, topk = loader(40, 16), (1, 3)
    found = base_models(nets(3), data, topk=topk)
    alone = [score(net(seed), data, topk=topk) for seed in range(3)]
    assert found.loss == pytest.approx(sum(one.loss for one in alone) / 3)
    for k in topk:
        assert found.accuracy[k] == pytest.approx(sum(one.accuracy[k] for one in alone) / 3)
    assert len({one.loss for one in alone}) == 3


def test_data_in_another_order_at_the_second_pass_is_an_error() -> None:
    class Shuffled(list[tuple[Tensor, Tensor]]):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            self.reverse()
            return super().__iter__()

    with pytest.raises(ValueError, match="another order at the second pass"):
        ensemble(nets(2), Shuffled(loader()))
    assert isinstance(ensemble(nets(1), Shuffled(loader())), Score)


REFERENCES: dict[str, Callable[..., Score]] = {"base_models": base_models, "ensemble": ensemble}


@pytest.mark.parametrize("name", REFERENCES)
def test_references_leave_the_models_alone(name: str) -> None:
    models = [marked(net(seed)) for seed in range(2)]
    before = [Snapshot.of(model) for model in models]
    REFERENCES[name]([lambda model=model: model for model in models], loader())
    for snapshot, model in zip(before, models, strict=True):
        snapshot.assert_still(model)


@pytest.mark.parametrize("name", REFERENCES)
def test_references_hold_one_model_at_a_time(name: str) -> None:
    alive = []

    class Counted(nn.Sequential):
        pass

    def load() -> nn.Module:
        gc.collect()
        alive.append(sum(type(thing) is Counted for thing in gc.get_objects()))
        return Counted(net())

    REFERENCES[name]([load] * 4, loader())
    assert alive == [0] * 4


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize(
    ("models", "data", "message"),
    [
        ([], loader(), "no models: give at least one"),
        ([net()], loader(), r"models\[0\] is a Sequential: give functions that load the models"),
        (nets(2), [], "the data is empty"),
        (
            nets(2),
            [(torch.zeros(2, 3, 8, 8), torch.full((2,), CLASSES))],
            "label 4 is out of range",
        ),
    ],
)
def test_bad_input_of_a_reference_is_named(
    name: str, models: list[Any], data: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        REFERENCES[name](models, data)


def test_an_ensemble_of_different_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="models of 4 and 7 classes"):
        ensemble([net, lambda: nn.Sequential(net(), nn.Linear(CLASSES, 7))], loader())


def test_a_metric_of_one_s_own_is_the_mean_over_all_examples() -> None:
    model, data = marked(net()), loader(20)  # the last batch is smaller
    before = Snapshot.of(model)
    found = measure(model, data, lambda outputs, batch: outputs[:, 0].mean() + len(batch[1]))
    before.assert_still(model)
    with torch.no_grad():
        logits = torch.cat([model.eval()(x) for x, _ in data])
    sizes = [len(y) for _, y in data]
    assert sizes[-1] < sizes[0]
    expected = float(logits[:, 0].mean()) + sum(n * n for n in sizes) / 20
    assert found == pytest.approx(expected, rel=1e-5)


def test_labels_may_be_probabilities_or_one_for_each_position() -> None:
    model, data = net(), loader()
    hard = score(model, data)
    soft = [(x, torch.nn.functional.one_hot(y, CLASSES).double()) for x, y in data]
    found = score(model, soft)
    assert (found.top1, found.loss) == (hard.top1, pytest.approx(hard.loss))
    assert torch.equal(class_accuracy(model, soft, CLASSES), class_accuracy(model, data, CLASSES))

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.inner(x), -self.inner(x)], dim=1)

    doubled = [(x, torch.stack([y, torch.full_like(y, -100)], dim=1)) for x, y in data]
    positions = score(Twice(), doubled)  # every second label does not count
    assert (positions.top1, positions.loss) == (hard.top1, pytest.approx(hard.loss))
    assert score(Ensemble([Twice(), Twice()]), doubled).top1 == hard.top1


def test_a_path_may_be_measured_by_a_loss_of_one_s_own() -> None:
    a, b, data = net(0), net(1), loader()
    points = path(a, b, data, points=3, loss=lambda outputs, _: outputs.square().mean())
    assert [math.isnan(point.accuracy) for point in points] == [True] * 3
    ends = [measure(m, data, lambda outputs, _: outputs.square().mean()) for m in (b, a)]
    assert [points[0].loss, points[2].loss] == pytest.approx(ends)
    assert points[1].loss == pytest.approx(
        measure(mean(a, b), data, lambda outputs, _: outputs.square().mean())
    )
