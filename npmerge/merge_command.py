"""Merge two checkpoint files into a third: what ``npmerge merge`` does."""

from __future__ import annotations

import copy
import hashlib
import importlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import npmerge
from npmerge import align as alignments
from npmerge.aggregate import finetune, mean, np_merge
from npmerge.batchnorm import reset_batchnorm
from npmerge.checkpoints import load_into, save_state
from npmerge.data import ImageSet, load, plain_batches, train_batches
from npmerge.evaluate import Ensemble, Score, score
from npmerge.merge import AGGREGATE
from npmerge.models import MODELS, build
from npmerge.zoo import write_atomically


@dataclass(frozen=True)
class MergeOptions:
    """How two checkpoints are merged.

    Attributes:
        model: ``"vgg11"``, ``"resnet20"``, or ``"package.module:factory"``, called as ``factory(classes)``.
        data: name of the image set.
        width: of a named model, 1 by default; a factory has its own.
        image_size: average-pool the images to this height and width in pixels; as they are by default.
        align: how B is aligned, a key of ``npmerge.align.METHODS``.
        aggregate: ``"np"``, ``"mean"`` or ``"finetune"``.
        epochs: passes over the training images, for ``"np"`` and ``"finetune"``.
        lr: Adam's learning rate for them.
        batch_size: images a step.
        seed: of the order and the augmentation, and of weight matching.
    """

    model: str
    data: str
    width: float | None = None
    image_size: int | None = None
    align: str = "permute"
    aggregate: str = "np"
    epochs: int = 10
    lr: float = 1e-2
    batch_size: int = 500
    seed: int = 0


def merge_checkpoints(
    a: Path | str,
    b: Path | str,
    output: Path | str,
    options: MergeOptions,
    *,
    device: torch.device | str = "cpu",
    force: bool = False,
    progress: bool = False,
) -> dict[str, Score]:
    """Merge the models of two checkpoint files and write the result; nothing is written if anything fails.

    The alignment and the batch norm reset see the training images as they are, alpha (or fine-tuning) sees them
    shuffled and augmented, the scores are those of the test images. A and B are scored as they come.

    Args:
        a: checkpoint of model A, kept as it is.
        b: checkpoint of model B, of the same architecture; aligned to A.
        output: the merged model's safetensors file; for NP Merge, alpha goes beside it, see :func:`alpha_path`.
        options: how to merge.
        device: where to run.
        force: replace the output, and alpha beside it, if they exist.
        progress: show a progress bar.

    Returns:
        The test scores of ``"A"``, ``"B"``, their ``"ensemble"``, the uniform ``"mean"`` after the alignment, and
        ``"merged"``.

    Raises:
        ValueError: a file that is missing, damaged or does not fit; an unknown name; an output that exists.
        DataError: the image set is absent or damaged.
        TrainingError: the loss is not finite.

    Source:
        Section III-A.
    """
    a, b, output = Path(a), Path(b), Path(output)
    _check_names(options)
    _check_output(output, (a, b), force)
    data = load(options.data, image_size=options.image_size)
    blank = _model(options, data)
    first, second = (
        load_into(copy.deepcopy(blank), file).to(device).to(memory_format=torch.channels_last)
        for file in (a, b)
    )
    plain = plain_batches(data, "train", options.batch_size, device=device)
    test = plain_batches(data, "test", options.batch_size, device=device)
    seeded = {"seed": options.seed} if options.align == "weight_matching" else {}
    aligned = alignments.METHODS[options.align](first, second, plain, **seeded).apply(second)
    uniform = reset_batchnorm(mean(first, aligned), plain)
    merged, alpha = uniform, None
    if options.aggregate != "mean":
        merged, alpha = _learn(first, aligned, data, options, device, progress)
        reset_batchnorm(merged, plain)
    models = {
        "A": first,
        "B": second,
        "ensemble": Ensemble([first, second]),
        "mean": uniform,
        "merged": merged,
    }
    scores = {name: score(model, test) for name, model in models.items()}
    how: dict[str, object] = {
        "npmerge": npmerge.__version__,
        **{
            name: {"file": path.name, "sha256": _sha256(path)}
            for name, path in (("a", a), ("b", b))
        },
        "options": asdict(options),
        "test": {name: {"top1": s.top1, "loss": s.loss} for name, s in scores.items()},
    }
    _write(output, merged, alpha, how)
    return scores


def alpha_path(output: Path) -> Path:
    """Where alpha is written: beside the merged model, e.g. ``merged.alpha.safetensors``."""
    return output.with_suffix(".alpha.safetensors")


def _learn(
    a: nn.Module,
    b: nn.Module,
    data: ImageSet,
    options: MergeOptions,
    device: torch.device | str,
    progress: bool,
) -> tuple[nn.Module, Mapping[str, Tensor] | None]:
    batches = train_batches(data, options.batch_size, device=device, seed=options.seed)
    if options.aggregate == "finetune":
        bar = "fine-tuning" if progress else None
        tuned = finetune(a, b, batches, epochs=options.epochs, lr=options.lr, progress=bar)
        return tuned.model, None
    bar = "NP Merge" if progress else None
    learned = np_merge(a, b, batches, epochs=options.epochs, lr=options.lr, progress=bar)
    return learned.model, learned.alpha


def _check_names(options: MergeOptions) -> None:
    for kind, name, known in (
        ("alignment", options.align, alignments.METHODS),
        ("aggregation", options.aggregate, AGGREGATE),
    ):
        if name not in known:
            raise ValueError(f"unknown {kind} {name!r}: choose one of {', '.join(known)}")
    if options.epochs < 0:
        raise ValueError(f"epochs is {options.epochs}: it cannot be negative")
    if not 0 < options.lr < float("inf"):
        raise ValueError(f"lr is {options.lr:g}: it must be positive")


def _check_output(output: Path, inputs: tuple[Path, ...], force: bool) -> None:
    if output.suffix != ".safetensors":
        raise ValueError(f"output is {output}: give a name that ends in .safetensors")
    for path in (output, alpha_path(output)):
        if path.resolve() in [given.resolve() for given in inputs]:
            raise ValueError(f"output {path} is one of the two checkpoints: give another name")
        if path.is_dir() or (path.exists() and not force):
            raise ValueError(
                f"output {path} exists already: give another name, or --force to replace a file"
            )


def _model(options: MergeOptions, data: ImageSet) -> nn.Module:
    """The model that the checkpoints are for, tried on one image."""
    if ":" in options.model:
        if options.width is not None:
            raise ValueError(
                f"width is {options.width:g}: it is for {', '.join(MODELS)}; a factory sets its own"
            )
        model = _from_factory(options.model, data.classes)
    elif options.model in MODELS:
        model = build(
            options.model,
            data.classes,
            width=1 if options.width is None else options.width,
            in_channels=data.channels,
            image_size=data.image_size,
            seed=options.seed,
        )
    else:
        raise ValueError(
            f"unknown model {options.model!r}: choose one of {', '.join(MODELS)}, or give package.module:factory"
        )
    example = data.example()
    wanted = f"model {options.model!r} must map {tuple(example.shape)} images of {data.name} to (1, {data.classes})"
    try:
        with torch.no_grad():
            logits = model.eval()(example)
    except RuntimeError as error:
        raise ValueError(f"{wanted}: {str(error).splitlines()[0]}") from error
    if not isinstance(logits, Tensor) or logits.shape != (1, data.classes):
        raise ValueError(f"{wanted}, not {tuple(getattr(logits, 'shape', ()))}: change the factory")
    return model


def _from_factory(name: str, classes: int) -> nn.Module:
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
    beside = alpha_path(output)

    def write_both(part: Path) -> None:
        save_state(part, model.state_dict(), {"merge": how})
        if alpha is None:
            beside.unlink(missing_ok=True)
        else:
            write_atomically(beside, lambda file: save_state(file, alpha, {"merge": how}))

    write_atomically(output, write_both)
