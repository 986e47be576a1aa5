"""More than two models become one; two of them are in memory at a time."""

from npmerge.many.cycle_consistent import c2m3, match_cycles
from npmerge.many.mutual import match_many, merge_many
from npmerge.many.reference import all_to_one
from npmerge.many.streaming import Load, Models, put_away
from npmerge.many.tournaments import Pairing, tournament

__all__ = [
    "Load",
    "Models",
    "Pairing",
    "all_to_one",
    "c2m3",
    "match_cycles",
    "match_many",
    "merge_many",
    "put_away",
    "tournament",
]
