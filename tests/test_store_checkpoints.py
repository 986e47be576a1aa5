"""Checked files: every changed byte is found, and whoever makes one and whoever finds it work with the same bytes."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import assert_same_state, net
from torch import Tensor

from npmerge.store.checkpoints import (
    kept,
    load_into,
    load_state,
    read_checked,
    save_state,
    write_checked,
)
from npmerge.store.files import DamagedError, locked

MADE_OF = {"seed": 0, "recipe": {"lr": 0.1, "epochs": (1, 2)}}


def state(seed: int = 0) -> dict[str, Tensor]:
    return net(seed).state_dict()


def write(path: Path, tensors: dict[str, Tensor] | None = None, **about: Any) -> bytes:
    write_checked(path, state() if tensors is None else tensors, {"made_of": MADE_OF, **about})
    return path.read_bytes()


def flipped(content: bytes, place: int, bit: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    return bytes(changed)


def test_what_is_written_is_read_with_all_that_is_said_about_it(tmp_path: Path) -> None:
    content = write(tmp_path / "x", seconds=1.5)
    tensors, about = read_checked(tmp_path / "x", MADE_OF)
    assert_same_state(tensors, state())
    assert about["seconds"] == 1.5
    assert about["made_of"] == {"seed": 0, "recipe": {"lr": 0.1, "epochs": [1, 2]}}
    assert content == write(tmp_path / "y", seconds=1.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "y"]


def test_a_digest_stands_for_the_tensors_and_what_made_them_alone(tmp_path: Path) -> None:
    def digest(tensors: dict[str, Tensor], seconds: float, made_of: dict[str, Any]) -> str:
        write_checked(tmp_path / "x", tensors, {"made_of": made_of, "seconds": seconds})
        found: str = read_checked(tmp_path / "x", made_of)[1]["digest"]
        return found

    first = digest(state(), 1.5, MADE_OF)
    assert digest(dict(reversed(state().items())), 2.5, MADE_OF) == first
    assert digest(state(1), 1.5, MADE_OF) != first
    assert digest(state(), 1.5, MADE_OF | {"seed": 1}) != first
    assert digest(state() | {"8.bias": state()["8.bias"].double()}, 1.5, MADE_OF) != first


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    content = write(path)
    start = content.index(b"}}") + 2  # the first words, and as many of the tensors and their names
    places = [*range(start), *random.Random(0).sample(range(start, len(content)), 300)]
    for place in places:
        path.write_bytes(flipped(content, place, place % 8))
        with pytest.raises(DamagedError, match=r"x\.safetensors is damaged \("):
            read_checked(path, MADE_OF)
    path.write_bytes(content)
    read_checked(path, MADE_OF)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_truncated_file_and_a_longer_one_are_damaged(size: int, tmp_path: Path) -> None:
    content = write(tmp_path / "x")
    for other in (content[:size], content + b" "):
        (tmp_path / "x").write_bytes(other)
        with pytest.raises(DamagedError, match="x is damaged"):
            read_checked(tmp_path / "x", MADE_OF)


def test_the_file_of_something_else_under_the_name_is_damaged(tmp_path: Path) -> None:
    write(tmp_path / "x")
    with pytest.raises(DamagedError, match="it is the file of something else"):
        read_checked(tmp_path / "x", MADE_OF | {"seed": 1})


def test_a_file_that_nobody_signed_is_damaged(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "x")
    with pytest.raises(DamagedError, match="not those that were written"):
        read_checked(tmp_path / "x", MADE_OF)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_neither_written_nor_read(
    value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = state() | {"8.weight": torch.full((5, 6), value)}
    with pytest.raises(ArithmeticError, match=r"x is not written: .* '8.weight' that are not fin"):
        write(tmp_path / "x", broken)
    assert list(tmp_path.iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr("npmerge.store.checkpoints.not_finite", lambda _: None)
        write(tmp_path / "x", broken)
    with pytest.raises(DamagedError, match=r"x is damaged .*'8.weight' that are not finite"):
        read_checked(tmp_path / "x", MADE_OF)


def test_a_full_disk_is_no_error_of_the_format(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"nowhere/x cannot be written"):
        save_state(tmp_path / "nowhere" / "x", state(), {})


def test_what_is_kept_is_made_once_and_always_read(tmp_path: Path) -> None:
    made = []

    def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
        made.append(1)
        return state(), {"seconds": 2.0}

    first, about = kept(tmp_path / "folder" / "x", MADE_OF, make)
    second, again = kept(tmp_path / "folder" / "x", MADE_OF, make)
    assert made == [1]
    assert about == again
    assert_same_state(first, second)
    assert_same_state(first, state())


def test_finding_what_is_kept_needs_no_lock_and_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path / "x")
    kept(tmp_path / "x", MADE_OF, lambda: pytest.fail("made"))
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    with locked(tmp_path / "x"):
        kept(tmp_path / "x", MADE_OF, lambda: pytest.fail("made"))


def test_what_is_damaged_is_said_and_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = write(tmp_path / "x")
    (tmp_path / "x").write_bytes(flipped(content, len(content) // 2, 0))
    with caplog.at_level(logging.WARNING, logger="npmerge"):
        kept(tmp_path / "x", MADE_OF, lambda: (state(), {}))
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{tmp_path / 'x'} is damaged (its bytes are not those that were written): making it again"
    )
    assert (tmp_path / "x").read_bytes() == content


def test_what_cannot_be_kept_is_not_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file/x cannot be written"):
        kept(tmp_path / "file" / "x", MADE_OF, lambda: pytest.fail("made"))


# Checkpoints of other programs


def as_lightning(tensors: dict[str, Tensor]) -> dict[str, Any]:
    inside = {f"model.{name}": value for name, value in tensors.items()}
    return {"state_dict": inside | {"criterion.weight": torch.ones(2)}, "epoch": 3, "loops": {}}


WRAPPED: dict[str, Any] = {
    "plain": dict,
    "lightning": as_lightning,
    "under a key": lambda tensors: {"model": tensors, "optimizer": {"lr": 0.1}, "epoch": 1},
    "data parallel": lambda tensors: {f"module.{n}": v for n, v in tensors.items()},
    "compiled": lambda tensors: {f"_orig_mod.{n}": v for n, v in tensors.items()},
    "both": lambda tensors: {f"module._orig_mod.{n}": v for n, v in tensors.items()},
    "lightning of compiled": lambda tensors: {
        "state_dict": {f"net._orig_mod.{n}": v for n, v in tensors.items()}
    },
}


@pytest.mark.parametrize("kind", WRAPPED)
@pytest.mark.parametrize("ending", [".pt", ".pth", ".ckpt", ".bin"])
def test_what_other_programs_wrap_a_state_dict_in_is_taken_away_and_said(
    kind: str, ending: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / f"x{ending}"
    torch.save(WRAPPED[kind](state()), path)
    assert_same_state(load_into(net(1), path).state_dict(), state())
    assert (str(path) in caplog.text) == (kind != "plain")
    if kind == "lightning":
        assert "its 'state_dict' is read" in caplog.text
        assert "'model.' is taken from its names, and 1 tensors that lie elsewhere" in caplog.text


def test_what_a_file_is_its_content_tells(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "x.ckpt")
    assert_same_state(load_state(tmp_path / "x.ckpt"), state())
    torch.save(state(), tmp_path / "x")
    assert_same_state(load_state(tmp_path / "x"), state())


def test_a_name_of_the_model_s_own_is_no_wrapper(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"model": torch.nn.Linear(2, 2), "net": torch.nn.Linear(2, 2)})
    save_file(model.state_dict(), tmp_path / "x")
    load_into(model, tmp_path / "x")
    only = torch.nn.ModuleDict({"model": torch.nn.Linear(2, 2)})
    torch.save({f"module.{n}": v for n, v in only.state_dict().items()}, tmp_path / "y")
    load_into(only, tmp_path / "y")
    with pytest.raises(ValueError, match=r"does not fit the model: the model has 'net.weight'"):
        load_into(model, tmp_path / "y")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_is_loaded_in_the_types_of_its_checkpoint(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    half = net().to(dtype).state_dict()
    save_file(half, tmp_path / "x")
    loaded = load_into(net(1), tmp_path / "x").state_dict()
    assert {v.dtype for n, v in loaded.items() if "num_batches" not in n} == {dtype}
    assert_same_state(loaded, half)


def test_an_old_batch_norm_that_has_not_counted_is_loaded(tmp_path: Path) -> None:
    save_file({n: v for n, v in state().items() if "num_batches" not in n}, tmp_path / "x")
    assert_same_state(load_into(net(1), tmp_path / "x").state_dict(), state())
