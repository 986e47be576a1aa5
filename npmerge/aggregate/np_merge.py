"""Agg by NP Merge: one learned interpolation coefficient for every parameter."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from npmerge.aggregate.learn import learn
from npmerge.data.batches import Data
from npmerge.symmetry import check_same_architecture
from npmerge.training import Run


@dataclass(frozen=True)
class NPMerge:
    """What NP Merge learned.

    Attributes:
        model: the merged model; its batch norm statistics are not yet reset.
        alpha: for every parameter, by name, the coefficients of model A: a tensor of its shape with values in (0, 1).
        history: the mean loss of each epoch.
    """

    model: nn.Module
    alpha: dict[str, Tensor]
    history: list[float]


def np_merge(
    a: nn.Module,
    b: nn.Module,
    data: Data,
    *,
    epochs: int = 10,
    lr: float = 1e-2,
    mixed_precision: bool | None = None,
    progress: str | None = None,
) -> NPMerge:
    """Learn ``W = alpha * A + (1 - alpha) * B`` with one alpha in (0, 1) for every parameter.

    ``alpha = sigmoid(alpha_pre)`` starts at 0.5 everywhere and is learned with Adam on the cross-entropy; A and B stay
    as they are. Buffers start as A's; batch statistics are used while learning, so reset batch norm afterwards.

    Args:
        a: model A.
        b: model B, of the same architecture and aligned to A.
        data: the optimisation data, any re-iterable of ``(images, labels)``.
        epochs: passes over the data.
        lr: Adam's learning rate for ``alpha_pre``.
        mixed_precision: bfloat16 autocast; by default where the device gains from it (CUDA).
        progress: label of the progress bar; none by default.

    Returns:
        The merged model with its alpha; ``a`` and ``b`` are not changed.

    Raises:
        ValueError: the models differ in architecture or shape, the data is empty, or a label is out of range.
        TrainingError: the loss is not finite.

    Source:
        Eq. 2 and Section III-D.
    """
    return learn(
        LearnAlpha(a, b, data, lr=lr),
        epochs=epochs,
        mixed_precision=mixed_precision,
        progress=progress,
    )


class LearnAlpha:
    """NP Merge about to be learned, alone or together with others; see :func:`np_merge`.

    Args:
        a: model A.
        b: model B, of the same architecture and aligned to A.
        data: the optimisation data.
        lr: Adam's learning rate for ``alpha_pre``.

    Raises:
        ValueError: the models differ in architecture or shape.
    """

    def __init__(self, a: nn.Module, b: nn.Module, data: Data, *, lr: float = 1e-2) -> None:
        check_same_architecture(a, b)
        self._a = a
        model = copy.deepcopy(a)
        self._optimizer = AlphaAdam(model, b, lr=lr)
        self.run = Run(model, data, self._optimizer)

    def result(self, history: list[float]) -> NPMerge:
        """The merged model and its alpha."""
        merged = copy.deepcopy(self._a)
        with torch.no_grad():
            for tensors in (nn.Module.parameters, nn.Module.buffers):
                for target, learned in zip(tensors(merged), tensors(self.run.model), strict=True):
                    target.copy_(learned)
        return NPMerge(merged, self._optimizer.alpha(), history)


class AlphaAdam:
    """Adam on ``alpha_pre``, through a model whose parameters are kept at ``B + sigmoid(alpha_pre) * (A - B)``.

    The model runs as it is: autograd gives ``dL/dW``, and the chain rule is applied by hand,
    ``dL/d(alpha_pre) = dL/dW * (A - B) * alpha * (1 - alpha)``. A step is therefore a step of ordinary training and a
    few elementwise passes over flat buffers; beyond what Adam on the weights needs, there are three buffers of the
    parameters' size (``alpha_pre``, ``B`` and ``A - B``).

    Args:
        model: starts as model A; its parameters become views of one flat buffer and are set to the mean of A and B.
        b: model B.
        lr: Adam's learning rate.

    Source:
        Eq. 2; Kingma & Ba 2015.
    """

    def __init__(self, model: nn.Module, b: nn.Module, *, lr: float) -> None:
        named = dict(model.named_parameters())
        kinds = {f"{p.dtype} on {p.device}" for p in named.values()}
        if len(kinds) != 1 or not all(p.is_floating_point() for p in named.values()):
            raise ValueError(
                f"NP Merge needs parameters of one floating-point type on one device, got {', '.join(sorted(kinds))}"
            )
        self._parameters = named
        self._weight = _flatten(list(named.values()))
        other = dict(b.named_parameters())
        self._b = _flatten(
            [other[name].to(self._weight.device, self._weight.dtype) for name in named]
        )
        self._delta = self._weight - self._b
        self._grad = torch.zeros_like(self._weight)
        self._pre = nn.Parameter(torch.zeros_like(self._weight))
        self._pre.grad = self._grad
        self._adam = torch.optim.Adam([self._pre], lr=lr, fused=True)
        # Passes over pieces that stay in the cache; a GPU wants few launches instead.
        size = 1 << 18 if self._weight.device.type == "cpu" else 1 << 24
        self._pieces = [slice(i, i + size) for i in range(0, len(self._weight), size)]
        for parameter, weight, grad in zip(
            named.values(), self._views(self._weight), self._views(self._grad), strict=True
        ):
            parameter.data, parameter.grad = weight, grad
            parameter.requires_grad_()
        self._write()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Adam's, for the learning rate."""
        return self._adam.param_groups

    def zero_grad(self) -> None:
        """Set the gradient to zero."""
        self._grad.zero_()

    @torch.no_grad()
    def step(self) -> None:
        """Turn dL/dW into dL/d(alpha_pre), step Adam, and write the new weights into the model."""
        for piece in self._pieces:
            grad = self._grad[piece]
            grad.mul_(self._delta[piece])
            torch.ops.aten.sigmoid_backward.grad_input(
                grad, torch.sigmoid(self._pre[piece]), grad_input=grad
            )
        self._adam.step()
        self._write()

    def alpha(self) -> dict[str, Tensor]:
        """The coefficients of model A, by parameter name, each of the parameter's shape."""
        alpha = torch.sigmoid(self._pre.detach())
        # A sigmoid rounds to 0 or 1 far out: keep the open interval.
        tiny = torch.finfo(alpha.dtype).eps / 2
        views = self._views(alpha.clamp_(tiny, 1 - tiny))
        return {name: view.clone() for name, view in zip(self._parameters, views, strict=True)}

    @torch.no_grad()
    def _write(self) -> None:
        for piece in self._pieces:
            torch.addcmul(
                self._b[piece],
                torch.sigmoid(self._pre[piece]),
                self._delta[piece],
                out=self._weight[piece],
            )

    def _views(self, flat: Tensor) -> list[Tensor]:
        parameters = list(self._parameters.values())
        pieces = torch.split(flat, [p.numel() for p in parameters])
        return [_unflatten(piece, p.shape) for piece, p in zip(pieces, parameters, strict=True)]


def _flatten(parameters: list[Tensor]) -> Tensor:
    """One vector of all parameters; convolution weights with their input channels innermost (channels-last)."""
    return torch.cat(
        [(p.detach().movedim(1, -1) if p.ndim > 2 else p.detach()).reshape(-1) for p in parameters]
    )


def _unflatten(piece: Tensor, shape: torch.Size) -> Tensor:
    if len(shape) <= 2:
        return piece.view(shape)
    return piece.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
