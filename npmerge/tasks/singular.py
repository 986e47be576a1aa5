"""Agg of the strongest singular directions of each task's matrices, made orthogonal to one another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from npmerge.methods import method
from npmerge.tasks.vectors import by_tensor

Singular = tuple[Tensor, Tensor, Tensor]
"""Left directions in columns, singular values, and right directions in rows."""


@method(
    kind="aggregate",
    label="TSV",
    row="TSV-{align}",
    family="task",
    needs=("base",),
    reference="gargiulo2025",
    place=62,
    use="For many tasks that share the same directions in the weights of each layer.",
)
@torch.no_grad()
def tsv(models: Sequence[nn.Module], *, base: nn.Module | None, scale: float = 1.0) -> nn.Module:
    """Keep the strongest singular directions of every task, and make those of all tasks orthogonal (TSV-M).

    Of r directions of a matrix each of the k tasks keeps r/k, rounded down. The left ones of all tasks, side by side,
    become the nearest orthonormal columns, the right ones the nearest orthonormal rows, and are multiplied again with
    their singular values between them. What is no matrix, see :func:`by_matrix`, is averaged.

    Args:
        models: k of them, of one architecture, aligned to the first.
        base: the model that they were trained from.
        scale: multiplies what is added to the base; 1 is the authors'.

    Returns:
        The merged model.

    Raises:
        ValueError: there is no base, the base is the mean of the models, or an architecture differs.

    Source:
        Gargiulo et al. 2025; convolutions as matrices are ours.
    """

    def change(tau: Tensor) -> Tensor:
        kept = min(tau.shape[1:]) // len(tau)
        return product(joined([strongest(decomposed(matrix), kept) for matrix in tau]))

    return by_tensor(models, base, lambda tau: scale * by_matrix(tau, change))


def by_matrix(tau: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply something to matrices, and average what is none.

    A convolution counts as a matrix of outputs by patches. Vectors are none, nor are tensors with fewer rows or columns
    than there are models.

    Args:
        tau: ``(k, *shape)``.
        change: takes ``(k, rows, columns)``, ``float64``, to ``(rows, columns)``.
    """
    if tau.ndim < 3 or min(tau.flatten(2).shape[1:]) < len(tau):
        return tau.mean(0)
    return change(tau.flatten(2).double()).view(tau.shape[1:]).to(tau)


def decomposed(matrix: Tensor) -> Singular:
    """Singular directions and values; without the directions of values that are zero, which are arbitrary.

    Args:
        matrix: ``(rows, columns)``, ``float64``.
    """
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((s > s[0] * max(matrix.shape) * torch.finfo(s.dtype).eps).sum()) if len(s) else 0
    return strongest((u, s, v), rank)


def strongest(directions: Singular, count: int) -> Singular:
    """The first so many.

    Args:
        directions: by falling singular value.
        count: how many, at most.
    """
    u, s, v = directions
    return u[:, :count], s[:count], v[:count]


def joined(parts: Sequence[Singular]) -> Singular:
    """Directions side by side, the left ones and the right ones made orthonormal.

    Args:
        parts: of matrices of one shape.
    """
    u, s, v = zip(*parts, strict=True)
    return _orthonormal(torch.cat(u, 1)), torch.cat(s), _orthonormal(torch.cat(v))


def product(directions: Singular) -> Tensor:
    """The matrix again."""
    u, s, v = directions
    return u * s @ v


def _orthonormal(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns, or rows; of equal ones the sum has length one."""
    u, _, v = decomposed(matrix)
    return u @ v
