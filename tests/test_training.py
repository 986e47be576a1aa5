"""The one training loop: it equals a hand-written one, and says when training diverges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import ttest_ind
from tiny import CLASSES, assert_same_state, images, loader, net, same_parameters
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset

from npmerge.aggregate import AlphaAdam
from npmerge.data import Batches, Images
from npmerge.evaluate import score
from npmerge.training import (
    OutOfMemoryError,
    Run,
    TrainingError,
    fit,
    fit_together,
    piecewise_linear,
)


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


def sgd_run(seed: int, data: Any = None, device: str = "cpu") -> Run:
    model = net(seed).to(device)
    source = loader(32, seed=seed) if data is None else data
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True
    )
    return Run(model, source, optimizer)


def adam_run(seed: int, data: Any = None, device: str = "cpu") -> Run:
    model = net(seed).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01 * (seed + 1), fused=True)
    return Run(model, loader(32) if data is None else data, optimizer)


def alpha_run(seed: int, data: Any = None, device: str = "cpu") -> Run:
    model = net(seed).to(device)
    optimizer = AlphaAdam(model, net(seed + 10), lr=0.05)
    return Run(model, loader(32) if data is None else data, optimizer)


KINDS: dict[str, Callable[..., Run]] = {"sgd": sgd_run, "adam": adam_run, "alpha": alpha_run}
WAYS: dict[str, dict[str, Any]] = {
    "in turns": {},
    "recorded": {"recorded": True},
    "stacked": {"stacked": True},
    "stacked and recorded": {"stacked": True, "recorded": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [False, True], ids=["own data", "shared data"])
def test_models_trained_together_equal_models_trained_alone(
    way: str, kind: str, shared: bool
) -> None:
    """Bit for bit where each model runs as it is; stacked, to a tenth of one of Adam's last steps (0.03)."""
    data = loader(32) if shared else None
    make = KINDS[kind]
    schedule = piecewise_linear(3, 1)
    alone = [make(seed, data) for seed in range(3)]
    expected = [fit(r.model, r.data, r.optimizer, epochs=3, schedule=schedule) for r in alone]
    together = [make(seed, data) for seed in range(3)]
    found = fit_together(together, epochs=3, schedule=schedule, at_once=3, **WAYS[way])
    for one, other, mine, theirs in zip(alone, together, expected, found, strict=True):
        if "stacked" not in way:
            assert theirs == mine
            assert_same_state(other.model.state_dict(), one.model.state_dict())
            continue
        assert theirs == pytest.approx(mine, rel=1e-5)
        for name, value in one.model.state_dict().items():
            torch.testing.assert_close(
                other.model.state_dict()[name], value, rtol=1e-3, atol=3e-3, msg=name
            )
        assert not same_parameters(one.model, net(0))


def test_a_smaller_last_batch_and_more_models_than_fit_at_once_change_nothing() -> None:
    alone = [sgd_run(seed, loader(20)) for seed in range(5)]  # 8 + 8 + 4 images
    for run in alone:
        fit(run.model, run.data, run.optimizer, epochs=3)
    together = [sgd_run(seed, loader(20)) for seed in range(5)]
    histories = fit_together(together, epochs=3, at_once=2, recorded=True)
    assert [isinstance(found, list) and len(found) for found in histories] == [3] * 5
    for one, other in zip(alone, together, strict=True):
        assert_same_state(other.model.state_dict(), one.model.state_dict())


def test_runs_that_wait_for_each_other_see_the_same_batches_and_the_next_training_other_ones() -> (
    None
):
    def shuffled() -> Batches:
        return Batches(
            images(40), 8, mean=(0.5,) * 3, std=(0.25,) * 3, shuffle=True, padding=1, flip=True
        )

    def train(data: Batches, at_once: int) -> list[Any]:
        return fit_together([adam_run(0, data) for _ in range(3)], epochs=2, at_once=at_once)

    one, two = shuffled(), shuffled()
    first, second = train(one, 1), train(one, 1)
    assert first == [first[0]] * 3
    assert second == [second[0]] * 3
    assert first != second
    assert [train(two, 2), train(two, 3)] == [first, second]


def test_a_model_compiled_trains_as_it_does_eagerly() -> None:
    eager, fast = ([sgd_run(seed) for seed in range(2)] for _ in range(2))
    expected = fit_together(eager, epochs=2, at_once=2)
    assert fit_together(fast, epochs=2, at_once=2, compile=True, recorded=True) == [
        pytest.approx(history, rel=1e-4) for history in expected
    ]
    for one, other in zip(eager, fast, strict=True):
        for name, value in one.model.state_dict().items():
            torch.testing.assert_close(
                other.model.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name
            )


def test_a_model_that_diverges_takes_no_other_with_it() -> None:
    runs = [adam_run(0), adam_run(1), adam_run(2)]
    runs[1].optimizer.param_groups[0]["lr"] = 1e30
    good, bad, fine = fit_together(runs, epochs=2, at_once=3)
    assert isinstance(bad, TrainingError)
    assert "at learning rate 1e+30" in str(bad)
    alone = adam_run(2)
    assert fine == fit(alone.model, alone.data, alone.optimizer, epochs=2)
    assert isinstance(good, list)
    assert len(good) == 2


def test_runs_of_different_lengths_are_refused_together_and_none_is_nothing() -> None:
    with pytest.raises(ValueError, match=r"as many steps an epoch each, these have \[2, 4\]"):
        fit_together([sgd_run(0), sgd_run(1, loader(16))], epochs=1, at_once=2)
    with pytest.raises(ValueError, match="at_once is 0: it must be at least 1"):
        fit_together([sgd_run(0)], epochs=1, at_once=0)
    assert fit_together([], epochs=1) == []


class Small(nn.Module):
    """A model on a device whose memory holds so many images in training."""

    def __init__(self, holds: int) -> None:
        super().__init__()
        self.inner, self.holds = net(), holds

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) > self.holds:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        logits: Tensor = self.inner(x)
        return logits


@pytest.mark.parametrize(
    ("holds", "advice"),
    [(31, "batches of 16 do"), (15, "batches of 8 do"), (0, "nor does a smaller one: free memory")],
)
@pytest.mark.parametrize("count", [1, 2])
def test_out_of_memory_names_a_batch_size_that_fits(holds: int, advice: str, count: int) -> None:
    runs = []
    for _ in range(count):
        model = Small(holds)
        runs.append(Run(model, loader(32, 32), sgd(model)))
    with pytest.raises(OutOfMemoryError) as caught:
        fit_together(runs, epochs=1, at_once=count)
    message = str(caught.value)
    assert "with batches of 32 does not fit into the memory of cpu" in message
    assert advice in message
    assert ("or train fewer models at once" in message) == (count > 1 and holds > 0)


def test_training_in_bfloat16_measures_the_same_accuracy_as_in_float32() -> None:
    """Welch's test over ten seeds cannot tell them apart, and does tell an untrained model from both."""
    test = loader(400, 100, seed=99)

    def accuracies(mixed_precision: bool, epochs: int) -> list[float]:
        found = []
        for seed in range(10):
            model = net(seed)
            fit(
                model, loader(160, 16, seed=seed), sgd(model, 0.05),
                epochs=epochs, mixed_precision=mixed_precision,
            )  # fmt: skip
            found.append(score(model, test).top1)
        return found

    bfloat16, float32, untrained = accuracies(True, 8), accuracies(False, 8), accuracies(False, 0)  # noqa: FBT003
    assert bfloat16 != float32
    assert ttest_ind(bfloat16, float32, equal_var=False).pvalue > 0.05
    assert ttest_ind(bfloat16, untrained, equal_var=False).pvalue < 1e-3
    assert abs(sum(bfloat16) - sum(float32)) / 10 < 3


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


@pytest.mark.gpu
@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_models_trained_together_on_a_gpu_follow_the_cpu(
    way: str, kind: str, compiling: bool
) -> None:
    schedule = piecewise_linear(3, 1)
    expected = fit_together(
        [KINDS[kind](seed) for seed in range(3)], epochs=3, schedule=schedule, at_once=3
    )
    runs = [KINDS[kind](seed, device="cuda") for seed in range(3)]
    found = fit_together(
        runs, epochs=3, schedule=schedule, at_once=3, mixed_precision=False, compile=compiling,
        **{"recorded": False} | WAYS[way],
    )  # fmt: skip
    assert found == [pytest.approx(history, rel=1e-2) for history in expected]
