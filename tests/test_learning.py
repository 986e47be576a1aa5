"""The picture of how NP Merge and fine-tuning learn."""

from __future__ import annotations

import numpy as np
from reports import record

from npmerge.methods import Combination
from npmerge.report.learning import plot_learning
from npmerge.store.records import Record

NP, FINETUNE = (Combination(name, "permute") for name in ("np_merge", "finetune"))
SPREAD = [[0.5 - x, 0.4 - x, 0.45, 0.5, 0.55, 0.6 + x, 0.9] for x in (0.0, 0.1)]


def learned(method: Combination, history: list[float], seed: int = 0) -> Record:
    details = {"history": history} | ({"spread": SPREAD} if method.aggregate == "np_merge" else {})
    return record(method, 50.0, seed, details=details)


def test_losses_are_means_over_seeds_and_alpha_begins_at_a_half() -> None:
    figure = plot_learning(
        [learned(NP, [2.0, 1.0]), learned(NP, [4.0, 2.0], 1), learned(FINETUNE, [1.0, 0.5])]
    )
    assert figure is not None
    loss, alpha = figure.axes
    assert {text.get_text() for text in loss.texts} == {NP.label, FINETUNE.label}
    assert f"{FINETUNE.label} ends at the lowest training loss, 0.50" in str(figure.get_label())
    drawn = {str(line.get_label()): line.get_ydata().tolist() for line in loss.lines}
    assert drawn == {NP.label: [3.0, 1.5], FINETUNE.label: [1.0, 0.5]}
    low, high = (np.asarray(line.get_ydata()) for line in alpha.lines[:2])
    assert np.allclose(low, [0.5, 0.4, 0.3])
    assert np.allclose(high, [0.5, 0.6, 0.7])


def test_records_that_tell_nothing_of_learning_give_no_picture() -> None:
    assert plot_learning([record(Combination("mean", "permute"), 50.0)]) is None
    other = learned(Combination("np_merge", "weight_matching"), [2.0, 1.0])
    assert plot_learning([other]) is None
    assert plot_learning([other], "weight_matching") is not None
