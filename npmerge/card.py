"""The model card of a merge, as the Hub shows it."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

PACKAGES = ("npmerge", "torch", "torchvision", "timm", "transformers", "safetensors")


def versions() -> dict[str, str]:
    """The versions that a merge depends on, by package, Python's among them."""
    from importlib.metadata import PackageNotFoundError, version  # slow, and only needed here

    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def model_card(how: Mapping[str, Any], name: str) -> str:
    """A merge in Markdown.

    Args:
        how: what :func:`npmerge.merge_command.merge_checkpoints` notes of a merge.
        name: of the merged model.

    Returns:
        The card: what went in with its hashes, methods, options and seed, scores, versions.
    """
    options = how["options"]
    steps = [step for step in ("align", "aggregate", "correct", "many") if options[step]]
    set_ = {key: value for key, value in options.items() if key not in (*steps, "options")}
    set_ = {key: value for key, value in set_.items() if value or key == "seed"}
    scores = how["scores"]
    columns = list(dict.fromkeys(key for one in scores.values() for key in one))
    return "\n".join(
        [
            "---", "tags: [model-merging, npmerge]", "---", "",
            f"# {name}", "",
            "Merged with [npmerge](https://arxiv.org/abs/2412.15467) from:", "",
            *_table(["model", "file", "SHA-256"],
                    [[chr(ord("A") + place), _code(one["file"]), _code(one["sha256"])]
                     for place, one in enumerate(how["checkpoints"])]), "",
            "## How", "",
            *_table(["step", "method", "options"],
                    [[step, _code(options[step]), _words(options["options"].get(step, {}))]
                     for step in steps]), "",
            *_table(["setting", "value"], [[key, _code(value)] for key, value in set_.items()]), "",
            f"## Scores ({how['scored_on']} data)", "",
            *_table(["", *columns],
                    [[row, *(f"{one[key]:.4f}" if key in one else "" for key in columns)]
                     for row, one in scores.items()]), "",
            "## Versions", "",
            ", ".join(f"{package} {number}" for package, number in how["versions"].items()), "",
        ]
    )  # fmt: skip


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def _words(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {_code(value)}" for key, value in options.items()) or "defaults"


def _code(value: object) -> str:
    return f"`{value}`"
