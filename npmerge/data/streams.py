"""Batches of any kind, tuples or dictionaries of tensors: checked, moved to a device and given to a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from npmerge.device import channels_last
from npmerge.named import user_code

Batch = tuple[Tensor, ...] | Mapping[str, Tensor]
"""``(inputs..., labels)``, or a dictionary of keyword inputs and ``"labels"``; each tensor has a row an example."""

Data = Iterable[Batch]
"""Any re-iterable of batches; a ``DataLoader`` is one."""

LABELS = ("labels", "label")
"""What a dictionary may call its labels."""

IGNORED = -100
"""The label of a position that does not count, such as padding; as PyTorch and Hugging Face have it."""


def stream(data: Data, device: torch.device | str) -> Iterator[Batch]:
    """The batches of ``data`` on ``device``, checked on the way.

    Args:
        data: any re-iterable of batches.
        device: where to move each batch.

    Yields:
        Tuples or dictionaries of tensors on ``device``: images with their channels innermost in memory, labels that are
        integers as ``int64``.

    Raises:
        ValueError: ``data`` is empty, a one-shot iterator, or yields something else than batches, or inputs that are
            not finite; it fails by itself.
    """
    once = isinstance(data, Iterator)
    if once or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise ValueError(
            f"data is a {'one-shot ' * once}{type(data).__name__}: give something that can be iterated again, "
            "such as a DataLoader or a list"
        )
    empty = True
    for batch in _drawn(data):
        _check(batch)
        if not size_of(batch):
            continue
        if not hasattr(data, "label_range"):  # npmerge's own batches are made of bytes
            _check_values(batch)
        empty = False
        moved = mapped(batch, lambda t: channels_last(t.to(device, non_blocking=True)))
        if isinstance(moved, Mapping):
            yield {k: _whole(v) if k in LABELS else v for k, v in moved.items()}
        else:
            yield (*moved[:-1], _whole(moved[-1]))
    if empty:
        raise ValueError(
            "the data is empty: it yields no image; check the loader or the index set it was made from"
        )


def _drawn(data: Data) -> Iterator[Batch]:
    with user_code(f"data ({type(data).__name__})"):
        yield from data


def first_examples(data: Data, count: int, device: torch.device | str) -> Iterator[Batch]:
    """The first so many examples of a pass, in their batches.

    Args:
        data: any re-iterable of batches.
        count: how many, at most.
        device: where to move each batch.

    Raises:
        ValueError: as :func:`stream`.
    """
    for batch in stream(data, device):
        yield mapped(batch, itemgetter(slice(count)))
        count -= size_of(batch)
        if count <= 0:
            return


def outputs_of(model: Callable[..., Any], batch: Batch) -> Any:
    """What a model answers to a batch.

    Args:
        model: called with a tuple's inputs, or with a dictionary's entries but the labels as keywords; inputs that are
            floating-point numbers in the precision of its parameters.
        batch: from :func:`stream`.

    Returns:
        The logits where the output is an object or a dictionary that has ``logits``, else the output itself.

    Raises:
        UserCodeError: the model fails.
    """
    positional, named = inputs_of(batch, model if isinstance(model, nn.Module) else None)
    given = ", ".join(f"{t.dtype} {tuple(t.shape)}" for t in (*positional, *named.values()))
    advice = f"it was given {given}; give what it takes, images as floating-point numbers"
    with user_code(f"model {type(model).__name__}", advice):
        return _unwrapped(model(*positional, **named))


def as_logits(outputs: Any) -> Tensor:
    """A model's outputs as the logits of classes, in float32, or float64 if they are.

    Args:
        outputs: logits, or an object or a dictionary that has ``logits``.

    Returns:
        ``(N, classes)``, or ``(N, ..., classes)`` of models that classify each position.

    Raises:
        ValueError: they are something else.
    """
    logits = _unwrapped(outputs)
    if not isinstance(logits, Tensor) or logits.ndim < 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"the model gives {found} where logits (N, classes) are needed: give a loss of your own, "
            "or a model that gives logits"
        )
    return logits if logits.dtype == torch.float64 else logits.float()


def classified(outputs: Any, batch: Batch, data: Data) -> tuple[Tensor, Tensor]:
    """A model's logits and the labels that they are held against.

    Args:
        outputs: from :func:`outputs_of`.
        batch: from :func:`stream`.
        data: where it comes from.

    Returns:
        Logits ``(M, classes)``, and labels, ``int64 (M,)`` or probabilities, ``(M, classes)``. Where every
        position has a label, M counts those of all examples whose label is not :data:`IGNORED`.

    Raises:
        ValueError: they are no logits, the labels do not fit them, or one is out of range.
    """
    logits, labels = as_logits(outputs), labels_of(batch)
    if logits.ndim > 2 and labels.shape == logits.shape[:-1]:
        counts = labels != IGNORED
        logits, labels = logits[counts], labels[counts]
    if logits.ndim != 2:
        raise ValueError(
            f"the model gives {tuple(logits.shape)} where logits (N, classes) are needed for labels "
            f"{tuple(labels.shape)}: give a loss of your own"
        )
    check_labels(data, labels, logits.shape[1])
    return logits, labels


def labels_of(batch: Batch) -> Tensor:
    """A batch's labels: the last of a tuple, or a dictionary's ``"labels"``.

    Args:
        batch: from :func:`stream`.

    Raises:
        ValueError: a dictionary without labels.
    """
    if not isinstance(batch, Mapping):
        return batch[-1]
    for name in LABELS:
        if name in batch:
            return batch[name]
    raise ValueError(f"a batch has no 'labels', only {', '.join(map(repr, batch))}")


def inputs_of(
    batch: Batch, model: nn.Module | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with for a batch.

    Args:
        batch: from :func:`stream`.
        model: inputs that are floating-point numbers get the precision of its parameters; by default they stay as they
            are.

    Returns:
        A tuple's inputs, and a dictionary's entries but the labels as keywords.
    """
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    dtype = next((p.dtype for p in parameters if p.is_floating_point()), None)

    def cast(tensor: Tensor) -> Tensor:
        return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)

    if isinstance(batch, Mapping):
        return (), {k: cast(v) for k, v in batch.items() if k not in LABELS}
    return tuple(map(cast, batch[:-1])), {}


def example_of(data: Data) -> Any:
    """The inputs of the first batch on the CPU: a tensor, a tuple of several, or a dictionary of keywords.

    Args:
        data: any re-iterable of batches.

    Raises:
        ValueError: as :func:`stream`.
    """
    positional, named = inputs_of(next(stream(data, "cpu")))
    return named or (positional[0] if len(positional) == 1 else positional)


def size_of(batch: Batch) -> int:
    """How many examples a batch has.

    Args:
        batch: from :func:`stream`.
    """
    return len(next(iter(batch.values() if isinstance(batch, Mapping) else batch)))


def mapped(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """A batch of the same kind with each of its tensors changed.

    Args:
        batch: stays as it is.
        change: called with each tensor.
    """
    if isinstance(batch, Mapping):
        return {name: change(value) for name, value in batch.items()}
    return tuple(map(change, batch))


def check_labels(data: Data, labels: Tensor, classes: int) -> None:
    """Raise if labels are not classes of the model, one for each example, or the probabilities of each.

    Args:
        data: where the batch comes from. Data that knows the lowest and the highest of its labels (``label_range``,
            as :class:`~npmerge.data.batches.Batches` does) is taken at its word, so that no step waits for the device.
        labels: the batch's labels, ``(N,)``, or probabilities, ``(N, classes)``.
        classes: how many outputs the model has.

    Raises:
        ValueError: the labels are neither, or one is below 0 or not below ``classes``.
    """
    if labels.ndim != 1 or labels.is_floating_point():
        if labels.shape[1:] == (classes,) and _are_probabilities(labels):
            return
        raise ValueError(
            f"labels must be one integer per image, or {classes} probabilities: "
            f"got {labels.dtype} {tuple(labels.shape)}"
        )
    if not len(labels):
        return
    known = getattr(data, "label_range", None)
    low, high = known if known is not None else (int(v) for v in torch.aminmax(labels))
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        raise ValueError(
            f"label {wrong} is out of range: the model has {classes} outputs, so labels go from 0 to {classes - 1}"
        )


def _are_probabilities(labels: Tensor) -> bool:
    return labels.is_floating_point() and bool(
        (labels >= 0).all() and ((labels.sum(dim=1) - 1).abs() < 1e-2).all()
    )


def _check(batch: Any) -> None:
    kind, parts = type(batch).__name__, []
    if isinstance(batch, Mapping):
        parts, enough = list(batch.values()), 1
    elif isinstance(batch, tuple | list):
        parts, enough = list(batch), 2
    if not parts or len(parts) < enough or not all(isinstance(part, Tensor) for part in parts):
        inside = ", ".join(type(part).__name__ for part in parts)
        raise ValueError(
            "data must yield (inputs, labels) tuples or dictionaries of tensors, "
            f"got {kind}{f' of {inside}' if inside else ''}"
        )
    if any(part.layout != torch.strided or part.is_meta for part in parts):
        raise ValueError("a batch holds a tensor that is sparse or without values: give dense ones")
    if not parts[0].ndim or len({part.shape[:1] for part in parts}) > 1:
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        raise ValueError(f"the tensors of a batch must have one row an example: got {shapes}")


def _check_values(batch: Batch) -> None:
    """Raise at inputs that are not finite; in a dictionary they may be infinite, as masks are."""
    positional, named = inputs_of(batch)
    suspects = [  # a sum costs a tenth of a look at every value
        tensor
        for tensor in (*positional, *named.values())
        if tensor.is_floating_point() and not tensor.sum().isfinite()
    ]
    if any(t.isnan().any() if named else not t.isfinite().all() for t in suspects):
        raise ValueError(
            "the inputs of a batch hold values that are not finite: check the data, and how it is normalised"
        )


def _unwrapped(outputs: Any) -> Any:
    if isinstance(outputs, Mapping):
        return outputs.get("logits", outputs)
    return getattr(outputs, "logits", outputs)


def _whole(labels: Tensor) -> Tensor:
    return labels if labels.is_floating_point() else labels.to(torch.int64)
