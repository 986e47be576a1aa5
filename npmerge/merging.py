"""Merge: align, aggregate, correct. The one place where the paper's equation is written."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from npmerge.aggregate import Aggregated, mean
from npmerge.align import Alignment, Covariances, covariances
from npmerge.checks import check_seed
from npmerge.data.streams import Data, example_of
from npmerge.device import pick_device
from npmerge.evaluate import Metric, measure, score
from npmerge.many import Load, Pairing
from npmerge.methods import Method, find
from npmerge.prepare import Kinds, kinds_of, prepared, put_back
from npmerge.store.checkpoints import not_finite
from npmerge.store.files import write_atomically
from npmerge.symmetry import Group, symmetry_on
from npmerge.tasks import NO_BASE
from npmerge.training import Learning, Loss, TrainingError

Loader = nn.Module | Load
"""A model, or a function that loads it."""
PAIR = 2


@dataclass(frozen=True)
class Choice:
    """An option that is chosen on held-out training data: the value whose merged model scores best there.

    Attributes:
        values: to choose from.
        trial: other options of the method that differ while values are tried, e.g. ``{"epochs": 1}``.
    """

    values: tuple[Any, ...]
    trial: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class HeldOut:
    """Training data in two parts, to choose options on; never test data.

    Attributes:
        kept: to learn from, and to correct with, in a trial; like ``learn_on`` of :func:`merge`.
        aside: the rest, which trials are scored on.
    """

    kept: Data | Callable[[int], Data]
    aside: Data


@dataclass(frozen=True)
class Merged:
    """A merged model and how it was made.

    Attributes:
        model: in evaluation mode, corrected.
        alignment: what B was aligned with; of more than two models the last one that was found, ``None`` if they were
            matched otherwise.
        details: what the last aggregation tells beside its model, e.g. NP Merge's ``"alpha"``.
        history: the mean loss of each epoch of the last aggregation.
        epochs: every epoch of every aggregation, of which there are several with more than two models: ``"merge"``,
            counted from 1, ``"epoch"``, its mean ``"loss"`` and, if there are validation data, ``"validation"``.
        chosen: for each option that was a :class:`Choice`, the value ``"chosen"`` and the score of all ``"trials"``.
        seconds: of ``"alignment"``, ``"learning"`` and ``"reset"``, trials included.
    """

    model: nn.Module
    alignment: Alignment | None
    details: Mapping[str, Any]
    history: list[float]
    chosen: dict[str, dict[str, Any]]
    seconds: dict[str, float]
    epochs: list[dict[str, float]] = field(default_factory=list)

    def save_history(self, path: Path | str) -> None:
        """Write :attr:`epochs` to a file.

        Args:
            path: ends in ``.csv`` or ``.json``.

        Raises:
            ValueError: it ends otherwise.
            OSError: it cannot be written.
        """
        path = Path(path)
        check_history_path(path)
        text = io.StringIO()
        if path.suffix == ".json":
            json.dump(self.epochs, text, indent=1)
        else:
            names = list(self.epochs[0]) if self.epochs else ["merge", "epoch", "loss"]
            writer = csv.DictWriter(text, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.epochs)
        write_atomically(path, lambda part: part.write_text(text.getvalue(), encoding="utf-8"))

    @property
    def alpha(self) -> dict[str, Tensor] | None:
        """NP Merge's coefficients of model A by parameter name; ``None`` for other aggregations."""
        return self.details.get("alpha")


def merge(
    models: Sequence[Loader],
    data: Data,
    *,
    align: str | Alignment | None = None,
    aggregate: str = "np_merge",
    correct: str | None = "reset_batchnorm",
    many: str | None = None,
    learn_on: Data | Callable[[int], Data] | None = None,
    base: nn.Module | None = None,
    seed: int = 0,
    align_options: Mapping[str, Any] | None = None,
    aggregate_options: Mapping[str, Any] | None = None,
    correct_options: Mapping[str, Any] | None = None,
    many_options: Mapping[str, Any] | None = None,
    held_out: HeldOut | None = None,
    loss: Loss | None = None,
    validation: Data | None = None,
    metric: Metric | None = None,
    patience: int | None = None,
    schedule: Callable[[float], float] | None = None,
    strict: bool = True,
    device: torch.device | str | None = None,
    mixed_precision: bool | None = None,
    saved: Path | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
    progress: bool = False,
) -> Merged:
    """Merge models: ``C = Agg(Align(A, B))``, then the correction.

    Args:
        models: two or more of one architecture, or functions that load them; none is changed. Widths may differ where
            the aggregation says so. The first is the
            reference: B is aligned to A. They may be compiled, or wrapped for several devices. Those in half precision
            are merged in float32. Frozen parameters (``requires_grad``) are averaged, not learned.
        data: training data, a re-iterable of batches (tuples whose last item holds the labels, or dictionaries with
            ``"labels"``), for the alignment.
        align: how B is aligned: the name of a method, or an alignment that was found before. By default ``"permute"``;
            ``"identity"`` for an aggregation that finds an alignment of its own, or starts from ``base``.
        aggregate: how aligned models become one.
        correct: what is done to a merged model; ``None`` for nothing.
        many: how more than two become one; by default in a tournament, or all at once where the aggregation takes any
            number. Two are a pair unless it is given.
        learn_on: what the aggregation learns from and the correction sees, ``data`` by default. Shuffle and augment it
            like the models' own training: batch norm's statistics should be those of what they have learned from. A
            function gets a seed of each pairing's own.
        base: the model that all others were trained from, for methods that need one.
        seed: of whatever is drawn at random.
        align_options: of the alignment, by name; see ``npmerge methods``. A value may be a :class:`Choice`.
        aggregate_options: of the aggregation, likewise.
        correct_options: of the correction.
        many_options: of the way to make one of many.
        held_out: what choices are made on. With more than two models they are made for the first pair.
        loss: ``loss(outputs, batch)``, a scalar; by default the cross-entropy of the labels.
        validation: batches that the model is scored on, corrected, after each epoch of learning; the best epoch is what
            is kept.
        metric: ``metric(outputs, batch)``, the higher the better, to validate and to choose by; by default the loss,
            and the accuracy to choose by.
        patience: stop learning after so many epochs in a row that did not validate better; by default never.
        schedule: multiplies the learning rate; a function of the epoch, counted in fractions.
        strict: refuse models with an operation whose symmetry is not known; else the channels that it touches stay
            where they are.
        device: where to compute; by default where the models are.
        mixed_precision: learn in bfloat16; by default where the device gains from it.
        saved: a folder that is kept up to date with all that is being learned. A merge that began alike and was cut off
            goes on from it; see :func:`npmerge.training.fit`. It is the caller's to delete.
        on_epoch: called after each epoch of learning with its number, from 1, and its mean loss.
        progress: show a progress bar.

    Returns:
        A new model, in the types and on the devices of the first, and how it was made.

    Raises:
        ValueError: something else than models, an unknown method or option, models that differ in architecture, data
            that is empty or mislabelled, a method without what it needs.
        SymmetryError: the model holds an operation whose symmetry is not known.
        TrainingError: the loss is not finite, or the merged model is not.

    Source:
        Section III-A.
    """
    device = None if device is None else pick_device(str(device))
    loads = _loaders(models, device)
    if len(loads) < PAIR:
        raise ValueError(f"models has {len(loads)}: give at least two")
    if many is None and len(loads) == PAIR and many_options:
        raise ValueError("many_options is given for two models, which are a pair: give many too")
    steps = Merger(
        data, align=align, aggregate=aggregate, correct=correct, learn_on=learn_on,
        base=None if base is None else prepared(base, device), seed=seed,
        align_options=align_options, aggregate_options=aggregate_options,
        correct_options=correct_options, held_out=held_out, loss=loss, validation=validation,
        metric=metric, patience=patience, schedule=schedule, strict=strict, mixed_precision=mixed_precision,
        saved=saved, on_epoch=on_epoch, progress=progress,
    )  # fmt: skip
    if many is None and len(loads) == PAIR:
        model = steps.merge(loads[0](), loads[1]())
    else:
        model = steps.merge_many(loads, many or steps.default_many, many_options or {})
    broken = not_finite(model.state_dict())
    if broken:
        raise TrainingError(
            f"the merged model holds values in {broken!r} that are not finite: check models, data and options"
        )
    return Merged(
        put_back(model.eval(), loads[0].kinds),
        steps.alignment,
        steps.details,
        steps.history,
        steps.chosen,
        steps.seconds,
        steps.epochs,
    )


class Merger:
    """The steps of a merge; :func:`merge` has the arguments.

    Attributes:
        alignment, details, history, chosen, seconds, epochs: as :class:`Merged` has them.
    """

    def __init__(
        self,
        data: Data,
        *,
        align: str | Alignment | None = None,
        aggregate: str = "np_merge",
        correct: str | None = "reset_batchnorm",
        learn_on: Data | Callable[[int], Data] | None = None,
        base: nn.Module | None = None,
        seed: int = 0,
        align_options: Mapping[str, Any] | None = None,
        aggregate_options: Mapping[str, Any] | None = None,
        correct_options: Mapping[str, Any] | None = None,
        held_out: HeldOut | None = None,
        loss: Loss | None = None,
        validation: Data | None = None,
        metric: Metric | None = None,
        patience: int | None = None,
        schedule: Callable[[float], float] | None = None,
        strict: bool = True,
        mixed_precision: bool | None = None,
        saved: Path | None = None,
        on_epoch: Callable[[int, float], None] | None = None,
        progress: bool = False,
        statistics: Callable[[], Covariances] | None = None,
    ) -> None:
        check_seed(seed)
        self._data, self._learn_on, self._seed = data, data if learn_on is None else learn_on, seed
        self._base, self._held_out, self._statistics = base, held_out, statistics
        self._aggregate = find(aggregate, "aggregate")
        self._align = (
            align if isinstance(align, Alignment)
            else find(align or self._aggregate.default_alignment, "align")
        )  # fmt: skip
        self._correct = None if correct is None else find(correct, "correct")
        self._options = {
            "align": dict(align_options or {}),
            "aggregate": dict(aggregate_options or {}),
            "correct": dict(correct_options or {}),
        }
        for kind, method in (
            ("align", self._align), ("aggregate", self._aggregate), ("correct", self._correct),
        ):  # fmt: skip
            if isinstance(method, Method):
                self._check(method, self._options[kind])
        if (
            self._aggregate.aligns
            and isinstance(self._correct, Method)
            and ("parents" in self._correct.parameters)
        ):
            raise ValueError(
                f"{self._correct.name} compares channels with those of aligned models, and "
                f"{self._aggregate.name} makes channels of its own: correct by reset_batchnorm"
            )
        self._loss, self._metric, self._validation = loss, metric, validation
        self._learning = Learning(
            loss=loss, mixed_precision=mixed_precision, on_epoch=on_epoch, schedule=schedule,
            patience=patience, validate=None if validation is None else self._validate,
            progress=self._aggregate.label if progress else None,
        )  # fmt: skip
        self._strict = strict
        self._saved, self._learned = saved, 0  # how often something was learned, trials included
        self._groups: Sequence[Group] | None = None
        self._parents: Sequence[nn.Module] = ()  # aligned, for a correction that asks for them
        self.alignment: Alignment | None = None
        self.details: Mapping[str, Any] = {}
        self.history: list[float] = []
        self.epochs: list[dict[str, float]] = []
        self._validated: list[float] = []
        self._merges = 0
        self.chosen: dict[str, dict[str, Any]] = {}
        self.seconds = {"alignment": 0.0, "learning": 0.0, "reset": 0.0}

    def merge(self, a: nn.Module, b: nn.Module, seed: int | None = None) -> nn.Module:
        """``C = Agg(Align(A, B))``, corrected.

        Args:
            a: model A.
            b: model B.
            seed: of the pairing; that of the merge by default.
        """
        model = self.correct(self.aggregate([a, self.align(a, b).apply(b)], seed), seed)
        self._parents = ()  # they need not stay in memory
        return model

    @property
    def default_many(self) -> str:
        """How more than two become one, if nothing else is said."""
        return "all_to_one" if self._aggregate.several else "tournament"

    def merge_many(self, loads: Sequence[Load], name: str, options: Mapping[str, Any]) -> nn.Module:
        """Many models become one, corrected; see :func:`merge`."""
        method = find(name, "many")
        self._check(method, options)
        pairs = "merge" in method.parameters
        at_once = "aggregate" in method.parameters and self._aggregate.several
        if not pairs and not at_once and self._aggregate.name != "mean":
            raise ValueError(
                f"{name!r} takes the mean of all models: aggregate must be 'mean', not {self._aggregate.name!r}"
            )
        steps = {"align", "merge"}.intersection(method.parameters)  # else it aligns by itself
        with nullcontext() if steps else self._timed("alignment"):
            context = self._with_groups(method, loads[0])
            model: nn.Module = self._call(
                method, options, models=loads, align=self.align, merge=self._match,
                aggregate=self.aggregate if at_once else None, seed=self._seed, **context,
            )  # fmt: skip
        model = model if pairs else self.correct(model)
        self._parents = ()
        return model

    def align(self, a: nn.Module, b: nn.Module) -> Alignment:
        """Find B's alignment to A."""
        with self._timed("alignment"):
            method, data = self._align, self._data
            if isinstance(method, Alignment):
                found = method
            elif method.name == "identity" and self._aggregate.aligns:
                found = Alignment((), (), ())  # their widths may differ
            else:
                learning = replace(self._learning, schedule=None, validate=None, patience=None)
                context: dict[str, Any] = {
                    "a": a, "b": b, "data": data, "seed": self._seed, "learning": learning,
                }  # fmt: skip
                context |= self._with_groups(method, lambda: a)
                if "example" in method.parameters:
                    context["example"] = example_of(data)
                options = self._options["align"]
                measure = self._statistics or (
                    (lambda: covariances(a, b, data, groups=self._groups))
                    if any(isinstance(value, Choice) for value in options.values())
                    else None
                )
                if measure is not None and "statistics" in method.parameters:
                    context["statistics"] = measure()

                def averaged(trial: Mapping[str, Any]) -> nn.Module:
                    self._parents = [a, self._call(method, trial, **context).apply(b)]
                    return mean(*self._parents)

                found = self._call(method, self._settled(method, averaged), **context)
        self.alignment = found
        return found

    def aggregate(self, models: Sequence[nn.Module], seed: int | None = None) -> nn.Module:
        """Make one model of aligned ones, A the first: of two, or of any number where the aggregation takes them."""
        method, own = self._aggregate, self._seed if seed is None else seed
        context: dict[str, Any] = {"models": models, "seed": own, "base": self._base}
        context |= dict(zip("ab", models, strict=False)) | self._with_groups(
            method, lambda: models[0]
        )
        self._parents = models
        self.history, self.details = [], {}  # those of the merge before are given up
        with self._timed("learning"):

            def learned(trial: Mapping[str, Any]) -> nn.Module:
                kept = None if self._held_out is None else _seeded(self._held_out.kept, own)
                return _model(self._learn(method, trial, data=kept, **context))

            options = self._settled(method, learned)
            self._validated = []
            result = self._learn(method, options, data=_seeded(self._learn_on, own), **context)
        if isinstance(result, Aggregated):
            self.history, self.details = result.history, result.details
        self._merges += 1
        for number, loss in enumerate(self.history):
            row: dict[str, float] = {"merge": self._merges, "epoch": number + 1, "loss": loss}
            if self._validated:
                row["validation"] = self._validated[number]
            self.epochs.append(row)
        return _model(result)

    def correct(self, model: nn.Module, seed: int | None = None) -> nn.Module:
        """Correct a merged model, in place."""
        return self._corrected(model, self._learn_on, seed)

    def _corrected(
        self, model: nn.Module, data: Data | Callable[[int], Data], seed: int | None
    ) -> nn.Module:
        if self._correct is None:
            return model
        with self._timed("reset"):
            corrected: nn.Module = self._call(
                self._correct, self._options["correct"], model=model, parents=self._parents,
                data=_seeded(data, self._seed if seed is None else seed),
            )  # fmt: skip
        return corrected

    def _match(self, a: nn.Module, b: nn.Module, pairing: Pairing) -> nn.Module:
        return self.merge(a, b, pairing.seed)

    def _settled(
        self, method: Method, merged: Callable[[Mapping[str, Any]], nn.Module]
    ) -> dict[str, Any]:
        """The options of a method, one that is a choice made by how the models merged with its values score."""
        options = self._options[method.kind]
        for name, choice in options.items():
            if not isinstance(choice, Choice):
                continue
            if name not in self.chosen:
                trials = {
                    value: self._tried(merged, options | dict(choice.trial) | {name: value})
                    for value in choice.values
                }
                best = max(trials, key=trials.__getitem__)
                if not math.isfinite(trials[best]):
                    raise TrainingError(
                        f"every {name} of {choice.values} diverged: give {method.name} others to choose from"
                    )
                self.chosen[name] = {
                    "chosen": best,
                    "trials": {_text(v): s for v, s in trials.items() if math.isfinite(s)},
                }
            return options | {name: self.chosen[name]["chosen"]}
        return options

    def _tried(
        self, merged: Callable[[Mapping[str, Any]], nn.Module], options: Mapping[str, Any]
    ) -> float:
        """The score on what is held out; a value that diverges is not chosen."""
        held_out = self._held_out
        if held_out is None:
            raise ValueError("a choice needs held-out training data: give held_out")
        try:
            model = self._corrected(merged(options), held_out.kept, None)
        except TrainingError:
            return -math.inf
        if self._metric is None and self._loss is None:
            return score(model, held_out.aside).top1
        return self._judged(model, held_out.aside) * (-1 if self._metric is None else 1)

    def _judged(self, model: nn.Module, data: Data) -> float:
        """The metric on some data; the loss where there is none."""
        judge = self._metric or self._loss
        return score(model, data).loss if judge is None else measure(model, data, judge)

    def _validate(self, model: nn.Module) -> float:
        """What an epoch's model, corrected like the result, is worth: the lower, the better."""
        value = self._judged(self.correct(copy.deepcopy(model)), self._validation or ())
        self._validated.append(value)
        return value if self._metric is None else -value

    def _check(self, method: Method, options: Mapping[str, Any]) -> None:
        for name, value in options.items():
            values = value.values if isinstance(value, Choice) else (value,)
            if not values:
                raise ValueError(f"{name} of {method.name} has no value to choose from")
            for one in values:
                method.check({name: one})
            if isinstance(value, Choice):
                method.check(value.trial)
        if "base" in method.needs and self._base is None:
            raise ValueError(f"{method.name} needs a base: {NO_BASE}")

    def _learn(self, method: Method, options: Mapping[str, Any], **context: Any) -> Any:
        """Call an aggregation, each time with a file of its own to go on from."""
        saved = None if self._saved is None else self._saved / f"{self._learned}.training"
        self._learned += 1
        return self._call(method, options, learning=replace(self._learning, saved=saved), **context)

    def _call(self, method: Method, options: Mapping[str, Any], **context: Any) -> Any:
        given = {name: value for name, value in context.items() if name in method.parameters}
        return method.function(**given, **options)

    def _with_groups(self, method: Method, load: Load) -> dict[str, Sequence[Group]]:
        """The symmetry groups, found once, for a method that asks for them."""
        if "groups" not in method.parameters:
            return {}
        if self._groups is None:
            self._groups = symmetry_on(load(), example_of(self._data), strict=self._strict).groups
        return {"groups": self._groups}

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        """Count the seconds of a stage; those of a correction within another one count there."""
        start, before = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            inner = sum(self.seconds.values()) - before
            self.seconds[stage] += time.perf_counter() - start - inner


def check_history_path(path: Path) -> None:
    """Raise a ``ValueError`` if a history cannot be written to a file of that name."""
    if path.suffix not in (".csv", ".json"):
        raise ValueError(f"history is {path}: give a name that ends in .csv or .json")


def _loaders(models: object, device: torch.device | str | None) -> list[_Prepared]:
    if not isinstance(models, Sequence) or isinstance(models, str):
        raise ValueError(f"models is a {type(models).__name__}: give a list of two models or more")
    for number, model in enumerate(models):
        if not callable(model):
            raise ValueError(
                f"models[{number}] is a {type(model).__name__}: give a module, or a function that returns one "
                "(`npmerge merge` takes files)"
            )
    return [_Prepared(model, device) for model in models]


class _Prepared:
    """Loads a model as it is computed with.

    Attributes:
        kinds: in what types and where it came.
    """

    def __init__(self, given: Loader, device: torch.device | str | None) -> None:
        self._device, self.kinds = device, Kinds()
        self._load: Load = given
        if isinstance(given, nn.Module):
            model, self.kinds = prepared(given, device), kinds_of(given)
            self._load = lambda: model

    def __call__(self) -> nn.Module:
        model = self._load()
        if not self.kinds and isinstance(model, nn.Module):
            self.kinds = kinds_of(model)
        return prepared(model, self._device)


def _seeded(data: Data | Callable[[int], Data], seed: int) -> Data:
    return data(seed) if callable(data) else data


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _model(result: nn.Module | Aggregated) -> nn.Module:
    return result.model if isinstance(result, Aggregated) else result
