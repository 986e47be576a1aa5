"""A training that was cut off goes on from its last saved epoch, to the same bits."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from npmerge.device import device_of, kernels_label, random_states, set_random_states

log = logging.getLogger(__name__)


class Resume:
    """The file that holds how far a training is.

    It holds the states of model, optimiser, PyTorch's random generators and the data (its ``epoch``), and says which
    training it is of: what it began with and where it runs.

    Args:
        path: of the file; need not exist.
        every: seconds to pass between two times it is written; a training that has lasted longer is written at its end.
        model, optimizer, data: as the training begins with them.
        conditions: what else the result depends on, JSON-serialisable.
    """

    def __init__(
        self,
        path: Path,
        every: float,
        model: nn.Module,
        optimizer: Any,
        data: Any,
        conditions: Mapping[str, Any],
    ) -> None:
        self._path, self._every = Path(path), every
        self._part = self._path.with_name(f".{self._path.name}.part")
        self._begun = self._written = time.monotonic()
        self._model, self._optimizer, self._data = model, optimizer, data
        self._device = device_of(model)
        began_with = {
            "model": _digest(model),
            "optimizer": [
                type(optimizer).__name__,
                *({k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups),
            ],
            "data": [getattr(data, name, None) for name in ("seed", "epoch")],
            "kernels": kernels_label(self._device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }  # fmt: skip
        text = json.dumps({**began_with, **conditions}, sort_keys=True, default=str)
        self._training = hashlib.sha256(text.encode()).hexdigest()

    def history(self) -> list[float]:
        """Go to where the file says the training was.

        Returns:
            The mean losses of the epochs that are done; empty where there is no such file, or with a warning where it
            is damaged or of another training.
        """
        if self._part.exists():  # of a training that was killed while it wrote
            self._part.unlink()
        if not self._path.exists():
            return []
        try:
            digest, content = _split(self._path.read_bytes())
            if hashlib.sha256(content).digest() != digest:
                raise ValueError("it is damaged")
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            if state["training"] != self._training:
                raise ValueError("it is of another training")
        except Exception as error:  # noqa: BLE001 - what torch.load raises is not bounded
            reason = (str(error) or type(error).__name__).splitlines()[0]
            log.warning("%s: %s, so the training begins anew", self._path, reason)
            return []
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        if state["epoch"] is not None:
            self._data.epoch = state["epoch"]
        set_random_states(state["random"], self._device)
        return list(state["history"])

    def save(self, history: Sequence[float], *, finished: bool = False) -> None:
        """Write the file if it is time.

        Args:
            history: the mean losses of the epochs that are done.
            finished: whether these are all.

        Raises:
            OSError: it cannot be written.
        """
        if time.monotonic() - (self._begun if finished else self._written) < self._every:
            return
        content = io.BytesIO()
        state = {
            "training": self._training,
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "epoch": getattr(self._data, "epoch", None),
            "random": random_states(self._device),
            "history": list(history),
        }
        torch.save(state, content)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(content.getbuffer()).digest()
        try:
            self._part.write_bytes(digest + content.getbuffer())
            self._part.replace(self._path)
        finally:
            self._part.unlink(missing_ok=True)
        self._written = time.monotonic()


def _split(raw: bytes) -> tuple[bytes, memoryview]:
    size = hashlib.sha256().digest_size
    return raw[:size], memoryview(raw)[size:]


def _digest(model: nn.Module) -> str:
    """A digest of a model's tensors, names and shapes included."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
