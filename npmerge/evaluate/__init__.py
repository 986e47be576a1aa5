"""What a model is worth: scores, what they are held against, and the path between two models."""

from npmerge.evaluate.ensembles import Ensemble, base_models, ensemble
from npmerge.evaluate.paths import PathPoint, barrier, path
from npmerge.evaluate.scores import Metric, Score, accuracy, class_accuracy, measure, score

__all__ = [
    "Ensemble",
    "Metric",
    "PathPoint",
    "Score",
    "accuracy",
    "barrier",
    "base_models",
    "class_accuracy",
    "ensemble",
    "measure",
    "path",
    "score",
]
