"""Paths of low loss between two models, and the models on them."""

from npmerge.paths.connecting import FORMS, Curve, CurveSGD, curve
from npmerge.paths.elastic_band import Band, auto_neb

__all__ = ["FORMS", "Band", "Curve", "CurveSGD", "auto_neb", "curve"]
