"""The symmetry of real architectures is read off right, and that of networks drawn at random too.

All models of the catalogue are run by ``benchmarks/architectures.py``; here is one of each kind.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import timm
import torch
from architecture_zoo import TIMM, Architecture, catalogue
from architectures import random_alignment, randomised
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import npmerge as npm
from npmerge.report.architectures import (
    COLUMNS,
    architecture_sources,
    architecture_summary,
    architecture_table,
    least_moved,
    not_right,
    read_architectures,
    rebasin_summary,
)
from npmerge.report.words import NOTHING
from npmerge.symmetry import RULES

PAGE = Path(__file__).parent.parent / "book" / "operations.md"
CATALOGUE = {(one.source, one.name): one for one in catalogue()}

# The number of groups, where counting is easy. A stream is what residual connections tie together.
STREAM = 1
RESNET18 = 4 + 8  # a stream in each stage, and between the two convolutions of each of eight blocks
ATTENTION = 3  # heads, their queries' dimensions (tied to the keys'), their values' dimensions
LAYER = ATTENTION + 1  # and the hidden layer
ROTARY = LAYER  # dimensions of the queries are held by their angles; two heads that share a key are a group

SAMPLE: list[tuple[str, str, int | None, float]] = [
    ("torchvision", "resnet18", RESNET18, 0.999),
    ("torchvision", "squeezenet1_1", None, 0.99),
    ("torchvision", "shufflenet_v2_x0_5", None, 0.99),
    ("torchvision", "mobilenet_v3_small", None, 0.99),
    ("torchvision", "regnet_y_400mf", None, 0.99),
    ("torchvision", "lraspp_mobilenet_v3_large", None, 0.99),
    ("timm", "vit_tiny_patch16_224", STREAM + 12 * LAYER, 0.999),
    ("timm", "convnext_atto", 4 + 12, 0.999),
    ("timm", "xcit_nano_12_p16_224", None, 0.99),
    ("timm", "coat_lite_tiny", None, 0.99),
    ("timm", "edgenext_xx_small", None, 0.99),
    ("timm", "ghostnet_050", None, 0.99),
    ("timm", "efficientvit_m0", None, 0.99),
    ("timm", "starnet_s050", None, 0.99),
    ("timm", "mobilevit_xxs", None, 0.99),
    ("Hugging Face", "bert", STREAM + 2 * LAYER + 1, 0.999),  # and the pooler
    ("Hugging Face", "deberta", None, 0.99),
    ("Hugging Face", "gpt2", STREAM + 2 * LAYER, 0.999),
    ("Hugging Face", "llama", STREAM + 2 * ROTARY, 0.999),
    ("Hugging Face", "bloom", None, 0.99),
    ("Hugging Face", "mixtral", None, 0.999),
    ("Hugging Face", "t5", None, 0.9),
    ("Hugging Face", "mamba", None, 0.99),
    ("Hugging Face", "rwkv", None, 0.99),
    ("Hugging Face", "swin", None, 0.99),
    ("Hugging Face", "wav2vec2", None, 0.99),
    ("Hugging Face", "whisper", None, 0.95),
    ("Hugging Face", "clip", None, 0.6),  # it returns the hidden states of both towers
]


@pytest.mark.parametrize(("source", "name", "groups", "floor"), SAMPLE)
def test_permuting_all_groups_keeps_what_a_published_architecture_computes(
    source: str, name: str, groups: int | None, floor: float
) -> None:
    torch.manual_seed(0)
    one = CATALOGUE[source, name]
    example, named = one.inputs()
    check = npm.check_symmetry(one.make(), *example, **named)
    assert check.difference < 1e-8
    assert check.moved > floor
    assert groups in (None, check.groups)


def test_the_catalogue_has_every_family() -> None:
    """A new version of timm may bring families: add a model of each to the catalogue."""
    assert set(timm.list_modules()) <= TIMM.keys()
    counts = Counter(one.source for one in CATALOGUE.values())
    assert counts["timm"] >= 150
    assert counts["Hugging Face"] >= 30
    assert all(isinstance(one, Architecture) and one.family for one in CATALOGUE.values())


class Drawn(nn.Module):
    """Blocks in a row, on sequences of vectors, some beside a shortcut; the kinds are the methods."""

    def __init__(self, blocks: list[tuple[str, int, bool]]) -> None:
        super().__init__()
        self.steps = nn.ModuleList()
        self.shortcuts = [shortcut for _, _, shortcut in blocks]
        width = 8
        self.stem = nn.Linear(3, width)
        for kind, factor, shortcut in blocks:
            out = width if shortcut else 8 * factor
            self.steps.append(BLOCKS[kind](width, out))
            width = out
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for step, shortcut in zip(self.steps, self.shortcuts, strict=True):
            x = x + step(x) if shortcut else step(x)
        logits: Tensor = self.head(x.mean(1))
        return logits


class Shuffled(nn.Module):
    """Grouped convolutions with a shuffle of the channels between them, as in ShuffleNet."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(width, 12, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm1d(12)
        self.second = nn.Conv1d(12, out, 1, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.first(x.transpose(1, 2))))
        y = y.unflatten(1, (2, 6)).transpose(1, 2).flatten(1, 2)
        shuffled: Tensor = self.second(y).transpose(1, 2)
        return shuffled


class Attention(nn.Module):
    """Self-attention with one matrix for queries, keys and values."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * 12), nn.Linear(12, out)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        attended: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return attended


class Recurrent(nn.Module):
    """A layer that reads in both directions."""

    def __init__(self, width: int, out: int, cell: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cell, self.out = (
            cell(width, 5, bidirectional=True, batch_first=True),
            nn.Linear(10, out),
        )

    def forward(self, x: Tensor) -> Tensor:
        read: Tensor = self.out(self.cell(x)[0])
        return read


class Gated(nn.Module):
    """One half of the hidden layer gates the other."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(width), nn.Linear(width, 14), nn.Linear(7, out)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(self.norm(x)).chunk(2, -1)
        gated: Tensor = self.down(nn.functional.silu(gate) * value)
        return gated


class Concatenated(nn.Module):
    """Two branches and the input beside each other."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(width, 5), nn.Linear(width, 6)
        self.out = nn.Linear(width + 11, out)

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.left(x).tanh(), x, self.right(x).relu()]
        joined: Tensor = self.out(torch.cat(branches, -1))
        return joined


BLOCKS = {
    "shuffled": Shuffled,
    "attention": Attention,
    "lstm": lambda width, out: Recurrent(width, out, nn.LSTM),
    "gru": lambda width, out: Recurrent(width, out, nn.GRU),
    "gated": Gated,
    "concatenated": Concatenated,
}
BLOCK = st.tuples(st.sampled_from(sorted(BLOCKS)), st.integers(1, 3), st.booleans())


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(blocks=st.lists(BLOCK, min_size=1, max_size=5), seed=st.integers(0, 99))
def test_permuting_all_groups_keeps_what_a_drawn_network_computes(
    blocks: list[tuple[str, int, bool]], seed: int
) -> None:
    model = randomised(Drawn(blocks), seed)
    x = torch.randn(2, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    groups = npm.find_symmetry(model, x)
    assert len(groups) >= max(1, sum(kind != "shuffled" for kind, _, _ in blocks))
    permuted = random_alignment(groups, seed).apply(model)
    with torch.no_grad():
        torch.testing.assert_close(permuted(x), model(x), rtol=1e-9, atol=1e-9)


def test_the_page_on_rules_teaches_an_operation() -> None:
    """Its code runs, the rule it shows is right, and without the rule the operation is refused by name."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    names: dict[str, Any] = {}
    try:
        exec("\n".join(blocks), names)  # noqa: S102 - the project's own page
    finally:
        taught = RULES.pop("mine.gate", None)
    assert taught is not None
    assert names["check"].moved > 0.9
    with pytest.raises(npm.SymmetryError, match=r"operation 'mine.gate' in module '1' \(Gate\)"):
        npm.find_symmetry(names["model"], torch.randn(2, 3))
    held = npm.find_symmetry(names["model"], torch.randn(2, 3), strict=False)
    assert (len(held), held.movable) == (0, 0)
    assert held.pinned == {"mine.gate in 1": 1}


def recorded(**changed: str) -> dict[str, str]:
    row = dict.fromkeys(COLUMNS, "") | {
        "source": "timm", "family": "resnet", "name": "resnet10t", "parameters": "5440000",
        "status": "right", "groups": "9", "moved": "0.99", "difference": "2e-15", "seconds": "0.2",
        "revision": "0123456789abcdef+", "versions": "torch 2.15.0", "rebasin": "right", "rebasin_moved": "0.5",
    }  # fmt: skip
    return row | changed


def written(folder: Path, *rows: dict[str, str]) -> pd.DataFrame:
    path = folder / "architectures.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return read_architectures(path)


def test_the_record_counts_what_is_right_and_names_what_is_not(tmp_path: Path) -> None:
    none = dict.fromkeys(("groups", "moved", "difference"), "")
    rows = written(
        tmp_path,
        recorded(),
        recorded(name="resnet14t", moved="0.4", seconds="0.6", rebasin="wrong"),
        recorded(name="dla34", family="dla", status="refused", reason="fft", rebasin="", **none),
        recorded(source="torchvision", rebasin="fails: IndexError", rebasin_moved="", note="small"),
    )
    row = architecture_summary(rows).loc["timm"]
    assert row[["architectures", "families", "right", "refused", "% right"]].tolist() == [
        "3", "2", "2", "1", "66.7",
    ]  # fmt: skip
    assert row["% of parameters moved: median (least)"] == "69.50 (40.00)"
    assert row["seconds: median (most)"] == "0.40 (0.60)"
    assert not_right(rows)["reason"].to_dict() == {"dla34": "fft"}
    assert list(least_moved(rows).index) == ["resnet14t"]
    theirs = rebasin_summary(rows)
    assert theirs.loc["timm", ["architectures", "right", "wrong"]].tolist() == ["2", "1", "1"]
    assert theirs.loc["torchvision", "fails"] == "1"
    assert architecture_table(rows, "torchvision")["as built"].tolist() == ["5.4 M, small"]
    assert list(architecture_table(rows, "timm")["groups"]) == ["9", "9", NOTHING]
    assert architecture_sources(rows)["architectures"].tolist() == ["3", "1"]


def test_without_a_record_the_tables_are_empty_and_another_file_is_refused(tmp_path: Path) -> None:
    nothing = read_architectures(tmp_path / "none.csv")
    for table in (
        architecture_summary,
        rebasin_summary,
        not_right,
        least_moved,
        architecture_sources,
    ):
        assert len(table(nothing)) == 0
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="run it again with --record"):
        read_architectures(tmp_path / "other.csv")
