"""Agg: two aligned models become one."""

from npmerge.aggregate.aggregated import Aggregated
from npmerge.aggregate.averaging import mean
from npmerge.aggregate.finetuning import finetune, learning_weights
from npmerge.aggregate.fisher_weighting import diagonal_fisher, fisher, fisher_share
from npmerge.aggregate.nonuniform import QUANTILES, AlphaAdam, learning_alpha, np_merge
from npmerge.aggregate.regression import regmean
from npmerge.aggregate.soups import SharedAlpha, learned_soup
from npmerge.aggregate.spherical import slerp

__all__ = [
    "QUANTILES",
    "Aggregated",
    "AlphaAdam",
    "SharedAlpha",
    "diagonal_fisher",
    "finetune",
    "fisher",
    "fisher_share",
    "learned_soup",
    "learning_alpha",
    "learning_weights",
    "mean",
    "np_merge",
    "regmean",
    "slerp",
]
