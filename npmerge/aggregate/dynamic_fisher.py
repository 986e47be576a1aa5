"""DF-Merge: how much of each model, by Fisher weights whose coefficients are searched for the best accuracy."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from npmerge.aggregate.aggregated import Aggregated
from npmerge.aggregate.averaging import mean
from npmerge.aggregate.fisher_weighting import diagonal_fisher
from npmerge.aggregate.uniform_and_greedy import uniform_soup
from npmerge.correct.batchnorm import reset_batchnorm
from npmerge.data.streams import Data
from npmerge.evaluate.scores import score
from npmerge.methods import method

FLOOR = 1e-6
"""Added to the information, so that where there is none the plain mean is taken."""
GRID = 21
"""Coefficients that are tried where there is only one to choose."""
BEGIN = 10
"""Random points before the search models what it has seen."""
GAIN = 0.01
"""How much better than the best an accuracy must be expected to count as an improvement."""

Trials = list[tuple[list[float], float]]
"""Points that were tried, and what they are worth."""


@method(
    kind="aggregate",
    label="DF-Merge",
    family="fisher",
    needs=("data", "labels"),
    reference="lee2025",
    place=52,
    use="Where one coefficient a model is enough and gradients only serve as weights.",
)
def df_merge(
    models: Sequence[nn.Module],
    data: Data,
    *,
    base: nn.Module | None = None,
    examples: int = 30,
    expectation: str = "sampled",
    trials: int = 50,
    seed: int = 0,
) -> Aggregated:
    """Search the coefficients of a Fisher-weighted average whose model is the most accurate.

    With a common base, ``C = base + k sum_i F_i c_i T_i / sum_i F_i`` for k task vectors ``T_i = W_i - base`` and the
    Fisher information ``F_i`` at ``base + c_i T_i``, each ``c_i`` from 0 to 1. Without one, which is ours, models that
    are aligned are averaged, ``C = sum_i c_i F_i W_i / sum_i c_i F_i`` with ``F_i`` at ``W_i``. Two models have one
    number to choose then, which is taken from a grid of 21. Otherwise Bayesian optimisation: 11 points, all ``c_i``
    equal to one the first of them, then the point of the largest expected improvement under a Gaussian process, again
    and again. Batch norm is reset before a model is scored.

    Args:
        models: of one architecture and aligned, or trained from the base.
        data: labelled; what is scored on, and of which the first examples give the information. Neither what the models
            have learned from nor test data: a part of the training data that was held out.
        base: the model that all others were trained from; by default none.
        examples: how many the information is taken from; 30 as in the authors' code.
        expectation: see :func:`~npmerge.aggregate.fisher_weighting.diagonal_fisher`.
        trials: points of the search after the first ones; 50 as in the authors' code.
        seed: of the search, and of the labels that are drawn.

    Returns:
        The merged model; its coefficients in ``details["chosen"]``, and all ``details["trials"]``, coefficients and
        accuracy from 0 to 1.

    Raises:
        ValueError: a negative number of trials, fewer than two models, models that differ in architecture or shape; or
            as :func:`~npmerge.aggregate.fisher_weighting.diagonal_fisher`.

    Source:
        Lee et al. 2025, with the improvement of 0.01 of its code.
    """
    if len(models) < 2 or trials < 0:
        raise ValueError(
            f"{len(models)} models and trials {trials}: give at least two models, and 0 trials or more"
        )

    def known(model: nn.Module) -> dict[str, Tensor]:
        return diagonal_fisher(model, data, expectation=expectation, examples=examples, seed=seed)

    at_the_models = [] if base is not None else [known(model) for model in models]

    def merged(coefficients: Sequence[float]) -> nn.Module:
        if base is None:
            return weighted(models, at_the_models, coefficients)
        scaled = [mean(m, base, alpha=c) for m, c in zip(models, coefficients, strict=True)]
        average = weighted(scaled, [known(model) for model in scaled])
        return mean(average, base, alpha=len(models))

    def worth(coefficients: Sequence[float]) -> float:
        return score(reset_batchnorm(merged(coefficients), data), data).top1 / 100

    if base is None and len(models) == 2:
        shares = sorted(np.linspace(0, 1, GRID).tolist(), key=lambda share: abs(share - 0.5))
        tried = [([share, 1 - share], worth([share, 1 - share])) for share in shares]
    else:
        tried = search(worth, len(models), trials=trials, seed=seed)
    chosen, _ = max(tried, key=lambda trial: trial[1])
    return Aggregated(merged(chosen), details={"chosen": chosen, "trials": tried})


@torch.no_grad()
def weighted(
    models: Sequence[nn.Module],
    information: Sequence[Mapping[str, Tensor]],
    coefficients: Sequence[float] | None = None,
) -> nn.Module:
    """Average any number of models, each parameter by what the models know of it.

    Args:
        models: of one architecture; buffers are averaged plainly.
        information: of each model, by parameter name.
        coefficients: multiply it; one by default.

    Returns:
        A new model, on the devices of the first.
    """
    result = uniform_soup(models)
    named = [dict(model.named_parameters()) for model in models]
    for name, target in result.named_parameters():
        total, weights = torch.zeros_like(target), torch.zeros_like(target)
        for own, known, c in zip(
            named, information, coefficients or [1.0] * len(models), strict=True
        ):
            weight = c * (known[name].to(target.device) + FLOOR)
            total += weight * own[name].to(target.device)
            weights += weight
        target.copy_(total / weights)
    return result


def search(
    worth: Callable[[Sequence[float]], float], dimensions: int, *, trials: int, seed: int
) -> Trials:
    """Look for the maximum of a function on the unit cube by Bayesian optimisation.

    Args:
        worth: of a point; costly, smooth, and not much larger than one.
        dimensions: of the cube.
        trials: how often it is asked, beyond eleven times to begin with.
        seed: of the points.

    Returns:
        All points and what they are worth, in the order in which they were tried; the first has all ones.
    """
    from scipy.stats import norm
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import Matern

    generator = np.random.default_rng(seed)
    points = [np.ones(dimensions), *generator.random((BEGIN, dimensions))]
    values = [worth(point.tolist()) for point in points]
    for _ in range(trials):
        process = GaussianProcessRegressor(
            Matern([0.3] * dimensions, (0.05, 10), nu=2.5),
            alpha=1e-6, normalize_y=True, random_state=seed,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a length that does not matter
            process.fit(points, values)
        near = points[int(np.argmax(values))] + 0.05 * generator.standard_normal((500, dimensions))
        candidates = np.concatenate([generator.random((1500, dimensions)), near.clip(0, 1)])
        expected, deviation = process.predict(candidates, return_std=True)
        gain = expected - max(values) - GAIN
        sure = gain / deviation.clip(1e-12)
        improvement = gain * norm.cdf(sure) + deviation * norm.pdf(sure)
        points.append(candidates[int(np.argmax(improvement))])
        values.append(worth(points[-1].tolist()))
    return [(point.tolist(), value) for point, value in zip(points, values, strict=True)]
