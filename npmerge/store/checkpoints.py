"""State dicts in files: read whole or not at all, held against the model or the description they are for."""

from __future__ import annotations

import json
import logging
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from npmerge.store.files import (
    DamagedError,
    canonical,
    locked,
    probe,
    sha256,
    write_atomically,
)

log = logging.getLogger(__name__)

State = Mapping[str, Tensor]
"""Tensors by name."""

INSIDE = ("state_dict", "model_state_dict", "model", "net")
"""Where training programs put a state dict beside other things, such as Lightning: the first of these is read."""

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The types of parameters."""

WRAPPED = re.compile(r"(?:(?:module|model|net)\.)+")
"""What wrappers put before the names of parameters: data parallelism and Lightning modules."""

COMPILED = "_orig_mod."
"""What ``torch.compile`` puts into the names, before them or in their middle."""


def load_state(path: Path | str) -> dict[str, Tensor]:
    """Read a state dict: safetensors, or a file of ``torch.save``, without running code from it.

    Args:
        path: the file; what it is, its content tells.

    Returns:
        Tensors by name, on the CPU. A state dict that lies beside other things, as in Lightning's ``.ckpt``, is taken
        out, and the log says so.

    Raises:
        ValueError: there is no such file, it is truncated or damaged (of PyTorch's files too, the checksums are
            looked at), or it holds something else than dense tensors of real numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no file {path}: give a checkpoint, .safetensors, .pt, .pth or .ckpt")
    try:
        if _is_safetensors(path):
            if _is_signed(path) and _signature(path) != _sign(path):
                raise ValueError("its bytes are not those that were written")
            return load_file(path)
        if zipfile.is_zipfile(path):  # torch.load does not look at the checksums
            with zipfile.ZipFile(path) as file:
                if part := file.testzip():
                    raise ValueError(f"the checksum of {part!r} is wrong")
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch.load raises for damaged bytes is not bounded
        raise ValueError(
            f"{path} is damaged or not a checkpoint ({_reason(error)}): copy it again, or save "
            "model.state_dict() alone"
        ) from error
    if isinstance(state, Mapping) and not _is_state(state):
        for name in INSIDE:
            if _is_state(state.get(name)):
                log.info("%s: its %r is read, and nothing else of it", path, name)
                return _dense(state[name], path)
    if not _is_state(state):
        raise ValueError(f"{path} holds no plain state dict: save model.state_dict() alone")
    return _dense(state, path)


def load_into(model: nn.Module, path: Path | str) -> nn.Module:
    """Load a checkpoint into a model, in place.

    Names are those of the model: what wrappers have put before them (:data:`WRAPPED`, :data:`COMPILED`) is taken away
    where the rest fits the model better, and the log says so.

    Args:
        model: of the checkpoint's architecture.
        path: see :func:`load_state`.

    Returns:
        The same model in evaluation mode, in the checkpoint's types.

    Raises:
        ValueError: the checkpoint cannot be read, does not fit (the first difference is named), or holds values that
            are not finite.
    """
    state = _without_wrappers(load_state(path), model.state_dict(), path)
    difference = _first_difference(model.state_dict(), state)
    if difference:
        raise ValueError(
            f"{path} does not fit the model: {difference}; check the model's name, width, classes and image size"
        )
    broken = not_finite(state)
    if broken:
        raise ValueError(f"{path} holds values in {broken!r} that are not finite: train it again")
    model.load_state_dict(state, strict=False)  # what an old batch norm has not counted is missing
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in state:
            tensor.data = tensor.data.to(state[name].dtype)
    return model.eval()


def _is_safetensors(path: Path) -> bool:
    """By its ending or its first bytes: the length of a header, and the header."""
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _is_state(found: object) -> bool:
    return (
        isinstance(found, Mapping)
        and bool(found)
        and all(isinstance(name, str) for name in found)
        and all(isinstance(value, Tensor) for value in found.values())
    )


def _dense(state: State, path: Path) -> dict[str, Tensor]:
    for name, value in state.items():
        odd = value.layout != torch.strided or value.is_nested or value.is_quantized
        if odd or value.is_meta or value.is_complex():
            raise ValueError(
                f"{path} holds in {name!r} a tensor that is sparse, nested, quantised, complex or without values: "
                "save plain tensors of numbers"
            )
    return dict(state)


def _without_wrappers(state: State, model: State, path: Path | str) -> dict[str, Tensor]:
    """The tensors under the names that fit the model best."""
    plain = {name.replace(COMPILED, ""): value for name, value in state.items()}
    prefixes = {""}
    for name in plain:
        if found := WRAPPED.match(name):
            parts = found[0].split(".")
            prefixes |= {".".join(parts[:end]) + "." for end in range(1, len(parts))}
    best = max(
        sorted(prefixes, key=len), key=lambda prefix: sum(prefix + name in plain for name in model)
    )
    found_names = {name: value for name, value in plain.items() if name.startswith(best)}
    if best or plain.keys() != state.keys():
        taken = " and ".join(
            [repr(COMPILED)] * (plain.keys() != state.keys()) + [repr(best)] * bool(best)
        )
        rest = len(plain) - len(found_names)
        log.info(
            "%s: %s is taken from its names%s", path, taken,
            f", and {rest} tensors that lie elsewhere are left out" if rest else "",
        )  # fmt: skip
    return {name.removeprefix(best): value for name, value in found_names.items()}


def not_finite(state: State) -> str | None:
    """The first tensor, by name, with a value that is not finite; ``None`` if there is none.

    Args:
        state: tensors by name.
    """
    return next((name for name, value in state.items() if not value.isfinite().all()), None)


def save_state(path: Path | str, state: State, metadata: Mapping[str, object]) -> None:
    """Write tensors to a safetensors file, contiguous and each on its own.

    Args:
        path: the file; see :func:`npmerge.store.files.write_atomically` to write it in one piece.
        state: tensors by name.
        metadata: how they were made; every value is stored as JSON.

    Raises:
        OSError: the file cannot be written.
    """
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
    }
    texts = {key: json.dumps(value, sort_keys=True) for key, value in metadata.items()}
    try:
        save_file(tensors, path, metadata=texts)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


# A checked file is a safetensors file whose first words are these, with the SHA-256 of the file, zeros standing for it.
_ZEROS = "0" * 64
_START = rb'{"__metadata__":{"npmerge":"{\"file\": \"'
_PLACE = 8 + len(_START)  # behind the header's length


def write_checked(path: Path, state: State, about: Mapping[str, Any]) -> None:
    """Write tensors so that no change of a byte is overlooked by :func:`read_checked`, in one piece.

    Args:
        path: the file.
        state: tensors by name.
        about: how they were made, JSON-serialisable; ``"made_of"`` is what they are a function of.

    Raises:
        ArithmeticError: a value is not finite; nothing is written.
        OSError: the file cannot be written.
    """
    broken = not_finite(state)
    if broken:
        raise ArithmeticError(
            f"{path.name} is not written: it holds values in {broken!r} that are not finite"
        )
    write_atomically(path, partial(_write_signed, state=state, about=about))


def read_checked(
    path: Path, made_of: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write_checked` has written.

    Args:
        path: the file.
        made_of: what its tensors are to be a function of.

    Returns:
        Tensors by name, on the CPU, and all that the file says about them; under ``"digest"`` what stands for the
        tensors and what they are made of, whatever else is said.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedError: a byte of it was changed, it is of something else, or a value is not finite.
    """
    try:
        if _signature(path) != _sign(path):
            raise DamagedError(f"{path} is damaged (its bytes are not those that were written)")
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["npmerge"])["says"]
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found = about.get("made_of")
    except (SafetensorError, LookupError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path} is damaged ({_reason(error)})") from error
    except IsADirectoryError as error:
        raise OSError(f"{path} is a folder where a file belongs: remove it") from error
    if found != json.loads(json.dumps(made_of)):
        raise DamagedError(f"{path} is damaged (it is the file of something else)")
    broken = not_finite(state)
    if broken:
        raise DamagedError(f"{path} is damaged (it holds values in {broken!r} that are not finite)")
    return state, about


def kept(
    path: Path,
    made_of: Mapping[str, Any],
    make: Callable[[], tuple[State, Mapping[str, Any]]],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a file holds, which is made first if it is missing or damaged, by one process while the others wait.

    It is always read back, so that whoever makes it and whoever finds it work with the same bytes. Finding it writes
    nothing, not even a lock.

    Args:
        path: the file.
        made_of: what its tensors are a function of.
        make: gives the tensors, and what else to say about them.

    Returns:
        As :func:`read_checked`.

    Raises:
        ArithmeticError: a value that was made is not finite.
        OSError: the file cannot be written; said before it is made.
    """
    try:
        return read_checked(path, made_of)
    except (FileNotFoundError, NotADirectoryError, DamagedError):
        probe(path)
    with locked(path):
        try:
            return read_checked(path, made_of)
        except FileNotFoundError:
            pass
        except DamagedError as error:
            log.warning("%s: making it again", error)
        state, about = make()
        write_checked(path, state, {**about, "made_of": made_of})
        return read_checked(path, made_of)


def _write_signed(path: Path, *, state: State, about: Mapping[str, Any]) -> None:
    says = {**about, "digest": sha256(_content(state, about["made_of"]))}
    save_state(path, state, {"npmerge": {"file": _ZEROS, "says": says}})
    signature = _sign(path)
    with path.open("r+b") as file:
        file.seek(_PLACE)
        file.write(signature.encode())


def _content(state: State, made_of: Mapping[str, Any]) -> Iterator[bytes | memoryview]:
    yield canonical(made_of)
    for name, value in sorted(state.items()):
        yield f"{name} {value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _is_signed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(_PLACE)[8:] == _START


def _signature(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(_PLACE)
        return file.read(len(_ZEROS)).decode("ascii", errors="replace")


def _sign(path: Path) -> str:
    """Of the whole file, zeros standing where it is written."""

    def parts() -> Iterator[bytes]:
        with path.open("rb") as file:
            yield file.read(_PLACE)
            yield _ZEROS.encode()
            file.seek(len(_ZEROS), 1)
            while part := file.read(2**20):
                yield part

    return sha256(parts())


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        return "it is not a pickle of tensors alone"
    return str(error).strip().split("\n")[0] or type(error).__name__


def _first_difference(model: State, state: State) -> str | None:
    for name, value in model.items():
        if name not in state and name.endswith("num_batches_tracked"):
            continue  # PyTorch before 0.4 did not count
        if name not in state:
            return f"the model has {name!r} and the checkpoint has not"
        if state[name].shape != value.shape:
            wanted, given = tuple(value.shape), tuple(state[name].shape)
            return f"{name!r} is {wanted} in the model and {given} in the checkpoint"
        kind = state[name].dtype
        if value.is_floating_point() != (kind in FLOATING):
            return f"{name!r} is {value.dtype} in the model and {kind} in the checkpoint"
    for name in state:
        if name not in model:
            return f"the checkpoint has {name!r} and the model has not"
    return None
