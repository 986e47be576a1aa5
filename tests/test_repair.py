"""REPAIR: means and deviations of channels, before and after."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import CLASSES, assert_same_state, images, loader, net, same_parameters
from torch import Tensor, nn

import npmerge as npm
from npmerge.correct import repair, reset_batchnorm
from npmerge.evaluate import score
from npmerge.models import vgg11


def deep(seed: int) -> nn.Sequential:
    """Layers without a norm, of every kind that is repaired; the last gives the logits."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 2), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 49, 12), nn.ReLU(),
        nn.Linear(12, CLASSES),
    )  # fmt: skip


def one_batch() -> list[tuple[Tensor, Tensor]]:
    data = images(64)
    return [(data.pixels / 255, data.labels)]


def channels(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    """Outputs of the inner layers with parameters, a row a sample and position."""
    found = []
    with torch.no_grad():
        for layer in model.eval():
            x = layer(x)
            if isinstance(layer, nn.Linear):
                found.append(x)
            elif isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                found.append(x.movedim(1, -1).flatten(0, -2))
    return found[:-1]


def test_channels_get_the_parents_mean_and_deviation() -> None:
    a, b, data = deep(0), deep(1), one_batch()
    x = data[0][0]
    merged = npm.aggregate.mean(a, b)
    collapsed = channels(merged, x)
    result = repair(merged, data, parents=(a, b), alpha=0.3)
    assert result is merged
    for c, before, first, second in zip(
        channels(merged, x), collapsed, channels(a, x), channels(b, x), strict=True
    ):
        assert torch.allclose(c.mean(0), 0.3 * first.mean(0) + 0.7 * second.mean(0), atol=1e-3)
        goal = 0.3 * first.std(0) + 0.7 * second.std(0)
        assert torch.allclose(c.std(0), goal, rtol=0.03, atol=3e-3)
        assert before.std(0).mean() < 0.9 * goal.mean()


def test_the_last_layer_and_the_parents_stay_and_no_hook_is_left() -> None:
    a, b, data = deep(0), deep(1), one_batch()
    states = [copy.deepcopy(model.state_dict()) for model in (a, b)]
    merged = npm.aggregate.mean(a, b)
    last = copy.deepcopy(merged[-1].state_dict())
    repair(merged, data, parents=(a, b))
    assert_same_state(merged[-1].state_dict(), last)
    for model, state in zip((a, b), states, strict=True):
        assert_same_state(model.state_dict(), state)
    assert not any(m._forward_hooks for model in (a, b, merged) for m in model.modules())


def test_what_did_not_collapse_is_left_as_it_is() -> None:
    a, data = deep(0), one_batch()
    merged = repair(copy.deepcopy(a), data, parents=(a, a))
    for name, value in merged.named_parameters():
        assert torch.allclose(value, dict(a.named_parameters())[name], rtol=0.02, atol=1e-3), name


def test_batch_norm_is_reset_where_there_is_one() -> None:
    def normed(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(),
            nn.Linear(6 * 36, CLASSES),
        )  # fmt: skip

    a, b, data = normed(0), normed(1), one_batch()
    merged = repair(npm.aggregate.mean(a, b), data, parents=(a, b))
    expected = reset_batchnorm(npm.aggregate.mean(a, b), data)
    assert_same_state(merged.state_dict(), expected.state_dict())


def test_it_is_a_correction_like_any_other_and_choices_are_made_behind_it() -> None:
    a, b, data = net(0, norm=False), net(1, norm=False), loader(48)
    merged = npm.merge([a, b], data, align="permute", aggregate="mean", correct="repair")
    aligned = npm.align.permute(a, b, data).apply(b)
    by_hand = repair(npm.aggregate.mean(a, aligned), data, parents=(a, aligned))
    assert_same_state(merged.model.state_dict(), by_hand.state_dict())
    many = npm.merge(
        [net(s, norm=False) for s in range(3)], data, aggregate="mean", correct="repair"
    )
    assert not same_parameters(many.model, a)
    chosen = npm.merge(
        [a, b], data, align="cca", align_options={"ridge": npm.Choice((0.1, 1.0))},
        aggregate="mean", correct="repair", held_out=npm.HeldOut(data[:4], data[4:]),
    )  # fmt: skip
    assert len(chosen.chosen["ridge"]["trials"]) == 2


def test_a_transposed_convolution_in_groups_stays_as_it_is() -> None:
    def grouped(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.ConvTranspose2d(3, 6, 3, groups=3), nn.ReLU(), nn.Flatten(),
            nn.Linear(600, 5), nn.ReLU(), nn.Linear(5, CLASSES),
        )  # fmt: skip

    a, b = grouped(0), grouped(1)
    merged, plain = npm.aggregate.mean(a, b), npm.aggregate.mean(a, b)
    repair(merged, one_batch(), parents=(a, b))
    assert torch.equal(merged[0].weight, plain[0].weight)
    assert not torch.equal(merged[3].weight, plain[3].weight)


def test_it_needs_two_parents() -> None:
    with pytest.raises(ValueError, match="REPAIR needs the two models that were merged, got 0"):
        repair(net(0), loader())
    models = [net(seed) for seed in range(3)]
    with pytest.raises(ValueError, match="REPAIR needs the two models"):
        npm.merge(models, loader(), aggregate="mean", many="all_to_one", correct="repair")


def test_a_deep_network_without_norms_is_better_repaired_than_averaged() -> None:
    """The paper's weakest cell: VGG11 averaged after Permute; here on digits."""
    data = npm.data.load("digits", image_size=8)
    train, test = data.plain_batches("train", 250), data.plain_batches("test", 500)
    models = []
    for seed in range(2):
        start = torch.Generator().manual_seed(seed)
        model = vgg11(10, width=0.125, in_channels=1, image_size=8, generator=start)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        npm.training.fit(
            model, data.train_batches(50, seed=seed), optimizer, epochs=6, mixed_precision=False
        )
        models.append(model.eval())
    plain, repaired = (
        npm.merge(models, train, aggregate="mean", correct=name).model for name in (None, "repair")
    )
    parents = [score(model, test).top1 for model in models]
    averaged, better = score(plain, test).top1, score(repaired, test).top1
    assert min(parents) > 80
    assert better > averaged + 3


def test_in_closed_form_the_first_layer_is_exact_and_others_are_better_than_before() -> None:
    a, b, data = deep(0), deep(1), one_batch()
    x = data[0][0]
    merged = npm.aggregate.mean(a, b, alpha=0.3)
    collapsed = channels(merged, x)
    repair(merged, data, parents=(a, b), alpha=0.3, closed_form=True)
    first, *others = zip(
        channels(merged, x), collapsed, channels(a, x), channels(b, x), strict=True
    )
    c, _, of_a, of_b = first
    assert torch.allclose(c.mean(0), 0.3 * of_a.mean(0) + 0.7 * of_b.mean(0), atol=1e-5)
    assert torch.allclose(c.std(0), 0.3 * of_a.std(0) + 0.7 * of_b.std(0), rtol=1e-3)
    for c, before, of_a, of_b in others:
        goal = 0.3 * of_a.std(0) + 0.7 * of_b.std(0)
        assert (c.std(0) - goal).abs().mean() < 0.7 * (before.std(0) - goal).abs().mean()


def test_in_closed_form_the_merged_model_is_not_run_and_equal_models_stay() -> None:
    a, data = deep(0), one_batch()
    a[1].inplace = True  # overwrites what was to be measured
    merged = copy.deepcopy(a)
    merged.register_forward_hook(lambda *_: pytest.fail("it was run"))
    repair(merged, data, parents=(a, a), closed_form=True)
    for name, value in merged.named_parameters():
        assert torch.allclose(value, a.get_parameter(name), rtol=1e-4, atol=1e-6), name


def test_in_closed_form_batch_norm_is_reset_behind_what_was_folded() -> None:
    def mixed(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, bias=False), nn.BatchNorm2d(6),
            nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, CLASSES),
        )  # fmt: skip

    a, b, data = mixed(0), mixed(1), one_batch()
    merged = repair(npm.aggregate.mean(a, b), data, parents=(a, b), closed_form=True)
    reset = reset_batchnorm(copy.deepcopy(merged), data)
    assert_same_state(merged.state_dict(), reset.state_dict())
    assert merged[3].num_batches_tracked == 1
