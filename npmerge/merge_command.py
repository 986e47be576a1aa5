"""Merge checkpoint files into one: what ``npmerge merge`` does."""

from __future__ import annotations

import hashlib
import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npmerge._version import __version__
from npmerge.catalogue import DATASETS, MODELS
from npmerge.methods import Kind, find
from npmerge.store.files import probe, write_atomically

if TYPE_CHECKING:  # what is wrong with a request is said before PyTorch is imported
    import torch
    from torch import Tensor, nn

    from npmerge.data import ImageData
    from npmerge.evaluate import Score

STEPS: tuple[Kind, ...] = ("align", "aggregate", "correct", "many")


@dataclass(frozen=True)
class MergeOptions:
    """How checkpoints are merged.

    Attributes:
        model: a name of :data:`npmerge.catalogue.MODELS`, or ``"package.module:factory"``, called as
            ``factory(classes)``.
        data: name of the image set.
        width: of a named model, 1 by default; a factory has its own.
        image_size: average-pool the images to this height and width in pixels; as they are by default.
        align: how the others are aligned to the first.
        aggregate: how aligned models become one.
        correct: what is done to the merged model; ``None`` for nothing.
        many: how more than two become one; a tournament by default.
        options: of the methods, by ``"align"``, ``"aggregate"``, ``"correct"`` and ``"many"``.
        batch_size: images a step.
        seed: of the order, the augmentation and whatever methods draw.
    """

    model: str
    data: str
    width: float | None = None
    image_size: int | None = None
    align: str = "permute"
    aggregate: str = "np_merge"
    correct: str | None = "reset_batchnorm"
    many: str | None = None
    options: Mapping[str, dict[str, Any]] = field(
        default_factory=lambda: {step: {} for step in STEPS}
    )
    batch_size: int = 500
    seed: int = 0


def check_request(
    checkpoints: Sequence[Path | str], output: Path | str, options: MergeOptions, *, force: bool
) -> None:
    """Find out what is wrong with a request, as far as names, numbers and files tell.

    Args:
        checkpoints: two or more files.
        output: the merged model's file.
        options: how to merge.
        force: whether the output may exist.

    Raises:
        ValueError: what is wrong.
        OSError: the output cannot be written.
    """
    if len(checkpoints) < 2:
        raise ValueError(f"only {len(checkpoints)} checkpoint is given: merge two or more")
    for step in STEPS:
        name = getattr(options, step)
        if name is None:
            continue
        method = find(name, step)
        for option, value in options.options.get(step, {}).items():
            if option not in method.options:
                known = ", ".join(method.options) or "none"
                raise ValueError(f"{name} has no option {option!r}: its options are {known}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{option} is {value:g}: it must be finite")
    learning = options.options.get("aggregate", {})
    if learning.get("epochs", 0) < 0:
        raise ValueError(f"epochs is {learning['epochs']}: it cannot be negative")
    if not learning.get("lr", 1) > 0:
        raise ValueError(f"lr is {learning['lr']:g}: it must be positive")
    if options.batch_size < 1:
        raise ValueError(f"batch_size is {options.batch_size}: it must be at least 1")
    if options.width is not None and not 0 < options.width < 1000:
        raise ValueError(f"width is {options.width:g}: it must be positive, and below 1000")
    DATASETS[options.data]
    if ":" in options.model:
        if options.width is not None:
            raise ValueError(
                f"width is {options.width:g}: it is for {', '.join(MODELS)}; a factory sets its own"
            )
    elif options.model not in MODELS:
        raise ValueError(
            f"unknown model {options.model!r}: choose one of {', '.join(MODELS)}, or give package.module:factory"
        )
    for path in map(Path, checkpoints):
        if not path.is_file():
            raise ValueError(f"no file {path}: give a checkpoint, .safetensors, .pt or .pth")
    _check_output(Path(output), [Path(path) for path in checkpoints], force)


def merge_checkpoints(
    checkpoints: Sequence[Path | str],
    output: Path | str,
    options: MergeOptions,
    *,
    device: torch.device | str = "cpu",
    force: bool = False,
    progress: bool = False,
) -> dict[str, Score]:
    """Merge the models of checkpoint files and write the result; nothing is written if anything fails.

    The alignment and the correction see the training images as they are, learning sees them shuffled and augmented,
    the scores are those of the test images. The models are scored as they come.

    Args:
        checkpoints: two or more, of one architecture; the first is model A, which the others are aligned to.
        output: the merged model's safetensors file; for NP Merge, alpha goes beside it, see :func:`alpha_path`.
        options: how to merge.
        device: where to run.
        force: replace the output, and alpha beside it, if they exist.
        progress: show a progress bar.

    Returns:
        The test scores of ``"A"``, ``"B"``, ..., their ``"ensemble"``, for two the uniform ``"mean"`` after the
        alignment, and ``"merged"``.

    Raises:
        ValueError: a file that is missing, damaged or does not fit; an unknown name; an output that exists.
        OSError: the output cannot be written.
        DataError: the image set is absent or damaged.
        TrainingError: the loss is not finite.

    Source:
        Section III-A.
    """
    import torch

    from npmerge.data import load
    from npmerge.evaluate import Ensemble, score
    from npmerge.merging import merge
    from npmerge.store.checkpoints import load_into

    files, output = [Path(path) for path in checkpoints], Path(output)
    check_request(files, output, options, force=force)
    data = load(options.data, image_size=options.image_size)
    models = [
        load_into(_model(options, data), file).to(device).to(memory_format=torch.channels_last)
        for file in files
    ]
    plain = data.plain_batches("train", options.batch_size, device=device)
    test = data.plain_batches("test", options.batch_size, device=device)
    merged = merge(
        models, plain,
        align=options.align, aggregate=options.aggregate, correct=options.correct,
        many=options.many, seed=options.seed, progress=progress,
        learn_on=lambda seed: data.train_batches(options.batch_size, device=device, seed=seed),
        align_options=options.options.get("align"),
        aggregate_options=options.options.get("aggregate"),
        correct_options=options.options.get("correct"),
        many_options=options.options.get("many"),
    )  # fmt: skip
    scored = {chr(ord("A") + place): model for place, model in enumerate(models)}
    scored["ensemble"] = Ensemble(models)
    if len(models) == 2 and options.many is None and merged.alignment is not None:
        uniform = merge(
            models, plain, align=merged.alignment, aggregate="mean", correct=options.correct
        )
        scored["mean"] = uniform.model
    scored["merged"] = merged.model
    scores = {name: score(model, test) for name, model in scored.items()}
    how: dict[str, object] = {
        "npmerge": __version__,
        "checkpoints": [{"file": path.name, "sha256": _sha256(path)} for path in files],
        "options": asdict(options),
        "test": {name: {"top1": s.top1, "loss": s.loss} for name, s in scores.items()},
    }
    _write(output, merged.model, merged.alpha, how)
    return scores


def alpha_path(output: Path) -> Path:
    """Where alpha is written: beside the merged model, e.g. ``merged.alpha.safetensors``."""
    return output.with_suffix(".alpha.safetensors")


def _check_output(output: Path, inputs: Sequence[Path], force: bool) -> None:
    if output.suffix != ".safetensors":
        raise ValueError(f"output is {output}: give a name that ends in .safetensors")
    for path in (output, alpha_path(output)):
        if path.resolve() in [given.resolve() for given in inputs]:
            raise ValueError(f"output {path} is one of the checkpoints: give another name")
        if path.is_dir() or (path.exists() and not force):
            raise ValueError(
                f"output {path} exists already: give another name, or --force to replace a file"
            )
    probe(output)


def _model(options: MergeOptions, data: ImageData) -> nn.Module:
    """The model that the checkpoints are for, tried on one image."""
    import torch

    from npmerge.models import build

    if ":" in options.model:
        model = _from_factory(options.model, data.classes)
    else:
        model = build(
            options.model,
            data.classes,
            width=1 if options.width is None else options.width,
            in_channels=data.channels,
            image_size=data.image_size,
            seed=options.seed,
        )
    example = data.example()
    wanted = f"model {options.model!r} must map {tuple(example.shape)} images of {data.name} to (1, {data.classes})"
    try:
        with torch.no_grad():
            logits = model.eval()(example)
    except RuntimeError as error:
        raise ValueError(f"{wanted}: {str(error).splitlines()[0]}") from error
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, data.classes):
        raise ValueError(f"{wanted}, not {tuple(getattr(logits, 'shape', ()))}: change the factory")
    return model


def _from_factory(name: str, classes: int) -> nn.Module:
    from torch import nn

    module, _, attribute = name.partition(":")
    advice = "give package.module:factory, called as factory(classes)"
    try:
        model = getattr(importlib.import_module(module), attribute)(classes)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"model factory {name!r} does not work ({str(error).splitlines()[0]}): {advice}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model factory {name!r} gave a {type(model).__name__}, not a module: {advice}"
        )
    return model


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(
    output: Path, model: nn.Module, alpha: Mapping[str, Tensor] | None, how: dict[str, object]
) -> None:
    """The model's file is put in place last, so that it never stands beside another merge's alpha."""
    from npmerge.store.checkpoints import save_state

    beside = alpha_path(output)

    def write_both(part: Path) -> None:
        save_state(part, model.state_dict(), {"merge": how})
        if alpha is None:
            beside.unlink(missing_ok=True)
        else:
            write_atomically(beside, lambda file: save_state(file, alpha, {"merge": how}))

    write_atomically(output, write_both)
