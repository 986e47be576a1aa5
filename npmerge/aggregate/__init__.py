"""Agg: two aligned models become one."""

from npmerge.aggregate.finetune import Finetuned, finetune, finetune_tuned
from npmerge.aggregate.mean import mean
from npmerge.aggregate.np_merge import AlphaAdam, NPMerge, np_merge

__all__ = ["AlphaAdam", "Finetuned", "NPMerge", "finetune", "finetune_tuned", "mean", "np_merge"]
