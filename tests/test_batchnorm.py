"""The batch norm reset: the plain average of batch statistics, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import Snapshot, assert_same_state, loader, marked, net
from torch import Tensor, nn

from npmerge.correct import reset_batchnorm


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), unbiased=True)


def test_the_statistics_become_the_mean_of_the_batches_statistics() -> None:
    """Over batches of 8, 8 and 4: each batch counts once, and the earlier statistics not at all."""
    model, data = net(), loader(20)
    first = [statistics(model[0](pixels)) for pixels, _ in data]
    reset_batchnorm(model, data)
    for got, batches in zip(
        (model[1].running_mean, model[1].running_var), zip(*first, strict=True), strict=True
    ):
        assert torch.allclose(got, torch.stack(batches).mean(dim=0), atol=1e-6)
    assert int(model[1].num_batches_tracked) == 3


def test_a_later_layer_sees_batches_normalised_by_the_earlier_one() -> None:
    model, data = net(), loader(20)
    seen = []
    for pixels, _ in data:
        hidden = nn.functional.batch_norm(
            model[0](pixels), None, None, model[1].weight, model[1].bias, training=True
        )
        seen.append(statistics(model[3](hidden.relu()))[0])
    reset_batchnorm(model, data)
    assert torch.allclose(model[4].running_mean, torch.stack(seen).mean(dim=0), atol=1e-5)


def test_resetting_twice_is_resetting_once() -> None:
    data = loader()
    once = reset_batchnorm(net(), data)
    twice = reset_batchnorm(reset_batchnorm(net(), data), data)
    assert_same_state(once.state_dict(), twice.state_dict())


def test_weights_modes_momentum_and_gradients_stay_as_they_are() -> None:
    model = marked(net())
    before = Snapshot.of(model)
    assert reset_batchnorm(model, loader()) is model
    after = Snapshot.of(model)
    changed = {k for k in before.state if not torch.equal(before.state[k], after.state[k])}
    kinds = ("running_mean", "running_var", "num_batches_tracked")
    assert changed == {f"{layer}.{kind}" for layer in (1, 4) for kind in kinds}
    assert before.modes == after.modes
    assert before.requires_grad == after.requires_grad
    assert model[1].momentum == 0.1


def test_other_layers_are_in_evaluation_mode_while_it_runs() -> None:
    """Dropout in front of batch norm does not change the statistics."""
    data = loader()
    plain = nn.Sequential(nn.BatchNorm2d(3))
    dropping = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3)).train()
    reset_batchnorm(plain, data)
    reset_batchnorm(dropping, data)
    assert torch.equal(plain[0].running_mean, dropping[1].running_mean)
    assert dropping[0].training


class Unread:
    def __iter__(self) -> Any:
        pytest.fail("the data was read")


def test_a_model_without_batch_norm_is_untouched_and_the_data_not_read() -> None:
    model = marked(net(norm=False))
    before = Snapshot.of(model)
    assert reset_batchnorm(model, Unread()) is model
    before.assert_still(model)


def test_batch_norm_without_running_statistics_has_nothing_to_reset() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))
    assert reset_batchnorm(model, Unread()) is model


@pytest.mark.parametrize("data", [[], [*loader(8), "no batch"]])
def test_data_that_is_empty_or_breaks_off_changes_nothing(data: Any) -> None:
    model = marked(net())
    before = Snapshot.of(model)
    with pytest.raises(ValueError, match=r"the data is empty|data must yield"):
        reset_batchnorm(model, data)
    before.assert_still(model)
    assert model[1].momentum == 0.1


def test_one_left_over_image_does_not_count_as_a_batch() -> None:
    whole, more = net().eval(), net().eval()
    batches = loader(16)
    extra = [*batches, (100 * torch.ones(1, 3, 8, 8), torch.zeros(1, dtype=torch.int64))]
    reset_batchnorm(whole, batches)
    reset_batchnorm(more, extra)
    assert_same_state(more.state_dict(), whole.state_dict())
    alone = reset_batchnorm(net().eval(), extra[-1:])  # but it is better than nothing
    assert not torch.equal(alone[1].running_mean, whole[1].running_mean)


def test_a_dictionary_without_labels_is_enough() -> None:
    pairs = loader()
    listed, named = (
        reset_batchnorm(net(), pairs),
        reset_batchnorm(net(), [{"input": x} for x, _ in pairs]),
    )
    assert_same_state(named.state_dict(), listed.state_dict())
