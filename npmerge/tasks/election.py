"""Agg of one vector that all tasks share, and of what makes each task's model of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from npmerge.aggregate import Aggregated
from npmerge.methods import method
from npmerge.tasks.vectors import added, task_vectors


@method(
    kind="aggregate",
    label="EMR",
    row="EMR-{align}",
    family="task",
    needs=("base",),
    reference="huang2024",
    place=62,
    use="Where the task is known when the model answers: one set of weights, and a mask for each task.",
)
@torch.no_grad()
def emr(models: Sequence[nn.Module], *, base: nn.Module | None) -> Aggregated:
    """Elect one task vector for all, and for each task a mask and a factor that make its own model of it.

    An entry's sign is that of the mean of the task vectors, and its size the largest of those with that sign. Task i
    masks the entries whose sign is not its own, and multiplies the others so that their size is that of tau_i (by sums
    over the tensors of means). Who uses it must know the task of an input: compare the models of the tasks with single
    models, and only the shared one with other merged models.

    Args:
        models: k of them, of one architecture, aligned to the first.
        base: the model that they were trained from.

    Returns:
        The base with the elected vector added; in ``details["models"]`` a model for each task, with the batch norm
        statistics of its own, and in ``details["bits"]`` what storing all of them takes, in bits per weight, beside the
        base: those of the vector and one for each task.

    Raises:
        ValueError: there is no base, the base is the mean of the models, or an architecture differs.

    Source:
        Huang et al. 2024; the factor as in the authors' code.
    """
    vectors = task_vectors(models, base)
    shared = {}
    for name, tau in vectors.items():
        sign = tau.sum(0).sign()
        shared[name] = sign * (tau * sign).amax(0).clamp(min=0)
    own = []
    for number, model in enumerate(models):
        masked = {n: torch.where(vectors[n][number] * tau > 0, tau, 0) for n, tau in shared.items()}
        size = sum(float(tau[number].abs().mean()) for tau in vectors.values())
        left = sum(float(tau.abs().mean()) for tau in masked.values())
        factor = size / left if left else 0.0
        own.append(added([model], base, {n: factor * tau for n, tau in masked.items()}))
    weights = [p for name, p in models[0].named_parameters() if name in vectors]
    bits = 8 * sum(p.numel() * p.element_size() for p in weights) / sum(map(torch.numel, weights))
    details = {"models": own, "bits": bits + len(models)}
    return Aggregated(added(models, base, shared), details=details)
