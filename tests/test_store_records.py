"""Records: where their cells say, believed in no byte or value without a check, and made again otherwise."""

from __future__ import annotations

import json
import math
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from npmerge.store.files import canonical, sha256
from npmerge.store.records import COLUMNS, Cell, Outcome, Records, Row, flat, table

CELL = Cell(
    "short", "same_data", "cifar100-resnet20x0.5", 0, "permute-np_merge", {"lr": 1e-5, "seed": 0}
)
ROW: dict[str, Any] = {
    "dataset": "cifar100", "image_size": 32, "model": "resnet20", "width": 0.5, "split": None,
    "models": 2, "many": None, "align": "permute", "aggregate": "np_merge", "tuned": False,
    "correct": "reset_batchnorm", "examples_per_class": None, "metric": "top1", "value": 50.5,
}  # fmt: skip
PROVENANCE: dict[str, Any] = {
    "revision": "r1", "device": "CPU (x86_64)", "kernels": "cpu-AVX2", "threads": 1,
    "precision": "float32", "python": "3.11.2", "versions": {"torch": "2.11.0"},
    "finished": "2026-01-01T00:00:00+00:00", "seconds": 1.3, "peak_memory_mib": 100,
    "base_models": {"a": {"digest": "12ab"}}, "deterministic": False,
}  # fmt: skip
TOOK = {"alignment": 1.5, "learning": 20, "reset": 0.25, "scoring": 3.0}


def write(records: Records, cell: Cell = CELL, **changed: Any) -> Path:
    outcome = Outcome([{**ROW, **changed}], {"curve": [1, 2.5], "name": "é"}, TOOK)
    return records.write(cell, outcome, PROVENANCE)


def rewrite(path: Path, change: Callable[[dict[str, Any]], object], *, sign: bool = True) -> None:
    """Change a record as somebody would who knows how it is signed."""
    content = json.loads(path.read_text())
    change(content)
    if sign:
        del content["digest"]
        content["digest"] = sha256([canonical(content)])
    path.write_text(json.dumps(content))


def test_a_record_is_where_its_cell_says_and_holds_everything(tmp_path: Path) -> None:
    path = write(Records(tmp_path))
    folder = tmp_path / "short" / "same_data" / "cifar100-resnet20x0.5" / "seed0"
    assert path == folder / "permute-np_merge.json"
    assert CELL.label == "same_data/cifar100-resnet20x0.5/seed0/permute-np_merge"
    assert list(path.parent.iterdir()) == [path]
    content = json.loads(path.read_text())
    assert list(content) == [
        "cell", "config", "config_hash", "rows", "details", "seconds", "provenance", "digest",
    ]  # fmt: skip
    (record,) = Records(tmp_path).read("short", "same_data", [CELL])
    assert record.cell.model_dump() == {
        "profile": "short", "experiment": "same_data", "setting": "cifar100-resnet20x0.5",
        "seed": 0, "name": "permute-np_merge",
    }  # fmt: skip
    assert record.config == CELL.config
    assert record.config_hash == CELL.config_hash
    assert [row.model_dump() for row in record.rows] == [ROW]
    assert record.details == {"curve": [1, 2.5], "name": "é"}
    assert record.seconds.model_dump() == TOOK
    assert record.provenance.model_dump() == PROVENANCE


def test_a_cell_is_done_only_with_its_own_record(tmp_path: Path) -> None:
    records = Records(tmp_path)
    assert records.state(CELL) == "missing"
    assert list(tmp_path.iterdir()) == []
    write(records)
    others = [replace(CELL, seed=1), replace(CELL, name="mean"), replace(CELL, config={"lr": 1})]
    assert {cell.label: records.state(cell) for cell in (CELL, *others[:2])} == {
        CELL.label: "done", others[0].label: "missing", others[1].label: "missing",
    }  # fmt: skip
    assert records.state(others[2]) == "stale"


def test_what_is_left_to_do_is_said_with_the_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = Records(tmp_path)
    assert not records.finished(CELL)
    path = write(records)
    assert records.finished(CELL)
    with records.locked(CELL):
        assert records.done(CELL)
        assert not records.finished(CELL)
    assert caplog.records == []
    assert not records.finished(replace(CELL, config={"lr": 1}))
    assert not records.done(replace(CELL, config={"lr": 1}))
    path.write_text("{}")
    assert not records.finished(CELL)
    assert not records.done(CELL)
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} was made under another configuration: making it again",
        f"{path} is damaged: making it again",
    ]


@pytest.mark.parametrize("name", ["", "..", ".x", "a/b", "a b", "x.failed", "-x", "x" * 200])
def test_a_cell_s_names_are_those_of_files(name: str) -> None:
    for changed in (
        lambda: replace(CELL, profile=name),
        lambda: replace(CELL, experiment=name),
        lambda: replace(CELL, setting=name),
        lambda: replace(CELL, name=name),
    ):
        with pytest.raises(ValueError, match="is no name for a file"):
            changed()


def test_every_flipped_byte_is_found_unless_the_record_says_the_same(tmp_path: Path) -> None:
    records = Records(tmp_path)
    path = write(records)
    content = path.read_bytes()
    same = 0
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << random.Random(place).randrange(8)
        path.write_bytes(changed)
        if records.state(CELL) != "damaged":
            assert records.state(CELL) == "done"
            assert json.loads(changed) == json.loads(content)  # 1e-05 as 1E-05
            same += 1
    assert same <= 4


def test_a_record_with_another_value_is_damaged_though_all_else_is_right(tmp_path: Path) -> None:
    path = write(Records(tmp_path))
    rewrite(path, lambda c: c["rows"][0].update(value=51.5), sign=False)
    assert Records(tmp_path).state(CELL) == "damaged"


SIGNED: dict[str, Callable[[dict[str, Any]], object]] = {
    "value a string": lambda c: c["rows"][0].update(value="50.5"),
    "value null": lambda c: c["rows"][0].update(value=None),
    "value too large": lambda c: c["rows"][0].update(value=1e9),
    "value above 100 %": lambda c: c["rows"][0].update(value=100.5),
    "value below 0 %": lambda c: c["rows"][0].update(value=-0.5),
    "loss below 0": lambda c: c["rows"][0].update(metric="loss", value=-1.0),
    "loss too large": lambda c: c["rows"][0].update(metric="loss", value=1e7),
    "value true": lambda c: c["rows"][0].update(value=True),
    "models a float": lambda c: c["rows"][0].update(models=2.0),
    "no models": lambda c: c["rows"][0].update(models=0),
    "tuned a number": lambda c: c["rows"][0].update(tuned=0),
    "examples a word": lambda c: c["rows"][0].update(examples_per_class="some"),
    "name too long": lambda c: c["rows"][0].update(aggregate="x" * 201),
    "a column too many": lambda c: c["rows"][0].update(table="I"),
    "a column too few": lambda c: c["rows"][0].pop("model"),
    "no rows": lambda c: c.update(rows=[]),
    "rows null": lambda c: c.update(rows=None),
    "cell null": lambda c: c.update(cell=None),
    "another seed": lambda c: c["cell"].update(seed=1),
    "seed a string": lambda c: c["cell"].update(seed="0"),
    "another cell": lambda c: c["cell"].update(name="permute-mean"),
    "another profile": lambda c: c["cell"].update(profile="paper"),
    "another configuration's hash": lambda c: c.update(config_hash="0123456789ab"),
    "another configuration": lambda c: c.update(config={"lr": 0.2}),
    "a key too many": lambda c: c.update(more=1),
    "a key too few": lambda c: c.pop("details"),
    "seconds negative": lambda c: c["seconds"].update(learning=-1),
    "no provenance": lambda c: c.update(provenance={}),
}


@pytest.mark.parametrize("kind", SIGNED)
def test_a_record_that_is_signed_but_not_plausible_is_damaged(kind: str, tmp_path: Path) -> None:
    path = write(Records(tmp_path))
    rewrite(path, lambda _: None)
    assert Records(tmp_path).state(CELL) == "done"
    rewrite(path, SIGNED[kind])
    assert Records(tmp_path).state(CELL) == "damaged"


MALFORMED: dict[str, Callable[[str], str | bytes]] = {
    "empty": lambda _: "",
    "truncated": lambda text: text[: len(text) // 2],
    "a list": lambda _: "[1, 2]",
    "null": lambda _: "null",
    "a part": lambda _: json.dumps({"rows": []}),
    "no text": lambda _: b"\xff\xfe\x00broken",
    "deep nesting": lambda text: text.replace("[", "[" * 100_000, 1),
    "deeply nested and whole": lambda _: "[" * 100_000 + "]" * 100_000,
    "a number of 5,000 digits": lambda text: text.replace("50.5", "5" * 5000),
    "NaN": lambda text: text.replace("50.5", "NaN"),
    "Infinity": lambda text: text.replace("50.5", "-Infinity"),
    "beyond floats": lambda text: text.replace("2.5", "1e999"),
    "half a pair": lambda text: text.replace("r1", "\\ud800"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_record_is_damaged_named_and_not_read(kind: str, tmp_path: Path) -> None:
    records = Records(tmp_path)
    path = write(records)
    content = MALFORMED[kind](path.read_text())
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert records.state(CELL) == "damaged"
    for cells in (None, [CELL]):
        with pytest.raises(ValueError, match=r"is damaged \(.*: run `npmerge run same_data --prof"):
            records.read("short", "same_data", cells)
    assert list(records.whole("short", "same_data")) == []


def test_a_folder_in_a_record_s_place_is_damaged(tmp_path: Path) -> None:
    Records(tmp_path).path(CELL).mkdir(parents=True)
    assert Records(tmp_path).state(CELL) == "damaged"


@pytest.mark.parametrize("change", [{"value": math.nan}, {"value": 101.0}, {"metric": ""}])
def test_a_value_that_no_record_may_have_is_not_written(
    change: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"permute-np_merge.json is not written: "):
        write(Records(tmp_path), **change)
    assert list(tmp_path.iterdir()) == []


def test_details_are_finite_and_can_be_written(tmp_path: Path) -> None:
    for bad in (math.inf, {1, 2}):
        with pytest.raises(ValueError, match="is not written"):
            Records(tmp_path).write(CELL, Outcome([ROW], {"curve": bad}, TOOK), PROVENANCE)


def test_a_failure_is_noted_with_its_reason_until_there_is_a_record(tmp_path: Path) -> None:
    records = Records(tmp_path)
    assert records.failure(CELL) is None
    note = records.fail(CELL, "the loss is nan\nin epoch 3 \udc80")
    assert note.name == "permute-np_merge.failed.json"
    assert records.state(CELL) == "failed"
    found = records.failure(CELL)
    assert found is not None
    assert found.reason == "the loss is nan\nin epoch 3 ?"
    assert records.state(replace(CELL, config={"lr": 1})) == "missing"  # that was another one
    with pytest.raises(FileNotFoundError, match=r"is missing \(it failed: the loss is nan"):
        records.read("short", "same_data", [CELL])
    assert records.read("short", "same_data") == []
    write(records)
    assert records.state(CELL) == "done"
    assert not note.exists()


def test_a_failure_says_more_than_a_stale_or_damaged_record(tmp_path: Path) -> None:
    records, today = Records(tmp_path), replace(CELL, config={"lr": 1})
    path = write(records)
    records.fail(today, "no memory")
    assert records.state(today) == "failed"
    path.write_text("{}")
    assert records.state(today) == "failed"
    records.fail(CELL, "no memory")
    write(records)
    assert records.state(CELL) == "done"


def test_a_note_that_is_damaged_or_of_another_cell_is_no_failure(tmp_path: Path) -> None:
    records, other = Records(tmp_path), replace(CELL, name="mean")
    note = records.fail(CELL, "no memory")
    records.path(other).with_name("mean.failed.json").write_bytes(note.read_bytes())
    assert records.state(other) == "missing"
    note.write_text(note.read_text().replace("no memory", "no mercy!"))
    assert records.failure(CELL) is None
    assert records.state(CELL) == "missing"


HOLD = """
import sys, time
from npmerge.store.records import Cell, Records
with Records(sys.argv[1]).locked(Cell("short", "same_data", "x", 0, "mean", {})) as got:
    print(got, flush=True)
    time.sleep(60)
"""


def test_a_cell_is_running_while_a_process_is_at_it_and_no_longer(tmp_path: Path) -> None:
    records, cell = Records(tmp_path), Cell("short", "same_data", "x", 0, "mean", {})
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        assert records.state(cell) == "running"
        with records.locked(cell) as got:
            assert not got
        other.send_signal(signal.SIGKILL)
    assert records.state(cell) == "missing"
    with records.locked(cell) as got:
        assert got
        assert records.read("short", "same_data") == []


def test_only_records_of_today_s_configuration_are_read_unless_asked(tmp_path: Path) -> None:
    records, today = Records(tmp_path), replace(CELL, config={"lr": 1})
    write(records)
    with pytest.raises(ValueError, match="another configuration: run `npmerge run same_data --pr"):
        records.read("short", "same_data", [today])
    assert len(records.read("short", "same_data", [today], stale=True)) == 1
    assert len(records.read("short", "same_data")) == 1
    assert len(list(records.whole("short", "same_data"))) == 1


def test_reading_gives_all_records_or_those_asked_for(tmp_path: Path) -> None:
    records = Records(tmp_path)
    assert records.read("short", "same_data") == []
    cells = [replace(CELL, seed=seed) for seed in range(3)]
    for cell in cells:
        write(records, cell, value=float(cell.seed))
    found = table(records.read("short", "same_data"))
    assert found["value"].tolist() == [0.0, 1.0, 2.0]
    assert found["seed"].tolist() == [0, 1, 2]
    assert table(records.read("short", "same_data", cells[1:2]))["value"].tolist() == [1.0]
    assert records.read("short", "cost") == records.read("paper", "same_data") == []


def test_a_cell_without_a_record_is_named_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"merge.json is missing: run `npmerge run same_d"):
        Records(tmp_path).read("short", "same_data", [CELL])
    assert list(tmp_path.iterdir()) == []


def test_a_table_has_the_typed_columns_and_where_each_number_is_from(tmp_path: Path) -> None:
    records = Records(tmp_path)
    write(records, examples_per_class="all")
    write(records, replace(CELL, seed=1), examples_per_class=5, metric="loss", value=1.25)
    found = table(records.read("short", "same_data"))
    assert list(found.columns) == COLUMNS
    first, second = flat(records.read("short", "same_data"))
    assert found.to_dict("records") == [first, second]
    assert first == ROW | {
        "examples_per_class": "all", "profile": "short", "experiment": "same_data",
        "setting": "cifar100-resnet20x0.5", "seed": 0, "device": "CPU (x86_64)", "revision": "r1",
    }  # fmt: skip
    assert (second["seed"], second["examples_per_class"], second["value"]) == (1, 5, 1.25)
    assert found.to_csv(index=False).splitlines()[0] == ",".join(COLUMNS)


def test_no_records_are_an_empty_table_with_the_columns() -> None:
    assert list(table([]).columns) == COLUMNS
    assert list(Row.model_fields) == list(ROW)
    cell = ["profile", "experiment", "setting", "seed"]
    assert [*cell, *ROW, "device", "revision"] == COLUMNS


def test_records_are_looked_at_without_pytorch_and_pandas() -> None:
    code = (
        "import sys, npmerge.store.records as r; r.Records('x').whole('digits', 'same_data'); "
        "print({'torch', 'pandas', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path = {sys.path!r}; {code}"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "set()\n"
