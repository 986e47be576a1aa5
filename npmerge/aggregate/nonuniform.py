"""Agg by NP Merge: one learned interpolation coefficient for every parameter."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from npmerge.aggregate.aggregated import Aggregated, learnable, taken_over
from npmerge.data.streams import Data
from npmerge.methods import method
from npmerge.symmetry import check_same_architecture
from npmerge.training import Learning

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
"""What is noted of alpha's spread: the coefficient that so large a share of the parameters stays below."""


@method(
    kind="aggregate",
    label="NP Merge",
    row="NP-{align}",
    family="np",
    needs=("data", "labels"),
    reference="npmerge2024",
    place=40,
    use="Where labelled data is at hand, and the merged weights are to stay between those of the two models.",
)
def np_merge(
    a: nn.Module,
    b: nn.Module,
    data: Data,
    *,
    epochs: int = 10,
    lr: float = 1e-2,
    learning: Learning | None = None,
) -> Aggregated:
    """Learn ``W = alpha * A + (1 - alpha) * B`` with one alpha in (0, 1) for every parameter.

    ``alpha = sigmoid(alpha_pre)`` starts at 0.5 everywhere and is learned with Adam; A and B stay as they are. It stays
    0.5 for parameters that A freezes (``requires_grad``). Buffers start as A's; batch statistics are used while
    learning, so reset batch norm afterwards.

    Args:
        a: model A.
        b: model B, of the same architecture and aligned to A.
        data: the optimisation data, any re-iterable of batches.
        epochs: passes over the data.
        lr: Adam's learning rate for ``alpha_pre``.
        learning: how; see :class:`~npmerge.training.Learning`.

    Returns:
        The merged model; in ``details["alpha"]`` the coefficients of model A, for every parameter by name; and in
        ``details["spread"]`` their :data:`QUANTILES` after each epoch. ``a`` and ``b`` are not changed.

    Raises:
        ValueError: the models differ in architecture or shape, every parameter is frozen, the data is empty, or a label
            is out of range.
        TrainingError: the loss is not finite.

    Source:
        Eq. 2 and Section III-D.
    """
    model, optimizer = learning_alpha(a, b, lr=lr)
    learning = learning or Learning()
    told = learning.on_epoch
    spread: list[list[float]] = []

    def noted(epoch: int, value: float) -> None:
        optimizer.note_spread()
        spread[:] = optimizer.spread
        if told is not None:
            told(epoch, value)

    noting = replace(learning, on_epoch=noted)
    history = noting.fit(model, data, optimizer, epochs=epochs)
    # Where learning was put back to its best epoch, the optimiser has forgotten the later ones.
    details = {"alpha": optimizer.alpha(), "spread": max(optimizer.spread, spread, key=len)}
    return Aggregated(taken_over(a, model), history, details)


def learning_alpha(a: nn.Module, b: nn.Module, *, lr: float) -> tuple[nn.Module, AlphaAdam]:
    """NP Merge about to begin: the mean of two models, and the optimiser of its coefficients.

    Args:
        a: model A.
        b: model B, aligned to A.
        lr: Adam's learning rate for ``alpha_pre``.
    """
    check_same_architecture(a, b)
    model = copy.deepcopy(a)
    return model, AlphaAdam(model, b, lr=lr)


class AlphaAdam:
    """Adam on ``alpha_pre``, through a model whose parameters are kept at ``B + sigmoid(alpha_pre) * (A - B)``.

    The model runs as it is: autograd gives ``dL/dW``, and the chain rule is applied by hand,
    ``dL/d(alpha_pre) = dL/dW * (A - B) * alpha * (1 - alpha)``. A step is therefore a step of ordinary training in
    which chain rule, Adam and the new weights are computed piece by piece of flat buffers, while the piece is in the
    cache; beyond what Adam on the weights needs, there are three buffers of the parameters' size (``alpha_pre``, ``B``
    and ``A - B``).

    Args:
        model: starts as model A; its parameters, but for the frozen ones, and their gradients become views of flat
            buffers, and all parameters are set to the mean of A and B. Forget the gradient by :meth:`zero_grad`, not by
            the model's.
        b: model B.
        lr: Adam's learning rate.

    Attributes:
        param_groups: the learning rate, which may be changed between steps, and Adam's other options.
        spread: the :data:`QUANTILES` of alpha over all parameters, whenever they were noted.

    Raises:
        ValueError: the parameters are of several types, on several devices, not floating-point numbers, or all frozen.

    Source:
        Eq. 2; Kingma & Ba 2015.
    """

    def __init__(self, model: nn.Module, b: nn.Module, *, lr: float) -> None:
        named = learnable(model)
        kinds = {f"{p.dtype} on {p.device}" for p in named.values()}
        if len(kinds) != 1 or not all(p.is_floating_point() for p in named.values()):
            raise ValueError(
                f"NP Merge needs parameters of one floating-point type on one device, got {', '.join(sorted(kinds))}"
            )
        self.param_groups: list[dict[str, Any]] = [{"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8}]
        self.spread: list[list[float]] = []
        self._parameters = named
        other = dict(b.named_parameters())
        self._frozen = {
            name: parameter
            for name, parameter in model.named_parameters()
            if name not in named and parameter.is_floating_point()
        }
        with torch.no_grad():
            for name, parameter in self._frozen.items():
                parameter.copy_(0.5 * parameter + 0.5 * other[name].to(parameter.device))
        weight = _flatten(list(named.values()))
        start = _flatten([other[name].to(weight.device, weight.dtype) for name in named])
        self._grad = torch.zeros_like(weight)
        self._zeroed = -1  # the version of the gradient that is known to be zero
        self._state = {
            "step": torch.zeros((), device=weight.device),
            "alpha_pre": torch.zeros_like(weight),
            "exp_avg": torch.zeros_like(weight),
            "exp_avg_sq": torch.zeros_like(weight),
        }
        _, *adam = self._state.values()
        # A GPU wants few launches instead of the cache.
        length = 1 << 18 if weight.device.type == "cpu" else 1 << 24
        buffers = (weight, start, weight - start, self._grad, *adam)
        self._pieces = list(zip(*(torch.split(buffer, length) for buffer in buffers), strict=True))
        for parameter, value, grad in zip(
            named.values(), self._views(weight), self._views(self._grad), strict=True
        ):
            parameter.data, parameter.grad = value, grad
        self._write()

    def zero_grad(self) -> None:
        """Set the gradient to zero, unless nothing was added to it since the last step has done so."""
        if self._grad._version != self._zeroed:
            self._grad.zero_()
            self._zeroed = self._grad._version

    @torch.no_grad()
    def step(self) -> None:
        """Turn dL/dW into dL/d(alpha_pre), step Adam, and write the new weights into the model.

        The gradient is used up: it is zero afterwards.
        """
        (group,) = self.param_groups
        beta1, beta2 = group["betas"]
        step = self._state["step"].add_(1)
        for weight, b, delta, grad, pre, exp_avg, exp_avg_sq in self._pieces:
            grad.mul_(delta)
            torch.ops.aten.sigmoid_backward.grad_input(grad, torch.sigmoid(pre), grad_input=grad)
            torch._fused_adam_(
                [pre], [grad], [exp_avg], [exp_avg_sq], [], [step], lr=group["lr"], beta1=beta1,
                beta2=beta2, eps=group["eps"], weight_decay=0.0, amsgrad=False, maximize=False,
            )  # fmt: skip
            torch.addcmul(b, torch.sigmoid(pre), delta, out=weight)
            grad.zero_()
        self._zeroed = self._grad._version

    def alpha(self) -> dict[str, Tensor]:
        """The coefficients of model A, by parameter name, each of the parameter's shape; 0.5 for frozen ones."""
        alpha = torch.sigmoid(self._state["alpha_pre"])
        # A sigmoid rounds to 0 or 1 far out: keep the open interval.
        tiny = torch.finfo(alpha.dtype).eps / 2
        views = self._views(alpha.clamp_(tiny, 1 - tiny))
        learned = {name: view.clone() for name, view in zip(self._parameters, views, strict=True)}
        return learned | {
            name: torch.full_like(parameter, 0.5) for name, parameter in self._frozen.items()
        }

    def note_spread(self) -> None:
        """Note how far the coefficients are spread now."""
        ordered = torch.sigmoid(self._state["alpha_pre"]).sort().values
        places = [round(share * (len(ordered) - 1)) for share in QUANTILES]
        self.spread.append([round(value, 4) for value in ordered[places].tolist()])

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on from here: alpha_pre, Adam's moments, the options, the spread.

        As with PyTorch's optimisers, the tensors are the ones in use.
        """
        return {
            "state": dict(self._state),
            "param_groups": [dict(group) for group in self.param_groups],
            "spread": list(self.spread),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state, bit for bit; the model's weights are set to what its alpha says.

        Args:
            state_dict: from :meth:`state_dict`, for the same models A and B; it is copied.

        Raises:
            ValueError: it is of a model with another number of parameters.
        """
        state = state_dict["state"]
        length, expected = state["alpha_pre"].numel(), self._grad.numel()
        if length != expected:
            raise ValueError(
                f"the state is of a model with {length:,} parameters, this one has {expected:,}"
            )
        for name, tensor in self._state.items():
            tensor.copy_(state[name])
        self.param_groups = [dict(group) for group in state_dict["param_groups"]]
        self.spread = list(state_dict["spread"])
        self._write()

    @torch.no_grad()
    def _write(self) -> None:
        for weight, b, delta, _, pre, *_ in self._pieces:
            torch.addcmul(b, torch.sigmoid(pre), delta, out=weight)

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
