"""Batches of any kind: what is streamed, what is refused, and what a model gets of it."""

from __future__ import annotations

from collections import UserDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import CLASSES, images
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from npmerge.data import Batches, Images
from npmerge.data.streams import (
    as_logits,
    check_labels,
    classified,
    labels_of,
    mapped,
    outputs_of,
    size_of,
    stream,
)

PIXELS = torch.zeros(2, 3, 8, 8)
LABELS = torch.tensor([0, 3])


def make(data: Images, batch_size: int = 5) -> Batches:
    return Batches(data, batch_size, mean=(0.5,) * 3, std=(0.25,) * 3)


def equal(x: Any, y: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(x, y, strict=True))


def test_any_re_iterable_of_batches_streams_alike() -> None:
    """A list, a DataLoader and Batches of the same images give the same tensors."""
    batches = make(images(12))
    listed = list(batches)
    pixels, labels = (torch.cat(part) for part in zip(*listed, strict=True))
    loader = DataLoader(TensorDataset(pixels, labels), batch_size=5)
    for data in (listed, loader, batches):
        found = list(stream(data, "cpu"))
        assert len(found) == 3
        assert all(equal(x, y) for x, y in zip(found, listed, strict=True))


def test_a_one_shot_iterator_is_refused_before_it_is_read() -> None:
    batches = iter(list(make(images(12))))
    with pytest.raises(ValueError, match="one-shot list_iterator: give something that can be"):
        next(stream(batches, "cpu"))
    assert len(list(batches)) == 3


EMPTY = torch.zeros(0, 3, 8, 8)


@pytest.mark.parametrize("data", [[], [(EMPTY, torch.zeros(0).long())], [{"pixels": EMPTY}]])
def test_an_empty_loader_is_refused(data: list[Any]) -> None:
    with pytest.raises(ValueError, match="the data is empty: it yields no image"):
        list(stream(data, "cpu"))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (PIXELS, "must yield .* got Tensor"),
        (7, "must yield .* got int"),
        ("no batch", "must yield .* got str"),
        ((PIXELS,), "must yield .* got tuple of Tensor"),
        ((PIXELS, [0, 1]), "must yield .* got tuple of Tensor, list"),
        ({}, "must yield .* got dict"),
        ({"pixels": PIXELS, "names": ["a", "b"]}, "must yield .* got dict of Tensor, list"),
        ((PIXELS, torch.zeros(3)), r"one row an example: got \(2, 3, 8, 8\), \(3,\)"),
        ({"a": PIXELS, "labels": torch.zeros(3)}, r"one row an example: got .* \(3,\)"),
        ((torch.tensor(1.0), torch.tensor(2)), r"one row an example: got \(\), \(\)"),
    ],
)
def test_a_malformed_batch_is_refused(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(stream([batch], "cpu"))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(2), r"one integer per image, or 4 prob.*: got torch.float32 \(2,\)"),
        (torch.zeros(2, CLASSES).long(), r"one integer per image.*: got torch.int64 \(2, 4\)"),
        (torch.ones(2, 3) / 3, r"or 4 probabilities: got torch.float32 \(2, 3\)"),
        (torch.zeros(2, CLASSES), r"or 4 probabilities: got torch.float32 \(2, 4\)"),
    ],
)
def test_labels_that_are_no_classes_are_refused_where_classes_are_needed(
    labels: Tensor, message: str
) -> None:
    assert len(list(stream([(PIXELS, labels)], "cpu"))) == 1  # a loss of one's own may take them
    with pytest.raises(ValueError, match=message):
        check_labels([], labels, CLASSES)


@pytest.mark.parametrize(("labels", "wrong"), [([0, 4], 4), ([-1, 3], -1)])
def test_a_label_that_is_no_class_is_named(labels: list[int], wrong: int) -> None:
    tensor = torch.tensor(labels)
    message = f"label {wrong} is out of range: the model has 4 outputs, so labels go from 0 to 3"
    with pytest.raises(ValueError, match=message):
        check_labels([(PIXELS, tensor)], tensor, 4)
    with pytest.raises(ValueError, match=message):
        check_labels(make(Images(PIXELS.byte(), tensor)), LABELS, 4)
    check_labels([], LABELS, 4)


def test_images_come_with_their_channels_innermost_and_whole_labels_as_int64() -> None:
    batch = (torch.rand(2, 3, 8, 8), torch.rand(2, 5), LABELS.byte())
    ((pixels, vectors, labels),) = stream([batch], "cpu")
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(pixels, batch[0])
    assert torch.equal(vectors, batch[1])
    assert (labels.dtype, labels.tolist()) == (torch.int64, [0, 3])
    ((_, targets),) = stream([(PIXELS, torch.rand(2))], "cpu")
    assert targets.dtype == torch.float32


def test_a_dictionary_of_any_class_streams_as_a_dictionary() -> None:
    given = UserDict({"pixels": PIXELS, "label": LABELS.byte(), "shift": torch.ones(2)})
    (batch,) = stream([given], "cpu")
    assert isinstance(batch, dict)
    assert list(batch) == ["pixels", "label", "shift"]
    assert torch.equal(labels_of(batch), LABELS)
    assert size_of(batch) == 2
    assert {k: tuple(v.shape) for k, v in mapped(batch, lambda t: t[:1]).items()} == {
        "pixels": (1, 3, 8, 8), "label": (1,), "shift": (1,),
    }  # fmt: skip


def test_a_model_gets_all_but_the_labels_and_its_logits_are_found() -> None:
    def model(x: Tensor, y: Tensor) -> Tensor:
        return x - y

    x, y = torch.full((2, 4), 5.0), torch.ones(2, 4)
    for batch in ((x, y, LABELS), {"labels": LABELS, "y": y, "x": x}, {"y": y, "x": x}):
        assert torch.equal(outputs_of(model, batch), x - y)
    for wrap in (lambda z: {"logits": z, "loss": 0}, lambda z: SimpleNamespace(logits=z)):
        assert torch.equal(outputs_of(lambda z, wrap=wrap: wrap(z), (x, LABELS)), x)
        assert torch.equal(as_logits(wrap(x)), x)
    assert outputs_of(lambda z: {"hidden": z}, (x, LABELS)) == {"hidden": x}


def test_a_dictionary_without_labels_is_an_error_only_where_they_are_needed() -> None:
    (batch,) = stream([{"pixels": PIXELS, "mask": PIXELS}], "cpu")
    with pytest.raises(ValueError, match="a batch has no 'labels', only 'pixels', 'mask'"):
        labels_of(batch)


@pytest.mark.parametrize(
    ("outputs", "found"),
    [(torch.zeros(2), r"\(2,\)"), ((PIXELS,), "tuple"), ({}, "dict")],
)
def test_outputs_that_are_no_logits_are_named(outputs: Any, found: str) -> None:
    with pytest.raises(ValueError, match=rf"the model gives {found} where logits \(N, classes\)"):
        as_logits(outputs)
    assert as_logits(torch.zeros(1, 2).half()).dtype == torch.float32
    assert as_logits(torch.zeros(1, 2).double()).dtype == torch.float64


def test_where_each_position_has_a_label_those_that_count_are_classified() -> None:
    logits, labels = torch.randn(2, 3, CLASSES), torch.tensor([[0, 1, -100], [3, -100, 2]])
    found = classified(logits, (PIXELS, labels), [])
    assert torch.equal(
        found[0], torch.stack([logits[0, 0], logits[0, 1], logits[1, 0], logits[1, 2]])
    )
    assert found[1].tolist() == [0, 1, 3, 2]
    with pytest.raises(ValueError, match=r"gives \(2, 3, 4\) where logits .* for labels \(2,\)"):
        classified(logits, (PIXELS, LABELS), [])
    with pytest.raises(ValueError, match="label 4 is out of range"):
        classified(logits, (PIXELS, labels.clamp(min=4)), [])


def test_labels_may_be_probabilities() -> None:
    probabilities = torch.rand(2, CLASSES).softmax(1)
    assert classified(torch.zeros(2, CLASSES), (PIXELS, probabilities), [])[1] is probabilities


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_inputs_come_in_the_precision_of_the_model_and_whole_numbers_stay(
    dtype: torch.dtype,
) -> None:
    class Picks(nn.Linear):
        def forward(self, x: Tensor, rows: Tensor) -> Tensor:  # type: ignore[override]
            assert rows.dtype == torch.int64
            return super().forward(x)[rows]

    model = Picks(4, 2).to(dtype)
    x, rows = torch.randn(2, 4), torch.tensor([1, 0])
    for batch in ((x, rows, LABELS), {"x": x, "rows": rows, "labels": LABELS}):
        assert outputs_of(model, batch).dtype == dtype
