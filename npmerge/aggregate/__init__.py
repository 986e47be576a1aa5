"""Agg: two aligned models become one."""

from npmerge.aggregate.finetune import (
    Finetuned,
    LearnWeights,
    finetune,
    finetune_tuned,
    finetune_tuned_together,
)
from npmerge.aggregate.learn import Learning, learn_together
from npmerge.aggregate.mean import mean
from npmerge.aggregate.np_merge import AlphaAdam, LearnAlpha, NPMerge, np_merge

__all__ = [
    "AlphaAdam",
    "Finetuned",
    "LearnAlpha",
    "LearnWeights",
    "Learning",
    "NPMerge",
    "finetune",
    "finetune_tuned",
    "finetune_tuned_together",
    "learn_together",
    "mean",
    "np_merge",
]
