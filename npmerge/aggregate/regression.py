"""Agg by regression: each layer answers, as nearly as one can, as the two models' layers do to their inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from npmerge.aggregate.averaging import mean
from npmerge.data.streams import Data, outputs_of, size_of, stream
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
    if examples < 1:
        raise ValueError(f"examples is {examples}: it must be at least 1")
    merged = mean(a, b)
    grams = [_grams(model, data, examples) for model in (a, b)]
    for name, first in grams[0].items():
        both = [_shrunk(gram, shrink) for gram in (first, grams[1][name])]
        layers = [model.get_submodule(name) for model in (a, b)]
        solved = torch.linalg.solve(
            sum(both),
            sum(gram @ _matrix(layer).to(gram) for gram, layer in zip(both, layers, strict=True)),
        )
        target: Any = merged.get_submodule(name)
        rows = solved[: len(solved) - (target.bias is not None)]
        target.weight.copy_(rows.T.reshape(target.weight.shape))
        if target.bias is not None:
            target.bias.copy_(solved[-1])
    return merged


def _grams(model: nn.Module, data: Data, examples: int) -> dict[str, Tensor]:
    """The mean outer product of the inputs of every layer that can be solved, ``float64``, by the layer's name."""
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if _is_solved(layer) and uses[id(layer.weight)] == 1
    }
    sums: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = _rows(layer, inputs[0])
            sums[name] = sums.get(name, 0) + (rows.T @ rows).double()

        return hook

    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    count = 0
    try:
        with measuring(model) as device:
            for batch in stream(data, device):
                outputs_of(model, batch)
                count += size_of(batch)
                if count >= examples:
                    break
    finally:
        for handle in handles:
            handle.remove()
    return {name: gram / count for name, gram in sums.items()}


def _is_solved(layer: nn.Module) -> bool:
    """Whether a layer is linear in its inputs, or in patches of them that are cut out here."""
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros" and layer.padding != "same"
    return isinstance(layer, nn.Linear)


def _rows(layer: Any, inputs: Tensor) -> Tensor:
    """What a layer multiplies its weights with, a row a sample and position; a last column of ones for its bias."""
    rows = inputs
    if not isinstance(layer, nn.Linear):
        padding = 0 if layer.padding == "valid" else layer.padding
        rows = unfold(
            inputs, layer.kernel_size, dilation=layer.dilation, padding=padding, stride=layer.stride
        ).movedim(1, -1)
    rows = rows.flatten(0, -2)
    return rows if layer.bias is None else torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)


def _matrix(layer: Any) -> Tensor:
    """A layer's weights, inputs by outputs; a last row for its bias."""
    weights = layer.weight.flatten(1).T
    return weights if layer.bias is None else torch.cat([weights, layer.bias[None]])


def _shrunk(gram: Tensor, share: float) -> Tensor:
    diagonal = gram.diagonal()
    return share * gram + torch.diag((1 - share) * diagonal + RIDGE * diagonal.mean() + 1e-300)
