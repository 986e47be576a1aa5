"""A band of models between two, let down onto the lowest path, and the model half-way on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from npmerge.aggregate.aggregated import Aggregated, learnable
from npmerge.aggregate.averaging import mean
from npmerge.data.streams import Batch, Data, classified, outputs_of, size_of, stream
from npmerge.device import device_of
from npmerge.methods import method
from npmerge.paths.connecting import Curve, learned_on_path
from npmerge.training import Learning, Loss

BETWEEN = 3
"""Places between two pivots at which the loss is measured; the authors take 9."""
EXCESS = 0.1
"""How far the loss must rise there over the straight line between the pivots' losses, as a share of the range of all
pivots' losses, for a pivot to be put there."""


@method(
    kind="aggregate",
    label="AutoNEB",
    row="AutoNEB-{align}",
    family="path",
    needs=("data", "labels"),
    reference="draxler2018",
    place=91,
    use="To find the lowest saddle between two models; costly.",
)
def auto_neb(
    a: nn.Module,
    b: nn.Module,
    data: Data,
    *,
    pivots: int = 3,
    insert: int = 2,
    cycles: int = 4,
    at: float = 0.5,
    epochs: int = 20,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    learning: Learning | None = None,
) -> Aggregated:
    """Let a chain of models between A and B down onto a path of low loss, and take a model on it.

    Each pivot goes down its gradient g but for what lies along the path, ``g - (g . t) t`` with the unit tangent t
    towards its higher neighbour (at a summit or in a dip, a mix of both). Then all are spread along the path as they
    were, as by springs that cannot be stretched. Pivots take turns, a batch each. After each cycle the loss is measured
    between them, and pivots are put in where it rises most over the straight line.

    Args:
        a: model A, where the path begins.
        b: model B, of the same architecture and aligned to A.
        data: the optimisation data, any re-iterable of batches; also what the losses are measured on.
        pivots: how many models lie between A and B at first; the authors' is 3.
        insert: how many are put in after a cycle, at most; the authors' is 2.
        cycles: how many parts the epochs are cut into; the authors have 14.
        at: the place of the model that is returned, as a share of the path's length, in [0, 1]; A is at 0.
        epochs: passes over the data, shared by all pivots.
        lr: SGD's learning rate; the authors fall from 0.1 to 0.001, which networks without norms may not stand.
        momentum: of SGD, the authors'.
        weight_decay: of SGD; the authors' is 0.0001.
        learning: how; see :class:`~npmerge.training.Learning`. It is the model that is returned that is validated.

    Returns:
        The model, its batch norm not yet reset; in ``details["points"]`` the pivots, by parameter name, for a
        :class:`~npmerge.paths.connecting.Curve` of the form ``"polychain"``; in ``details["path"]`` places on the path
        and the loss there, the pivots and what lies between them, in batch norm's training mode. The largest is the
        saddle's. ``a`` and ``b`` are not changed; what A freezes stays the mean.

    Raises:
        ValueError: ``pivots``, ``insert``, ``cycles`` or ``at`` is out of range, the models differ in architecture or
            shape or are the same, every parameter is frozen, the data is empty, or a label is out of range.
        TrainingError: the loss is not finite.

    Source:
        Draxler et al. 2018, for one pair of minima, and its code.
    """
    for word, value, least in (("pivots", pivots, 1), ("insert", insert, 0), ("cycles", cycles, 1)):
        if value < least:
            raise ValueError(f"{word} is {value}: give at least {least}")
    if not 0 <= at <= 1:
        raise ValueError(f"at is {at}: the path goes from 0, at A, to 1, at B")
    learning = learning or Learning()
    loss = learning.loss or (
        lambda outputs, batch: cross_entropy(*classified(outputs, batch, data))
    )
    model = mean(a, b).train()
    band = Band(
        model, *(_flat(end, model) for end in (a, b)), pivots=pivots, lr=lr, momentum=momentum,
        weight_decay=weight_decay,
    )  # fmt: skip
    band.measure(data, loss)
    ends = {round(epochs * part / cycles) for part in range(1, cycles)}
    told = learning.on_epoch

    def noted(outputs: Any, batch: Batch) -> Tensor:
        value = loss(outputs, batch)
        band.note(value.detach())
        return value

    def on_epoch(epoch: int, value: float) -> None:
        if epoch in ends:
            band.insert(band.measure(data, loss), insert)
        if told is not None:
            told(epoch, value)

    def found() -> nn.Module:
        return Curve(a, b, band.points(), "polychain").at(band.index(at))

    history = learned_on_path(
        replace(learning, loss=noted, on_epoch=on_epoch), model, data, band, epochs, found
    )
    path = band.measure(data, loss)
    return Aggregated(found(), history, {"points": band.points(), "path": path})


class Band:
    """SGD on the pivots of a band between two models, through a model that stands at one of them, turn by turn.

    Args:
        model: its learnable parameters are set to those of the pivot whose turn it is.
        first: one end, as a vector of these parameters.
        last: the other.
        pivots: how many lie in between, on the segment, evenly spaced.
        lr: SGD's learning rate.
        momentum: of SGD.
        weight_decay: of SGD.
    """

    def __init__(
        self,
        model: nn.Module,
        first: Tensor,
        last: Tensor,
        *,
        pivots: int,
        lr: float,
        momentum: float,
        weight_decay: float,
    ) -> None:
        if torch.equal(first, last):
            raise ValueError("the two models have the same parameters: there is no path to find")
        self._model, self._parameters = model, learnable(model)
        self._lr, self._momentum, self._decay = lr, momentum, weight_decay
        shares = torch.linspace(0, 1, pivots + 2, dtype=torch.float64).tolist()
        self._begin(torch.stack([torch.lerp(first, last, share) for share in shares]), shares)
        self._stand(1)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """SGD's."""
        return self._sgd.param_groups

    def zero_grad(self) -> None:
        """Forget the gradient of the model's parameters."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def note(self, loss: Tensor) -> None:
        """The loss of the pivot whose turn it is."""
        self._losses[self._turn] = loss

    @torch.no_grad()
    def step(self) -> None:
        """Keep the gradient of the pivot whose turn it is; after the last one's turn, move all of them."""
        gradients = (
            torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters.values()
        )
        self._gradients[self._turn] = torch.cat([one.flatten() for one in gradients])
        if self._turn < len(self._band) - 2:
            self._stand(self._turn + 1)
            return
        for number in range(1, len(self._band) - 1):
            tangent = self._tangent(number)
            force = self._gradients[number] + self._decay * self._band[number]
            self._gradients[number] = force - (force @ tangent) * tangent
        self._band.grad = self._gradients
        self._sgd.step()
        self._spread()
        self._stand(1)

    @torch.no_grad()
    def measure(self, data: Data, loss: Loss) -> list[tuple[float, float]]:
        """Places on the path, as shares of its length, and the mean loss there, at every pivot and between them."""
        places = np.interp(
            np.arange((len(self._band) - 1) * (BETWEEN + 1) + 1) / (BETWEEN + 1),
            np.arange(len(self._band)), self._places,
        )  # fmt: skip
        measured = []
        for number, place in enumerate(places.tolist()):
            before, part = divmod(number, BETWEEN + 1)
            after = min(before + 1, len(self._band) - 1)
            self._set(torch.lerp(self._band[before], self._band[after], part / (BETWEEN + 1)))
            measured.append((place, _mean_loss(self._model, data, loss)))
        self._losses = torch.tensor([value for _, value in measured[:: BETWEEN + 1]])
        self._stand(self._turn)
        return measured

    @torch.no_grad()
    def insert(self, measured: Sequence[tuple[float, float]], count: int) -> None:
        """Put pivots in where the loss rises most over the straight line between two of them, and begin a new cycle.

        Args:
            measured: from :meth:`measure`.
            count: how many, at most.
        """
        step = BETWEEN + 1
        pivots = [loss for _, loss in measured[::step]]
        span = max(pivots) - min(pivots)
        rises = []
        for number, (low, high) in enumerate(pairwise(pivots)):
            line = np.linspace(low, high, step + 1)[1:-1]
            over = [loss for _, loss in measured[number * step + 1 : (number + 1) * step]] - line
            rises.append((float(over.max()), number, int(over.argmax()) + 1))
        chosen = [rise for rise in sorted(rises, reverse=True)[:count] if rise[0] > EXCESS * span]
        rows, places = list(self._band.detach()), list(self._places)
        for _, number, part in sorted(chosen, key=lambda rise: -rise[1]):
            share = part / step
            rows.insert(number + 1, torch.lerp(rows[number], rows[number + 1], share))
            places.insert(number + 1, measured[number * step + part][0])
        self._begin(torch.stack(rows), places)
        known = dict(measured)
        self._losses = torch.tensor([known[place] for place in places])
        self._stand(1)

    def index(self, place: float) -> float:
        """Where a place on the path is for a curve that gives each segment as much.

        Args:
            place: as a share of the path's length.

        Returns:
            The t of the curve.
        """
        return float(np.interp(place, self._places, np.linspace(0, 1, len(self._places))))

    def points(self) -> list[dict[str, Tensor]]:
        """The pivots, each by parameter name; copies."""
        every = {name: p.detach() for name, p in self._model.named_parameters()}
        return [
            {name: value.clone() for name, value in (every | self._named(row)).items()}
            for row in self._band.detach()[1:-1]
        ]

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on from here."""
        return {
            "sgd": self._sgd.state_dict(),
            "band": self._band.detach(),
            "places": list(self._places),
            "losses": self._losses,
            "gradients": self._gradients,
            "turn": self._turn,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Args:
            state_dict: from :meth:`state_dict`, for the same ends.
        """
        self._begin(state_dict["band"].to(self._band.device, copy=True), state_dict["places"])
        self._sgd.load_state_dict(state_dict["sgd"])
        self._losses = state_dict["losses"].clone()
        self._gradients.copy_(state_dict["gradients"])
        self._stand(state_dict["turn"])

    def _begin(self, band: Tensor, places: Sequence[float]) -> None:
        self._band, self._places = nn.Parameter(band), list(places)
        self._sgd = torch.optim.SGD([self._band], lr=self._lr, momentum=self._momentum)
        self._gradients = torch.zeros_like(band)
        self._losses = torch.zeros(len(band))

    def _tangent(self, number: int) -> Tensor:
        """The unit vector along the path at a pivot."""
        before, here, after = self._losses[number - 1 : number + 2].tolist()
        back: Tensor
        on: Tensor
        back, on = normalize(self._band[number - 1 : number + 2].diff(dim=0))
        if before < here < after:
            return on
        if before > here > after:
            return back
        small, large = sorted((abs(before - here), abs(after - here)))
        mixed = large * on + small * back if after > before else small * on + large * back
        return normalize(mixed if large else on, dim=0)

    def _spread(self) -> None:
        """Move the pivots along the path until they are where they belong."""
        lengths = self._band.diff(dim=0).norm(dim=1)
        reached = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        goals = reached[-1] * reached.new_tensor(self._places[1:-1])
        segment = (torch.searchsorted(reached, goals, right=True) - 1).clamp(max=len(lengths) - 1)
        share = ((goals - reached[segment]) / lengths[segment])[:, None]
        self._band[1:-1] = torch.lerp(self._band[segment], self._band[segment + 1], share)

    def _stand(self, turn: int) -> None:
        self._turn = turn
        self._set(self._band[turn])

    @torch.no_grad()
    def _set(self, vector: Tensor) -> None:
        for name, value in self._named(vector).items():
            self._parameters[name].copy_(value)

    def _named(self, vector: Tensor) -> dict[str, Tensor]:
        parts = vector.split([p.numel() for p in self._parameters.values()])
        pairs = zip(self._parameters.items(), parts, strict=True)
        return {name: part.view(p.shape) for (name, p), part in pairs}


def _flat(model: nn.Module, like: nn.Module) -> Tensor:
    """A model's parameters as a vector, of those that another one learns."""
    values = dict(model.named_parameters())
    return torch.cat([values[name].detach().to(p).flatten() for name, p in learnable(like).items()])


def _mean_loss(model: nn.Module, data: Data, loss: Loss) -> float:
    total, count = 0.0, 0
    for batch in stream(data, device_of(model)):
        total += float(loss(outputs_of(model, batch), batch)) * size_of(batch)
        count += size_of(batch)
    return total / count
