"""Networks that are not npmerge's: torchvision's, timm's, a function's, and folders of Hugging Face."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from npmerge.named import attribute, first_line, takes, user_code

LIBRARIES = ("torchvision", "timm")
"""Whose networks are known by name, as in ``timm:resnet18``."""

CLASSES = ("num_classes", "classes")
"""What a factory may call the number of its outputs."""


def build_outside(name: str, classes: int | None) -> nn.Module:
    """Build a network without its trained weights; nothing is downloaded.

    Args:
        name: ``torchvision:NAME``, ``timm:NAME``, or ``package.module:factory``. A factory gets the classes as
            ``num_classes`` or ``classes`` where it takes one of these, else as the one argument that it cannot do
            without, else not at all.
        classes: how many outputs; ``None`` if that is not known.

    Raises:
        ValueError: it cannot be built, or classes are needed and not known.
    """
    library, _, inner = name.partition(":")
    advice = "give torchvision:NAME, timm:NAME, or package.module:factory"
    with user_code(f"model factory {name!r}", advice):
        if library == "torchvision":
            from torchvision.models import get_model

            model: Any = get_model(inner, weights=None, num_classes=_needed(classes))
        elif library == "timm":
            import timm

            model = timm.create_model(inner, pretrained=False, num_classes=_needed(classes))
        else:
            model = _made(attribute(name, "model factory"), classes)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model factory {name!r} gave a {type(model).__name__}, not a module: {advice}"
        )
    return model


def _made(factory: Any, classes: int | None) -> Any:
    known, anything, required = takes(factory)
    for keyword in CLASSES:
        if keyword in known:
            return factory(**{keyword: _needed(classes)})
    if len(required) == 1:
        return factory(_needed(classes))
    return factory(num_classes=_needed(classes)) if anything and not required else factory()


def _needed(classes: int | None) -> int:
    if classes is None:
        raise ValueError("the number of classes is not known, give --classes")
    return classes


def is_folder(path: Path | str) -> bool:
    """Whether a path is a model folder of Hugging Face: it holds a ``config.json``."""
    return (Path(path) / "config.json").is_file()


def load_folder(path: Path | str) -> nn.Module:
    """Load a folder that ``save_pretrained`` has written; nothing is downloaded, and no code of it is run.

    Args:
        path: the folder. Its ``config.json`` names the class of the model.

    Returns:
        The model in evaluation mode, in the types it was saved in.

    Raises:
        ValueError: it is damaged, lacks weights, or transformers does not know its class.
    """
    import transformers

    path = Path(path)
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        (name, *_) = config.architectures or [""]
        with _silent():
            model, found = getattr(transformers, name).from_pretrained(
                path, local_files_only=True, dtype="auto", output_loading_info=True
            )
    except Exception as error:  # transformers raises what the libraries below it raise
        reason = first_line(error) or type(error).__name__
        raise ValueError(f"{path} cannot be loaded by transformers ({reason})") from error
    for problem in ("missing_keys", "mismatched_keys"):
        for key in sorted(map(str, found[problem])):
            raise ValueError(f"{path} does not fit a {name}: {problem.replace('_', ' ')}: {key}")
    loaded: nn.Module = model
    return loaded.eval()


def save_folder(model: nn.Module, like: Path | str, path: Path | str) -> None:
    """Write a model as a folder that ``from_pretrained`` loads.

    Args:
        model: of a class of transformers.
        like: a folder of that model, whose tokenizer and preprocessor files are copied.
        path: the folder to write.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(path)
    with _silent():
        model.save_pretrained(path)  # type: ignore[operator]
    weights = (".safetensors", ".bin", ".h5", ".msgpack", ".index.json")
    for file in Path(like).iterdir():
        if not file.is_file() or file.name.startswith(".") or file.name.endswith(weights):
            continue
        if file.name != "README.md" and not (path / file.name).exists():
            shutil.copyfile(file, path / file.name)


def image_processing(path: Path | str) -> dict[str, Any]:
    """What a folder's image processor does to images: ``image_size``, ``mean`` and ``std``, as far as it says.

    Args:
        path: the folder.
    """
    file = Path(path) / "preprocessor_config.json"
    words = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    size = words.get("crop_size") or words.get("size") or {}
    side = size if isinstance(size, int) else size.get("height") or size.get("shortest_edge")
    found = {"image_size": side}
    if words.get("do_normalize", True):
        found |= {"mean": words.get("image_mean"), "std": words.get("image_std")}
    return {key: value for key, value in found.items() if value}


@contextmanager
def _silent() -> Iterator[None]:
    """Without the progress bars of transformers, which has one switch for all."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
