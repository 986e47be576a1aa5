"""Merge checkpoint files into one: what ``npmerge merge`` does."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npmerge.card import model_card, versions
from npmerge.catalogue import DATASETS, MODELS
from npmerge.checks import (
    CLASSES,
    EPOCHS,
    IMAGE_SIZE,
    WIDTH,
    check_finite,
    check_seed,
    check_whole,
)
from npmerge.methods import Kind, find
from npmerge.store.files import probe, write_atomically

if TYPE_CHECKING:  # what is wrong with a request is said before PyTorch is imported
    import torch
    from torch import Tensor, nn

    from npmerge.data.user import Parts

SUFFIX = ".safetensors"
SCHEDULES = "linear", "cosine"
"""How a learning rate may fall to 0."""
STEPS: tuple[Kind, ...] = ("align", "aggregate", "correct", "many")


@dataclass(frozen=True)
class MergeOptions:
    """How checkpoints are merged.

    Attributes:
        model: a name of :data:`npmerge.catalogue.MODELS`, ``"torchvision:NAME"``, ``"timm:NAME"``, or
            ``"package.module:factory"``; see :func:`npmerge.models.outside.build_outside`. Folders of Hugging Face need
            none.
        data: an image set, a folder of images, or ``"package.module:function"``; see
            :func:`npmerge.data.user.open_data`.
        classes: how many outputs the model has; by default as many as the data has.
        width: of a named model, 1 by default.
        image_size: height and width of the images in pixels; image sets are average-pooled to it.
        mean, std: of the pixels of a folder's images, per channel, in units of pixel value / 255.
        transform: ``"package.module:function"`` for a folder's images, in the place of these.
        align: how the others are aligned to the first, or a file that an alignment was saved to; by default as
            :func:`npmerge.merging.merge` does.
        aggregate: how aligned models become one.
        correct: what is done to the merged model; ``None`` for nothing.
        many: how more than two become one; by default as :func:`npmerge.merging.merge` does.
        base: file or folder of the model that all others were trained from, for methods that need it.
        options: of the methods, by ``"align"``, ``"aggregate"``, ``"correct"`` and ``"many"``.
        batch_size: images a step.
        validation: share of the training images that the best epoch is chosen on.
        patience: epochs without a better one until learning stops.
        schedule: how the learning rate falls to 0, ``"linear"`` or ``"cosine"``; by default it stays.
        loss, metric: ``"package.module:function"``, of the outputs and the batch.
        hold_unknown: leave what an operation of unknown symmetry touches where it is, instead of refusing the model.
        seed: of the order, the augmentation and whatever methods draw.
    """

    model: str | None
    data: str
    classes: int | None = None
    width: float | None = None
    image_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    transform: str | None = None
    align: str = ""
    aggregate: str = "np_merge"
    correct: str | None = "reset_batchnorm"
    many: str | None = None
    base: Path | None = None
    options: Mapping[str, dict[str, Any]] = field(
        default_factory=lambda: {step: {} for step in STEPS}
    )
    batch_size: int = 500
    validation: float = 0.0
    patience: int | None = None
    schedule: str | None = None
    loss: str | None = None
    metric: str | None = None
    hold_unknown: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.align:
            align = find(self.aggregate, "aggregate").default_alignment
            object.__setattr__(self, "align", align)


@dataclass(frozen=True)
class Beside:
    """What is written beside a merged model, or instead of it.

    Attributes:
        alignment: file of the alignment; none by default.
        history: file of the losses, ``.csv`` or ``.json``; none by default.
    """

    alignment: Path | None = None
    history: Path | None = None


def check_request(
    checkpoints: Sequence[Path | str],
    output: Path | str | None,
    options: MergeOptions,
    *,
    beside: Beside = Beside(),
    force: bool = False,
) -> None:
    """Find out what is wrong with a request, as far as names, numbers and files tell.

    Args:
        checkpoints: two or more files or folders.
        output: where the merged model goes; ``None`` if there is to be none.
        options: how to merge.
        beside: what else is written.
        force: whether the output may exist.

    Raises:
        ValueError: what is wrong.
        OSError: the output cannot be written.
    """
    if len(checkpoints) < 2:
        raise ValueError(f"only {len(checkpoints)} checkpoint is given: merge two or more")
    for step in STEPS:
        name = getattr(options, step)
        given = options.options.get(step, {})
        if name is None or (step == "align" and _is_saved(name) and not given):
            continue
        find(name, step).check(given)
    if options.schedule is not None and options.schedule not in SCHEDULES:
        raise ValueError(
            f"unknown schedule {options.schedule!r}: choose one of {', '.join(SCHEDULES)}"
        )
    for what in ("schedule", "patience"):
        known = find(options.aggregate, "aggregate").options
        if getattr(options, what) is not None and "epochs" not in known:
            raise ValueError(f"{options.aggregate} does not learn: it has no {what}")
    check_seed(options.seed)
    check_whole("batch_size", options.batch_size, 1)
    for what, most in (("classes", CLASSES), ("image_size", IMAGE_SIZE), ("patience", EPOCHS)):
        if (value := getattr(options, what)) is not None:
            check_whole(what, value, 1, most)
    for value in (*(options.mean or ()), *(options.std or ())):
        check_finite("mean or std", value)
    if options.width is not None:
        check_finite("width", options.width, above=0, most=WIDTH)
    if options.data not in DATASETS and ":" not in options.data and not Path(options.data).is_dir():
        raise ValueError(
            f"unknown data set {options.data!r}: choose one of {', '.join(DATASETS)}, "
            "or give a folder of images or package.module:function"
        )
    if options.base is None and "base" in find(options.aggregate, "aggregate").needs:
        raise ValueError(
            f"{options.aggregate} needs the model that the others were trained from: give --base"
        )
    paths = [Path(path) for path in checkpoints]
    for path in [*paths, *([options.base] if options.base else [])]:
        if not path.is_file() and not _is_folder(path):
            raise ValueError(
                f"no file {path}: give a checkpoint, .safetensors, .pt, .pth or .ckpt, "
                "or a folder with a config.json"
            )
    _check_model(options, paths)
    if output is not None:
        _check_output(Path(output), paths, force)
    if beside.history is not None and beside.history.suffix not in (".csv", ".json"):
        raise ValueError(f"history is {beside.history}: give a name that ends in .csv or .json")
    if beside.alignment is not None and (len(paths) > 2 or options.many):
        raise ValueError("save_alignment is for two models: more have no single alignment")
    for file in (beside.history, beside.alignment):
        if file is not None:
            if file.exists() and not force:
                raise ValueError(f"{file} exists already: give another name, or --force")
            probe(file)


def merge_checkpoints(
    checkpoints: Sequence[Path | str],
    output: Path | str,
    options: MergeOptions,
    *,
    beside: Beside = Beside(),
    device: torch.device | str = "cpu",
    force: bool = False,
    progress: bool = False,
) -> dict[str, dict[str, float]]:
    """Merge the models of checkpoint files and write the result; nothing is written if anything fails.

    The alignment sees the training images as they are, learning and the correction see them shuffled and augmented,
    the scores are those of the test images (of the validation images, or of the training images, where there are no
    others). The models are scored as they come.

    Args:
        checkpoints: two or more, of one architecture; the first is model A, which the others are aligned to. Files, or
            folders of Hugging Face.
        output: the merged model's safetensors file, or its folder where the checkpoints are folders. A model card goes
            beside it, or into the folder; for NP Merge, so does alpha, see :func:`alpha_path`.
        options: how to merge.
        beside: what else is written.
        device: where to run.
        force: replace the output, and what is beside it, if they exist.
        progress: show a progress bar.

    Returns:
        The scores of ``"A"``, ``"B"``, ..., their ``"ensemble"``, for two the uniform ``"mean"`` after the alignment,
        and ``"merged"``: each an ``"accuracy"`` in percent and a ``"loss"``; with a loss or a metric of one's own
        ``"loss"`` and ``"metric"``.

    Raises:
        ValueError: a file that is missing, damaged or does not fit; an unknown name; an output that exists.
        OSError: the output cannot be written.
        DataError: the image set is absent or damaged.
        TrainingError: the loss is not finite.

    Source:
        Section III-A.
    """
    from npmerge.evaluate import Ensemble
    from npmerge.merging import merge
    from npmerge.prepare import put_back

    files, output = [Path(path) for path in checkpoints], Path(output)
    check_request(files, output, options, beside=beside, force=force)
    bench = _Bench(files, options, device)
    merged = merge(
        bench.models, bench.parts.train,
        align=bench.align, aggregate=options.aggregate, correct=options.correct,
        many=options.many, base=bench.base, seed=options.seed, progress=progress, learn_on=bench.parts.learn,
        align_options=options.options.get("align"),
        aggregate_options=options.options.get("aggregate"),
        correct_options=options.options.get("correct"),
        many_options=options.options.get("many"),
        loss=bench.loss, metric=bench.metric, validation=bench.parts.validation,
        patience=options.patience, schedule=_schedule(options), strict=not options.hold_unknown,
    )  # fmt: skip
    scored = {chr(ord("A") + place): model for place, model in enumerate(bench.models)}
    if bench.loss is None and bench.metric is None:
        scored["ensemble"] = Ensemble(bench.models)
    if (
        len(files) == 2 and options.many is None and merged.alignment is not None
        and not find(options.aggregate, "aggregate").aligns
    ):  # fmt: skip
        uniform = merge(
            bench.models, bench.parts.train, align=merged.alignment, aggregate="mean",
            correct=options.correct, seed=options.seed, learn_on=bench.parts.learn,
        )  # fmt: skip
        scored["mean"] = uniform.model
    scored["merged"] = merged.model
    scores = {name: bench.score(model) for name, model in scored.items()}
    how: dict[str, Any] = {
        "checkpoints": [
            {"file": path.name, "sha256": _sha256(path)}
            for path in [*files, *([options.base] if options.base else [])]
        ],
        "options": asdict(options) | {"base": options.base and options.base.name},
        "scored_on": bench.parts.judged[0],
        "scores": scores,
        "versions": versions(),
    }
    if beside.history is not None:
        merged.save_history(beside.history)
    if beside.alignment is not None and merged.alignment is not None:
        merged.alignment.save(beside.alignment)
    model = put_back(
        merged.model, {name: ("cpu", dtype) for name, (_, dtype) in bench.kinds.items()}
    )
    if _is_folder(files[0]):
        _write_folder(output, files[0], model, merged.alpha, how)
    else:
        _write(output, model, merged.alpha, how)
    return scores


def inspect_checkpoints(
    checkpoints: Sequence[Path | str],
    options: MergeOptions,
    *,
    device: torch.device | str = "cpu",
) -> str:
    """Look at the models of two checkpoint files before they are merged.

    Args:
        checkpoints: two, as :func:`merge_checkpoints` takes them; of more, the first two.
        options: how they would be merged.
        device: where to run.

    Returns:
        What :func:`npmerge.inspection.inspect` finds, in lines.

    Raises:
        ValueError: as :func:`merge_checkpoints`.
    """
    from npmerge.inspection import inspect

    files = [Path(path) for path in checkpoints]
    check_request(files, None, options)
    bench = _Bench(files[:2], options, device)
    found = inspect(
        bench.models[0], bench.models[1], bench.parts.train,
        align=bench.align, align_options=options.options.get("align"),
        learn_on=bench.parts.learn, judged=bench.parts.judged[1], loss=bench.loss, seed=options.seed,
        strict=not options.hold_unknown,
    )  # fmt: skip
    return str(found)


class _Bench:
    """What a merge works with.

    Attributes:
        models: in float32, on the device.
        kinds: the types that the first one came in.
        parts: the data.
        base: the model that they were trained from, if one is given.
        align: how to align: a name, or an alignment that was saved.
        loss, metric: the user's own, if any.
    """

    def __init__(
        self, files: Sequence[Path], options: MergeOptions, device: torch.device | str
    ) -> None:
        import torch

        from npmerge.align import Alignment
        from npmerge.data.user import Preprocessing, open_data
        from npmerge.named import attribute
        from npmerge.prepare import kinds_of, prepared

        self.parts = open_data(
            options.data,
            Preprocessing(**_preprocessing(files[0], options)),
            batch_size=options.batch_size, validation=options.validation, seed=options.seed,
            device=device,
        )  # fmt: skip
        self.align = Alignment.load(options.align) if _is_saved(options.align) else options.align
        self.loss = None if options.loss is None else attribute(options.loss, "loss")
        self.metric = None if options.metric is None else attribute(options.metric, "metric")
        self.models: list[nn.Module] = []
        self.base: nn.Module | None = None
        for file in [*files, *([options.base] if options.base else [])]:
            model = _loaded(file, options, self.parts)
            if not self.models:
                self.kinds = kinds_of(model)
            ready = prepared(model, device).to(memory_format=torch.channels_last)
            if len(self.models) < len(files):
                self.models.append(ready)
            else:
                self.base = ready

    def score(self, model: nn.Module) -> dict[str, float]:
        """What a model is worth on the data to judge on."""
        from npmerge.evaluate import measure, score

        data, found = self.parts.judged[1], {}
        if self.metric is not None:
            found["metric"] = measure(model, data, self.metric)
        if self.loss is not None:
            return found | {"loss": measure(model, data, self.loss)}
        if self.metric is not None:
            return found
        scored = score(model, data)
        return {"accuracy": scored.top1, "loss": scored.loss}


def _preprocessing(file: Path, options: MergeOptions) -> dict[str, Any]:
    """What is asked for, before what a folder says of itself."""
    from npmerge.models.outside import image_processing

    names = ("image_size", "mean", "std", "transform")
    asked = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if not Path(options.data).is_dir() or not _is_folder(file):
        return asked
    return image_processing(file) | asked


def alpha_path(output: Path) -> Path:
    """Where alpha is written: beside a file, e.g. ``merged.alpha.safetensors``, or in a folder."""
    file = output.suffix == SUFFIX
    return output.with_suffix(f".alpha{SUFFIX}") if file else output / f"alpha{SUFFIX}"


def card_path(output: Path) -> Path:
    """Where the model card is written: beside a file, e.g. ``merged.md``, or in a folder."""
    return output.with_suffix(".md") if output.suffix == SUFFIX else output / "README.md"


def _is_folder(path: Path) -> bool:
    return (path / "config.json").is_file()


def _is_saved(align: str) -> bool:
    return align.endswith(SUFFIX)


def _check_model(options: MergeOptions, files: Sequence[Path]) -> None:
    """Names only: a model is built once the data is known."""
    folders = [path for path in files if _is_folder(path)]
    if folders:
        if options.model is not None or len(folders) < len(files):
            raise ValueError(
                f"{folders[0]} is a folder with its own model: give folders alone, and no --model"
            )
        return
    if options.model is None:
        raise ValueError(
            f"the model of {files[0]} is not known: give --model {', '.join(MODELS)}, torchvision:NAME, "
            "timm:NAME or package.module:factory"
        )
    if ":" in options.model:
        if options.width is not None:
            raise ValueError(
                f"width is {options.width:g}: it is for {', '.join(MODELS)}; a factory sets its own"
            )
    elif options.model not in MODELS:
        raise ValueError(
            f"unknown model {options.model!r}: choose one of {', '.join(MODELS)}, or give torchvision:NAME, "
            "timm:NAME or package.module:factory"
        )


def _check_output(output: Path, inputs: Sequence[Path], force: bool) -> None:
    folder = _is_folder(inputs[0])
    if folder == (output.suffix == SUFFIX):
        raise ValueError(
            f"output is {output}: give a name that ends in {SUFFIX} for a file, and without it for a folder"
        )
    for path in (output, alpha_path(output), card_path(output)):
        if path.resolve() in [given.resolve() for given in inputs]:
            raise ValueError(f"output {path} is one of the checkpoints: give another name")
        mine = folder and force and _is_folder(path)
        if not mine and (path.is_dir() or (path.exists() and not force)):
            raise ValueError(
                f"output {path} exists already: give another name, or --force to replace a file"
            )
    if not output.is_dir():
        probe(output)


def _loaded(file: Path, options: MergeOptions, parts: Parts) -> nn.Module:
    """A checkpoint's model, tried on the data."""
    from npmerge.models.outside import build_outside, load_folder
    from npmerge.store.checkpoints import load_into

    if options.model is None:
        return _tried(load_folder(file), str(file), options, parts)
    if ":" in options.model:
        classes = parts.classes if options.classes is None else options.classes
        model = build_outside(options.model, classes)
    else:
        model = _named(options, parts)
    return load_into(_tried(model, f"model {options.model!r}", options, parts), file)


def _named(options: MergeOptions, parts: Parts) -> nn.Module:
    from npmerge.data.streams import example_of
    from npmerge.models import build

    example = example_of(parts.train)
    classes = parts.classes if options.classes is None else options.classes
    if classes is None or getattr(example, "ndim", 0) != 4:
        raise ValueError(
            f"{options.model} is a network for images: give data of images, and --classes"
        )
    return build(
        str(options.model), classes, width=1 if options.width is None else options.width,
        in_channels=example.shape[1], image_size=example.shape[2], seed=options.seed,
    )  # fmt: skip


def _tried(model: nn.Module, name: str, options: MergeOptions, parts: Parts) -> nn.Module:
    """The model, if it takes the data and has as many outputs as the data has classes."""
    import torch

    from npmerge.data.streams import as_logits, mapped, outputs_of, stream
    from npmerge.named import UserCodeError

    batch = mapped(next(stream(parts.train, "cpu")), lambda tensor: tensor[:1])
    shapes = [tuple(t.shape) for t in (batch.values() if isinstance(batch, Mapping) else batch)]
    wanted = f"{name} must take a batch of {options.data}, {', '.join(map(str, shapes))}"
    try:
        with torch.no_grad():
            outputs = outputs_of(model.eval(), batch)
    except UserCodeError as error:
        raise ValueError(f"{wanted}: {error}") from error
    classes = parts.classes
    if options.loss is None and options.metric is None and classes is not None:
        try:
            found = as_logits(outputs).shape[-1]
        except ValueError as error:
            raise ValueError(f"{wanted}: {error}") from error
        if found < classes:
            raise ValueError(f"{wanted}, and give {classes} logits, not {found}: change the model")
    return model


def _schedule(options: MergeOptions) -> Callable[[float], float] | None:
    """What multiplies the learning rate."""
    if options.schedule is None:
        return None
    from npmerge.training import piecewise_linear, warmup_cosine

    known = find(options.aggregate, "aggregate").options["epochs"]
    epochs = options.options.get("aggregate", {}).get("epochs", known.default)
    return {"linear": piecewise_linear, "cosine": warmup_cosine}[options.schedule](epochs, 0)


def _sha256(path: Path) -> str:
    """Of a file, or of the weights in a folder, one after the other."""
    files = (
        [path]
        if path.is_file()
        else sorted(path.glob("*.safetensors")) + sorted(path.glob("*.bin"))
    )
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while part := opened.read(2**20):
                digest.update(part)
    return digest.hexdigest()


def _write_folder(
    output: Path,
    like: Path,
    model: nn.Module,
    alpha: Mapping[str, Tensor] | None,
    how: Mapping[str, Any],
) -> None:
    """The whole folder is put in place at once."""
    from npmerge.models.outside import save_folder

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as place:
        part = Path(place) / output.name
        save_folder(model, like, part)
        card_path(part).write_text(model_card(how, output.name), encoding="utf-8")
        _write_alpha(part, alpha, how)
        if output.exists():
            output.rename(Path(place) / "before")
        part.rename(output)


def _write(
    output: Path, model: nn.Module, alpha: Mapping[str, Tensor] | None, how: Mapping[str, Any]
) -> None:
    """The model's file is put in place last, so that it never stands beside another merge's alpha."""
    from npmerge.store.checkpoints import save_state

    def write_all(part: Path) -> None:
        save_state(part, model.state_dict(), {"merge": how})
        _write_alpha(output, alpha, how)
        text = model_card(how, output.stem)
        write_atomically(card_path(output), lambda file: file.write_text(text, encoding="utf-8"))

    write_atomically(output, write_all)


def _write_alpha(output: Path, alpha: Mapping[str, Tensor] | None, how: Mapping[str, Any]) -> None:
    from npmerge.store.checkpoints import save_state

    beside = alpha_path(output)
    if alpha is None:
        beside.unlink(missing_ok=True)
    else:
        write_atomically(beside, lambda file: save_state(file, alpha, {"merge": how}))
