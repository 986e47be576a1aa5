"""A method whose learning is cut off in its third epoch, and called again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from tiny import assert_same_state
from torch import nn

from npmerge import training
from npmerge.training import Learning


def assert_resumes(run: Callable[[Learning], nn.Module], folder: Path) -> None:
    """It goes on from its last saved epoch and ends at the bits of an uninterrupted one.

    Args:
        run: calls the method, for four epochs of data that can go on.
        folder: where it may be saved.
    """
    seen: list[int] = []

    def stop(epoch: int, _: float) -> None:
        if epoch == 3:
            raise KeyboardInterrupt

    expected = run(Learning(mixed_precision=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "fit", partial(training.fit, save_every=0))
        saved = Learning(mixed_precision=False, saved=folder / "training")
        with pytest.raises(KeyboardInterrupt):
            run(replace(saved, on_epoch=stop))
        resumed = run(replace(saved, on_epoch=lambda epoch, _: seen.append(epoch)))
    assert seen == [3, 4]
    assert_same_state(resumed.state_dict(), expected.state_dict())
