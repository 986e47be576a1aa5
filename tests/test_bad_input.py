"""Bad input ends in one line that says the value, what is wrong and what to do: no traceback, and no wrong result."""

from __future__ import annotations

import io
import math
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import CLASSES, loader, net
from torch import Tensor, nn

import npmerge as npm
from npmerge import cli
from npmerge.aggregate import fisher, mean, np_merge, uniform_soup
from npmerge.align import covariances, permute, weight_matching
from npmerge.cli import main
from npmerge.data import Images
from npmerge.data.batches import Batches
from npmerge.device import pick_device
from npmerge.evaluate import Ensemble, barrier, class_accuracy, ensemble, measure, path, score
from npmerge.models import build
from npmerge.models.outside import build_outside
from npmerge.named import UserCodeError, user_code
from npmerge.store.checkpoints import FLOATING, load_state, read_checked
from npmerge.symmetry import find_symmetry
from npmerge.training import fit

HUGE = 10**20
NOWHERE = math.nan


# What a user may write: a factory, a model, data, a loss, a metric, a transform


def tiny_net(num_classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, num_classes))


def raises_runtime(_classes: int) -> nn.Module:
    raise RuntimeError("boom")


def raises_key(_classes: int) -> nn.Module:
    raise KeyError("boom")


def leaves(_classes: int) -> nn.Module:
    raise SystemExit(0)


class Failing(nn.Sequential):
    """Fails with its third batch, so while it is aligned or scored."""

    seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        if self.seen > 2:
            raise KeyError("boom")
        found: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return found


def fails_late(num_classes: int) -> nn.Module:
    return Failing(*tiny_net(num_classes))


class FailsAtOnce(nn.Sequential):
    def forward(self, *_: Tensor) -> Tensor:
        raise KeyError("boom")


def fails_at_once(num_classes: int) -> nn.Module:
    return FailsAtOnce(*tiny_net(num_classes))


PIXELS = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 2


def good() -> Any:
    return [(PIXELS, LABELS)]


def of_bytes() -> Any:
    return [((255 * PIXELS).to(torch.uint8), LABELS)]


def not_finite() -> Any:
    return [(PIXELS / 0, LABELS)]


def sparse() -> Any:
    return [(PIXELS.to_sparse(), LABELS)]


def number() -> Any:
    return 3


class Broken:
    def __iter__(self) -> Iterator[Any]:
        yield PIXELS, LABELS
        raise KeyError("boom")


def breaks() -> Any:
    return Broken()


def data_leaves() -> Any:
    raise SystemExit(0)


def bad_loss(_outputs: Tensor, _batch: Any) -> Tensor:
    raise KeyError("boom")


def text(_outputs: Tensor, _batch: Any) -> str:
    return "text"


def of_each(outputs: Tensor, _batch: Any) -> Tensor:
    return outputs.sum(1)


def unlearnable(_outputs: Tensor, _batch: Any) -> Tensor:
    return torch.tensor(1.0)


def bad_transform(_image: Any) -> Tensor:
    raise KeyError("boom")


def as_it_is(image: Any) -> Any:
    return image


# Commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of :func:`tiny_net`, and what else is wrong about a third."""
    place = tmp_path_factory.mktemp("bad")
    state = tiny_net(2).state_dict()
    for name in "ab":
        torch.save(tiny_net(2).state_dict(), place / f"{name}.pt")
    first = "0.weight"
    weight = state[first]
    others: dict[str, Any] = {
        "sparse": {first: weight.to_sparse()},
        "meta": {first: weight.to("meta")},
        "complex": {first: weight.to(torch.complex64)},
        "int32": {first: weight.to(torch.int32)},
        "float8": {first: weight.to(torch.float8_e4m3fn)},
        "double": {name: value.double() for name, value in state.items()},
        "nan": {first: weight * math.nan},
        "numbered": {1: weight},
    }
    for name, changed in others.items():
        torch.save({**state, **changed}, place / f"{name}.pt")
    content = bytearray((place / "a.pt").read_bytes())
    with zipfile.ZipFile(place / "a.pt") as file:
        part = next(one for one in file.infolist() if one.filename.endswith("data/0"))
        inside = file.read(part)
    content[content.index(inside)] ^= 1
    (place / "flipped.pt").write_bytes(content)
    (place / "file").write_text("no folder")
    (place / "unfinished.py").write_text("def factory(classes:\n")
    (place / "unset.py").write_text("import os\nos.environ['NPMERGE_IS_NOT_SET']\n")
    for kind in "xy":
        (place / "images" / kind).mkdir(parents=True)
        Image.new("L", (6, 6)).save(place / "images" / kind / "0.png")
    return place


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The folder is the current one, and importable; its files and their sizes."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    return sizes(folder)


def sizes(folder: Path) -> dict[str, int]:
    return {str(file): file.stat().st_size for file in folder.rglob("*.*") if file.suffix != ".pyc"}


def merging(
    *words: str,
    a: str = "a.pt",
    b: str = "b.pt",
    model: str = "test_bad_input:tiny_net",
    data: str = "test_bad_input:good",
) -> list[str]:
    command = ["merge", a, b, "--output", "m.safetensors", "--model", model, "--data", data]
    command += ["--aggregate", "mean", "--classes", "2", "--device", "cpu", "--quiet"]
    return [*command, *words]


def own(name: str) -> str:
    return f"test_bad_input:{name}"


LEARNING = ("--aggregate", "np_merge", "--epochs", "1")
NAMED = ("--width", "0.125")
PICTURES = ("--mean", "0.5", "--std", "0.5")
STORES = ("--results", "r", "--zoo", "z", "--models", "m")

COMMANDS: list[tuple[list[str], str]] = [
    # numbers
    (merging("--width", "inf", model="resnet20"), "width is inf: give a finite number above 0"),
    (merging("--width", "1e9", model="resnet20"), "width is 1000000000.0: give a finite number"),
    (merging("--seed", "-1"), "seed is -1: give a whole number from 0"),
    (merging("--seed", str(HUGE)), f"seed is {HUGE}: give a whole number from 0 to 2^64 - 1"),
    (merging("--classes", "0"), "classes is 0: give a whole number from 1"),
    (merging("--classes", "-3"), "classes is -3: give a whole number from 1"),
    (merging("--batch-size", str(HUGE)), f"batch_size is {HUGE}: give a whole number from 1"),
    (merging("--patience", "1"), "mean does not learn: it has no patience"),
    (merging(*LEARNING, "--epochs", str(HUGE)), f"epochs is {HUGE}: give a whole number from 0 to 1"),
    (merging(*LEARNING, "--lr", "0"), "lr is 0.0: give a finite number above 0"),
    (merging("--aggregate-option", "alpha=nan"), "alpha is 'nan': give a finite number"),
    (merging("--aggregate-option", "alpha=1e999"), "alpha is inf: give a finite number"),
    (merging("--aggregate-option", "alpha=1j"), "alpha is a complex: give a finite number"),
    (merging("--aggregate-option", "alpha=[1]"), "alpha is a list: give a finite number"),
    (merging("--aggregate-option", "alpha=True"), "alpha is True: give a finite number"),
    (
        merging("--align", "weight_matching", "--align-option", "max_sweeps=1.5"),
        "max_sweeps is 1.5: give a whole number",
    ),
    (merging("--image-size", "0", data="images"), "image_size is 0: give a whole number from 1"),
    (merging("--image-size", str(10**8), data="images"), "image_size is 100000000: give a whole"),
    (merging("--image-size", "4", "--std", "inf", data="images"), "mean or std is inf: give a fin"),
    (["run", "same_data", "--seeds", str(HUGE)], f"seed is {HUGE}: give a whole number from 0"),
    (["status", "--seeds", "-1"], "seed is -1: give a whole number from 0"),
    (["book", "--seeds", str(HUGE)], f"seed is {HUGE}: give a whole number from 0"),
    # devices
    (merging("--device", "meta"), "device 'meta' is not here (Cannot copy out of meta tensor"),
    (merging("--device", "mps"), "device 'mps' is not here ("),
    (merging("--device", "privateuseone"), "device 'privateuseone' is not here ("),
    (["run", "same_data", "--device", "meta", *STORES], "device 'meta' is not here"),
    (["status", "--device", "meta", *STORES], "device 'meta' is not here"),
    (["book", "--device", "foo"], "device 'foo' is not here"),
    # files and folders
    (merging(a="sparse.pt"), "sparse.pt holds in '0.weight' a tensor that is sparse, nested"),
    (merging(a="meta.pt"), "meta.pt holds in '0.weight' a tensor that is sparse, nested"),
    (merging(a="complex.pt"), "complex.pt holds in '0.weight' a tensor that is sparse, nested"),
    (merging(a="int32.pt"), "'0.weight' is torch.float32 in the model and torch.int32 in the che"),
    (merging(a="float8.pt"), "'0.weight' is torch.float32 in the model and torch.float8"),
    (merging(a="double.pt"), "'0.weight' has type torch.float64 in the first model and torch.floa"),
    (merging(a="nan.pt"), "nan.pt holds values in '0.weight' that are not finite"),
    (merging(a="numbered.pt"), "numbered.pt holds no plain state dict"),
    (merging(a="flipped.pt"), "flipped.pt is damaged or not a checkpoint (the checksum of"),
    (merging(a="a\0.pt"), r"checkpoints is 'a\x00.pt': give UTF-8"),
    (merging(a="a\udcff.pt"), r"checkpoints is 'a\udcff.pt': give UTF-8, and rename a file whose name"),
    (["status", "--zoo", "file"], "zoo is file, a file: give a folder"),
    (["records", "--results", "file"], "results is file, a file: give a folder"),
    (["claims", "--results", "a\0"], r"results is 'a\x00': give UTF-8"),
    # a user's own code
    (merging(model=own("raises_runtime")), "does not work (RuntimeError: boom, "),
    (merging(model=own("raises_key")), "does not work (KeyError: boom, "),
    (merging(model=own("leaves")), "model factory 'test_bad_input:leaves' does not work (SystemExit"),
    (merging(model="unfinished:factory"), "does not work (SyntaxError: '(' was never closed"),
    (merging(model="unset:factory"), "does not work (KeyError: NPMERGE_IS_NOT_SET, "),
    (merging(model=own("fails_at_once")), "model FailsAtOnce does not work (KeyError: boom, "),
    (merging(model=own("fails_late")), "model Failing does not work (KeyError: boom, "),
    (merging(data=own("of_bytes")), "it was given torch.uint8 (1, 1, 4, 4); give what it takes"),
    (merging(data=own("not_finite")), "the inputs of a batch hold values that are not finite"),
    (merging(data=own("sparse")), "a batch holds a tensor that is sparse or without values"),
    (merging(data=own("number")), "data is a int: give something that can be iterated again"),
    (merging(data=own("breaks")), "data (Broken) does not work (KeyError: boom, "),
    (merging(data=own("data_leaves")), "does not work (SystemExit: 0, "),
    (merging(*LEARNING, "--loss", own("bad_loss")), "loss 'bad_loss' does not work (KeyError: boom"),
    (merging(*LEARNING, "--loss", own("text")), "loss 'text' gives str: give one number"),
    (merging(*LEARNING, "--loss", own("of_each")), "loss 'of_each' gives (8,): give one number"),
    (merging(*LEARNING, "--loss", own("unlearnable")), "a tensor that is computed of the model's"),
    (merging("--metric", own("bad_loss")), "metric or loss 'bad_loss' does not work (KeyError: boom"),
    (merging("--metric", own("text")), "metric or loss 'text' does not work (ValueError: could not"),
    (merging("--transform", own("bad_transform"), data="images"), "does not work (KeyError: boom, "),
    (merging("--transform", own("as_it_is"), data="images"), "gave a Image: give a tensor"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), COMMANDS)
def test_a_bad_command_says_in_one_line_what_is_wrong_and_writes_nothing(
    words: list[str], message: str, here: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 1
    out, err = capsys.readouterr()
    said = [line for line in err.splitlines() if line.startswith("npmerge: ")]
    assert out == ""
    assert "Traceback" not in err
    assert len(said) == 1
    assert message in said[0]
    assert sizes(Path()) == {os.path.relpath(name): size for name, size in here.items()}


def test_the_good_command_beside_the_bad_ones_merges(
    here: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(merging()) == 0
    capsys.readouterr()
    for file in ("m.safetensors", "m.md"):
        Path(file).unlink()


def test_the_line_of_a_user_s_own_code_is_named_and_the_traceback_is_shown_if_asked_for(
    here: dict[str, int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NPMERGE_TRACEBACK", "1")
    assert main(merging(model=own("raises_key"))) == 1
    err = capsys.readouterr().err
    line = raises_key.__code__.co_firstlineno + 1
    assert f"does not work (KeyError: boom, {__file__}:{line})" in err.splitlines()[-1]
    assert "Traceback (most recent call last)" in err


def test_the_home_of_somebody_who_is_not_there_is_no_folder_of_data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NPMERGE_DATA", "~nobody-of-that-name/x")
    assert main(["data", "cifar10"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "the folder of cifar10 is '~nobody-of-that-name/x', and there is no such home" in line


def test_memory_that_is_full_is_said_in_one_line(
    here: dict[str, int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for error in (MemoryError(), RuntimeError("can't allocate memory: you tried to allocate 9")):

        def full(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr("npmerge.merging.Merger.align", full)
        assert main(merging()) == 1
        assert capsys.readouterr().err.startswith("npmerge: the memory is full: take a narrower")


def test_an_error_of_npmerge_s_own_making_is_a_traceback(
    here: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what a message explains is cut to a line."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("npmerge.merging.Merger.align", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        main(merging())


def test_a_terminal_without_unicode_is_told_what_it_can_show(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setattr(cli, "_methods", lambda _: sys.stdout.write("\u22120.5 ± 1 → \udcff\n"))
    assert main(["methods"]) == 0
    assert raw.getvalue() == b"-0.5 +- 1 -> ?\n"


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_an_interrupt_while_the_command_is_imported_leaves_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "argparse.py").write_text(
        "import time\nprint('ready', flush=True)\ntime.sleep(60)\n"
    )
    command = [sys.executable, "-m", "npmerge", "methods"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == ""
        assert process.wait() == -signal.SIGINT


def test_a_folder_in_the_place_of_a_file_of_the_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"is a folder where a file belongs: remove it"):
        read_checked(tmp_path, {})


# Calls

A, B = net(0), net(1)
DATA = loader()


def changed(change: Callable[[Tensor], Tensor]) -> Any:
    return [(change(pixels), labels) for pixels, labels in DATA]


BYTES = changed(lambda pixels: pixels.to(torch.uint8))
NAN = changed(lambda pixels: pixels * NOWHERE)
INFINITE = changed(lambda pixels: pixels / 0)
BAD_MODEL = net(0)
with torch.no_grad():
    next(BAD_MODEL.parameters())[0] = NOWHERE


def merged(a: Any = A, b: Any = B, data: Any = DATA, **options: Any) -> Any:
    return npm.merge([a, b], data, **{"aggregate": "mean", **options})


def learned(**options: Any) -> Any:
    return merged(aggregate="np_merge", aggregate_options={"epochs": 1, **options})


def built(**options: Any) -> nn.Module:
    values = {"classes": 2, "width": 0.1, "in_channels": 1, "image_size": 8, "seed": 0} | options
    return build("resnet20", values.pop("classes"), **values)


def batches(**options: Any) -> Batches:
    images = Images(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    return Batches(images, 2, **{"mean": (0.5,), "std": (0.5,), **options})


def trained(**options: Any) -> list[float]:
    model = net()
    lr = options.pop("lr", 0.1)
    return fit(model, DATA, torch.optim.SGD(model.parameters(), lr), **{"epochs": 1, **options})


def of_nothing() -> nn.Module:
    return net().to("meta")


CALLS: dict[str, tuple[Callable[[], object], str]] = {
    # numbers
    "alpha nan": (lambda: mean(A, B, alpha=math.nan), "alpha is nan: give a finite number"),
    "alpha text": (lambda: mean(A, B, alpha="x"), "alpha is 'x': give a finite number"),  # type: ignore[arg-type]
    "alpha of several": (
        lambda: mean(A, B, alpha=torch.tensor([0.1, 0.2])),  # type: ignore[arg-type]
        "alpha is a Tensor: give a finite number",
    ),
    "option nan": (lambda: merged(aggregate_options={"alpha": math.nan}), "alpha is nan: give"),
    "lr 0": (lambda: learned(lr=0), "lr is 0: give a finite number above 0"),
    "lr inf": (lambda: learned(lr=math.inf), "lr is inf: give a finite number above 0"),
    "fit lr 0": (lambda: trained(lr=0), "lr is 0.0: give a finite number above 0"),
    "epochs": (lambda: trained(epochs=HUGE), f"epochs is {HUGE}: give a whole number from 0 to"),
    "half an epoch": (lambda: learned(epochs=0.5), "epochs is 0.5: give a whole number"),
    "seed": (lambda: merged(seed=-1), "seed is -1: give a whole number from 0"),
    "huge seed": (lambda: merged(seed=HUGE), "give a whole number from 0 to 2"),
    "seed of batches": (lambda: batches(seed=-1), "seed is -1: give a whole number"),
    "std 0": (lambda: batches(std=(0.0,)), r"std is \(0.0,\): it must be positive"),
    "mean nan": (lambda: batches(mean=(math.nan,)), "mean or std is nan: give a finite number"),
    "means": (lambda: batches(mean=(0.5, 0.5)), "give one of each for 1 channels"),
    "padding": (lambda: batches(padding=-1), "padding is -1: give a whole number"),
    "classes 0": (lambda: built(classes=0), "classes is 0: give a whole number from 1"),
    "classes 1.5": (lambda: built(classes=1.5), "classes is 1.5: give a whole number from 1"),
    "no channels": (lambda: built(in_channels=0), "in_channels is 0: give a whole number from 1"),
    "width": (lambda: built(width=1e9), "width is 1000000000.0: give a finite number above 0"),
    "image size": (lambda: built(image_size="x"), "image_size is 'x': give a whole number"),
    "seed of a model": (lambda: built(seed=1.5), "seed is 1.5: give a whole number"),
    "topk": (lambda: score(A, DATA, topk=5), r"topk is 5: give several, such as \(1, 5\)"),  # type: ignore[arg-type]
    "topk 1.5": (lambda: score(A, DATA, topk=(1.5,)), "topk is 1.5: give a whole number"),  # type: ignore[arg-type]
    "points": (lambda: path(A, B, DATA, points=2.5), "points is 2.5: give a whole number"),  # type: ignore[arg-type]
    "no points": (lambda: barrier([]), "no points: give those of a path"),
    "floor": (lambda: fisher(A, B, DATA, floor=-1), "floor is -1: give a finite number above 0"),
    "many options": (lambda: merged(many_options={"x": 1}), "many_options is given for two models"),
    # labels
    "fewer classes": (lambda: class_accuracy(A, DATA, 2), "label 3 is out of range: classes is 2"),
    "no classes": (lambda: class_accuracy(A, DATA, 0), "classes is 0: give a whole number from 1"),
    # inputs
    "bytes": (lambda: score(A, BYTES), "it was given torch.uint8 .*; give what it takes, images as"),
    "bytes, fisher": (lambda: fisher(A, B, BYTES), "it was given torch.uint8"),
    "bytes, reset": (lambda: npm.reset_batchnorm(net(), BYTES), "it was given torch.uint8"),
    "nan": (lambda: merged(data=NAN, align="identity"), "of a batch hold values that are not finite"),
    "nan, weights": (lambda: merged(data=NAN, align="weight_matching"), "that are not finite"),
    "infinite": (lambda: covariances(A, B, INFINITE), "of a batch hold values that are not finite"),
    "nan, reset": (lambda: npm.reset_batchnorm(net(), NAN), "of a batch hold values that are not"),
    "no data": (lambda: score(A, None), "data is a NoneType: give something that can be iterated"),  # type: ignore[arg-type]
    "a function": (lambda: score(A, lambda: DATA), "data is a function: give something"),  # type: ignore[arg-type]
    "other keywords": (
        lambda: score(A, [{"x": torch.zeros(2, 3, 8, 8), "labels": torch.zeros(2)}]),
        "model Sequential does not work .TypeError: .* unexpected keyword argument 'x'",
    ),
    # models
    "no model": (lambda: mean(A, "b.pt"), "a model is a str: give a module"),  # type: ignore[arg-type]
    "a state dict": (lambda: score(A.state_dict(), DATA), "a model is a OrderedDict: give a mod"),  # type: ignore[arg-type]
    "a class": (lambda: permute(A, nn.Linear, DATA), "a model is a type: give a module"),  # type: ignore[arg-type]
    "nothing": (lambda: find_symmetry(None, DATA[0][0]), "a model is a NoneType: give a module"),  # type: ignore[arg-type]
    "apply": (lambda: permute(A, B, DATA).apply([]), "a model is a list: give a module"),  # type: ignore[arg-type]
    "a soup": (lambda: uniform_soup([None]), "a model is a NoneType: give a module"),  # type: ignore[list-item]
    "an ensemble": (lambda: Ensemble([3]), "a model is a int: give a module"),  # type: ignore[list-item]
    "ensemble": (lambda: ensemble([3], DATA), r"models\[0\] is a int: give functions"),  # type: ignore[list-item]
    "no values": (lambda: score(of_nothing(), DATA), "on the device meta, it has no values"),
    "no values, B": (lambda: mean(A, of_nothing()), "on the device meta, it has no values"),
    "complex": (lambda: mean(net().to(torch.complex64), B), "torch.complex64: give a model of real"),
    "types": (lambda: covariances(A, net(1).double(), DATA), "torch.float32 in the first model and torch.float64"),
    "half learns": (lambda: np_merge(net().half(), net(1).half(), DATA, epochs=1), "float16 does not"),
    "nan in B": (lambda: merged(b=BAD_MODEL, align="identity"), "the merged model holds values in"),
    # a user's own
    "loss": (lambda: measure(A, DATA, bad_loss), "metric or loss 'bad_loss' does not work .KeyErro"),
    "loss to learn": (lambda: merged(aggregate="finetune", loss=text), "loss 'text' gives str: give"),
    "device": (lambda: merged(device="meta"), "device 'meta' is not here"),
    "short device": (lambda: pick_device("mps"), r"^.{0,200}$"),
    "detector": (lambda: build_outside("torchvision:x", 2), "does not work .ValueError: Unknown mod"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), CALLS.values(), ids=CALLS)
def test_a_bad_call_is_an_error_that_says_what_to_give(
    call: Callable[[], object], message: str
) -> None:
    with pytest.raises((ValueError, ArithmeticError), match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("images", [torch.float64, torch.float16])
@pytest.mark.parametrize("models", FLOATING)
def test_images_and_models_of_any_precision_are_merged_and_scored(
    images: torch.dtype, models: torch.dtype
) -> None:
    data = changed(lambda pixels: pixels.to(images))
    a, b = net(0).to(models), net(1).to(models)
    found = merged(a, b, data)
    assert {parameter.dtype for parameter in found.model.parameters()} == {models}
    assert score(a, data).top1 >= 0
    assert len(class_accuracy(a, data, CLASSES)) == CLASSES
    assert weight_matching(a, b, example=data[0][0]).apply(b) is not b


def test_large_finite_inputs_and_the_infinities_of_masks_are_let_through() -> None:
    """What a sum overflows at is looked at closely; a mask is a dictionary's."""
    large = torch.full((2, 3, 8, 8), 60000.0, dtype=torch.float16)
    score(net(), [(large, torch.zeros(2, dtype=torch.int64))])

    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return (x + mask).softmax(-1)

    batch = {"x": torch.zeros(2, 3), "mask": torch.zeros(2, 3), "labels": torch.zeros(2).long()}
    batch["mask"][:, 1] = -math.inf
    assert score(Masked(), [batch]).top1 == 100
    batch["mask"][:, 2] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        score(Masked(), [batch])


def test_an_error_of_a_user_s_code_keeps_the_first_one_behind_it() -> None:
    with pytest.raises(UserCodeError, match="it does not work") as caught, user_code("it"):
        raise KeyError("boom")
    assert isinstance(caught.value.__cause__, KeyError)
    for passed in (torch.OutOfMemoryError("full"), npm.SymmetryError("known"), KeyboardInterrupt()):
        with pytest.raises(type(passed)), user_code("it"):
            raise passed


def test_a_whole_checkpoint_is_read_as_it_was_written(folder: Path) -> None:
    assert load_state(folder / "a.pt").keys() == tiny_net(2).state_dict().keys()
