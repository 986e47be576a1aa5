"""Training with a share of the weights frozen, the same for all models: fewer ways for neurons to swap places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from npmerge.aggregate.aggregated import Aggregated, learnable, taken_over
from npmerge.aggregate.uniform_and_greedy import uniform_soup
from npmerge.data.streams import Data
from npmerge.methods import method
from npmerge.training import Learning, Optimizer


@method(
    kind="aggregate",
    label="Frozen fine-tuning",
    row="Frozen fine-tuning-{align}",
    family="training",
    needs=("data", "labels"),
    reference="li2024",
    ours=True,
    place=85,
    use="As a control, to see how much of fine-tuning needs all parameters.",
)
def frozen_finetune(
    models: Sequence[nn.Module],
    data: Data,
    *,
    share: float = 0.4,
    epochs: int = 10,
    lr: float = 1e-2,
    seed: int = 0,
    learning: Learning | None = None,
) -> Aggregated:
    """Fine-tune the mean of the models, but for a random share of its weights, which stay the mean.

    A control for what fine-tuning needs so many free parameters for. The authors freeze while the models themselves
    are trained, which :class:`Frozen` does.

    Args:
        models: at least one, aligned to the first.
        data: the optimisation data, any re-iterable of batches.
        share: of the weights that stay, in [0, 1]; the authors' is 0.4.
        epochs: passes over the data.
        lr: Adam's learning rate, that of fine-tuning.
        seed: of the draw.
        learning: how; see :class:`~npmerge.training.Learning`.

    Returns:
        The fine-tuned model; ``models`` are not changed.

    Raises:
        ValueError: ``share`` is out of range, the models differ in architecture or shape, every parameter is frozen,
            the data is empty, or a label is out of range.
        TrainingError: the loss is not finite.

    Source:
        Li et al. 2024, whose freezing it takes over from training to fine-tuning.
    """
    model = uniform_soup(models)
    adam = torch.optim.Adam(learnable(model).values(), lr=lr, fused=True)
    optimizer = Frozen(adam, model, share=share, seed=seed)
    history = (learning or Learning()).fit(model, data, optimizer, epochs=epochs)
    return Aggregated(taken_over(models[0], model), history)


class Frozen:
    """An optimiser under which a random share of the weights stays as it is.

    Models of one architecture that are trained with the same seed and share have the same weights frozen; give them
    the same values there by ``start``, or the same initialisation.

    Args:
        optimizer: of the model's parameters.
        model: about to be trained; where it is frozen it takes the values of ``start``.
        share: the probability of a weight to be frozen, in [0, 1].
        seed: of the draw.
        start: gives the values of frozen weights; by default the model itself.

    Raises:
        ValueError: ``share`` is out of range, or every parameter of the model is frozen.

    Source:
        Li et al. 2024, "TNA-PFN".
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        *,
        share: float,
        seed: int = 0,
        start: nn.Module | None = None,
    ) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"share is {share}: give a share of the weights, from 0 to 1")
        values = dict((start or model).named_parameters())
        generator = torch.Generator().manual_seed(seed)
        self._optimizer = optimizer
        self._kept = [
            (
                parameter,
                (torch.rand(parameter.shape, generator=generator) < share).to(parameter.device),
                values[name].detach().to(parameter, copy=True),
            )
            for name, parameter in learnable(model).items()
        ]
        self._put_back()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimiser's."""
        return self._optimizer.param_groups

    def zero_grad(self) -> None:
        """Forget the gradient."""
        self._optimizer.zero_grad()

    def step(self) -> None:
        """Use the gradient, and put the frozen weights back, which weight decay or momentum would move."""
        self._optimizer.step()
        self._put_back()

    def state_dict(self) -> Mapping[str, Any]:
        """The optimiser's."""
        return self._optimizer.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        """Go on from a saved state.

        Args:
            state_dict: from :meth:`state_dict`.
        """
        self._optimizer.load_state_dict(state_dict)

    @torch.no_grad()
    def _put_back(self) -> None:
        for parameter, frozen, value in self._kept:
            parameter.copy_(torch.where(frozen, value, parameter))
