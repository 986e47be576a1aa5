"""Agg by regression: each layer answers, as nearly as one can, as the two models' layers do to their inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from npmerge.aggregate.averaging import mean
from npmerge.data.streams import Batch, Data, outputs_of, size_of, stream
from npmerge.device import measuring
from npmerge.methods import method

RIDGE = 1e-6
"""Added to a Gram matrix's diagonal, as a share of its mean: inputs that never vary leave the mean of the weights."""


@method(
    kind="aggregate",
    label="RegMean",
    family="regression",
    needs=("data",),
    reference="jin2023",
    place=55,
    use="Where there are unlabelled inputs and no time to learn: one pass, and a solve for each layer.",
)
@torch.no_grad()
def regmean(
    a: nn.Module, b: nn.Module, data: Data, *, shrink: float = 0.9, examples: int = 4096
) -> nn.Module:
    """Solve each layer's least squares, ``(G_A + G_B) W = G_A W_A + G_B W_B`` with the Gram matrices of its inputs.

    Linear layers, and convolutions whose channels form one group, as linear layers of patches; a bias counts as the
    weight of an input that is always one. All other parameters are averaged, as are weights that layers share. A Gram
    matrix is as wide as a layer's inputs are many, 4,608 for 512 channels and patches of 3x3.

    Args:
        a: model A.
        b: model B, of the same architecture and aligned to A.
        data: what both are given; no labels. (The authors give each its own data.)
        shrink: multiplies the Gram matrices' other entries than those of the diagonal; 0.9 is the authors', 1 is plain
            least squares.
        examples: how many, at most; the first ones of a pass.

    Returns:
        The merged model.

    Raises:
        ValueError: the models differ in architecture or shape, ``examples`` is not positive, or the data is empty.

    Source:
        Jin et al. 2023, Eq. 3 and Section 3.3, for linear layers; convolutions are ours.
    """
    merged = mean(a, b)
    grams = [_grams(model, data, examples) for model in (a, b)]
    for name, first in grams[0].items():
        both = [_shrunk(gram, shrink) for gram in (first, grams[1][name])]
        layers = [model.get_submodule(name) for model in (a, b)]
        weights = [matrix_of(layer).to(gram) for gram, layer in zip(both, layers, strict=True)]
        products = [gram @ weight for gram, weight in zip(both, weights, strict=True)]
        set_matrix(merged.get_submodule(name), torch.linalg.solve(sum(both), sum(products)))
    return merged


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that are linear in their inputs, or in patches of them that are cut out here, by name.

    Linear layers, and convolutions whose channels form one group, unless they share their weights with another.

    Args:
        model: any.
    """
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return {
        name: layer
        for name, layer in model.named_modules()
        if _is_linear(layer) and uses[id(layer.weight)] == 1
    }


def running_once(model: nn.Module, layers: Mapping[str, nn.Module], data: Data) -> list[str]:
    """Those of a model's layers that run once in a pass, in the order in which they run.

    Args:
        model: runs on the first batch.
        layers: by name.
        data: any re-iterable of batches.
    """
    runs: Counter[str] = Counter()
    with measuring(model) as device, ExitStack() as stack:
        for name, layer in layers.items():
            handle = layer.register_forward_hook(lambda *_, name=name: runs.update([name]))
            stack.callback(handle.remove)
        outputs_of(model, next(stream(data, device)))
    return [name for name, count in runs.items() if count == 1]


def rows_of(layer: Any, inputs: Tensor) -> Tensor:
    """What a layer multiplies its weights with, a row a sample and position; a last column of ones for its bias.

    In float32 at least.

    Args:
        layer: one of :func:`linear_layers`.
        inputs: what it is given.
    """
    rows = inputs
    if not isinstance(layer, nn.Linear):
        padding = 0 if layer.padding == "valid" else layer.padding
        rows = unfold(
            inputs, layer.kernel_size, dilation=layer.dilation, padding=padding, stride=layer.stride
        ).movedim(1, -1)
    rows = rows.flatten(0, -2).to(torch.promote_types(inputs.dtype, torch.float32))
    return rows if layer.bias is None else torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)


def matrix_of(layer: Any) -> Tensor:
    """A layer's weights, inputs by outputs; a last row for its bias.

    Args:
        layer: one of :func:`linear_layers`.
    """
    weights = layer.weight.flatten(1).T
    return weights if layer.bias is None else torch.cat([weights, layer.bias[None]])


def set_matrix(layer: Any, matrix: Tensor) -> None:
    """Write weights and bias into a layer.

    Args:
        layer: one of :func:`linear_layers`; changed in place.
        matrix: as :func:`matrix_of` gives it.
    """
    rows = matrix[: len(matrix) - (layer.bias is not None)]
    layer.weight.copy_(rows.T.reshape(layer.weight.shape))
    if layer.bias is not None:
        layer.bias.copy_(matrix[-1])


class LeastSquares:
    """The least squares of a layer, summed up over batches.

    Smallest is ``|X W - Y|^2 + ridge * mean(diag(X^T X)) * |W - W_0|^2``, where ``W_0`` are the weights that the layer
    has: on these inputs the error does not become larger, and weights that they say nothing about stay.

    Args:
        layer: one of :func:`linear_layers`.
        ridge: how much its weights count.

    Raises:
        ValueError: ``ridge`` is negative.
    """

    def __init__(self, layer: nn.Module, ridge: float) -> None:
        if ridge < 0:
            raise ValueError(f"ridge is {ridge}: it must not be negative")
        self._layer, self._ridge = layer, ridge
        self._pull = torch.zeros_like(matrix_of(layer), dtype=torch.float64)
        self._gram = self._pull.new_zeros(len(self._pull), len(self._pull))

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Add a batch.

        Args:
            inputs: what the layer is given.
            targets: what it is to answer.
        """
        rows = rows_of(self._layer, inputs)
        missing = targets - self._layer(inputs)
        channels = -1 if isinstance(self._layer, nn.Linear) else 1
        self._gram += (rows.T @ rows).double()
        self._pull += (rows.T @ missing.movedim(channels, -1).flatten(0, -2).to(rows)).double()

    def solve(self) -> None:
        """Give the layer the best weights, in place."""
        step = torch.linalg.solve(_shrunk(self._gram, 1, self._ridge), self._pull)
        set_matrix(self._layer, matrix_of(self._layer) + step)


def _grams(model: nn.Module, data: Data, examples: int) -> dict[str, Tensor]:
    """The mean outer product of the inputs of every layer that can be solved, ``float64``, by the layer's name."""
    sums: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = rows_of(layer, inputs[0])
            sums[name] = sums.get(name, 0) + (rows.T @ rows).double()

        return hook

    handles = [
        layer.register_forward_pre_hook(note(name)) for name, layer in linear_layers(model).items()
    ]
    count = 0
    try:
        with measuring(model) as device:
            for batch in first_batches(data, device, examples):
                outputs_of(model, batch)
                count += size_of(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: gram / count for name, gram in sums.items()}


def run_to(model: nn.Module, name: str, batch: Batch) -> tuple[Tensor, Tensor]:
    """Run a model as far as one of its layers.

    Args:
        model: in evaluation mode.
        name: the layer's, which has one input.
        batch: from :func:`~npmerge.data.streams.stream`.

    Returns:
        What the layer is given, and what it answers.
    """
    found: list[Tensor] = []

    def hook(_: nn.Module, given: Any, named: Any, output: Tensor) -> None:
        found.extend([*given, *named.values(), output])
        raise _ReachedError

    handle = model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
    try:
        with suppress(_ReachedError):
            outputs_of(model, batch)
    finally:
        handle.remove()
    return found[0], found[1]


class _ReachedError(Exception):
    """The layer has answered."""


def first_batches(data: Data, device: torch.device | str, examples: int) -> Iterator[Batch]:
    """The first batches of a pass that together have as many examples as are asked for, or all.

    Args:
        data: any re-iterable of batches.
        device: where to move each batch.
        examples: how many.

    Raises:
        ValueError: ``examples`` is not positive, or as :func:`~npmerge.data.streams.stream`.
    """
    if examples < 1:
        raise ValueError(f"examples is {examples}: it must be at least 1")
    count = 0
    for batch in stream(data, device):
        yield batch
        count += size_of(batch)
        if count >= examples:
            return


def _is_linear(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros" and layer.padding != "same"
    return isinstance(layer, nn.Linear)


def _shrunk(gram: Tensor, share: float, ridge: float = RIDGE) -> Tensor:
    diagonal = gram.diagonal()
    return share * gram + torch.diag((1 - share) * diagonal + ridge * diagonal.mean() + 1e-300)
