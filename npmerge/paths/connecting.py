"""A curve of low loss between two models, and the model half-way on it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from npmerge.aggregate.aggregated import Aggregated, learnable
from npmerge.aggregate.averaging import mean
from npmerge.data.streams import Data
from npmerge.methods import method
from npmerge.symmetry import check_same_architecture
from npmerge.training import Learning


def bezier(count: int, t: float) -> list[float]:
    """How much each of the points of a Bezier curve weighs at t: Bernstein's polynomials.

    Args:
        count: of the points, the two ends included.
        t: in [0, 1].
    """
    last = count - 1
    return [math.comb(last, j) * t**j * (1 - t) ** (last - j) for j in range(count)]


def polychain(count: int, t: float) -> list[float]:
    """How much each of the points of a chain of segments weighs at t; each segment takes as much of [0, 1].

    Args:
        count: of the points, the two ends included.
        t: in [0, 1].
    """
    return [max(0.0, 1 - abs(t * (count - 1) - j)) for j in range(count)]


FORMS: dict[str, Callable[[int, float], list[float]]] = {"bezier": bezier, "polychain": polychain}
"""The forms of a curve by name: the weights of its points at t."""


@method(
    kind="aggregate",
    label="Curve",
    row="Curve-{align}",
    family="path",
    needs=("data", "labels"),
    reference="garipov2018",
    place=90,
    use="To see whether two models are connected, and to take a model from the middle.",
)
def curve(
    a: nn.Module,
    b: nn.Module,
    data: Data,
    *,
    form: str = "bezier",
    bends: int = 1,
    at: float = 0.5,
    epochs: int = 10,
    lr: float = 0.015,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    seed: int = 0,
    learning: Learning | None = None,
) -> Aggregated:
    r"""Learn a curve from A to B that has a low loss everywhere, and take a model on it.

    The bends of ``phi`` minimise the loss of ``phi(t)`` for t uniform in [0, 1], of which each step draws one. They
    start on the segment. With one bend P a Bezier curve is ``(1 - t)^2 A + 2 t (1 - t) P + t^2 B``.

    Args:
        a: model A, where t is 0.
        b: model B, of the same architecture and aligned to A, where t is 1.
        data: the optimisation data, any re-iterable of batches.
        form: ``"bezier"``, or ``"polychain"``, segments one after the other.
        bends: how many points are free; the authors' is 1.
        at: the t of the model that is returned, in [0, 1].
        epochs: passes over the data; the authors make 200 to 600.
        lr: SGD's learning rate; the authors' is 0.015 for VGG16, 0.03 for residual networks.
        momentum: of SGD, the authors'.
        weight_decay: of the weights on the curve (not of its bends); the authors' for VGG16.
        seed: of what t is drawn from.
        learning: how; see :class:`~npmerge.training.Learning`. It is the model that is returned that is validated.

    Returns:
        The model, its batch norm not yet reset; and in ``details["points"]`` the bends, each with a tensor for every
        parameter by name, of which :class:`Curve` makes the model at any t. ``a`` and ``b`` are not changed.

    Raises:
        ValueError: an unknown form, no bend, ``at`` out of range; the models differ in architecture or shape, every
            parameter is frozen, the data is empty, or a label is out of range.
        TrainingError: the loss is not finite.

    Source:
        Garipov et al. 2018 and its code; aligned first, as by Tatro et al. 2020.
    """
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}: choose one of {', '.join(FORMS)}")
    if bends < 1:
        raise ValueError(f"bends is {bends}: a curve has at least 1")
    if not 0 <= at <= 1:
        raise ValueError(f"at is {at}: a curve goes from 0, at A, to 1, at B")
    check_same_architecture(a, b)
    model = copy.deepcopy(a)
    optimizer = CurveSGD(
        model, b, form=form, bends=bends, lr=lr, momentum=momentum, weight_decay=weight_decay,
        seed=seed,
    )  # fmt: skip

    def found() -> nn.Module:
        return Curve(a, b, optimizer.points(), form).at(at)

    history = learned_on_path(learning or Learning(), model, data, optimizer, epochs, found)
    return Aggregated(found(), history, {"points": optimizer.points()})


def learned_on_path(
    learning: Learning,
    model: nn.Module,
    data: Data,
    optimizer: Any,
    epochs: int,
    found: Callable[[], nn.Module],
) -> list[float]:
    """Learn a path through a model that goes to and fro on it.

    Args:
        learning: how.
        model: whose weights the optimiser sets.
        data: any re-iterable of batches.
        optimizer: of the path.
        epochs: passes over the data.
        found: makes the model that is validated.

    Returns:
        The mean loss of each epoch.
    """
    validate = learning.validate
    if validate is not None:
        learning = replace(learning, validate=lambda _: validate(found()))
    return learning.fit(model, data, optimizer, epochs=epochs)


@dataclass(frozen=True)
class Curve:
    """A curve of models.

    Attributes:
        a: model A, where it begins.
        b: model B, aligned to A, where it ends.
        points: its bends in between, each with a tensor for every parameter by name.
        form: ``"bezier"`` or ``"polychain"``.
    """

    a: nn.Module
    b: nn.Module
    points: Sequence[Mapping[str, Tensor]]
    form: str = "bezier"

    @torch.no_grad()
    def at(self, t: float) -> nn.Module:
        """The model at t, a new one; floating-point buffers are on the segment, so reset its batch norm.

        Args:
            t: in [0, 1]; A at 0, B at 1.

        Raises:
            ValueError: t is out of range.
        """
        if not 0 <= t <= 1:
            raise ValueError(f"t is {t}: a curve goes from 0, at A, to 1, at B")
        model = mean(self.a, self.b, alpha=1 - t)
        ends = [dict(end.named_parameters()) for end in (self.a, self.b)]
        points = (ends[0], *self.points, ends[1])
        shares = FORMS[self.form](len(points), t)
        for name, parameter in model.named_parameters():
            parameter.copy_(_weighted(shares, [point[name].to(parameter) for point in points]))
        return model


class CurveSGD:
    """SGD on the bends of a curve, through a model that stands at one of its points, drawn at each step.

    The gradient of bend j is that of the weights times what the bend weighs at t. What is frozen stays on the segment.

    Args:
        model: starts as model A; its parameters are set to those of the curve at t.
        b: model B.
        form: a key of :data:`FORMS`.
        bends: how many; they start on the segment, evenly spaced.
        lr: SGD's learning rate.
        momentum: of SGD.
        weight_decay: of the weights on the curve.
        seed: of what t is drawn from.
    """

    def __init__(
        self,
        model: nn.Module,
        b: nn.Module,
        *,
        form: str,
        bends: int,
        lr: float,
        momentum: float,
        weight_decay: float,
        seed: int,
    ) -> None:
        learnable(model)
        theirs = dict(b.named_parameters())
        self._parameters = dict(model.named_parameters())
        self._points = {}
        for name, parameter in self._parameters.items():
            ends = parameter.detach().clone(), theirs[name].detach().to(parameter)
            self._points[name] = [torch.lerp(*ends, j / (bends + 1)) for j in range(bends + 2)]
        free = [point for points in self._points.values() for point in points[1:-1]]
        self._sgd = torch.optim.SGD(free, lr=lr, momentum=momentum)
        self._weights, self._decay = FORMS[form], weight_decay
        self._generator = torch.Generator().manual_seed(seed)
        self._count = bends + 2
        self._draw()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """SGD's."""
        return self._sgd.param_groups

    def zero_grad(self) -> None:
        """Forget the gradient of the model's parameters."""
        for parameter in self._parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Turn dL/dW into the gradients of the bends, step SGD, and write the weights of the next t into the model."""
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            gradient = parameter.grad.add(parameter, alpha=self._decay)
            for share, point in zip(self._shares[1:-1], self._points[name][1:-1], strict=True):
                point.grad = share * gradient
        self._sgd.step()
        self._draw()

    def points(self) -> list[dict[str, Tensor]]:
        """The bends, each by parameter name; copies."""
        return [
            {name: points[j].detach().clone() for name, points in self._points.items()}
            for j in range(1, self._count - 1)
        ]

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on from here."""
        return {
            "sgd": self._sgd.state_dict(),
            "points": self.points(),
            "generator": self._generator.get_state(),
            "t": self._t,
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Args:
            state_dict: from :meth:`state_dict`, for the same models A and B.
        """
        self._sgd.load_state_dict(state_dict["sgd"])
        for name, points in self._points.items():
            for point, saved in zip(points[1:-1], state_dict["points"], strict=True):
                point.copy_(saved[name])
        self._generator.set_state(state_dict["generator"])
        self._write(state_dict["t"])

    def _draw(self) -> None:
        self._write(float(torch.rand((), generator=self._generator)))

    @torch.no_grad()
    def _write(self, t: float) -> None:
        self._t, self._shares = t, self._weights(self._count, t)
        for name, parameter in self._parameters.items():
            parameter.copy_(_weighted(self._shares, self._points[name]))


def _weighted(shares: Sequence[float], points: Sequence[Tensor]) -> Tensor:
    total = shares[0] * points[0]
    for share, point in zip(shares[1:], points[1:], strict=True):
        total += share * point
    return total
