"""Align and aggregate in one linear map: models of equal or different widths become one."""

from npmerge.zips.greedy_zipping import zipit
from npmerge.zips.optimal_transport import ot_fusion
from npmerge.zips.permuted_least_squares import np_from_pleas, pleas
from npmerge.zips.widths import resized
from npmerge.zips.zipped import Zip, matched_groups

__all__ = [
    "Zip", "matched_groups", "np_from_pleas", "ot_fusion", "pleas", "resized", "zipit",
]  # fmt: skip
