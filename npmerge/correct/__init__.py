"""What a merged model needs before it is used."""

from npmerge.correct.batchnorm import reset_batchnorm

__all__ = ["reset_batchnorm"]
