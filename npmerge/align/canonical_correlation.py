"""CCA: match linear combinations of channels, not only single ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from npmerge.align.alignment import Alignment
from npmerge.align.correlation import permute
from npmerge.align.moments import Covariances, covariances
from npmerge.data.streams import Data
from npmerge.methods import method
from npmerge.symmetry import Group


@method(
    kind="align", label="CCA Merge", short="CCA", family="alignment", needs=("data",),
    reference="horoi2024", place=4,
    use="Where neurons match in groups rather than one to one; choose its ridge on held-out data.",
)  # fmt: skip
def cca(
    a: nn.Module,
    b: nn.Module,
    data: Data,
    *,
    ridge: float = 1e-3,
    groups: Sequence[Group] | None = None,
    statistics: Covariances | None = None,
) -> Alignment:
    r"""Map B's channels linearly onto A's by canonical correlation analysis.

    With the centred covariances of the activations (each channel's mean over all samples and positions subtracted),
    :math:`U \Sigma V^\top = \mathrm{svd}(S_{xx}^{-1/2} S_{xy} S_{yy}^{-1/2})` and
    :math:`T = S_{xx}^{1/2} U V^\top S_{yy}^{-1/2}`; gamma I is added to :math:`S_{xx}` and :math:`S_{yy}` first.
    A linear map between two networks without non-linearities is found exactly as gamma goes to 0; as it grows, T
    becomes the rotation that fits best. Through a ReLU or a batch norm T does not keep B's function; a batch norm's
    scale is mapped as a standard deviation (:meth:`Alignment.apply`), where the authors' code multiplies it by T.

    Args:
        a: Model A; its device is used.
        b: Model B, of the same architecture.
        data: Re-iterable of batches (tuples of inputs and labels, or dictionaries); one pass is made.
        ridge: gamma, added as it is to the variances of the activations; it keeps dead channels from blowing up.
        groups: The symmetry groups, if already known.
        statistics: What :func:`npmerge.align.moments.covariances` has measured, if that is known already: several
            ridges then cost one pass.

    Returns:
        A matrix T and its inverse per group; Permute's permutation for a group that allows nothing else.

    Raises:
        ValueError: If the models differ in architecture or shape, the data is empty, the ridge is negative, a
            covariance is singular with it, or the statistics hold variances only.
        SymmetryError: If the model's symmetry groups cannot be found.

    Source:
        The paper's "CCA Merge"; Horoi et al. 2024, "Harmony in Diversity".
    """
    if not 0 <= ridge < float("inf"):
        raise ValueError(f"ridge is {ridge}: it must be a finite number that is not negative")
    if statistics is None:
        statistics = covariances(a, b, data, groups=groups)
    groups = statistics.groups
    restricted = {number for number, group in enumerate(groups) if group.permutations_only}
    mixed = [
        number
        for number, group in enumerate(groups)
        if group.tap is not None and group.tap.mixed and number not in restricted
    ]
    found: dict[int, tuple[Tensor, Tensor]] = {}
    if restricted:
        matched = permute(a, b, data, statistics=statistics)
        found = {n: (matched.maps[n], matched.inverses[n]) for n in restricted}
    if mixed:  # measured once those that can only be permuted are aligned
        still = [torch.arange(group.size) for group in groups]
        permutations = [found[n][0] if n in found else p for n, p in enumerate(still)]
        aligned = Alignment.from_permutations(groups, permutations).apply(b)
        again = covariances(a, aligned, data, groups=[groups[n] for n in mixed])
        found |= {n: _mapped(again, place, ridge) for place, n in enumerate(mixed)}
    found |= {n: _mapped(statistics, n, ridge) for n in range(len(groups)) if n not in found}
    maps, inverses = (
        zip(*(found[n] for n in range(len(groups))), strict=True) if found else ((), ())
    )
    return Alignment(groups, tuple(maps), tuple(inverses))


def _mapped(statistics: Covariances, number: int, ridge: float) -> tuple[Tensor, Tensor]:
    """T and its inverse, of one group."""
    group, xx = statistics.groups[number], statistics.xx[number]
    yy, xy = statistics.yy[number], statistics.xy[number]
    if xx.ndim == 1:
        raise ValueError(
            "the statistics hold variances only: measure them with variances_only=False"
        )
    root_x, inverse_root_x = _roots(xx.cpu(), ridge, f"model A at group {group.name!r}")
    root_y, inverse_root_y = _roots(yy.cpu(), ridge, f"model B at group {group.name!r}")
    rotation = _rotation(inverse_root_x @ xy.cpu() @ inverse_root_y)
    return root_x @ rotation @ inverse_root_y, root_y @ rotation.T @ inverse_root_x


def _roots(covariance: Tensor, ridge: float, where: str) -> tuple[Tensor, Tensor]:
    """The symmetric square root of covariance + ridge * I, and its inverse."""
    if not covariance.isfinite().all():
        raise ValueError(
            f"the activations of {where} are not finite: check its parameters and the data"
        )
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    # Rounding leaves null directions (dead channels) at +-1e-9 or so of the largest.
    values = values.clamp_min(0) + ridge
    smallest, largest = float(values[0]), float(values[-1])
    if smallest <= 1e-10 * largest:
        raise ValueError(
            f"the covariance of {where} is singular (eigenvalues {smallest:.1e} to {largest:.1e}), probably dead "
            f"channels or too few images: use a ridge above {max(ridge, 1e-8 * largest, 1e-12):.0e}"
        )
    return (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T


def _rotation(correlation: Tensor) -> Tensor:
    """U V^T; between directions that do not correlate at all, where svd is free, the choice nearest the identity."""
    U, values, Vh = torch.linalg.svd(correlation)
    rank = int((values > 1e-9 * values[:1].clamp_min(1e-9)).sum())
    rotation: Tensor = U[:, :rank] @ Vh[:rank]
    if rank < len(values):
        free_u, free_v = U[:, rank:], Vh[rank:].T
        left, _, right = torch.linalg.svd(free_u.T @ free_v)
        rotation = rotation + free_u @ left @ right @ free_v.T
    return rotation
