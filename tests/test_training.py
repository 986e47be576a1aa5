"""The one training loop: it equals a hand-written one, and says when training diverges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import CLASSES, assert_same_state, images, loader, net, same_parameters
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset

from npmerge.data import Batches, Images
from npmerge.training import TrainingError, fit, piecewise_linear


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


class Recorder:
    """An optimiser that does nothing but note its learning rate."""

    def __init__(self, lr: float) -> None:
        self.param_groups: list[dict[str, Any]] = [{"lr": lr}, {"lr": 10 * lr}]
        self.seen: list[float] = []

    def zero_grad(self) -> None:
        pass

    def step(self) -> None:
        self.seen.append(self.param_groups[0]["lr"])
        assert self.param_groups[1]["lr"] == pytest.approx(10 * self.seen[-1])


@pytest.mark.parametrize(
    ("epoch", "multiplier"),
    [(0, 0), (2.5, 0.5), (5, 1), (53.75, 0.75), (102.5, 0.5), (200, 0), (201, 0)],
)
def test_the_schedule_rises_over_the_warm_up_and_falls_to_zero(
    epoch: float, multiplier: float
) -> None:
    assert piecewise_linear(200, 5)(epoch) == pytest.approx(multiplier)


def test_a_schedule_that_is_all_warm_up_ends_at_the_peak() -> None:
    schedule = piecewise_linear(5, 5)
    assert schedule(4.5) == pytest.approx(0.9)
    assert schedule(5) == 0


def test_every_step_has_its_learning_rate_and_the_optimiser_gets_its_own_back() -> None:
    """4 epochs of 2 steps with a warm-up of 1: the multiplier is taken at the end of the step."""
    recorder = Recorder(0.5)
    fit(net(), loader(16), recorder, epochs=4, schedule=piecewise_linear(4, 1))
    multipliers = [1 / 2, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]
    assert recorder.seen == pytest.approx([0.5 * m for m in multipliers])
    assert [group["lr"] for group in recorder.param_groups] == [0.5, 5.0]


def test_without_a_schedule_the_learning_rate_is_constant() -> None:
    recorder = Recorder(0.5)
    fit(net(), loader(16), recorder, epochs=2)
    assert recorder.seen == [0.5] * 4


def test_the_loop_equals_a_hand_written_one_bit_for_bit() -> None:
    model, by_hand = net(), net()
    history = fit(model, loader(), sgd(model), epochs=2)
    optimizer, losses = sgd(by_hand), []
    by_hand.train()
    for _ in range(2):
        for pixels, labels in loader():
            optimizer.zero_grad()
            loss = cross_entropy(
                by_hand(pixels.contiguous(memory_format=torch.channels_last)), labels
            )
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert_same_state(model.state_dict(), by_hand.state_dict())
    assert history == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3])


def test_a_model_trained_twice_from_one_seed_is_bit_identical_and_another_seed_differs() -> None:
    def train(seed: int) -> nn.Module:
        batches = Batches(
            images(40), 8, mean=(0.5,) * 3, std=(0.25,) * 3, shuffle=True, padding=1, flip=True,
            seed=seed,
        )  # fmt: skip
        model = net(seed)
        fit(model, batches, sgd(model), epochs=2, schedule=piecewise_linear(2, 1))
        return model

    first = train(0)
    torch.manual_seed(123)
    assert_same_state(first.state_dict(), train(0).state_dict())
    assert not same_parameters(first, train(1))


def test_training_learns_and_leaves_the_model_in_train_mode() -> None:
    model = net().eval()
    history = fit(model, loader(64), sgd(model), epochs=12)
    assert len(history) == 12
    assert history[-1] < 0.75 * history[0]
    assert model.training


def test_no_epochs_change_nothing_and_negative_ones_are_refused() -> None:
    model = net()
    assert fit(model, loader(), sgd(model), epochs=0) == []
    assert_same_state(model.state_dict(), net().state_dict())
    with pytest.raises(ValueError, match="epochs is -1: it cannot be negative"):
        fit(model, loader(), sgd(model), epochs=-1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_names_epoch_step_and_learning_rate(
    value: float,
) -> None:
    """The second of three steps of the second epoch; the rate is the one of that very step."""

    class Poisoned:
        epoch = 0

        def __len__(self) -> int:
            return 3

        def __iter__(self) -> Any:
            self.epoch += 1
            for step, (pixels, labels) in enumerate(loader()):
                bad = self.epoch == 2 and step == 1
                yield (torch.full_like(pixels, value) if bad else pixels), labels

    model = net(norm=False)
    optimizer = sgd(model, lr=0.06)
    message = r"the loss is nan in epoch 2, step 2, at learning rate 0.01: try a lower one"
    with pytest.raises(TrainingError, match=message):
        fit(model, Poisoned(), optimizer, epochs=2, schedule=piecewise_linear(2, 0))
    assert optimizer.param_groups[0]["lr"] == 0.06


def test_an_absurd_learning_rate_diverges_with_that_error() -> None:
    model = net(norm=False)
    with pytest.raises(TrainingError, match=r"epoch 1, step \d, at learning rate 1e\+30"):
        fit(model, loader(), sgd(model, lr=1e30), epochs=1)


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Re-iterable data that does not know its length."""

    def __iter__(self) -> Any:
        return iter(loader())


def test_data_of_unknown_length_trains_but_takes_no_schedule() -> None:
    data = DataLoader(Stream(), batch_size=None)
    model, listed = net(), net()
    fit(model, data, sgd(model), epochs=2)
    fit(listed, loader(), sgd(listed), epochs=2)
    assert_same_state(model.state_dict(), listed.state_dict())
    with pytest.raises(ValueError, match="needs data of known length"):
        fit(model, data, sgd(model), epochs=1, schedule=piecewise_linear(1, 0.5))


def test_a_label_out_of_range_is_refused_before_the_model_is_changed() -> None:
    pixels, labels = images(8).pixels, torch.full((8,), CLASSES)
    normalised = [(pixels / 255.0, labels)]
    batches = Batches(Images(pixels, labels), 8, mean=(0.0,) * 3, std=(1.0,) * 3)
    for data in (normalised, batches):
        model = net()
        with pytest.raises(ValueError, match="label 4 is out of range: the model has 4 outputs"):
            fit(model, data, sgd(model), epochs=1)
        assert same_parameters(model, net())


def test_mixed_precision_trains_float32_weights_in_bfloat16() -> None:
    half, full = net(), net()
    fit(half, loader(), sgd(half), epochs=1, mixed_precision=True)
    fit(full, loader(), sgd(full), epochs=1, mixed_precision=False)
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    assert not same_parameters(half, full)
    for x, y in zip(half.parameters(), full.parameters(), strict=True):
        assert torch.allclose(x, y, atol=0.1)


def test_progress_is_shown_on_stderr_only_when_asked_for(
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = net()
    fit(model, loader(), sgd(model), epochs=1)
    assert capfd.readouterr() == ("", "")
    fit(model, loader(), sgd(model), epochs=1, progress="base model")
    out, err = capfd.readouterr()
    assert out == ""
    assert "base model" in err


@pytest.mark.gpu
def test_training_on_a_gpu_follows_the_cpu() -> None:
    """In float32 the losses agree; by default the GPU trains in bfloat16 and still learns."""
    losses = []
    for device in ("cpu", "cuda"):
        model = net().to(device)
        losses.append(fit(model, loader(), sgd(model, 0.01), epochs=3, mixed_precision=False))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    model = net().to("cuda")
    history = fit(model, loader(64), sgd(model), epochs=12)
    assert history[-1] < 0.75 * history[0]
