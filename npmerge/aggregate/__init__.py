"""Agg: two aligned models become one."""

from npmerge.aggregate.aggregated import Aggregated
from npmerge.aggregate.averaging import mean
from npmerge.aggregate.finetuning import finetune, learning_weights
from npmerge.aggregate.nonuniform import QUANTILES, AlphaAdam, learning_alpha, np_merge

__all__ = [
    "QUANTILES",
    "Aggregated",
    "AlphaAdam",
    "finetune",
    "learning_alpha",
    "learning_weights",
    "mean",
    "np_merge",
]
