"""Agg: aligned models become one."""

from npmerge.aggregate.aggregated import Aggregated
from npmerge.aggregate.averaging import mean
from npmerge.aggregate.dynamic_fisher import df_merge
from npmerge.aggregate.entropy import adamerging
from npmerge.aggregate.finetuning import finetune, learning_weights
from npmerge.aggregate.fisher_weighting import diagonal_fisher, fisher, fisher_share
from npmerge.aggregate.freezing import Frozen, frozen_finetune
from npmerge.aggregate.interpolated_neurons import neuron_interpolation
from npmerge.aggregate.label_free import consistency_alpha
from npmerge.aggregate.nonuniform import QUANTILES, AlphaAdam, learning_alpha, np_merge
from npmerge.aggregate.population import papa
from npmerge.aggregate.preferences import pareto
from npmerge.aggregate.regression import regmean
from npmerge.aggregate.soups import SharedAlpha, learned_soup
from npmerge.aggregate.spherical import slerp
from npmerge.aggregate.started import (
    np_from_fisher,
    np_from_interpolation,
    np_from_regmean,
    np_from_repair,
)
from npmerge.aggregate.trajectory import ema, fge, swa
from npmerge.aggregate.uniform_and_greedy import greedy_soup, uniform_soup

__all__ = [
    "QUANTILES",
    "Aggregated",
    "AlphaAdam",
    "Frozen",
    "SharedAlpha",
    "adamerging",
    "consistency_alpha",
    "df_merge",
    "diagonal_fisher",
    "ema",
    "fge",
    "finetune",
    "fisher",
    "fisher_share",
    "frozen_finetune",
    "greedy_soup",
    "learned_soup",
    "learning_alpha",
    "learning_weights",
    "mean",
    "neuron_interpolation",
    "np_from_fisher",
    "np_from_interpolation",
    "np_from_regmean",
    "np_from_repair",
    "np_merge",
    "papa",
    "pareto",
    "regmean",
    "slerp",
    "swa",
    "uniform_soup",
]
