"""npmerge is tortured in small, and what came of it is written down and shown."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from processes import needs_proc
from tiny import net
from torture import table
from torture.common import Case
from torture.parts import PARTS

from npmerge.report.robustness import RIGHT, read_robustness, robustness_parts
from npmerge.store.checkpoints import load_state, write_checked
from npmerge.store.files import locked

pytestmark = [needs_proc, pytest.mark.skipif(sys.platform != "linux", reason="as it is done there")]


@pytest.mark.parametrize("part", PARTS)
def test_nothing_ends_otherwise_than_it_should(part: str, tmp_path: Path) -> None:
    cases = list(PARTS[part](tmp_path, 0, 0))
    assert len(cases) > 1
    assert [case for case in cases if case.outcome not in RIGHT] == []


def test_the_rows_of_a_part_are_replaced_and_those_of_others_stay(tmp_path: Path) -> None:
    path = tmp_path / "torture.csv"
    table.write(
        path, "kills", [Case("kills", "run", "lost", "a\nb"), Case("kills", "run", RIGHT[0])], 3
    )
    table.write(path, "fuzz", [Case("fuzz", "reader", "withstood", count=1000)], 4)
    table.write(path, "kills", [Case("kills", "run", "wrong", "x `y`")] * 2, 5)
    rows = read_robustness(path)
    assert rows[["part", "outcome", "count"]].values.tolist() == [
        ["fuzz", "withstood", 1000],
        ["kills", "wrong", 2],
    ]


def test_the_page_shows_a_table_a_part_and_every_defect(tmp_path: Path) -> None:
    path = tmp_path / "torture.csv"
    assert set(robustness_parts(path).values()) == {"There is no record of this yet."}
    table.write(path, "flips", [Case("flips", "record", "remade", count=1200)], 60)
    assert "None of the 1,200 cases ended" in robustness_parts(path)["findings"]
    table.write(
        path, "kills", [Case("kills", "run", "wrong", "x `y`"), Case("kills", "run", RIGHT[0])], 5
    )
    found = robustness_parts(path)
    assert "- run: 1 times wrong (`x y`)" in found["findings"]
    assert found["kills"].splitlines() == [
        "| | resumed to the same records | wrong |", "|---|--:|--:|", "| run | 1 | 1 |",
    ]  # fmt: skip
    path.write_text("part\n")
    with pytest.raises(ValueError, match="no record of the torture: run make torture again"):
        robustness_parts(path)


def test_what_a_killed_writer_left_is_gone_once_another_is_at_the_file(tmp_path: Path) -> None:
    path = tmp_path / "record [1].json"
    left, another = tmp_path / f".{path.name}.abcd_123", tmp_path / ".record [1].training"
    for file in (left, another):
        file.touch()
    with locked(path):
        assert not left.exists()
        assert another.exists()


def test_a_flipped_bit_in_a_file_that_npmerge_signed_is_told_by_whoever_reads_it(
    tmp_path: Path,
) -> None:
    path = tmp_path / "model.safetensors"
    write_checked(path, net().state_dict(), {"made_of": {}})
    assert all(torch.isfinite(value).all() for value in load_state(path).values())
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_state(path)
