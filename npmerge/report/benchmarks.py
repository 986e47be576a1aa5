"""Records of the benchmarks: read from their folder, and shown as tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from npmerge.report.pages import show
from npmerge.report.words import short_revision

KEYS = ("benchmark", "setting", "tables", "notes", "provenance")
"""What a record of a benchmark has."""


def read_benchmarks(folder: Path | str) -> list[dict[str, Any]]:
    """The contents of all benchmark records of a folder, in the order of their names.

    Args:
        folder: where ``benchmarks/*.py --record`` wrote them; without any, or not there, it has no records.

    Raises:
        ValueError: a file is no such record.
    """
    contents = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            content = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError):
            content = None
        if not isinstance(content, dict) or any(key not in content for key in KEYS):
            raise ValueError(f"{path} is no record of a benchmark: run it again with --record")
        contents.append(content)
    return contents


def benchmark_title(content: dict[str, Any]) -> str:
    """What was measured, and where.

    Args:
        content: from :func:`read_benchmarks`.
    """
    setting = content["setting"]
    network = f"{setting['model']}x{setting['width']:g}"
    size = setting["image_size"]
    return f"{content['benchmark']}.py: {network}, {size}x{size} pixels, on {_where(content)}"


def benchmark_tables(content: dict[str, Any]) -> dict[str, pd.DataFrame]:
    """The tables of a record, by their titles.

    Args:
        content: from :func:`read_benchmarks`.

    Returns:
        One row a variant, as text; the first is the baseline. ``speed`` is how many times the baseline's images per
        second it has in the same round: the median, and in brackets the lowest and the highest of the rounds.
    """
    return {
        title: pd.DataFrame.from_dict(
            {name: _row(row) for name, row in rows.items()}, orient="index"
        )
        for title, rows in content["tables"].items()
    }


def benchmark_sources(contents: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Where the numbers come from, a row a record.

    Args:
        contents: from :func:`read_benchmarks`.
    """
    rows = [
        {
            "benchmark": benchmark_title(content).partition(", on ")[0],
            "revision": short_revision(content["provenance"]["revision"]),
            "device": _where(content),
            "python": content["provenance"]["python"],
            "torch": content["provenance"]["versions"]["torch"],
            "rounds": str(content["setting"]["repeats"]),
            "clock": content["setting"]["clock"],
            "finished": content["provenance"]["finished"][:10],
        }
        for content in contents
    ]
    columns = None if rows else ["benchmark"]
    return pd.DataFrame(rows, columns=columns).set_index("benchmark")


def show_benchmark(contents: Sequence[dict[str, Any]], name: str) -> None:
    """Show the tables and notes of one benchmark's records, or say that there are none.

    Args:
        contents: from :func:`read_benchmarks`.
        name: of the benchmark.
    """
    found = [content for content in contents if content["benchmark"] == name]
    if not found:
        show(f"There is no record of `{name}.py` yet.")
    for content in found:
        show(f"**{benchmark_title(content)}**")
        for title, rows in benchmark_tables(content).items():
            show(title + ":")
            show(rows)
        for note in content["notes"]:
            show(note)


def devices(contents: Sequence[dict[str, Any]]) -> str:
    """A sentence on the devices that the records are from, and on the kind of device that has none.

    Args:
        contents: from :func:`read_benchmarks`.
    """
    cpus, others = (
        sorted({_where(content) for content in contents if _is_cpu(content) is cpu})
        for cpu in (True, False)
    )
    told = [f"There are records from {', '.join(cpus + others)}." if cpus + others else ""]
    told += [
        f"There is no record from a {kind}: nothing is known of the speed there."
        for kind, found in (("CPU", cpus), ("GPU", others))
        if not found
    ]
    return " ".join(filter(None, told))


def _where(content: dict[str, Any]) -> str:
    source = content["provenance"]
    device: str = source["device"]
    if not _is_cpu(content):
        return device
    return f"{device}, {source['threads']} thread{'s' * (source['threads'] != 1)}"


def _is_cpu(content: dict[str, Any]) -> bool:
    return str(content["setting"]["device"]).partition(":")[0] == "cpu"


def _row(row: dict[str, Any]) -> dict[str, str]:
    low, high = (1 / ratio for ratio in reversed(row["ratio_range"]))
    rate = (
        {"images/s": f"{row['images_per_second']:,.0f}"}
        if "images_per_second" in row
        else {"ms": f"{row['ms']:,.0f}"}
    )
    return {
        **rate,
        "speed": f"{_short(1 / row['ratio'])} ({_short(low)}-{_short(high)})",
        **{
            name: f"{value:.1f}" if 10 <= value < 1000 else _short(value)
            for name, value in row.get("extra", {}).items()
        },
    }


def _short(number: float) -> str:
    return f"{number:.2f}" if number < 10 else f"{number:,.0f}"
