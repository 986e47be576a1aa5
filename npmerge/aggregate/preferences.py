"""Agg to a family: one learning gives a merged model for every preference between the two."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from npmerge.aggregate.aggregated import Aggregated, taken_over
from npmerge.aggregate.soups import SharedAlpha, check_level
from npmerge.data.streams import Batch, Data, as_logits, outputs_of
from npmerge.device import device_of
from npmerge.methods import method
from npmerge.symmetry import check_same_architecture
from npmerge.training import Learning


@method(
    kind="aggregate",
    label="Pareto",
    family="soup",
    needs=("data",),
    reference="chen2025",
    ours=True,
    place=48,
    use="Where one learning is to give a family of models between the wishes of two owners.",
)
def pareto(
    a: nn.Module,
    b: nn.Module,
    data: Data,
    *,
    preference: float = 0.5,
    level: str = "layer",
    epochs: int = 10,
    lr: float = 1e-2,
    seed: int = 0,
    learning: Learning | None = None,
) -> Aggregated:
    r"""Learn ``W = alpha * A + (1 - alpha) * B`` for every preference, a number p from 0 (as B) to 1 (as A), at once.

    A coefficient is :math:`\alpha(p) = \sigma(p u + (1 - p) v)`, and u and v are learned, from 0 on. At each step p is
    drawn uniformly and ``p H(A) + (1 - p) H(B)`` is minimised, with the cross-entropy H of the merged model's
    predictions to those that a model has: no labels are needed.

    It is ours, after a method that adds a low-rank tensor, linear in the preference, to a merged model of a common
    base, for as many tasks as there are models.

    Args:
        a: model A.
        b: model B, of the same architecture and aligned to A.
        data: the optimisation data; its labels are not used.
        preference: of the model that is returned.
        level: what has coefficients of its own; see :func:`~npmerge.aggregate.soups.learned_soup`.
        epochs: passes over the data.
        lr: Adam's learning rate for u and v, that of NP Merge.
        seed: of the preferences that are drawn.
        learning: how; see :class:`~npmerge.training.Learning`. Its loss is not used.

    Returns:
        The merged model; in ``details["alpha"]`` the coefficients of model A, for every parameter by name; in
        ``details["coefficients"]`` how many numbers were learned; and in ``details["family"]`` a function that makes
        the model of another preference. Batch norm is to be reset for each.

    Raises:
        ValueError: a preference that is not from 0 to 1, an unknown level; the models differ in architecture or shape,
            every parameter is frozen, or the data is empty.
        TrainingError: the loss is not finite.

    Source:
        After Chen & Kwok 2025.
    """
    check_level(level)
    _check(preference)
    check_same_architecture(a, b)
    model = copy.deepcopy(a)
    optimizer = PreferredAlpha(model, b, lr=lr, level=level, seed=seed)
    teachers = [copy.deepcopy(one).to(device_of(model)).eval() for one in (a, b)]

    def loss(outputs: Any, batch: Batch) -> Tensor:
        with torch.no_grad():
            first, second = (as_logits(outputs_of(one, batch)).softmax(-1) for one in teachers)
        wanted = torch.lerp(second, first, optimizer.preference)
        return cross_entropy(as_logits(outputs).flatten(0, -2), wanted.flatten(0, -2))

    def family(preference: float) -> nn.Module:
        _check(preference)
        before = optimizer.preference
        optimizer.prefer(preference)
        made = taken_over(a, model)
        optimizer.prefer(before)
        return made

    learning = learning or Learning()
    validate = learning.validate
    learning = replace(
        learning,
        loss=loss,
        validate=None if validate is None else lambda _: validate(family(preference)),
    )
    history = learning.fit(model, data, optimizer, epochs=epochs)
    optimizer.prefer(preference)
    details = {
        "alpha": optimizer.alpha(),
        "coefficients": 2 * optimizer.coefficients,
        "family": family,
    }
    return Aggregated(taken_over(a, model), history, details)


class PreferredAlpha(SharedAlpha):
    """Adam on shared coefficients whose logits are affine in a preference, drawn anew after every step.

    Args:
        model: starts as model A; its parameters, but for the frozen ones, are set to what alpha says.
        b: model B.
        lr: Adam's learning rate.
        level: what has coefficients of its own.
        seed: of the preferences.

    Attributes:
        preference: that the model's weights are for now.
        param_groups: Adam's, with the learning rate, which may be changed between steps.
    """

    def __init__(self, model: nn.Module, b: nn.Module, *, lr: float, level: str, seed: int) -> None:
        super().__init__(model, b, lr=lr, level=level, bounded=True)
        self._ends = [torch.stack([pre, pre]) for pre in self._pre.values()]
        self._adam = torch.optim.Adam(self._ends, lr=lr)
        self.param_groups = self._adam.param_groups
        self._generator = torch.Generator().manual_seed(seed)
        self._draw()

    def prefer(self, preference: float) -> None:
        """Set the weights to those of a preference.

        Args:
            preference: from 0, as B, to 1, as A.
        """
        self.preference = preference
        for pre, (at_one, at_zero) in zip(self._pre.values(), self._ends, strict=True):
            pre.copy_(torch.lerp(at_zero, at_one, preference))
        self._write()

    @torch.no_grad()
    def step(self) -> None:
        """Turn dL/dW into the gradient of u and v, step Adam, and draw the next preference."""
        for ends, gradient in zip(self._ends, self._gradients(), strict=True):
            ends.grad = torch.stack([self.preference * gradient, (1 - self.preference) * gradient])
        self._adam.step()
        self._draw()

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on from here."""
        return super().state_dict() | {
            "ends": self._ends,
            "preference": self.preference,
            "drawn": self._generator.get_state(),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state, bit for bit; the model's weights are set to what its alpha says.

        Args:
            state_dict: from :meth:`state_dict`, for the same models A and B; it is copied.
        """
        for ends, value in zip(self._ends, state_dict["ends"], strict=True):
            ends.copy_(value)
        super().load_state_dict(state_dict)
        self._generator.set_state(state_dict["drawn"])
        self.prefer(state_dict["preference"])

    def _draw(self) -> None:
        self.prefer(float(torch.rand((), generator=self._generator)))


def _check(preference: float) -> None:
    if not 0 <= preference <= 1:
        raise ValueError(f"preference is {preference:g}: give a number from 0 (as B) to 1 (as A)")
