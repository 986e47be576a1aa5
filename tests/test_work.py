"""A cell's work: who sees which data, what is made once, and the numbers that the library gives by hand."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import (
    DIRICHLET,
    OPTIMISATION,
    PROFILE,
    Snapshot,
    assert_same_state,
    same_parameters,
)
from torch import Tensor, nn

from npmerge import merging, reset_batchnorm
from npmerge.aggregate import finetune, mean, np_merge
from npmerge.align import cca, permute, weight_matching
from npmerge.data import Batches, ImageData, Images
from npmerge.data.partition import dirichlet, holdout, per_class
from npmerge.evaluate import Ensemble, score
from npmerge.experiments import EXPERIMENTS
from npmerge.many import Pairing, all_to_one, merge_many, tournament
from npmerge.methods import METHODS
from npmerge.models.residual import ResNet
from npmerge.run import work
from npmerge.run.work import LEARNING, Bench, Work, base_models, do_cell, load_images
from npmerge.store import artifacts
from npmerge.store.artifacts import Artifacts
from npmerge.store.records import Cell, Outcome, Row
from npmerge.store.zoo import Zoo

CPU = torch.device("cpu")
SETTING = DIRICHLET | {"images": 300}  # which is quick
BATCH = 100
LEARN = OPTIMISATION | {"batch_size": BATCH}
Done = Callable[..., Outcome]


def cell(experiment: str, name: str, *, seed: int = 0, **section: Any) -> Cell:
    """The tiny profile's with few images, or with other parameters of the experiment."""
    section = {"settings": [SETTING], "optimisation": LEARN} | section
    sections = {experiment: PROFILE.sections[experiment] | section}
    profile = PROFILE.model_copy(update={"sections": sections})
    (found,) = (x for x in EXPERIMENTS[experiment].list(profile, [seed]) if x.name == name)
    return found


def changed(one: Cell, **config: Any) -> Cell:
    return replace(one, config=one.config | config)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench.at(Zoo(tmp_path_factory.mktemp("zoo")), CPU)


@pytest.fixture
def fresh(bench: Bench, tmp_path: Path) -> Bench:
    """The same base models, of which nothing has been made."""
    return replace(bench, artifacts=Artifacts(tmp_path / "artifacts"))


@pytest.fixture(scope="module")
def done(bench: Bench) -> Done:
    """What cells give, each done once."""
    known: dict[tuple[str, str], Outcome] = {}

    def do(experiment: str, name: str) -> Outcome:
        if (experiment, name) not in known:
            known[experiment, name] = do_cell(cell(experiment, name), bench)
        return known[experiment, name]

    return do


def rows(outcome: Outcome) -> list[Row]:
    return [Row.model_validate(row) for row in outcome.rows]


def numbers(outcome: Outcome) -> dict[str, float]:
    return {row.metric: row.value for row in rows(outcome)}


class Hand:
    """A cell's models and data, put together by hand."""

    def __init__(self, one: Cell, zoo: Zoo, indices: Tensor | None = None) -> None:
        self.data, self.indices = load_images(one.config["setting"]), indices
        self.train, self.test = self.plain("train", indices), self.plain("test")
        raw = zoo.loaders(base_models(one), self.data)
        self.loads = [lambda load=load: self.reset(load()) for load in raw]

    @property
    def pair(self) -> tuple[nn.Module, nn.Module]:
        a, b = (load() for load in self.loads)
        return a, b

    def plain(self, split: str, indices: Tensor | None = None) -> Batches:
        return self.data.plain_batches(split, BATCH, indices=indices)

    def shuffled(self, seed: int = 0, indices: Tensor | None = None) -> Batches:
        chosen = self.indices if indices is None else indices
        return self.data.train_batches(BATCH, indices=chosen, seed=LEARNING + seed)

    def held_out(self) -> tuple[Tensor, Tensor]:
        labels = self.data.train.labels
        mine = torch.arange(len(labels)) if self.indices is None else self.indices
        kept, aside = holdout(labels[mine], 0.1, seed=0)
        return mine[kept], mine[aside]

    def tried(self, model: nn.Module) -> float:
        kept, aside = self.held_out()
        reset_batchnorm(model, self.shuffled(indices=kept))
        return score(model, self.plain("train", aside)).top1

    def reset(self, model: nn.Module, seed: int = 0) -> nn.Module:
        return reset_batchnorm(model, self.shuffled(seed))

    def numbers(self, model: nn.Module) -> dict[str, float]:
        found = score(model, self.test)
        return {"top1": found.top1, "loss": found.loss}


# --- What a cell says --------------------------------------------------------------------------


MERGED = {
    "dataset": "digits", "image_size": 4, "model": "resnet20", "width": 0.125, "split": "dirichlet",
    "models": 2, "many": None, "align": "permute", "aggregate": "mean", "tuned": False,
    "correct": "reset_batchnorm", "examples_per_class": None,
}  # fmt: skip
ROWS: dict[tuple[str, str], Mapping[str, Any]] = {
    ("disjoint_splits", "permute-np_merge"): {"aggregate": "np_merge"},
    ("disjoint_splits", "cca-mean"): {"align": "cca"},
    ("disjoint_splits", "permute-finetune-tuned"): {"aggregate": "finetune", "tuned": True},
    ("disjoint_splits", "ensemble"): {"aggregate": "ensemble", "align": None},
    ("disjoint_splits", "base_models-as-trained"): {
        "aggregate": "base_models", "align": None, "correct": None,
    },
    ("data_size", "5-permute-np_merge"): {"aggregate": "np_merge", "examples_per_class": 5},
    ("data_size", "all-permute-mean"): {"examples_per_class": "all"},
    ("many_models", "3-all_to_one-cca-mean"): {"align": "cca", "models": 3, "many": "all_to_one"},
    ("many_models", "3-tournament-permute-np_merge"): {
        "aggregate": "np_merge", "models": 3, "many": "tournament",
    },
}  # fmt: skip


@pytest.mark.parametrize("which", ROWS, ids=" ".join)
def test_rows_say_in_columns_what_their_numbers_are_of(which: tuple[str, str], done: Done) -> None:
    found = rows(done(*which))
    assert {row.metric for row in found} == {"top1", "loss"}
    for row in found:
        assert row.model_dump(exclude={"metric", "value"}) == MERGED | ROWS[which]


def test_details_keep_what_figures_need(done: Done, bench: Bench) -> None:
    details = done("disjoint_splits", "permute-np_merge").details
    assert len(details["history"]) == 1
    size = {name: p.numel() for name, p in Work(cell("disjoint_splits", "permute-np_merge"), bench)
            .pair[0].named_parameters()}  # fmt: skip
    assert {name: sum(counts) for name, counts in details["alpha"].items()} == size
    assert {len(counts) for counts in details["alpha"].values()} == {work.BINS}


@pytest.mark.parametrize("align", ["identity", "permute", "weight_matching"])
def test_the_ends_of_every_path_are_the_base_models(align: str, done: Done) -> None:
    """An alignment keeps the function, so each path starts and ends at the base models' loss."""
    outcome = done("disjoint_splits", f"{align}-mean")
    first, last = outcome.details["path"]
    assert (first["alpha"], last["alpha"]) == (0, 1)
    base = numbers(done("disjoint_splits", "base_models"))["loss"]
    assert (first["loss"] + last["loss"]) / 2 == pytest.approx(base, rel=1e-4)
    assert numbers(outcome)["barrier"] == 0  # of a path that is its two ends


@pytest.mark.parametrize("correct", [None, "reset_batchnorm"])
def test_the_models_of_a_path_are_corrected_as_the_merged_model_is(
    correct: str | None, bench: Bench
) -> None:
    one = cell("disjoint_splits", "identity-mean")
    outcome = do_cell(changed(one, measures={"path": 3}, correct=correct), bench)
    found, (first, middle, last) = numbers(outcome), outcome.details["path"]
    assert middle["loss"] == pytest.approx(found["loss"], rel=1e-6)
    expected = max(0, middle["loss"] - (first["loss"] + last["loss"]) / 2)
    assert found["barrier"] == pytest.approx(expected)
    assert {row.correct for row in rows(outcome)} == {correct}


def test_details_say_who_saw_and_who_knows_which_class(done: Done) -> None:
    details = {
        name: done("disjoint_splits", name).details["classes"]
        for name in ("base_models", "ensemble", "permute-mean", "permute-np_merge")
    }
    data = load_images(SETTING)
    seen = torch.tensor(details["base_models"]["seen"])
    assert seen.sum(dim=0).tolist() == torch.bincount(data.train.labels).tolist()
    shares = dirichlet(data.train.labels, seed=0)
    assert seen.sum(dim=1).tolist() == [len(share) for share in shares]
    weights = torch.bincount(data.test.labels).double() / len(data.test.labels)
    for name, classes in details.items():
        knows = torch.tensor(classes["accuracy"], dtype=torch.float64).view(-1, data.classes)
        assert len(knows) == (2 if name == "base_models" else 1)
        top1 = numbers(done("disjoint_splits", name))["top1"]
        assert float((knows @ weights).mean()) == pytest.approx(top1)


# --- Who sees what -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["base_models", "ensemble", "permute-mean", "permute-np_merge", "permute-finetune-tuned"],
)
def test_all_of_the_data_gives_the_numbers_of_the_disjoint_split(name: str, done: Done) -> None:
    whole = numbers(done("data_size", f"all-{name}"))
    assert numbers(done("disjoint_splits", name)).items() >= whole.items()


def spoiled(kept: Tensor) -> ImageData:
    """Training images that are negatives but for some."""
    data: Any = load_images(SETTING)
    pixels = 255 - data.train.pixels
    pixels[kept] = data.train.pixels[kept]
    changed: ImageData = replace(data, train=Images(pixels, data.train.labels))
    return changed


@pytest.mark.parametrize("examples", [5, 1])
@pytest.mark.parametrize(
    "name", ["base_models", "permute-np_merge", "weight_matching-finetune-tuned"]
)
def test_no_training_image_but_the_optimisation_data_is_used(
    examples: int, name: str, fresh: Bench, done: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = rows(done("data_size", f"{examples}-{name}"))
    labels = load_images(SETTING).train.labels
    data = spoiled(per_class(labels, examples, seed=0))
    monkeypatch.setattr(work, "load_images", lambda _: data)
    assert rows(do_cell(cell("data_size", f"{examples}-{name}"), fresh)) == expected


def test_the_optimisation_data_is_used(
    fresh: Bench, done: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "load_images", lambda _: spoiled(torch.tensor([0])))
    name = "5-permute-np_merge"
    assert numbers(do_cell(cell("data_size", name), fresh)) != numbers(done("data_size", name))


def test_the_parents_are_scored_as_trained_and_with_batch_norm_of_the_union(
    done: Done, bench: Bench
) -> None:
    one = cell("disjoint_splits", "base_models")
    hand = Hand(one, bench.zoo)
    raw = [bench.zoo.load(base, hand.data) for base in base_models(one)]
    for name, models in (("base_models-as-trained", raw), ("base_models", hand.pair)):
        each = [hand.numbers(model) for model in models]
        by_hand = {metric: sum(one[metric] for one in each) / 2 for metric in each[0]}
        assert numbers(done("disjoint_splits", name)) == pytest.approx(by_hand)
    assert numbers(done("disjoint_splits", "ensemble")) == pytest.approx(
        hand.numbers(Ensemble(hand.pair))
    )
    as_trained = numbers(done("disjoint_splits", "base_models-as-trained"))
    assert as_trained["loss"] != pytest.approx(by_hand["loss"], rel=1e-3)


@pytest.mark.parametrize("name", ["permute-mean", "permute-finetune", "permute-np_merge"])
def test_a_pair_is_left_as_the_zoo_has_it(name: str, bench: Bench) -> None:
    one = Work(cell("disjoint_splits", name), bench)
    before = [Snapshot.of(model) for model in one.pair]
    one.outcome()
    for base, load, model, snapshot in zip(one.bases, one.raw, one.pair, before, strict=True):
        snapshot.assert_still(model)
        again = bench.zoo.load(base, one.data)
        assert_same_state(load().state_dict(), again.state_dict())
        assert same_parameters(model, again)
        assert not torch.equal(model.bn.running_mean, again.bn.running_mean)


def test_shares_without_a_class_and_a_left_over_image_are_trained_aligned_and_merged(
    tmp_path: Path,
) -> None:
    """201 images in batches of 100 leave one over; a model of this draw has never seen some class."""
    setting = DIRICHLET | {"images": 201}
    labels = load_images(setting).train.labels

    def least(seed: int) -> int:
        shares = dirichlet(labels, seed=seed)
        return min(int(torch.bincount(labels[s], minlength=10).min()) for s in shares)

    seed = next(seed for seed in range(200) if least(seed) == 0)
    section = {"settings": [setting]}
    bench = Bench.at(Zoo(tmp_path), CPU)
    for name in ("permute-np_merge", "base_models"):
        found = do_cell(cell("disjoint_splits", name, seed=seed, **section), bench)
        assert {row.metric for row in rows(found)} == {"top1", "loss"}
    assert any(0 in row for row in found.details["classes"]["seen"])


# --- What the library gives by hand ------------------------------------------------------------


def learned(hand: Hand, a: nn.Module, b: nn.Module, seed: int) -> nn.Module:
    aligned = permute(a, b, hand.train).apply(b)
    return hand.reset(np_merge(a, aligned, hand.shuffled(seed), epochs=1).model, seed)


def averaged(hand: Hand, a: nn.Module, b: nn.Module, pairing: Pairing) -> nn.Module:
    example = hand.data.example()
    return hand.reset(mean(a, weight_matching(a, b, example).apply(b)), pairing.seed)


BY_HAND: dict[str, Callable[[Hand], nn.Module]] = {
    "3-tournament-permute-np_merge": lambda hand: tournament(
        hand.loads, lambda a, b, pairing: learned(hand, a, b, pairing.seed), seed=0
    ),
    "3-tournament-weight_matching-mean": lambda hand: tournament(
        hand.loads, partial(averaged, hand), seed=0
    ),
    "3-all_to_one-permute-mean": lambda hand: hand.reset(
        all_to_one(hand.loads, lambda a, b: permute(a, b, hand.train))
    ),
    "3-all_to_one-cca-mean": lambda hand: hand.reset(
        all_to_one(hand.loads, lambda a, b: cca(a, b, hand.train, ridge=0.1))
    ),
    "3-merge_many-weight_matching-mean": lambda hand: hand.reset(
        merge_many(hand.loads, seed=0, example=hand.data.example())
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_many_models_become_what_the_library_makes_of_them(
    name: str, bench: Bench, done: Done
) -> None:
    hand = Hand(cell("many_models", name), bench.zoo)
    assert len(hand.loads) == 3
    by_hand = hand.numbers(BY_HAND[name](hand))
    assert numbers(done("many_models", name)) == pytest.approx(by_hand, rel=1e-6)


def test_a_pair_becomes_what_the_library_makes_of_it(bench: Bench, done: Done) -> None:
    hand = Hand(cell("disjoint_splits", "permute-np_merge"), bench.zoo)
    by_hand = hand.numbers(learned(hand, *hand.pair, 0))
    found = numbers(done("disjoint_splits", "permute-np_merge"))
    assert found == pytest.approx(by_hand, rel=1e-6)


def test_cca_s_ridge_is_chosen_on_held_out_images_only(bench: Bench) -> None:
    ridges = [1e-3, 0.1, 10.0]
    options = OPTIMISATION["options"] | {"cca": {"ridge": {"choose": ridges}}}
    section = {"optimisation": LEARN | {"options": options}}
    one = cell("disjoint_splits", "cca-mean", **section)
    outcome = do_cell(one, bench)
    hand = Hand(one, bench.zoo)
    a, b = hand.pair
    aligned = {ridge: cca(a, b, hand.train, ridge=ridge).apply(b) for ridge in ridges}
    trials = {ridge: hand.tried(mean(a, moved)) for ridge, moved in aligned.items()}
    best = max(trials, key=trials.__getitem__)
    assert len(set(trials.values())) > 1
    found = outcome.details["chosen"]["ridge"]
    assert found == {"chosen": best, "trials": {f"{k:g}": v for k, v in trials.items()}}
    by_hand = hand.numbers(hand.reset(mean(a, aligned[best])))
    assert numbers(outcome) == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("examples", ["all", 5])
def test_tuned_fine_tuning_is_fine_tuning_with_the_rate_that_is_chosen_on_held_out_images(
    examples: int | str, bench: Bench
) -> None:
    rates = [1e-4, 1e-2]
    optimisation = LEARN | {
        "options": {"finetune": {"epochs": 2}},
        "tuned": {"finetune": {"lr": {"choose": rates, "trial": {"epochs": 1}}}},
    }
    section = {"optimisation": optimisation}
    one = cell("data_size", f"{examples}-permute-finetune-tuned", **section)
    outcome = do_cell(one, bench)
    labels = load_images(SETTING).train.labels
    indices = per_class(labels, examples, seed=0) if isinstance(examples, int) else None
    hand = Hand(one, bench.zoo, indices)
    a, b = hand.pair
    aligned = permute(a, b, hand.train).apply(b)
    data, trials = partial(hand.shuffled, indices=hand.held_out()[0]), {}
    for lr in rates:
        trials[lr] = hand.tried(finetune(a, aligned, data(), epochs=1, lr=lr).model)
    best = max(trials, key=trials.__getitem__)
    found = outcome.details["chosen"]["lr"]
    assert found == {"chosen": best, "trials": {f"{k:g}": v for k, v in trials.items()}}
    plain = cell("data_size", f"{examples}-permute-finetune", **section)
    method = plain.config["aggregate"]
    fixed = do_cell(
        changed(plain, aggregate=method | {"options": method["options"] | {"lr": best}}), bench
    )
    assert numbers(fixed) == numbers(outcome)
    assert fixed.details["history"] == outcome.details["history"]
    assert len(fixed.details["history"]) == 2


def test_every_choice_of_a_cell_is_kept(bench: Bench) -> None:
    align = cell("disjoint_splits", "cca-mean").config["align"]
    one = changed(cell("disjoint_splits", "permute-finetune-tuned"), align=align)
    chosen = do_cell(one, bench).details["chosen"]
    assert {name: found["chosen"] for name, found in chosen.items()} == {"ridge": 0.1, "lr": 1e-3}


# --- What is made once, and how long it takes --------------------------------------------------


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often what cells share is made."""
    counts: Counter[str] = Counter()
    known, measured = artifacts.kept, work.covariances

    def kept(path: Path, made_of: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        def counted() -> Any:
            counts[made_of["kind"]] += 1
            return make()

        return known(path, made_of, counted)

    def covariances(*args: Any, **options: Any) -> Any:
        counts["pass"] += 1
        return measured(*args, **options)

    monkeypatch.setattr(artifacts, "kept", kept)
    monkeypatch.setattr(work, "covariances", covariances)
    return counts


def test_alignments_statistics_and_corrected_models_are_made_once_and_shared(
    fresh: Bench, made: Counter[str], done: Done
) -> None:
    names = ["base_models", "ensemble", "permute-mean", "cca-mean", "permute-np_merge"]
    names += ["weight_matching-mean", "permute-finetune", "permute-finetune-tuned"]
    expected = {name: rows(done("disjoint_splits", name)) for name in names}
    made.clear()
    for name in names:
        assert rows(do_cell(cell("disjoint_splits", name), fresh)) == expected[name]
    assert made == {"model": 2, "statistics": 1, "pass": 1, "alignment": 3}
    made.clear()
    another = replace(fresh, artifacts=Artifacts(fresh.artifacts.folder))
    assert do_cell(cell("disjoint_splits", "cca-mean"), another).details["chosen"]
    do_cell(cell("data_size", "all-permute-mean"), another)
    assert not made
    do_cell(cell("data_size", "5-permute-mean"), another)  # of other images
    assert made == {"model": 2, "statistics": 1, "pass": 1, "alignment": 1}


class Clock:
    """Stands still, but for what is said to take its time."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def taking(self, seconds: float, known: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*args: Any, **options: Any) -> Any:
            self.now += seconds
            return known(*args, **options)

        return slow


SECONDS: dict[tuple[str, str], Sequence[float]] = {
    ("disjoint_splits", "permute-finetune"): (1001, 10, 100, 10_000),
    ("disjoint_splits", "permute-finetune-tuned"): (1001, 20, 200, 10_000),  # with the trial
    ("disjoint_splits", "permute-mean"): (1001, 0, 100, 10_200),  # with the path
    ("disjoint_splits", "cca-mean"): (1000 + 2 + 100 + 2, 0, 100, 10_000),  # with the trial
    ("disjoint_splits", "ensemble"): (0, 0, 0, 7),
    ("many_models", "3-tournament-permute-finetune"): (2, 20, 200, 10_000),
    ("many_models", "3-all_to_one-permute-mean"): (2, 0, 100, 10_000),
    ("many_models", "3-merge_many-weight_matching-mean"): (5, 0, 100, 10_000),
}
"""Of alignment, learning, reset and scoring."""


def test_seconds_of_alignment_learning_reset_and_scoring_are_kept_apart(
    fresh: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a cell finds counts with the seconds it once took; correcting base models counts nowhere."""
    clock = Clock()
    took = {"permute": 1, "cca": 2, "merge_many": 5, "ensemble": 7, "finetune": 10,
            "reset_batchnorm": 100}  # fmt: skip
    for name, seconds in took.items():
        method = METHODS[name]
        monkeypatch.setitem(vars(method), "function", clock.taking(seconds, method.function))
    monkeypatch.setattr(work, "covariances", clock.taking(1000, work.covariances))
    monkeypatch.setattr(work, "score", clock.taking(10_000, work.score))
    for module in (work, merging, artifacts):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    stages = ("alignment", "learning", "reset", "scoring")
    for which, expected in SECONDS.items():
        found = do_cell(cell(*which), fresh).seconds
        assert found == dict(zip(stages, expected, strict=True)), which


@pytest.mark.parametrize("name", ["tournament-permute-mean", "all_to_one-weight_matching-mean"])
def test_models_are_loaded_when_they_are_needed_and_never_all_at_once(
    name: str, bench: Bench, done: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = cell("many_models", f"3-{name}")
    expected = rows(done("many_models", f"3-{name}"))  # which makes what is shared
    known, alive = bench.zoo.load, []

    def load(*args: Any, **options: Any) -> nn.Module:
        gc.collect()
        models = [thing for thing in gc.get_objects() if type(thing) is ResNet]
        alive.append(sum(next(m.parameters()).device.type != "meta" for m in models))
        return known(*args, **options)

    monkeypatch.setattr(bench.zoo, "load", load)
    gc.collect()
    gc.freeze()  # what was there before is neither collected nor counted
    try:
        assert rows(do_cell(one, bench)) == expected
    finally:
        gc.unfreeze()
    assert len(alive) >= 3
    assert max(alive) == 1
