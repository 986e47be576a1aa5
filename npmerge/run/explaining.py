"""What NP Merge's coefficients go with: the models' Fisher information, their distance, and who saw which class."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from npmerge.aggregate import diagonal_fisher, fisher_share, learning_alpha
from npmerge.merging import Merged
from npmerge.run.work import Bench, Work, histogram, mixed_precision
from npmerge.store.records import Cell, Outcome
from npmerge.store.zoo import Zoo
from npmerge.training import fit

EXAMPLES = 1000
"""Training images that the Fisher information is taken over."""


def explain_cell(cell: Cell, bench: Bench) -> Outcome:
    """Do a cell, and note in its details what alpha goes with, where it is NP Merge's.

    Args:
        cell: from an experiment.
        bench: where to do it.
    """
    return _Explained(cell, bench).outcome()


def explained(
    alpha: Mapping[str, Tensor], a: nn.Module, b: nn.Module, share: Mapping[str, Tensor]
) -> dict[str, dict[str, float]]:
    """What the coefficients of each tensor go with, as Spearman's rank correlations.

    Args:
        alpha: of model A, by parameter name.
        a: model A.
        b: model B, aligned to A.
        share: A's share of the Fisher information, by parameter name.

    Returns:
        By parameter name: ``"fisher"``, alpha with A's share; ``"distance"``, how far alpha is from one half with how
        far A is from B; ``"size"``, alpha with A's share of the absolute values; ``"mean"`` and ``"spread"``, alpha's
        mean and standard deviation; ``"numbers"``, how many there are. A correlation that is not defined is left out.
    """
    theirs = dict(b.named_parameters())
    found = {}
    for name, own in a.named_parameters():
        one, other = own.detach(), theirs[name].detach()
        here = alpha[name]
        pairs = {
            "fisher": (here, share[name]),
            "distance": ((here - 0.5).abs(), (one - other).abs()),
            "size": (here, one.abs() / (one.abs() + other.abs())),
        }
        ranks = {word: _rank_correlation(*pair) for word, pair in pairs.items()}
        found[name] = {
            **{word: round(rho, 4) for word, rho in ranks.items() if math.isfinite(rho)},
            "mean": round(float(here.mean()), 4),
            "spread": round(float(here.std(correction=0)), 4),
            "numbers": here.numel(),
        }
    return found


def epoch_by_epoch(cell: Cell, zoo: Path | str, device: str = "cpu") -> list[dict[str, list[int]]]:
    """Learn alpha once more, and count its coefficients after each epoch.

    Args:
        cell: of NP Merge.
        zoo: folder of the base models.
        device: where to learn.

    Returns:
        The start and every epoch: for each weight tensor, how many coefficients lie in each twentieth of (0, 1).
    """
    work = Work(cell, Bench.at(Zoo(zoo), torch.device(device)))
    a, b = work.pair
    options = cell.config["aggregate"]["options"]
    model, optimizer = learning_alpha(a, work.alignment().apply(b), lr=options["lr"])
    batches = work.shuffled(work.indices, work.seed)
    mixed = mixed_precision(cell.config, work.device)
    found = []
    for epoch in range(options["epochs"] + 1):
        if epoch:
            fit(model, batches, optimizer, epochs=1, mixed_precision=mixed)
        weights = {name: x for name, x in optimizer.alpha().items() if x.ndim > 1}
        found.append({name: list(histogram(x)) for name, x in weights.items()})
    return found


class _Explained(Work):
    def _keep(self, result: Merged) -> None:
        super()._keep(result)
        if result.alpha is None or self.config["aggregate"]["method"] != "np_merge":
            return
        a, b = self.pair
        aligned = self.alignment().apply(b)
        share = fisher_share(
            *(
                diagonal_fisher(
                    model, self.train, expectation="sampled", examples=EXAMPLES, seed=self.seed
                )
                for model in (a, aligned)
            )
        )
        self.details["explained"] = explained(result.alpha, a, aligned, share)
        if self.setting.get("split"):
            self.details["alpha_of_class"] = _by_class(result.alpha, self.data.classes)
            self.details["seen"] = self.seen(self.bases)


def _rank_correlation(first: Tensor, second: Tensor) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that are all alike
        return float(spearmanr(first.flatten().cpu(), second.flatten().cpu()).statistic)


def _by_class(alpha: Mapping[str, Tensor], classes: int) -> list[float]:
    """The mean coefficient of each class's weights in the last layer."""
    last = [value for value in alpha.values() if value.ndim == 2 and len(value) == classes][-1]
    return [round(value, 4) for value in last.mean(1).tolist()]
