"""Records of benchmarks become tables whose speeds are right, and the devices without a record are named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from npmerge.report.benchmarks import (
    benchmark_sources,
    benchmark_tables,
    devices,
    read_benchmarks,
    show_benchmark,
)

ROOT = Path(__file__).parent.parent


def record(device: str = "cpu", name: str = "CPU (x86_64)", threads: int = 2) -> dict[str, Any]:
    def row(images: float, ratio: float, low: float, high: float) -> dict[str, Any]:
        return {
            "images_per_second": images,
            "ratio": ratio,
            "ratio_range": [low, high],
            "extra": {"peak MiB": 0.5 * images},
        }

    setting = {
        "device": device, "model": "resnet20", "width": 2.0, "image_size": 32, "repeats": 3,
        "clock": "wall",
    }  # fmt: skip
    return {
        "benchmark": "training",
        "setting": setting,
        "tables": {
            "Training": {"plain loop": row(100, 1, 1, 1), "npmerge": row(2000, 0.05, 0.025, 0.2)}
        },
        "notes": [],
        "provenance": {
            "revision": "0123456789abcdef+", "device": name, "threads": threads, "python": "3.11.7",
            "versions": {"torch": "2.15.0"}, "finished": "2026-01-31T10:00:00+00:00",
        },
    }  # fmt: skip


def test_speed_is_the_inverse_of_the_time_ratio_with_its_ends_exchanged() -> None:
    table = benchmark_tables(record())["Training"]
    assert list(table.index) == ["plain loop", "npmerge"]
    assert table.loc["plain loop", "speed"] == "1.00 (1.00-1.00)"
    assert table.loc["npmerge", "speed"] == "20 (5.00-40)"
    assert table.loc["npmerge", "images/s"] == "2,000"
    assert table.loc["npmerge", "peak MiB"] == "1,000"


def test_a_record_s_source_has_revision_device_and_versions() -> None:
    (row,) = benchmark_sources([record()]).to_dict("records")
    assert row["revision"] == "01234567+"
    assert row["device"] == "CPU (x86_64), 2 threads"
    assert (row["torch"], row["finished"]) == ("2.15.0", "2026-01-31")


def test_a_device_without_a_record_is_named_and_only_that() -> None:
    cpu, gpu = record(), record("cuda:0", "NVIDIA H200")
    assert "from CPU (x86_64), 2 threads." in devices([cpu])
    assert "no record from a GPU" in devices([cpu])
    assert "no record from a CPU" in devices([gpu])
    assert devices([gpu, cpu]) == "There are records from CPU (x86_64), 2 threads, NVIDIA H200."
    assert "from a CPU" in devices([])
    assert "from a GPU" in devices([])


def test_records_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name, threads in (("b", 1), ("a", 2)):
        (tmp_path / f"{name}.json").write_text(json.dumps(record(threads=threads)))
    assert [c["provenance"]["threads"] for c in read_benchmarks(tmp_path)] == [2, 1]
    assert read_benchmarks(tmp_path / "nowhere") == []
    assert list(benchmark_sources([]).index) == []


def test_a_benchmark_is_shown_with_its_notes_or_said_to_be_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[Any] = []
    monkeypatch.setattr("IPython.display.display", said.append)
    show_benchmark([record() | {"notes": ["a note"]}], "training")
    assert [getattr(one, "data", None) for one in (said[1], said[3])] == ["Training:", "a note"]
    assert list(said[2].index) == ["plain loop", "npmerge"]
    show_benchmark([record()], "batches")
    assert "no record of `batches.py`" in said[-1].data


def test_a_row_without_images_shows_its_milliseconds() -> None:
    content = record()
    row = content["tables"]["Training"]["npmerge"]
    row["ms"] = 1234.5
    del row["images_per_second"]
    assert benchmark_tables(content)["Training"].loc["npmerge", "ms"] == "1,234"


@pytest.mark.parametrize("text", ["{", "[]", '{"benchmark": "training"}'])
def test_a_damaged_record_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(ValueError, match=r"broken\.json is no record"):
        read_benchmarks(tmp_path)


def test_a_benchmark_writes_a_record_that_becomes_tables(tmp_path: Path) -> None:
    """With the smallest of settings: nothing is said of the times."""
    options = "--threads 1 --batch-size 4 --image-size 8 --width 0.25 --repeats 1"
    script = ROOT / "benchmarks" / "batches.py"
    command = [sys.executable, str(script), *options.split(), "--record", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    assert [path.name for path in tmp_path.iterdir()] == ["batches-resnet20x0.25-8px-cpu.json"]
    assert str(tmp_path) not in next(tmp_path.iterdir()).read_text()
    (content,) = read_benchmarks(tmp_path)
    alone, trained = benchmark_tables(content).values()
    for rows in (alone, trained):
        assert rows["speed"].iloc[0] == "1.00 (1.00-1.00)"
        assert len(rows) > 1
