"""Models: the protocol's architectures, from an explicit seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision.models
from torch import nn

from npmerge.models import MODELS, build, resnet18, resnet20, vgg11


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_resnet20_has_the_parameters_counted_by_hand() -> None:
    """3x3 convolutions without bias have in * out * 9 weights, batch norm 2 * out.

    stem 3*16*9 + 32 = 464; stage 1: 6 * (16*16*9 + 32) = 14,016
    stage 2: (16*32*9 + 64) + 5 * (32*32*9 + 64) + shortcut (16*32*9 + 64) = 55,744
    stage 3: (32*64*9 + 128) + 5 * (64*64*9 + 128) + shortcut (32*64*9 + 128) = 222,080
    head 64*100 + 100 = 6,500
    """
    assert parameters(resnet20(100)) == 464 + 14_016 + 55_744 + 222_080 + 6_500 == 298_804


def test_vgg11_has_the_parameters_counted_by_hand() -> None:
    """A 3x3 convolution with bias has in * out * 9 + out parameters.

    3-64: 1,792; 64-128: 73,856; 128-256: 295,168; 256-256: 590,080; 256-512: 1,180,160;
    three times 512-512: 7,079,424; head 512*10 + 10 = 5,130
    """
    convolutions = 1_792 + 73_856 + 295_168 + 590_080 + 1_180_160 + 7_079_424
    assert parameters(vgg11(10)) == convolutions + 5_130 == 9_225_610


def test_resnet18_is_torchvision_s_down_to_its_names() -> None:
    """Its state dict goes into torchvision's model and back, the statistics included, and the outputs are equal."""
    ours, theirs = resnet18(), torchvision.models.resnet18()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ours(images)  # train mode: other running statistics than a fresh model's
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        assert torch.equal(ours.eval()(images), theirs.eval()(images))
    fresh = torchvision.models.resnet18()
    ours.load_state_dict(fresh.state_dict())
    with torch.no_grad():
        assert torch.equal(ours(images), fresh.eval()(images))


def test_resnet18_starts_as_torchvision_s_does() -> None:
    """Weights have the deviation and the tails of torchvision's, and what is constant there is the same here."""
    theirs = torchvision.models.resnet18().state_dict()
    for name, value in resnet18().state_dict().items():
        other = theirs[name]
        if value.ndim < 2 and name != "fc.bias":
            assert torch.equal(value, other), name
            continue
        assert float(value.std()) == pytest.approx(float(other.std()), rel=0.1), name
        tails = [float((w / w.std()).pow(4).mean()) for w in (value, other)]
        assert tails[0] == pytest.approx(tails[1], rel=0.15), name  # normal: 3, uniform: 1.8
        if name.startswith("fc"):
            assert float(value.abs().max()) == pytest.approx(512**-0.5, rel=0.01)


def test_the_papers_resnet18_is_four_times_as_wide() -> None:
    with torch.device("meta"):
        model = resnet18(1000, 4)
    assert [model.conv1.out_channels, model.fc.in_features] == [256, 2048]
    assert model.layer3[0].downsample[0].kernel_size == (1, 1)


@pytest.mark.parametrize("size", [8, 32, 64])
def test_resnet18_takes_small_images_and_other_channels(size: int) -> None:
    model = build("resnet18", 7, width=0.125, in_channels=1, image_size=size, seed=0)
    assert model(torch.zeros(2, 1, size, size)).shape == (2, 7)


def test_width_multiplies_the_channels() -> None:
    wide, narrow = resnet20(10, 2), resnet20(10, 0.25)
    assert [wide.conv.out_channels, wide.head.in_features] == [32, 128]
    assert [narrow.conv.out_channels, narrow.head.in_features] == [4, 16]
    assert vgg11(10, 0.125).head.in_features == 64


def test_resnet20_s_shortcuts_are_3x3_convolutions_with_batch_norm_at_the_two_narrowings() -> None:
    shortcuts = [
        module.shortcut
        for module in resnet20(10).modules()
        if isinstance(getattr(module, "shortcut", None), nn.Sequential)
    ]
    assert len(shortcuts) == 2
    for convolution, norm in shortcuts:
        assert (convolution.kernel_size, convolution.stride) == ((3, 3), (2, 2))
        assert convolution.bias is None
        assert isinstance(norm, nn.BatchNorm2d)


def test_vgg11_has_eight_biased_convolutions_five_pools_and_no_batch_norm() -> None:
    kinds = [type(module).__name__ for module in vgg11(10).modules()]
    assert kinds.count("Conv2d") == 8
    assert kinds.count("MaxPool2d") == 5
    assert kinds.count("Linear") == 1
    assert not {"BatchNorm2d", "Dropout"} & set(kinds)


@pytest.mark.parametrize("size", [2, 4, 8, 16, 32])
def test_vgg11_takes_8_to_32_pixels_and_ends_in_one(size: int) -> None:
    model = vgg11(10, 0.125, in_channels=1, image_size=size)
    images = torch.zeros(2, 1, size, size)
    assert model(images).shape == (2, 10)
    assert model.features(images).shape == (2, 64, 1, 1)


@pytest.mark.parametrize("size", [8, 16, 32])
def test_resnet20_takes_8_to_32_pixels(size: int) -> None:
    model = build("resnet20", 7, width=0.125, in_channels=1, image_size=size, seed=0)
    assert model(torch.zeros(2, 1, size, size)).shape == (2, 7)


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_a_function_of_the_seed_and_the_global_state_is_left_alone(name: str) -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        model = build(name, 10, width=0.125, in_channels=3, image_size=8, seed=seed)
        return list(model.state_dict().values())

    state = torch.get_rng_state()
    first = weights(1)
    torch.manual_seed(5)
    again, other = weights(1), weights(2)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(first, other, strict=True))
    torch.set_rng_state(state)
    weights(3)
    assert torch.equal(torch.get_rng_state(), state)


def test_resnet20_starts_kaiming_normal_and_vgg11_xavier_uniform_with_zero_biases() -> None:
    weight = resnet20(10).stages[2][1].conv1.weight.detach()
    assert float(weight.std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    assert float(weight.abs().max()) > 3 * float(weight.std())  # not uniform
    bound = 2**0.5 * (6 / (2 * 512 * 9)) ** 0.5
    vgg = vgg11(10)
    (*_, last) = (m.weight.detach() for m in vgg.modules() if isinstance(m, nn.Conv2d))
    assert float(last.abs().max()) == pytest.approx(bound, rel=1e-3)
    for model in (vgg, resnet20(10)):
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                assert not parameter.any()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet34", {}, "unknown model 'resnet34': choose one of vgg11, resnet20, resnet18"),
        ("resnet20", {"width": 0}, "width is 0: give a finite number above 0"),
        ("vgg11", {"width": -1.0}, "width is -1.0: give a finite number above 0"),
        ("vgg11", {"image_size": 12}, "vgg11 takes images of 2, 4, 8, 16 or 32 pixels, not 12"),
        ("vgg11", {"image_size": 1}, "vgg11 needs images of at least 2 pixels, not 1"),
        ("resnet20", {"image_size": 2}, "resnet20 needs images of at least 4 pixels, not 2"),
        ("resnet18", {"image_size": 4}, "resnet18 needs images of at least 8 pixels, not 4"),
        ("resnet18", {"width": 0}, "width is 0: give a finite number above 0"),
    ],
)
def test_a_model_that_there_is_not_is_refused(
    name: str, options: dict[str, float], message: str
) -> None:
    values: dict[str, Any] = {"width": 1, "in_channels": 3, "image_size": 8, "seed": 0} | options
    with pytest.raises(ValueError, match=message):
        build(name, 10, **values)
