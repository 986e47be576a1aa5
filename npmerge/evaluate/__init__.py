"""What a model is worth: scores, what they are held against, and the path between two models."""

from npmerge.evaluate.ensembles import Ensemble, base_models, ensemble
from npmerge.evaluate.paths import PathPoint, barrier, path
from npmerge.evaluate.scores import Score, accuracy, class_accuracy, score

__all__ = [
    "Ensemble",
    "PathPoint",
    "Score",
    "accuracy",
    "barrier",
    "base_models",
    "class_accuracy",
    "ensemble",
    "path",
    "score",
]
