"""What a merged model needs before it is used."""

from npmerge.correct.batchnorm import reset_batchnorm
from npmerge.correct.renormalisation import repair
from npmerge.correct.representation import surgery

__all__ = ["repair", "reset_batchnorm", "surgery"]
