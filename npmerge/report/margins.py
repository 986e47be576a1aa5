"""Margins: how far one method is ahead of another, paired over seeds, and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan, sqrt

import pandas as pd
from scipy.special import stdtrit

from npmerge.report.words import seed_count, signed

CONFIDENCE = 0.95
"""Of the interval around a margin."""


@dataclass(frozen=True)
class Margin:
    """The mean of paired differences, with the interval that Student's t gives it.

    Attributes:
        mean: over the seeds, in percentage points; above zero where the first method is ahead.
        half: half the width of the interval; NaN for one seed.
        seeds: how many there are.
    """

    mean: float
    half: float
    seeds: int

    @property
    def low(self) -> float:
        """The lower end of the interval."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """The upper end of the interval."""
        return self.mean + self.half

    @property
    def text(self) -> str:
        """For a reader, e.g. ``"+1.2 ± 0.8 (3 seeds)"``."""
        spread = f" ± {self.half:.1f}" * (self.seeds > 1)
        return f"{signed(self.mean)}{spread} ({seed_count(self.seeds)})"


def paired_margin(differences: pd.Series[float]) -> Margin:
    """The margin of one method over another.

    Args:
        differences: the first method's score minus the second's, a value a seed, none missing.
    """
    seeds = len(differences)
    if seeds < 2:
        return Margin(float(differences.mean()), nan, seeds)
    quantile = float(stdtrit(seeds - 1, (1 + CONFIDENCE) / 2))
    return Margin(
        float(differences.mean()), quantile * float(differences.std()) / sqrt(seeds), seeds
    )
