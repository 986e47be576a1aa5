"""The one training loop: it equals a hand-written one, and says when training diverges."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import killed
import pytest
import torch
from scipy.stats import ttest_ind
from tiny import CLASSES, assert_same_state, images, loader, net, same_parameters
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, IterableDataset

from npmerge import training
from npmerge.data import Batch, Batches, Images
from npmerge.device import threads
from npmerge.evaluate import score
from npmerge.training import OutOfMemoryError, TrainingError, fit, piecewise_linear


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
        self.seen.append(float(self.param_groups[0]["lr"]))
        assert float(self.param_groups[1]["lr"]) == pytest.approx(10 * self.seen[-1])

    def state_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    def load_state_dict(self, state: Any, /) -> None:
        raise NotImplementedError


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
    with pytest.raises(ValueError, match="epochs is -1: give a whole number from 0 to 1000000"):
        fit(model, loader(), sgd(model), epochs=-1)


@pytest.mark.parametrize("value", [3e38, -3e38])  # finite, but not what is computed of them
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


def test_a_label_out_of_range_is_refused_before_a_parameter_is_changed() -> None:
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
def test_out_of_memory_names_a_batch_size_that_fits(holds: int, advice: str) -> None:
    model = Small(holds)
    with pytest.raises(OutOfMemoryError) as caught:
        fit(model, loader(32, 32), sgd(model), epochs=1)
    message = str(caught.value)
    assert "with batches of 32 does not fit into the memory of cpu" in message
    assert advice in message


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_training_in_bfloat16_measures_the_same_accuracy_as_in_float32(device: str) -> None:
    """Welch's test over ten seeds cannot tell them apart, and does tell an untrained model from both."""
    test = loader(400, 100, seed=99)

    def accuracies(mixed_precision: bool, epochs: int) -> list[float]:
        found = []
        for seed in range(10):
            model = net(seed).to(device)
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


@pytest.mark.parametrize("gains", [True, False])
def test_bfloat16_is_the_default_exactly_where_the_device_gains_from_it(
    gains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("npmerge.training.gains_from_bfloat16", lambda _: gains)
    default, forced = net(), net()
    fit(default, loader(), sgd(default), epochs=1)
    fit(forced, loader(), sgd(forced), epochs=1, mixed_precision=gains)
    assert_same_state(default.state_dict(), forced.state_dict())


def test_a_compiled_model_trains_as_it_does_eagerly() -> None:
    eager, fast = net(), net()
    expected = fit(eager, loader(), sgd(eager), epochs=2)
    assert fit(fast, loader(), sgd(fast), epochs=2, compile=True) == pytest.approx(expected, 1e-4)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(fast.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_every_epoch_is_told_with_its_mean_loss_when_it_is_over() -> None:
    model, told = net(), []
    history = fit(model, loader(), sgd(model), epochs=3, on_epoch=lambda *epoch: told.append(epoch))
    assert told == list(enumerate(history, start=1))


def test_one_training_goes_on_with_the_batches_where_the_last_one_stopped() -> None:
    one, two = killed.batches(), killed.batches()
    whole, parts = net(), net()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (whole, parts)]
    history = fit(whole, one, optimizers[0], epochs=3)
    first = fit(parts, two, optimizers[1], epochs=1)
    assert first + fit(parts, two, optimizers[1], epochs=2) == history
    assert_same_state(whole.state_dict(), parts.state_dict())


class Two(nn.Module):
    """A model of two inputs that answers as Hugging Face's do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, pixels: Tensor, shift: Tensor) -> dict[str, Tensor]:
        return {"logits": self.inner(pixels + shift.view(-1, 1, 1, 1)), "hidden": shift}


def test_tuples_of_several_inputs_and_dictionaries_train_as_the_same_images_do() -> None:
    plain, several, named = net(), Two(), Two()
    pairs = loader()
    zeros = [torch.zeros(len(labels)) for _, labels in pairs]
    tuples = [(x, zero, y) for (x, y), zero in zip(pairs, zeros, strict=True)]
    mappings = [{"labels": y, "pixels": x, "shift": zero} for x, zero, y in tuples]
    expected = fit(plain, pairs, sgd(plain), epochs=2)
    assert fit(several, tuples, sgd(several), epochs=2) == expected
    assert fit(named, mappings, sgd(named), epochs=2) == expected
    for other in (several, named):
        assert_same_state(other.inner.state_dict(), plain.state_dict())
        assert score(other, mappings) == score(plain, pairs)


class Waits(TorchDispatchMode):
    """Counts how often a number is fetched from a tensor: on a GPU, each waits for all that was launched before."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("steps", [2, 6])
def test_no_step_waits_for_the_device(steps: int) -> None:
    model = net()
    data = Batches(images(8 * steps), 8, mean=(0.5,) * 3, std=(0.25,) * 3)
    with Waits() as waits:
        torch.ones(1).item()
        fit(model, data, sgd(model), epochs=2, schedule=piecewise_linear(2, 1))
    assert waits.count == 1  # the one above


def test_a_learning_rate_that_is_a_tensor_stays_one_and_follows_the_schedule() -> None:
    recorder = Recorder(0.5)
    for group in recorder.param_groups:
        group["lr"] = torch.tensor(group["lr"])
    rates = [group["lr"] for group in recorder.param_groups]
    fit(net(), loader(16), recorder, epochs=2, schedule=lambda epoch: epoch)
    assert recorder.seen == pytest.approx([0.25, 0.5, 0.75, 1])
    assert [float(rate) for rate in rates] == [0.5, 5.0]


def test_a_loss_of_one_s_own_is_minimised_and_its_labels_need_not_be_classes() -> None:
    def squares(outputs: Any, batch: Batch) -> Tensor:
        assert isinstance(batch, tuple)
        return (outputs.float() - batch[-1]).square().mean()

    data = [(x, torch.randn(len(x), CLASSES)) for x, _ in loader(64)]
    model = net()
    history = fit(model, data, sgd(model, 0.01), epochs=5, loss=squares)
    assert history[-1] < 0.9 * history[0]
    with pytest.raises(ValueError, match=r"or 4 probabilities: got torch.float32 \(8, 4\)"):
        fit(model, data, sgd(model), epochs=1)


def test_a_model_without_logits_needs_a_loss_of_its_own() -> None:
    model = nn.Sequential(net(), nn.Unflatten(1, (2, 2)))
    with pytest.raises(
        ValueError, match=r"the model gives \(8, 2, 2\) where logits \(N, classes\)"
    ):
        fit(model, loader(), sgd(model), epochs=1)


# A training that is cut off


def tensors_in(state: Any) -> list[Any]:
    if isinstance(state, dict):
        return [leaf for key in sorted(state, key=str) for leaf in tensors_in(state[key])]
    if isinstance(state, list | tuple):
        return [leaf for part in state for leaf in tensors_in(part)]
    return [state]


def same(x: Any, y: Any) -> bool:
    return torch.equal(x, y) if isinstance(x, Tensor) else bool(x == y)


@pytest.mark.parametrize("kind", ["sgd", "adam", "alpha"])
def test_a_training_killed_in_an_epoch_resumes_to_the_bits_of_an_uninterrupted_one(
    kind: str, tmp_path: Path
) -> None:
    """Augmentation, schedule, momentum, batch norm, dropout and channels last included."""
    saved = tmp_path / "deep" / "training"
    program = [sys.executable, killed.__file__, kind, str(saved)]
    assert subprocess.run(program, check=False).returncode == -signal.SIGKILL
    assert [path.name for path in saved.parent.iterdir()] == ["training"]

    seen: list[int] = []
    model, optimizer, history = killed.train(kind, killed.batches(), saved, seen)
    expected, untouched, losses = killed.train(kind, killed.batches())
    assert seen == [3, 4]
    assert history == losses
    assert_same_state(model.state_dict(), expected.state_dict())
    for x, y in zip(model.parameters(), expected.parameters(), strict=True):
        assert x.stride() == y.stride()
    found, right = tensors_in(optimizer.state_dict()), tensors_in(untouched.state_dict())
    assert len(found) > 3
    assert all(same(x, y) for x, y in zip(found, right, strict=True))


def test_a_training_that_was_over_is_not_repeated(tmp_path: Path) -> None:
    saved, seen = tmp_path / "training", []
    first, _, history = killed.train("sgd", killed.batches(), saved)
    again, _, losses = killed.train("sgd", killed.batches(), saved, seen)
    assert (losses, seen) == (history, [])
    assert_same_state(again.state_dict(), first.state_dict())


def test_the_file_is_written_no_more_often_than_asked_for(tmp_path: Path) -> None:
    model = net()
    fit(model, loader(), sgd(model), epochs=2, saved=tmp_path / "training", save_every=3600)
    assert list(tmp_path.iterdir()) == []
    assert training.SAVE_EVERY == 120


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of a training of four epochs."""
    saved = tmp_path_factory.mktemp("saved") / "training"
    killed.train("sgd", killed.batches(), saved)
    return saved.read_bytes()


@pytest.mark.parametrize("share", [0, 0.005, 0.3, 0.6, 0.95, 0.999])
@pytest.mark.parametrize("harm", ["flip", "cut"])
def test_a_damaged_file_is_ignored_with_a_warning(
    harm: str, share: float, cut_off: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved, seen = tmp_path / "training", []
    place = int(share * len(cut_off))
    flipped = cut_off[:place] + bytes([cut_off[place] ^ 1]) + cut_off[place + 1 :]
    saved.write_bytes(flipped if harm == "flip" else cut_off[:place])
    with caplog.at_level(logging.WARNING, logger="npmerge"):
        killed.train("sgd", killed.batches(), saved, seen)
    assert seen == [1, 2, 3, 4]
    assert caplog.messages == [f"{saved}: it is damaged, so the training begins anew"]
    assert (
        saved.read_bytes()[:32] == cut_off[:32]
    )  # the digest: the new file is the one that was damaged


OTHER: dict[str, Callable[[nn.Module], dict[str, Any]]] = {
    "weights": lambda model: model.load_state_dict(net(1).state_dict()) and {},
    "epochs": lambda _: {"epochs": 5},
    "schedule": lambda _: {"schedule": piecewise_linear(4, 2)},
    "learning rate": lambda model: {"optimizer": sgd(model, 0.2)},
    "optimiser": lambda model: {"optimizer": torch.optim.Adam(model.parameters(), lr=0.1)},
    "precision": lambda _: {"mixed_precision": True},
    "seed of the data": lambda _: {"data": killed.batches(seed=6)},
    "length of the data": lambda _: {"data": loader(40, 8)},
}


def epochs_trained(saved: Path, what: str | None = None) -> list[int]:
    """Train, with something changed, and say which epochs were not taken from the file."""
    model, seen = net(), []
    options: dict[str, Any] = {
        "epochs": 4, "schedule": piecewise_linear(4, 1), "optimizer": sgd(model),
        "data": killed.batches(), "mixed_precision": False,
    }  # fmt: skip
    if what is not None:
        options |= OTHER[what](model)
    fit(
        model, options.pop("data"), options.pop("optimizer"), **options, saved=saved,
        save_every=0, on_epoch=lambda epoch, _: seen.append(epoch),
    )  # fmt: skip
    return seen


@pytest.mark.parametrize("what", OTHER)
def test_the_file_of_another_training_is_ignored_with_a_warning(
    what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = tmp_path / "training"
    with caplog.at_level(logging.WARNING, logger="npmerge"):
        assert epochs_trained(saved) == [1, 2, 3, 4]
        assert epochs_trained(saved) == []
        assert caplog.messages == []
        assert epochs_trained(saved, what) == list(range(1, 6 if what == "epochs" else 5))
    (line,) = caplog.messages
    assert line == f"{saved}: it is of another training, so the training begins anew"


def test_a_file_of_other_kernels_or_threads_is_of_another_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tmp_path / "training"
    assert epochs_trained(saved) == [1, 2, 3, 4]
    with threads(2):
        assert epochs_trained(saved) == [1, 2, 3, 4]
        assert epochs_trained(saved) == []
    assert epochs_trained(saved) == [1, 2, 3, 4]
    monkeypatch.setattr("npmerge._resume.kernels_label", lambda _: "cpu-else")
    assert epochs_trained(saved) == [1, 2, 3, 4]


def test_a_training_that_diverges_leaves_the_epochs_before_in_the_file(tmp_path: Path) -> None:
    saved = tmp_path / "training"
    data = killed.batches()

    def train(loss: Any, seen: list[int]) -> None:
        model = net()
        fit(
            model, killed.batches(), sgd(model), epochs=3, saved=saved, save_every=0, loss=loss,
            on_epoch=lambda epoch, _: seen.append(epoch),
        )  # fmt: skip

    steps = iter(range(100))

    def bad(outputs: Tensor, batch: Batch) -> Tensor:
        found = cross_entropy(outputs, batch[-1])
        return found * float("nan") if next(steps) == len(data) else found

    seen: list[int] = []
    with pytest.raises(TrainingError, match="epoch 2, step 1"):
        train(bad, seen)
    train(None, seen)
    assert seen == [1, 2, 3]


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
@pytest.mark.parametrize("kind", ["sgd", "adam", "alpha"])
@pytest.mark.parametrize("compiling", [False, True])
def test_every_optimiser_on_a_gpu_follows_the_cpu(kind: str, compiling: bool) -> None:
    found = []
    for device, compiled in (("cpu", False), ("cuda", compiling)):
        model = net().to(device)
        optimizer = killed.optimizer_of(kind, model, net(1))
        history = fit(
            model, loader(32), optimizer, epochs=3, schedule=piecewise_linear(3, 1),
            mixed_precision=False, compile=compiled,
        )  # fmt: skip
        found.append(history)
    assert found[1] == pytest.approx(found[0], rel=1e-2)
