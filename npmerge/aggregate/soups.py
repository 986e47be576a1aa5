"""Agg by coefficients that parameters share: from one for the whole model to one for each parameter."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from npmerge.aggregate.aggregated import Aggregated, learnable, taken_over
from npmerge.aggregate.fisher_weighting import diagonal_fisher, fisher_share
from npmerge.data.streams import Data
from npmerge.methods import method
from npmerge.symmetry import check_same_architecture
from npmerge.training import Learning

Level = Literal["model", "layer", "tensor", "channel", "parameter"]
"""What has a coefficient of its own; a layer is a module, with its weight and its bias."""
CERTAIN = 0.02
"""How near to 0 or 1 a coefficient may start: farther out a sigmoid hardly learns."""


@method(
    kind="aggregate",
    label="Learned soup",
    row="Soup-{align}",
    family="soup",
    needs=("data", "labels"),
    reference="wortsman2022",
    place=45,
    use="Where few numbers are to be learned: one for each tensor or layer needs little data.",
)
def learned_soup(
    a: nn.Module,
    b: nn.Module,
    data: Data,
    *,
    level: str = "tensor",
    bounded: bool = True,
    start: str = "half",
    epochs: int = 10,
    lr: float = 1e-2,
    seed: int = 0,
    learning: Learning | None = None,
) -> Aggregated:
    """Learn ``W = alpha * A + (1 - alpha) * B`` with coefficients that parameters share.

    With one for each parameter it is :func:`~npmerge.aggregate.nonuniform.np_merge`, step by step.

    Args:
        a: model A.
        b: model B, of the same architecture and aligned to A.
        data: the optimisation data, any re-iterable of batches.
        level: what has a coefficient of its own: the ``"model"``, a ``"layer"``, a ``"tensor"``, an output
            ``"channel"`` of a tensor, or a ``"parameter"``.
        bounded: alpha is a sigmoid, in (0, 1); else its tangent at one half, ``1/2 + alpha_pre / 4``, which is free.
        start: ``"half"``, or ``"fisher"``: A's share of the Fisher information, see
            :func:`~npmerge.aggregate.fisher_weighting.fisher`, but for the last two in a hundred at either end.
        epochs: passes over the data.
        lr: Adam's learning rate for ``alpha_pre``, that of NP Merge; the authors' is 0.05.
        seed: of what the Fisher information is sampled with.
        learning: how; see :class:`~npmerge.training.Learning`.

    Returns:
        The merged model; in ``details["alpha"]`` the coefficients of model A, for every parameter by name; and in
        ``details["coefficients"]`` how many were learned. ``a`` and ``b`` are not changed.

    Raises:
        ValueError: an unknown level or start; the models differ in architecture or shape, every parameter is frozen,
            the data is empty, or a label is out of range.
        TrainingError: the loss is not finite.

    Source:
        Wortsman et al. 2022, Appendix I, for levels from the model to the tensor; Eq. 2 for the parameter.
    """
    check_level(level)
    if start not in ("half", "fisher"):
        raise ValueError(f"unknown start {start!r}: choose one of half, fisher")
    check_same_architecture(a, b)
    first = None
    if start == "fisher":
        known_by_a, known_by_b = (
            diagonal_fisher(model, data, expectation="sampled", seed=seed) for model in (a, b)
        )
        first = fisher_share(known_by_a, known_by_b)
    model = copy.deepcopy(a)
    optimizer = SharedAlpha(model, b, lr=lr, level=level, bounded=bounded, start=first)
    history = (learning or Learning()).fit(model, data, optimizer, epochs=epochs)
    details = {"alpha": optimizer.alpha(), "coefficients": optimizer.coefficients}
    return Aggregated(taken_over(a, model), history, details)


class SharedAlpha:
    """Adam on shared coefficients, through a model whose parameters are kept at ``B + alpha * (A - B)``.

    Args:
        model: starts as model A; its parameters, but for the frozen ones, are set to what alpha says.
        b: model B.
        lr: Adam's learning rate.
        level: a :data:`Level`.
        bounded: alpha is a sigmoid; else its tangent at one half.
        start: alpha to begin with, by parameter name, averaged over what shares a coefficient; one half by default.

    Attributes:
        param_groups: Adam's, with the learning rate, which may be changed between steps.
    """

    def __init__(
        self,
        model: nn.Module,
        b: nn.Module,
        *,
        lr: float,
        level: str,
        bounded: bool,
        start: Mapping[str, Tensor] | None = None,
    ) -> None:
        theirs = dict(b.named_parameters())
        self._bounded = bounded
        self._parameters = learnable(model)
        self._b = {n: theirs[n].detach().to(p.device, p.dtype) for n, p in self._parameters.items()}
        self._delta = {n: p.detach() - self._b[n] for n, p in self._parameters.items()}
        self._frozen = {n: p for n, p in model.named_parameters() if n not in self._parameters}
        with torch.no_grad():
            for name, parameter in self._frozen.items():
                parameter.lerp_(theirs[name].to(parameter.device, parameter.dtype), 0.5)
        self._of = {name: _shared_by(name, level) for name in self._parameters}
        members = defaultdict(list)
        for name, key in self._of.items():
            members[key].append(name)
        self._pre = {key: self._began(names, level, start or {}) for key, names in members.items()}
        self._adam = torch.optim.Adam(self._pre.values(), lr=lr)
        self.param_groups = self._adam.param_groups
        self._write()

    @property
    def coefficients(self) -> int:
        """How many are learned."""
        return sum(pre.numel() for pre in self._pre.values())

    def zero_grad(self) -> None:
        """Forget the gradient of the model's parameters."""
        for parameter in self._parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Turn dL/dW into the gradient of the coefficients, step Adam, and write the new weights into the model."""
        for pre, gradient in zip(self._pre.values(), self._gradients(), strict=True):
            pre.grad = gradient
        self._adam.step()
        self._write()

    def _gradients(self) -> Iterator[Tensor]:
        """Those of the coefficients, from those of the weights."""
        for key, pre in self._pre.items():
            gradient = torch.zeros_like(pre)
            for name, parameter in self._parameters.items():
                if self._of[name] == key and parameter.grad is not None:
                    gradient += (parameter.grad * self._delta[name]).sum_to_size(pre.shape)
            alpha = torch.sigmoid(pre)
            yield gradient * (alpha * (1 - alpha) if self._bounded else 0.25)

    def alpha(self) -> dict[str, Tensor]:
        """The coefficients of model A, by parameter name, each of the parameter's shape; 0.5 for frozen ones."""
        return {
            name: self._alpha(name).expand_as(parameter).clone()
            for name, parameter in self._parameters.items()
        } | {name: torch.full_like(parameter, 0.5) for name, parameter in self._frozen.items()}

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on from here."""
        return {"adam": self._adam.state_dict(), "alpha_pre": list(self._pre.values())}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state, bit for bit; the model's weights are set to what its alpha says.

        Args:
            state_dict: from :meth:`state_dict`, for the same models A and B; it is copied.
        """
        for pre, value in zip(self._pre.values(), state_dict["alpha_pre"], strict=True):
            pre.copy_(value)
        self._adam.load_state_dict(state_dict["adam"])
        self.param_groups = self._adam.param_groups
        self._write()

    def _began(self, names: list[str], level: str, start: Mapping[str, Tensor]) -> Tensor:
        """The coefficient of what shares one, before the first step."""
        parameters = [self._parameters[name] for name in names]
        one = parameters[0]
        shape = (
            one.shape if level == "parameter"
            else (len(one), *[1] * (one.ndim - 1)) if level == "channel" and one.ndim
            else ()
        )  # fmt: skip
        total, count = one.new_zeros(shape), 0
        for name, parameter in zip(names, parameters, strict=True):
            alpha = start.get(name, torch.full_like(parameter, 0.5))
            total += alpha.detach().sum_to_size(shape)
            count += parameter.numel()
        alpha = (total * total.numel() / count).clamp(CERTAIN, 1 - CERTAIN)
        return alpha.logit() if self._bounded else 4 * (alpha - 0.5)

    def _alpha(self, name: str) -> Tensor:
        pre = self._pre[self._of[name]]
        return torch.sigmoid(pre) if self._bounded else 0.5 + pre / 4

    @torch.no_grad()
    def _write(self) -> None:
        for name, parameter in self._parameters.items():
            torch.addcmul(self._b[name], self._alpha(name), self._delta[name], out=parameter.data)


def check_level(level: str) -> None:
    """Raise a ``ValueError`` that lists the levels if this is none."""
    if level not in get_args(Level):
        raise ValueError(f"unknown level {level!r}: choose one of {', '.join(get_args(Level))}")


def _shared_by(name: str, level: str) -> str:
    """What a parameter shares its coefficient with: all that have the same word."""
    return {"model": "", "layer": name.rpartition(".")[0]}.get(level, name)
