"""Straight-through estimation: weight matching to a target that learns to make the average good."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from npmerge.aggregate.averaging import mean
from npmerge.align.alignment import Alignment
from npmerge.align.judging import corrected_loss, fixed_batches, seeded
from npmerge.align.rebasin import match_tensors
from npmerge.data.streams import Batch, Data, example_of
from npmerge.device import device_of
from npmerge.methods import method
from npmerge.symmetry import Group, check_same_architecture, symmetry_on
from npmerge.training import Learning, Loss


@method(
    kind="align", label="Straight-through", short="STE", family="alignment",
    needs=("data", "labels"), reference="ainsworth2023", place=8,
    use="Where labels and time are at hand and Weight Matching is not good enough.",
)  # fmt: skip
def ste(
    a: nn.Module,
    b: nn.Module,
    data: Data,
    *,
    epochs: int = 10,
    lr: float = 1.0,
    momentum: float = 0.9,
    match_every: int = 10,
    examples: int = 1024,
    groups: Sequence[Group] | None = None,
    seed: int = 0,
    learning: Learning | None = None,
) -> Alignment:
    r"""Permute B's channels so that the loss of the average with A is lowest, by gradients through weight matching.

    A free target starts at A. Each step takes the gradient of the loss at :math:`(A + P(B)) / 2`, where P is weight
    matching of B to the target, and gives it to the target as if the target were :math:`P(B)`. So the first P is
    :func:`~npmerge.align.rebasin.weight_matching`'s, and the one that is returned is never worse: each new P is judged
    by the loss of its average on fixed batches, and the best is kept. Each matching starts from the one before.

    Batch norm uses each batch's own statistics while learning, and is reset on the fixed batches to judge: the running
    statistics of neither model fit their average.

    Args:
        a: model A; its device is used.
        b: model B, of the same architecture.
        data: labelled training data, any re-iterable of batches.
        epochs: passes over the data; the authors take 250.
        lr: learning rate of stochastic gradient descent on the target. The authors' 0.01 goes with their many epochs
            and a matching at each step; ours was chosen on small VGG11s and ResNet20s.
        momentum: its momentum, the authors'.
        match_every: steps from one weight matching to the next; the authors match at each.
        examples: how many the fixed batches hold, at least: the first of a pass.
        groups: the symmetry groups, if already known.
        seed: of the order in which weight matching visits the groups, and of dropout.
        learning: how; see :class:`~npmerge.training.Learning`.

    Returns:
        A permutation per group.

    Raises:
        ValueError: the models differ in architecture or shape, a parameter is not finite, ``match_every`` or
            ``examples`` is not positive, the data is empty, or a label is out of range.
        SymmetryError: the model's symmetry groups cannot be found.
        TrainingError: the loss is not finite.

    Source:
        Ainsworth et al. 2023, "Git Re-Basin", algorithm 2.
    """
    if match_every < 1:
        raise ValueError(f"match_every is {match_every}: it must be at least 1")
    check_same_architecture(a, b)
    groups = tuple(symmetry_on(a, example_of(data)) if groups is None else groups)
    learning = learning or Learning()
    target = _Target(
        a, b, groups, fixed_batches(data, examples), learning.loss,
        lr=lr, momentum=momentum, match_every=match_every, seed=seed,
    )  # fmt: skip
    with seeded(seed, device_of(a)):
        learning.fit(target.average, data, target, epochs=epochs)
    target.match()
    return target.best


class _Target:
    """Gradient descent on what B is matched to.

    Attributes:
        average: of A and B as it is matched now; gives the gradient.
        best: the alignment whose average has the lowest loss so far.
        param_groups: with the learning rate.
    """

    def __init__(
        self,
        a: nn.Module,
        b: nn.Module,
        groups: Sequence[Group],
        fixed: Sequence[Batch],
        loss: Loss | None,
        *,
        lr: float,
        momentum: float,
        match_every: int,
        seed: int,
    ) -> None:
        self._a, self._b, self._groups = a, b, groups
        self._fixed, self._loss, self._every, self._seed = fixed, loss, match_every, seed
        self._target = {name: p.detach().clone() for name, p in a.named_parameters()}
        self._sgd = torch.optim.SGD(self._target.values(), lr=lr, momentum=momentum)
        self.param_groups = self._sgd.param_groups
        self._steps = 0
        self.average = copy.deepcopy(a).requires_grad_()
        self._now = Alignment.from_permutations(groups, [torch.arange(g.size) for g in groups])
        self._now = self._matched()
        self.best, self._lowest = self._now, self._judged()

    def zero_grad(self) -> None:
        """Forget the gradient."""
        self.average.zero_grad()

    def step(self) -> None:
        """Give the average's gradient to the target, one half of it, and match when it is time."""
        for name, parameter in self.average.named_parameters():
            self._target[name].grad = None if parameter.grad is None else parameter.grad / 2
        self._sgd.step()
        self._steps += 1
        if self._steps % self._every == 0:
            self.match()

    def match(self) -> None:
        """Match B to the target, from where B is; keep the alignment if it is the best."""
        found = self._matched()
        if all(map(torch.equal, found.maps, self._now.maps)):
            return
        self._now = found
        loss = self._judged()
        if loss < self._lowest:
            self.best, self._lowest = found, loss

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on from here."""
        return {
            "target": self._target,
            "sgd": self._sgd.state_dict(),
            "steps": self._steps,
            "now": self._now.maps,
            "best": self.best.maps,
            "lowest": self._lowest,
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state, bit for bit; the average is the caller's to put back.

        Args:
            state_dict: from :meth:`state_dict`, for the same models and groups; it is copied.
        """
        for name, tensor in self._target.items():
            tensor.copy_(state_dict["target"][name])
        self._sgd.load_state_dict(state_dict["sgd"])
        self.param_groups = self._sgd.param_groups
        self._steps, self._lowest = state_dict["steps"], state_dict["lowest"]
        self._now, self.best = (
            Alignment.from_permutations(self._groups, state_dict[name]) for name in ("now", "best")
        )

    def _matched(self) -> Alignment:
        """B's alignment to the target, found from where B is now."""
        moved = {
            name: p.detach().to(self._target[name].device)
            for name, p in self._now.apply(self._b).named_parameters()
        }
        step = match_tensors(self._target, moved, self._groups, seed=self._seed)
        return Alignment.from_permutations(self._groups, step).compose(self._now)

    def _judged(self) -> float:
        """The loss of the average as B is matched now, which the model becomes."""
        average = mean(self._a, self._now.apply(self._b))
        loss = corrected_loss(average, self._fixed, self._loss)
        self.average.load_state_dict(average.state_dict())
        return loss
