"""REPAIR: channels whose variance collapsed in the average get back the mean and the spread that the parents' have."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torch.nn.modules.conv import _ConvNd

from npmerge.correct.batchnorm import batchnorms, re_estimate, reset_batchnorm
from npmerge.data.streams import Data, outputs_of, stream
from npmerge.device import measuring
from npmerge.methods import method

EPSILON = 1e-5
"""Added to variances, as batch norm does."""


@method(
    kind="correct",
    label="REPAIR",
    family="correction",
    needs=("data",),
    reference="jordan2023",
    use="After an average of models without batch norm, whose variance has collapsed.",
)
@torch.no_grad()
def repair(
    model: nn.Module,
    data: Data,
    *,
    parents: Sequence[nn.Module] = (),
    alpha: float = 0.5,
    closed_form: bool = False,
) -> nn.Module:
    """Rescale and shift every channel before its activation, and re-estimate batch norm, in place.

    Its mean is to be ``alpha mu_A + (1 - alpha) mu_B``, that of the parents' own channels, and its standard deviation
    alike. All layers are measured in one pass, each behind those that are repaired already; what they need is folded
    into weight and bias. Convolutions and linear layers count that have a bias: without one a norm follows, and batch
    norm is reset. The last one, which gives the logits, stays.

    In closed form the merged model is not measured: its channels are taken for averages of the parents', of the mean
    that they are to have and the variance ``(alpha s_A)^2 + ((1 - alpha) s_B)^2 + 2 alpha (1 - alpha) s_A s_B r``, with
    the standard deviations s and the correlation r of matched channels, before the activation. That is so in the first
    layer, and in others as far as their inputs are such averages. Batch norm, where there is any, is still reset by a
    pass.

    Args:
        model: the merged model; changed in place.
        data: any re-iterable of batches of training data, augmented like those that the models learned from; the
            labels are not used.
        parents: A, and B aligned to A.
        alpha: the share of A.
        closed_form: work out what the merged model's channels have, rather than measure it.

    Returns:
        The same model.

    Raises:
        ValueError: there are not two parents, or the data is empty.

    Source:
        Jordan et al. 2023, Section 3, and its code for VGG11; for the closed form this takes the correlation behind the
        activation.
    """
    if len(parents) != 2:
        raise ValueError(f"REPAIR needs the two models that were merged, got {len(parents)}")
    a, b = parents
    norms = {}
    for name, (mean_a, mean_b, var_a, var_b, shared) in _statistics(a, b, data).items():
        expected = alpha**2 * var_a + (1 - alpha) ** 2 * var_b + 2 * alpha * (1 - alpha) * shared
        norms[name] = _Norm(
            torch.lerp(mean_b, mean_a, alpha),
            torch.lerp(_deviation(var_b), _deviation(var_a), alpha),
            expected.clamp(min=0),
        )
    if not closed_form:
        with _hooked(model, norms):
            re_estimate(model, batchnorms(model), data)
    for name, norm in norms.items():
        norm.fold_into(model.get_submodule(name))
    return reset_batchnorm(model, data) if closed_form else model


class _Norm:
    """A batch norm behind a layer, whose running statistics are the plain average over the batches.

    Args:
        mean: what a channel's is to become, and is taken to be before the first batch.
        deviation: its standard deviation is to become.
        variance: it is taken to have before the first batch.
    """

    def __init__(self, mean: Tensor, deviation: Tensor, variance: Tensor) -> None:
        self._goals = deviation, mean
        self._mean, self._var = mean.clone(), variance
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


def _statistics(a: nn.Module, b: nn.Module, data: Data) -> dict[str, Tensor]:
    """Of every channel that can be repaired both means, both variances and the covariance, ``(5, channels)``.

    Those of batches are averaged, as batch norm does with the merged model's. By the layer's name, in the order they
    run; the last one, which gives the logits, is left out.
    """
    held: dict[str, list[Tensor]] = defaultdict(list)
    found: dict[str, list[Tensor]] = defaultdict(list)

    def hold(name: str, layer: nn.Module, _: Any, output: Tensor) -> None:
        held[name].append(_rows(layer, output).clone())  # the activation may be in place

    def note(name: str, layer: nn.Module, _: Any, output: Tensor) -> None:
        x, y = held[name].pop(0).double(), _rows(layer, output).double()
        means = x.mean(0), y.mean(0)
        x, y = x - means[0], y - means[1]
        products = [(p * q).sum(0) / max(len(x) - 1, 1) for p, q in ((x, x), (y, y), (x, y))]
        found[name].append(torch.stack([*means, *products]))

    layers = {name: layer for name, layer in a.named_modules() if _foldable(layer)}
    holding, noting = ({name: partial(hook, name) for name in layers} for hook in (hold, note))
    with _hooked(a, holding), _hooked(b, noting), measuring(b), measuring(a) as device:
        for batch in stream(data, device):
            outputs_of(a, batch)
            outputs_of(b, batch)
    return {
        name: torch.stack(found[name]).mean(0).to(layers[name].weight.dtype)
        for name in list(found)[:-1]
    }


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


def _rows(layer: nn.Module, output: Tensor) -> Tensor:
    """A layer's outputs, a row a sample and position."""
    return output.movedim(_axis(layer), -1).flatten(0, -2)


def _axis(layer: nn.Module) -> int:
    """Of a layer's outputs, where the channels lie."""
    return -1 if isinstance(layer, nn.Linear) else 1


def _deviation(variance: Tensor) -> Tensor:
    return (variance + EPSILON).sqrt()
