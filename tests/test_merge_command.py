"""``npmerge merge``: two checkpoints in, a third out, or one line that says what is wrong and nothing written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import assert_same_state
from torch import Tensor, nn
from torch.nn.functional import one_hot

import npmerge as npm
from npmerge.cli import main
from npmerge.data import load
from npmerge.data.user import Preprocessing, open_data
from npmerge.merge_command import MergeOptions, alpha_path, merge_checkpoints
from npmerge.methods import METHODS
from npmerge.models import resnet20
from npmerge.models.outside import build_outside, load_folder
from npmerge.store.checkpoints import load_into, load_state, save_state
from npmerge.training import fit, piecewise_linear, warmup_cosine

MODEL = ["--model", "resnet20", "--width", "0.125", "--data", "digits", "--image-size", "4"]
QUICK = ["--epochs", "1", "--device", "cpu", "--quiet"]
load_once = cache(load)
OPTIONS = MergeOptions(
    "resnet20", "digits", width=0.125, image_size=4, options={"aggregate": {"epochs": 1}}
)


def factory(classes: int) -> nn.Module:
    """The same network as the checkpoints', for ``--model``."""
    return resnet20(classes, 0.125, in_channels=1)


def of_colour(classes: int) -> nn.Module:
    return resnet20(classes, 0.125)


def of_three_classes(_classes: int) -> nn.Module:
    return resnet20(3, 0.125, in_channels=1)


def without_module(classes: int) -> int:
    return classes


def of_two(_first: int, _second: int) -> None:
    pytest.fail("called")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    data, folder = load("digits", image_size=4), tmp_path_factory.mktemp("trained")
    written = []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        model = resnet20(10, 0.125, in_channels=1, generator=generator)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        fit(model, data.train_batches(100, seed=seed), optimizer, epochs=1)
        save_state(folder / "model.safetensors", model.state_dict(), {})
        written.append((folder / "model.safetensors").read_bytes())
    return written[0], written[1]


@pytest.fixture
def here(
    trained: tuple[bytes, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, bytes]:
    """The current folder holds the two checkpoints; their contents."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("npmerge.data.load", load_once)
    files = dict(zip(("a.safetensors", "b.safetensors"), trained, strict=True))
    for name, content in files.items():
        Path(name).write_bytes(content)
    return files


def contents() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path().iterdir() if path.is_file()}


def merge(*words: str, a: str = "a.safetensors", b: str = "b.safetensors") -> int:
    return main(["merge", a, b, "--output", "m.safetensors", *MODEL, *QUICK, *words])


def averaged(*words: str) -> int:
    command = ["merge", "a.safetensors", "b.safetensors", "--output", "m.safetensors", *MODEL]
    return main([*command, "--aggregate", "mean", "--device", "cpu", "--quiet", *words])


def printed(out: str) -> dict[str, tuple[float, float]]:
    rows = [line.split() for line in out.splitlines()[1:-1]]
    return {name: (float(top1.rstrip("%")), float(loss)) for name, top1, loss in rows}


def model_of(state: dict[str, Tensor]) -> nn.Module:
    model = factory(10)
    model.load_state_dict(state)
    return model.eval()


def metadata(path: str) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["merge"])
        return found


def test_the_written_models_score_what_the_table_says(
    here: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge() == 0
    out, _ = capsys.readouterr()
    assert out.splitlines()[-1] == "m.safetensors"
    table = printed(out)
    assert list(table) == ["A", "B", "ensemble", "mean", "merged"]
    after = contents()
    assert here.items() <= after.items()  # the checkpoints are as they were
    assert after.keys() - here.keys() == {"m.safetensors", "m.alpha.safetensors", "m.md"}
    test = load("digits", image_size=4).plain_batches("test", 500)
    for row, name in (("A", "a"), ("B", "b"), ("merged", "m")):
        found = npm.evaluate.score(model_of(load_file(f"{name}.safetensors")), test)
        assert (found.top1, found.loss) == pytest.approx(table[row], abs=1e-2)
    how = metadata("m.safetensors")
    assert how["options"]["align"] == "permute"
    assert how["options"]["options"]["aggregate"] == {"epochs": 1}
    assert how["scored_on"] == "test"
    assert how["scores"]["merged"]["accuracy"] == pytest.approx(table["merged"][0], abs=1e-2)
    assert how == metadata("m.alpha.safetensors")


def test_it_does_what_the_library_does(here: dict[str, bytes]) -> None:
    """Aligned on the plain images, alpha learned on the augmented ones, batch norm reset on these too."""
    data = load("digits", image_size=4)
    plain = data.plain_batches("train", 500)
    merge_checkpoints(["a.safetensors", "b.safetensors"], "m.safetensors", OPTIONS)
    a, b = (load_into(factory(10), f"{name}.safetensors") for name in "ab")
    aligned = npm.align.permute(a, b, plain).apply(b)
    learned = npm.aggregate.np_merge(a, aligned, data.train_batches(500), epochs=1)
    expected = npm.reset_batchnorm(learned.model, data.train_batches(500)).state_dict()
    got = load_file("m.safetensors")
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert torch.allclose(value, expected[name], atol=1e-4), name
    alpha = load_file(alpha_path(Path("m.safetensors")))
    assert alpha.keys() == learned.alpha.keys()
    assert all(((v > 0) & (v < 1)).all() for v in alpha.values())
    assert any((v != 0.5).any() for v in alpha.values())


@pytest.mark.parametrize("align", ["identity", "weight_matching", "cca"])
def test_every_alignment_can_be_averaged(
    align: str, here: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    assert averaged("--align", align, "--seed", "3") == 0
    table = printed(capsys.readouterr().out)
    assert table["mean"] == table["merged"]
    # a mean has no alpha to keep
    assert contents().keys() - here.keys() == {"m.safetensors", "m.md"}


def test_fine_tuning_and_force_leave_no_alpha_of_another_merge(here: dict[str, bytes]) -> None:
    for name in ("m.safetensors", "m.alpha.safetensors", "m.md"):
        Path(name).write_text("old")
    assert merge("--aggregate", "finetune", "--force") == 0
    assert contents().keys() - here.keys() == {"m.safetensors", "m.md"}
    assert Path("m.md").read_text() != "old"
    assert metadata("m.safetensors")["options"]["aggregate"] == "finetune"


def test_pickled_state_dicts_and_a_factory_give_the_same_model(here: dict[str, bytes]) -> None:
    for name in ("a.pt", "b.pth"):
        torch.save(load_file(Path(name).with_suffix(".safetensors")), name)
    named = replace(OPTIONS, aggregate="mean", options={})
    mine = replace(named, model="test_merge_command:factory", width=None)
    scores = merge_checkpoints(["a.safetensors", "b.safetensors"], "x.safetensors", named)
    assert scores == merge_checkpoints(["a.pt", "b.pth"], "y.safetensors", mine)
    assert_same_state(load_file("x.safetensors"), load_file("y.safetensors"))


def test_more_than_two_checkpoints_are_merged_in_a_tournament(
    here: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("c.safetensors").write_bytes(here["b.safetensors"])
    command = ["merge", *(f"{name}.safetensors" for name in "abc"), "--output", "m.safetensors"]
    assert main([*command, *MODEL, *QUICK]) == 0
    assert list(printed(capsys.readouterr().out)) == ["A", "B", "C", "ensemble", "merged"]
    one = ["merge", "a.safetensors", "--output", "x.safetensors", *MODEL, *QUICK]
    assert_one_line(one, "only 1 checkpoint is given: merge two or more", capsys)


def test_options_of_methods_are_given_by_name(
    here: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    """All of A is A itself, but for its batch norm."""
    assert (
        averaged("--align", "identity", "--aggregate-option", "alpha=1.0", "--correct", "none") == 0
    )
    table = printed(capsys.readouterr().out)
    assert table["merged"] == table["A"] != table["B"]


def test_a_folder_that_cannot_be_written_is_found_before_the_work(
    here: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").write_text("in the way")
    monkeypatch.setattr("npmerge.merging.Merger.align", lambda *_: pytest.fail("worked"))
    assert_refused(["--output", "file/m.safetensors"], "file", capsys)


def damaged(name: str, change: Any) -> None:
    state = load_file(f"{name}.safetensors")
    change(state)
    save_file(state, f"{name}.safetensors")


def rename(state: dict[str, Tensor]) -> None:
    state["extra"] = torch.zeros(2)


def drop(state: dict[str, Tensor]) -> None:
    del state["bn.bias"]


def poison(state: dict[str, Tensor]) -> None:
    state["conv.weight"][0] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename, "b.safetensors does not fit the model: the checkpoint has 'extra'"),
        (drop, "b.safetensors does not fit the model: the model has 'bn.bias'"),
        (poison, "b.safetensors holds values in 'conv.weight' that are not finite"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    change: Any, message: str, here: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    damaged("b", change)
    assert_refused([], message, capsys)


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
@pytest.mark.parametrize("kept", [0, 7, 60, 9_000, -1])
def test_a_truncated_checkpoint_is_named(
    kept: int, ending: str, here: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(f"b.{ending}")
    if ending == "pt":
        torch.save(load_file("b.safetensors"), path)
    path.write_bytes(path.read_bytes()[:kept])
    assert_refused([], f"{path} is damaged or not a checkpoint (", capsys, b=path.name)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_a_flipped_bit_is_read_or_refused(zipped: bool, tmp_path: Path) -> None:
    """Whatever the unpickler makes of damaged bytes, it is a state dict or a ValueError that names the file."""
    path, state = tmp_path / "a.pt", {"w": torch.ones(3), "v": torch.zeros(2)}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    refused: list[str] = []
    for position in range(0, len(whole), 9):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 128]) + whole[position + 1 :])
        try:
            assert all(isinstance(value, Tensor) for value in load_state(path).values())
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 5
    assert all(message.startswith(f"{path} ") for message in refused)


@pytest.mark.parametrize(
    "content", [b"no checkpoint", b"\x80\x02.", b"\x80\x02]q\x00.", b"{}" * 50]
)
def test_other_files_are_no_checkpoints(
    content: bytes, here: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("b.pt").write_bytes(content)
    assert_refused([], "b.pt is damaged or not a checkpoint (", capsys, b="b.pt")


@pytest.mark.parametrize("held", [[1, 2], {}, {"state_dict": {"w": 1}, "epoch": 3}])
def test_a_pickle_of_something_else_is_no_state_dict(
    held: object, here: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(held, "b.pt")
    assert_refused([], "b.pt holds no plain state dict: save model.state_dict()", capsys, b="b.pt")


def test_a_base_is_a_checkpoint_too_and_named_where_it_is_missing(
    here: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["merge", "a.safetensors", "b.safetensors", "--output", "m.safetensors", *MODEL]
    command += ["--aggregate", "wise_ft", "--aggregate-option", "alpha=1.0", "--quiet"]
    assert main(command) == 1
    assert "wise_ft needs the model that the others were trained from: give --base" in (
        capsys.readouterr().err
    )
    assert main([*command, "--base", "c.safetensors"]) == 1
    assert "no file c.safetensors" in capsys.readouterr().err
    Path("c.safetensors").write_bytes(here["a.safetensors"])
    assert main([*command, "--base", "c.safetensors", "--correct", "none"]) == 0
    merged, a, b = (load_file(f"{name}.safetensors") for name in "mab")
    for (
        name,
        value,
    ) in merged.items():  # all the way to the mean of the models, which nothing has aligned
        if value.is_floating_point():
            assert torch.allclose(value, (a[name] + b[name]) / 2, atol=1e-6), name
    how = metadata("m.safetensors")
    assert how["options"]["align"] == "identity"
    assert how["options"]["base"] == "c.safetensors"
    assert [one["file"] for one in how["checkpoints"]] == [f"{name}.safetensors" for name in "abc"]


def test_the_list_explains_every_method_and_needs_nothing_else(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["merge", "--list"])
    assert stop.value.code == 0
    listed = capsys.readouterr().out
    for name, one in METHODS.items():
        assert f"  {name} ({one.label}): {one.summary}" in listed
        assert one.use in listed
    assert "aggregate, needs common base" in listed


def test_a_pickled_module_is_not_run(
    here: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(nn.Linear(2, 2), "b.pt")
    assert_refused([], "checkpoint (it is not a pickle of tensors alone)", capsys, b="b.pt")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--width", "0.25"],
            "a.safetensors does not fit the model: 'conv.weight' is (4, 1, 3, 3)",
        ),
        (["--model", "vgg11"], "does not fit the model: the model has 'features.0.weight'"),
        (["--model", "lenet"], "unknown model 'lenet': choose one of vgg11, resnet20"),
        (["--data", "mnist"], "unknown data set 'mnist'"),
        (["--image-size", "3"], "image_size is 3: it must divide the 8 pixels of digits"),
        (["--align", "magic"], "unknown alignment 'magic': choose one of identity, permute"),
        (
            ["--aggregate", "sum"],
            "unknown aggregation 'sum': choose one of mean, ",
        ),
        (["--epochs", "-1"], "epochs is -1"),
        (["--lr", "nan"], "lr is nan"),
        (["--batch-size", "0"], "batch_size is 0"),
        (["--device", "abacus"], "device 'abacus' is not here"),
        (["--device", "a b"], "device is 'a b': give auto, cpu, cuda"),
        (["--width", "inf"], "width is inf: give a finite number above 0, at most 100"),
        (
            ["--aggregate-option", "colour=1"],
            "np_merge has no option 'colour': its options are epochs",
        ),
        (["--align-option", "ridge"], "option 'ridge' has no value: write NAME=VALUE"),
        (["--many", "magic"], "unknown many 'magic': choose one of tournament"),
        (["--correct", "magic"], "unknown correction 'magic': choose one of reset_batchnorm"),
        (["--aggregate", "mean"], "mean has no option 'epochs': its options are alpha"),
        (["--output", "m.pt"], "output is m.pt: give a name that ends in .safetensors"),
        (["--output", "a.safetensors"], "output a.safetensors is one of the checkpoints"),
        (["--output", "./b.safetensors", "--force"], "is one of the checkpoints"),
        (["--model", "test_merge_command:factory"], "width is 0.125: it is for vgg11, resnet20"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    words: list[str],
    message: str,
    here: dict[str, bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert_refused(words, message, capsys)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nowhere:factory",
            "model factory 'nowhere:factory' does not work (ModuleNotFoundError: No",
        ),
        (":factory", "model factory ':factory' does not work ("),
        ("test_merge_command:absent", "has no attribute 'absent'"),
        (
            "test_merge_command:of_two",
            "factory 'test_merge_command:of_two' does not work (TypeError: of_two()",
        ),
        ("test_merge_command:without_module", "gave a int, not a module"),
        (
            "torchvision:resnet19",
            "model factory 'torchvision:resnet19' does not work (ValueError: Unknown",
        ),
        ("timm:resnet19", "model factory 'timm:resnet19' does not work (RuntimeError: Unknown"),
        ("test_merge_command:of_colour", "must take a batch of digits, (1, 1, 4, 4), (1,): "),
        ("test_merge_command:of_three_classes", ", and give 10 logits, not 3: change the model"),
    ],
)
def test_a_factory_that_does_not_work_is_refused(
    name: str, message: str, here: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["merge", "a.safetensors", "b.safetensors", "--output", "m.safetensors"]
    command += ["--model", name, "--data", "digits", "--image-size", "4", *QUICK]
    assert_one_line(command, message, capsys)


def test_a_missing_checkpoint_is_named(
    here: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused([], "no file c.pt: give a checkpoint", capsys, b="c.pt")


@pytest.mark.parametrize("name", ["m.safetensors", "m.alpha.safetensors", "m.md"])
def test_an_output_that_exists_is_kept(
    name: str, here: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    Path(name).write_text("mine")
    assert_refused([], f"output {name} exists already: give another name, or --force", capsys)


def test_a_write_that_fails_leaves_the_folder_as_it_was(
    here: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, *_: object) -> None:
        path.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr("npmerge.store.checkpoints.save_state", full)
    assert_refused([], "disk full", capsys)


def test_an_interrupt_says_that_nothing_was_written(
    here: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("npmerge.merging.Merger.align", interrupt)
    assert merge() == 130
    assert capsys.readouterr().err == "npmerge: stopped; nothing was written\n"
    assert contents() == here


def assert_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], b: str = "b.safetensors"
) -> None:
    command = ["merge", "a.safetensors", b, "--output", "m.safetensors", *MODEL, *QUICK, *words]
    assert_one_line(command, message, capsys)


def assert_one_line(command: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents()
    assert main(command) == 1
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.strip().splitlines()
    assert line.startswith("npmerge: ")
    assert message in line
    assert contents() == before


# Data of one's own


def pictures(
    folder: Path, parts: Sequence[str], count: int = 6, size: tuple[int, int] = (9, 7)
) -> None:
    """Grey pictures of ten classes, each of another brightness."""
    generator = torch.Generator().manual_seed(0)
    for part in parts:
        for label in range(10):
            place = folder / part / f"class{label}"
            place.mkdir(parents=True)
            for number in range(count):
                noise = torch.randint(20, size, generator=generator) + 20 * label
                Image.fromarray(noise.to(torch.uint8).numpy()).save(place / f"{number}.png")


def seven(image: Image.Image) -> Tensor:
    assert image.size == (7, 9)
    return torch.full((1, 4, 4), 7.0)


def batches(batch_size: int, image_size: int) -> dict[str, Any]:
    data = load("digits", image_size=image_size)
    return {
        "train": data.plain_batches("train", batch_size),
        "test": data.plain_batches("test", batch_size),
    }


def three(batch_size: int) -> tuple[Any, ...]:
    data = batches(batch_size, 4)
    return data["train"], data["test"], None


def listed() -> list[Any]:
    return list(batches(500, 4)["test"])


def nothing() -> dict[str, Any]:
    return {"training": []}


def squares(outputs: Tensor, batch: Any) -> Tensor:
    return (outputs.softmax(1) - one_hot(batch[-1], 10)).square().mean()


def hits(outputs: Tensor, batch: Any) -> Tensor:
    return (outputs.argmax(1) == batch[-1]).double().mean()


MINE = ["--model", "resnet20", "--width", "0.125", "--quiet", "--device", "cpu"]


def own(*words: str) -> int:
    return main(
        ["merge", "a.safetensors", "b.safetensors", "--output", "m.safetensors", *MINE, *words]
    )


def test_a_folder_of_images_is_cut_to_size_and_normalised(
    here: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(Path("images"), ["train", "val", "test"])
    words = ["--data", "images", "--image-size", "4", "--mean", "0.5", "--std", "0.25"]
    assert own(*words, "--epochs", "2", "--batch-size", "16", "--history", "h.csv") == 0
    assert list(printed(capsys.readouterr().out)) == ["A", "B", "ensemble", "mean", "merged"]
    how = metadata("m.safetensors")
    assert how["scored_on"] == "test"
    assert "validation" in Path("h.csv").read_text().splitlines()[0]
    parts = open_data("images", Preprocessing(4, (0.5,), (0.25,)), batch_size=16)
    assert parts.classes == 10
    pixels, labels = (torch.cat(part) for part in zip(*parts.judged[1], strict=True))
    assert pixels.shape == (60, 1, 4, 4)
    assert labels.tolist() == sorted([*range(10)] * 6)
    shades = torch.tensor([pixels[labels == k].mean() for k in range(10)])
    expected = ((9.5 + 20 * torch.arange(10)) / 255 - 0.5) / 0.25
    assert torch.allclose(shades, expected, atol=0.1)
    orders = [[y.tolist() for _, y in parts.learn(seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_an_image_that_a_process_cannot_decode_is_named_in_one_line(
    here: dict[str, bytes], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures(Path("images"), ["train"])
    damaged = next(Path("images").rglob("*.png"))
    damaged.write_bytes(damaged.read_bytes()[:20])
    monkeypatch.setattr("npmerge.data.user.MANY", 0)
    words = ["--data", "images", "--image-size", "4", "--mean", "0.5", "--std", "0.25"]
    assert own(*words) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"npmerge: {damaged} cannot be decoded")


def test_a_folder_without_parts_is_training_data_of_which_a_share_is_held_out(
    here: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(Path("images"), ["."])
    words = ["--data", "images", "--transform", "test_merge_command:seven", "--epochs", "1"]
    assert own(*words) == 0
    assert metadata("m.safetensors")["scored_on"] == "train"
    assert own(*words, "--validation", "0.25", "--force") == 0
    assert metadata("m.safetensors")["scored_on"] == "validation"
    parts = open_data(
        "images", Preprocessing(transform="test_merge_command:seven"), batch_size=9, validation=0.25
    )
    assert parts.validation is not None
    counts = [
        sum(len(y) for _, y in data) for data in (parts.train, parts.learn(0), parts.validation)
    ]
    assert counts == [45, 45, 15]
    assert all((x == 7).all() for x, _ in parts.train)


@pytest.mark.parametrize(
    ("function", "scored_on"), [("batches", "test"), ("three", "validation"), ("listed", "train")]
)
def test_data_may_come_from_a_function(
    function: str, scored_on: str, here: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", f"test_merge_command:{function}", "--image-size", "4", "--classes", "10"]
    assert own(*words, "--epochs", "1") == 0
    mine = printed(capsys.readouterr().out)
    assert metadata("m.safetensors")["scored_on"] == scored_on
    test = load("digits", image_size=4).plain_batches("test", 500)
    known = npm.evaluate.score(model_of(load_file("a.safetensors")), test)
    assert mine["A"] == pytest.approx((known.top1, known.loss), abs=1e-2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "nowhere:data"], "data 'nowhere:data' does not work (ModuleNotFoundError: No"),
        (["--data", "test_merge_command:nothing"], "gave other parts than train, validation and"),
        (["--data", "test_merge_command:listed", "--classes", "10", "--validation", "0.1"], "own parts"),
        (["--data", "test_merge_command:listed"], "resnet20 is a network for images: give data of"),
        (["--data", "images"], "the size of the images is not known: give image_size"),
        (["--data", "images", "--image-size", "4", "--mean", "1", "2"], "one or three of each"),
        (["--data", "images", "--image-size", "4", "--std", "0"], "give one or three of each"),
        (["--data", "images", "--image-size", "4", "--validation", "1"], "a share between 0 and 1"),
        (["--data", "empty", "--image-size", "4"], "Couldn't find any class folder in empty"),
        (["--data", "digits", "--mean", "1"], "digits has its own mean, std and transform"),
        (["--data", "digits", "--image-size", "4", "--patience", "2"], "patience is 2: give at lea"),
        (["--data", "digits", "--schedule", "step"], "unknown schedule 'step': choose one of linear"),
        (["--data", "digits", "--schedule", "linear", "--aggregate", "mean"], "mean does not learn"),
        (["--data", "digits", "--history", "h.txt"], "history is h.txt: give a name that ends in"),
        (["--data", "digits", "--align", "x.safetensors"], "x.safetensors"),
        (["--data", "digits", "--loss", "test_merge_command:absent"], "loss 'test_merge_command:abs"),
        (["--data", "digits", "--output", "a.md"], "output is a.md: give a name that ends in"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_one_s_own_is_said_in_one_line(
    words: list[str], message: str, here: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(Path("images"), ["train"])
    Path("empty").mkdir()
    command = [
        "merge",
        "a.safetensors",
        "b.safetensors",
        "--output",
        "m.safetensors",
        *MINE,
        *words,
    ]
    assert_one_line(command, message, capsys)


def test_without_an_output_or_a_model_it_says_so(
    here: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["merge", "a.safetensors", "b.safetensors", "--data", "digits", "--quiet"]
    assert_one_line([*command, "--model", "resnet20"], "no output: give --output, or", capsys)
    message = "the model of a.safetensors is not known: give --model vgg11"
    assert_one_line([*command, "--output", "m.safetensors"], message, capsys)


# Validation, a loss and a metric, what is kept beside


def test_learning_stops_when_a_metric_gets_no_better_and_the_history_is_written(
    here: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--loss", "test_merge_command:squares", "--metric", "test_merge_command:hits"]
    words += ["--validation", "0.2", "--patience", "1", "--epochs", "30", "--lr", "0.3"]
    assert merge(*words, "--history", "h.json") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["metric", "loss"]
    assert [line.split()[0] for line in out[1:-1]] == ["A", "B", "mean", "merged"]
    history = json.loads(Path("h.json").read_text())
    values = [row["validation"] for row in history]
    assert len(values) < 30
    assert values[-1] <= max(values[:-1])  # it stopped at the first epoch that was no better
    assert values[:-1] == sorted(set(values[:-1]))
    assert all(row["loss"] < 1 for row in history)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [("linear", piecewise_linear(2, 0)), ("cosine", warmup_cosine(2, 0))],
)
def test_the_learning_rate_falls_as_asked(
    name: str, schedule: Callable[[float], float], here: dict[str, bytes]
) -> None:
    assert merge("--epochs", "2", "--lr", "0.3", "--schedule", name) == 0
    written = load_file("m.safetensors")
    a, b = (model_of(load_file(f"{one}.safetensors")) for one in "ab")
    parts = open_data("digits", Preprocessing(image_size=4), batch_size=500)
    again, constant = (
        npm.merge(
            [a, b],
            parts.train,
            learn_on=parts.learn,
            schedule=one,
            aggregate_options={"epochs": 2, "lr": 0.3},
        ).model.state_dict()
        for one in (schedule, None)
    )
    weight = "head.weight"
    assert torch.allclose(written[weight], again[weight], atol=1e-5)
    assert not torch.allclose(written[weight], constant[weight], atol=1e-3)


def test_an_alignment_is_saved_and_used_again(
    here: dict[str, bytes], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert averaged("--save-alignment", "found.safetensors") == 0
    first = printed(capsys.readouterr().out)
    monkeypatch.setattr(
        "npmerge.align.correlation.covariances", lambda *_, **__: pytest.fail("again")
    )
    assert averaged("--align", "found.safetensors", "--force") == 0
    assert printed(capsys.readouterr().out) == first
    three = ["merge", *["a.safetensors"] * 3, "--output", "x.safetensors", *MODEL]
    assert_one_line([*three, "--save-alignment", "y.safetensors"], "is for two models", capsys)


def test_a_report_looks_and_writes_nothing(
    here: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", "a.safetensors", "b.safetensors", "--report", *MODEL, "--quiet"]) == 0
    out = capsys.readouterr().out
    a, b = (model_of(load_file(f"{name}.safetensors")) for name in "ab")
    data = load("digits", image_size=4)
    found = npm.inspect(
        a, b, data.plain_batches("train", 500), learn_on=lambda seed: data.train_batches(500, seed=seed),
        judged=data.plain_batches("test", 500),
    )  # fmt: skip
    assert out == f"{found}\n"
    assert contents() == here


def test_a_model_card_says_what_went_in_and_what_came_out(here: dict[str, bytes]) -> None:
    assert merge("--seed", "7", "--lr", "0.02") == 0
    card, how = Path("m.md").read_text(), metadata("m.safetensors")
    for name in ("a", "b"):
        digest = hashlib.sha256(here[f"{name}.safetensors"]).hexdigest()
        assert f"| `{name}.safetensors` | `{digest}` |" in card
    assert "| aggregate | `np_merge` | epochs = `1`, lr = `0.02` |" in card
    assert "| align | `permute` | defaults |" in card
    assert "| seed | `7` |" in card
    best = how["scores"]["merged"]
    assert f"| merged | {best['accuracy']:.4f} | {best['loss']:.4f} |" in card
    assert f"torch {torch.__version__.partition('+')[0]}" in card
    assert "## Scores (test data)" in card


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_written_as_it_came(dtype: torch.dtype, here: dict[str, bytes]) -> None:
    for name in "ab":
        state = load_file(f"{name}.safetensors")
        save_file(
            {n: v.to(dtype) if v.is_floating_point() else v for n, v in state.items()},
            f"{name}.safetensors",
        )
    assert merge() == 0
    found = load_file("m.safetensors")
    assert {v.dtype for v in found.values() if v.is_floating_point()} == {dtype}
    assert factory(10).load_state_dict(found)


# Models of other libraries


def tiny_vit(num_classes: int) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", num_classes=num_classes, img_size=8, patch_size=4, depth=2,
        embed_dim=24, num_heads=3,
    )  # fmt: skip
    return model


def with_any_keyword(*, weights: str | None = None, **more: Any) -> nn.Module:
    assert weights is None
    return resnet20(more["num_classes"], 0.125)


def sized(width: int = 3) -> nn.Module:
    assert width == 3
    return resnet20(10, 0.125)


@pytest.mark.parametrize(
    "name",
    [
        "torchvision:resnet18", "timm:resnet10t", "torchvision.models:resnet18",
        "timm.models:resnet18", "test_merge_command:tiny_vit", "test_merge_command:of_colour",
        "test_merge_command:with_any_keyword", "test_merge_command:sized",
    ],
)  # fmt: skip
def test_a_network_of_a_library_is_built_without_a_download(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda *_, **__: pytest.fail("asked"))
    model = build_outside(name, 10).eval()
    assert model(torch.zeros(2, 3, 8, 8)).shape == (2, 10)
    if "sized" not in name:
        with pytest.raises(ValueError, match="the number of classes is not known, give --classes"):
            build_outside(name, None)


def test_folders_of_hugging_face_become_a_folder_that_from_pretrained_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        config = transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            image_size=8, patch_size=4, num_labels=10,
        )  # fmt: skip
        transformers.ViTForImageClassification(config).to(torch.bfloat16).save_pretrained(name)
        processor = transformers.ViTImageProcessor(
            size={"height": 8, "width": 8}, image_mean=[0.4] * 3
        )
        processor.save_pretrained(name)
        Path(name, "vocabulary.txt").write_text("words")
        Path(name, "README.md").write_text("mine")
    pictures(Path("images"), ["train", "test"])
    capsys.readouterr()
    command = ["merge", "a", "b", "--output", "m", "--data", "images", "--epochs", "1"]
    command += ["--device", "cpu", "--quiet"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "m"
    assert err == ""  # no bar but ours
    assert {path.name for path in Path("m").iterdir()} == {
        "README.md", "alpha.safetensors", "config.json", "model.safetensors",
        "preprocessor_config.json", "vocabulary.txt",
    }  # fmt: skip
    model = transformers.ViTForImageClassification.from_pretrained("m", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert "## Scores (test data)" in Path("m/README.md").read_text()
    test = open_data("images", Preprocessing(8, (0.4,) * 3, (0.5,) * 3), batch_size=500).judged[1]
    found = npm.evaluate.score(model.float(), test)
    assert printed(out)["merged"][1] == pytest.approx(found.loss, abs=2e-2)
    before = {name: Path(name, "model.safetensors").read_bytes() for name in "abm"}
    assert main(command) == 1
    assert "output m exists already" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0
    assert Path("a/model.safetensors").read_bytes() == before["a"]
    assert not list(Path().glob(".*"))
    Path("b/config.json").write_text("{}")
    assert main([*command, "--force"]) == 1
    assert "npmerge: b cannot be loaded by transformers (" in capsys.readouterr().err
    assert Path("m/model.safetensors").read_bytes() == before["m"]


def test_a_folder_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["classifier.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"does not fit a ViTFor.*: missing keys: classifier\.weight"
    ):
        load_folder(tmp_path)


@torch.library.custom_op("npmerge_tests::kept", mutates_args=())
def kept(x: Tensor) -> Tensor:
    return x.clone()


class Unknown(resnet20(10, 0.125, in_channels=1).__class__):  # type: ignore[misc]
    """The checkpoints' network with an operation without a rule behind it."""

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = torch.ops.npmerge_tests.kept(super().forward(images))
        return logits


def of_unknown(classes: int) -> nn.Module:
    model = factory(classes)
    model.__class__ = Unknown
    return model


def test_an_operation_without_a_rule_is_refused_or_what_it_touches_held(
    here: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["merge", "a.safetensors", "b.safetensors", "--output", "m.safetensors"]
    command += ["--model", "test_merge_command:of_unknown", "--data", "digits", "--image-size", "4"]
    command += ["--aggregate", "mean", "--device", "cpu", "--quiet"]
    assert_one_line(command, "kept", capsys)
    assert main([*command, "--hold-unknown"]) == 0
    assert "| hold_unknown | `True` |" in Path("m.md").read_text()
