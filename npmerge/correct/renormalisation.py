"""REPAIR: channels whose variance collapsed in the average get back the mean and the spread that the parents' have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torch.nn.modules.conv import _ConvNd

from npmerge.correct.batchnorm import batchnorms, re_estimate
from npmerge.data.streams import Data
from npmerge.methods import method

EPSILON = 1e-5
"""Added to variances, as batch norm does."""


@method(
    kind="correct",
    label="REPAIR",
    family="correction",
    needs=("data",),
    reference="jordan2023",
)
@torch.no_grad()
def repair(
    model: nn.Module, data: Data, *, parents: Sequence[nn.Module] = (), alpha: float = 0.5
) -> nn.Module:
    """Rescale and shift every channel before its activation, and re-estimate batch norm, in place.

    Its mean is to be ``alpha mu_A + (1 - alpha) mu_B``, that of the parents' own channels, and its standard deviation
    alike. All layers are measured in one pass, each behind those that are repaired already; what they need is folded
    into weight and bias. Convolutions and linear layers count that have a bias: without one a norm follows, and batch
    norm is reset. The last one, which gives the logits, stays.

    Args:
        model: the merged model; changed in place.
        data: any re-iterable of batches of training data, augmented like those that the models learned from; the
            labels are not used.
        parents: A, and B aligned to A.
        alpha: the share of A.

    Returns:
        The same model.

    Raises:
        ValueError: there are not two parents, or the data is empty.

    Source:
        Jordan et al. 2023, Section 3, and its code for VGG11.
    """
    if len(parents) != 2:
        raise ValueError(f"REPAIR needs the two models that were merged, got {len(parents)}")
    (mean_a, var_a), (mean_b, var_b) = (_statistics(parent, data) for parent in parents)
    norms = {
        name: _Norm(
            torch.lerp(mean_b[name], mean, alpha),
            torch.lerp(_deviation(var_b[name]), _deviation(var_a[name]), alpha),
        )
        for name, mean in mean_a.items()
    }
    with _hooked(model, norms):
        re_estimate(model, batchnorms(model), data)
    for name, norm in norms.items():
        norm.fold_into(model.get_submodule(name))
    return model


class _Norm:
    """A batch norm behind a layer, whose running statistics are the plain average over the batches.

    Args:
        mean: what a channel's is to become.
        deviation: its standard deviation, likewise.
    """

    def __init__(self, mean: Tensor, deviation: Tensor) -> None:
        self._goals = deviation, mean
        self._mean, self._var = torch.zeros_like(mean), torch.zeros_like(mean)
        self._batches = 0

    def __call__(self, layer: nn.Module, _: Any, output: Tensor) -> Tensor:
        self._batches += 1
        channels = output.movedim(_axis(layer), 1)
        normed = batch_norm(
            channels, self._mean, self._var, *self._goals, training=True,
            momentum=1 / self._batches, eps=EPSILON,
        )  # fmt: skip
        return normed.movedim(1, _axis(layer))

    def fold_into(self, layer: Any) -> None:
        """Let the layer do what the norm does."""
        deviation, mean = self._goals
        scale = deviation / _deviation(self._var)
        outputs = layer.weight.movedim(1 if getattr(layer, "transposed", False) else 0, -1)
        outputs.mul_(scale)
        layer.bias.sub_(self._mean).mul_(scale).add_(mean)


def _statistics(model: nn.Module, data: Data) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The mean and the variance of every channel that can be repaired, by the layer's name, in the order they run."""
    sums: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(layer: nn.Module, _: Any, output: Tensor) -> None:
            rows = output.movedim(_axis(layer), -1).flatten(0, -2).double()
            found = torch.stack(
                [torch.full_like(rows[0], len(rows)), rows.sum(0), (rows**2).sum(0)]
            )
            sums[name] = sums[name] + found if name in sums else found

        return hook

    layers = {name: layer for name, layer in model.named_modules() if _foldable(layer)}
    with _hooked(model, {name: note(name) for name in layers}):
        re_estimate(model, (), data)
    *inner, _ = sums  # the last one gives the logits
    means, variances = {}, {}
    for name in inner:
        count, total, squares = sums[name]
        mean = total / count
        kind = layers[name].weight.dtype
        means[name] = mean.to(kind)
        variances[name] = (squares / count - mean**2).clamp(min=0).to(kind)
    return means, variances


@contextmanager
def _hooked(model: nn.Module, hooks: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    handles = [
        model.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _foldable(layer: nn.Module) -> bool:
    """Whether a norm behind a layer can be folded into it; transposed convolutions hide their outputs in groups."""
    if isinstance(layer, _ConvNd) and layer.transposed and layer.groups > 1:
        return False
    return isinstance(layer, (nn.Linear, _ConvNd)) and layer.bias is not None


def _axis(layer: nn.Module) -> int:
    """Of a layer's outputs, where the channels lie."""
    return -1 if isinstance(layer, nn.Linear) else 1


def _deviation(variance: Tensor) -> Tensor:
    return (variance + EPSILON).sqrt()
