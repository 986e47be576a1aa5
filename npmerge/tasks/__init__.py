"""Agg of models that were trained from a common base: what each has learned is a difference from it."""

from npmerge.tasks.arithmetic import task_arithmetic
from npmerge.tasks.competition import pcb
from npmerge.tasks.election import emr
from npmerge.tasks.interpolation import wise_ft, wise_ft_curve
from npmerge.tasks.isotropic import iso_c, iso_cts
from npmerge.tasks.projection import opcm
from npmerge.tasks.singular import tsv
from npmerge.tasks.sparsification import breadcrumbs, dare, della
from npmerge.tasks.stock import model_stock
from npmerge.tasks.trimming import ties
from npmerge.tasks.vectors import NO_BASE, added, checked_base, task_vectors

__all__ = [
    "NO_BASE",
    "added",
    "breadcrumbs",
    "checked_base",
    "dare",
    "della",
    "emr",
    "iso_c",
    "iso_cts",
    "model_stock",
    "opcm",
    "pcb",
    "task_arithmetic",
    "task_vectors",
    "ties",
    "tsv",
    "wise_ft",
    "wise_ft_curve",
]
