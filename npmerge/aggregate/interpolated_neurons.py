"""Agg by interpolated neurons: layers answer to the merged network's own activations as the models do to theirs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from npmerge.aggregate.regression import (
    LeastSquares,
    first_batches,
    linear_layers,
    run_to,
    running_once,
)
from npmerge.aggregate.summing import Sum
from npmerge.correct.batchnorm import batchnorms, re_estimate
from npmerge.data.streams import Data, stream
from npmerge.device import measuring
from npmerge.methods import method


@method(
    kind="aggregate",
    label="Neuron Interpolation",
    family="regression",
    needs=("data",),
    reference="luenam2025",
    place=57,
    use="As RegMean, in deep networks, where the errors of earlier layers must be made good.",
)
@torch.no_grad()
def neuron_interpolation(
    models: Sequence[nn.Module], data: Data, *, ridge: float = 1e-3, examples: int = 4096
) -> nn.Module:
    """Solve each layer's least squares, front to back: ``W = argmin |X W - (Y_1 + ... + Y_k) / k|^2``.

    X are the merged network's own activations, behind the layers that are solved already, so that errors of earlier
    layers are made up for; Y_i are model i's before its activation function. All neurons count alike: the authors also
    weigh them by their importance. Linear layers, and convolutions whose channels form one group, as linear layers of
    patches. All other parameters are averaged, as are those of layers that share weights or run more than once. The
    statistics of a batch norm are estimated again before the next layer is solved. Each layer takes a pass of all
    models as far as it, and each batch norm before it one of the merged network.

    Args:
        models: any number, at least two, of one architecture; aligned to the first. None is changed.
        data: what all are given; no labels.
        ridge: keeps the weights near their mean, as a share of the mean of the inputs' squares; the authors have none.
        examples: how many are learned from: the first batches of a pass that have so many, or all. They are held in
            memory.

    Returns:
        The merged model.

    Raises:
        ValueError: the models differ in architecture or shape, ``ridge`` is negative, ``examples`` is not positive, or
            the data is empty.

    Source:
        Luenam et al. 2025, the closed form for linear layers. Behind an alignment by assignment, such as Permute, it is
        their Hungarian Fusion with neurons of equal importance. Convolutions and the statistics of batch norm are ours.
    """
    total = Sum(models[0])
    for model in models[1:]:
        total.add(model)
    merged = total.mean()
    few = list(first_batches(data, "cpu", examples))
    passed: list[_BatchNorm] = []
    with ExitStack() as stack:
        devices = [stack.enter_context(measuring(model)) for model in (merged, *models)]
        norms: dict[str, nn.Module] = {
            name: layer for name, layer in merged.named_modules() if layer in batchnorms(merged)
        }
        for name in running_once(merged, linear_layers(merged) | norms, few):
            layer = merged.get_submodule(name)
            if isinstance(layer, _BatchNorm):
                passed.append(layer)
                continue
            if passed:
                re_estimate(merged, passed, few)
                passed = []
            squares = LeastSquares(layer, ridge)
            for own, *theirs in zip(*(stream(few, device) for device in devices), strict=True):
                inputs, _ = run_to(merged, name, own)
                answers = [
                    run_to(model, name, batch)[1].to(inputs.device)
                    for model, batch in zip(models, theirs, strict=True)
                ]
                squares.add(inputs, torch.stack(answers).mean(0))
            squares.solve()
        if passed:
            re_estimate(merged, passed, few)
    return merged
