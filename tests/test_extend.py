"""One new file is enough: a method, a network, a data set and an experiment are found wherever names are shown."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import npmerge

METHOD = '''
"""Agg by a mean in which one model counts more."""

from torch import nn

from npmerge.aggregate.averaging import mean
from npmerge.methods import method


@method(kind="aggregate", label="Weighted mean", row="Weighted-{align}", family="toys")
def weighted_mean(a: nn.Module, b: nn.Module, *, share: float = 0.7) -> nn.Module:
    """Interpolate with a fixed share of model A."""
    return mean(a, b, alpha=share)
'''
MODEL = '''
"""A network of two layers."""

import torch
from torch import nn

from npmerge.catalogue import model


@model(label="Two layers", family="perceptrons")
def two_layers(
    classes: int,
    width: float = 1,
    *,
    in_channels: int = 3,
    image_size: int = 32,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """A hidden layer and ReLU."""
    hidden = round(16 * width)
    made = nn.Sequential(
        nn.Flatten(), nn.Linear(in_channels * image_size**2, hidden), nn.ReLU(), nn.Linear(hidden, classes)
    )
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return made
'''
DATASET = '''
"""Random dots, four classes."""

import torch

from npmerge.catalogue import dataset
from npmerge.data.images import Images
from npmerge.data.inmemory import ImageSet


def _half(count: int, seed: int) -> Images:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    pixels = torch.randint(100, (count, 1, 4, 4), generator=generator) + 50 * labels.view(-1, 1, 1, 1)
    return Images(pixels.clamp(max=255).to(torch.uint8), labels)


@dataset(label="Dots", classes=4, image_size=4, channels=1)
def dots(folder: object = None, *, image_size: int | None = None) -> ImageSet:
    """Grey squares whose brightness is their class."""
    return ImageSet("dots", _half(200, 0), _half(80, 1), 4, (0.5,), (0.25,), padding=0, flip=False)
'''
EXPERIMENT = '''
"""Does a weighted mean do?"""

from npmerge.experiments.listing import Experiment, setting_cells
from npmerge.experiments.profile import Methods

SETTING = {
    "dataset": "dots", "image_size": 4, "model": "two_layers", "width": 1,
    "recipe": {"epochs": 2, "batch_size": 50, "lr": 0.1, "warmup_epochs": 1},
}
SECTION = {
    "settings": [SETTING],
    "optimisation": {"batch_size": 50, "options": {"weighted_mean": {"share": 0.6}}},
    "methods": [{"align": ["permute"], "aggregate": ["mean", "weighted_mean"]}],
}


def list_cells(profile, section, seeds):
    return [
        cell
        for setting in section.settings
        for seed in seeds
        for cell in setting_cells(profile, "weighing", section, setting, seed)
    ]


EXPERIMENT = Experiment("weighing", "Weighing", "ours", list_cells, defaults={"digits": SECTION})
'''
FILES = {
    "aggregate/weighted.py": METHOD,
    "models/layers.py": MODEL,
    "data/sets/dotted.py": DATASET,
    "experiments/weighing.py": EXPERIMENT,
}
SHOWN = """
import json, sys
from npmerge.book import api_pages
from npmerge.methods import Combination
from npmerge.report.plots import plot_methods
from npmerge.report.numbers import summary
from npmerge.store.records import Records, table
records = list(Records(sys.argv[1]).whole("digits", "weighing"))
found = summary(table(records))
figure = plot_methods(records)
texts = [text.get_text() for axis in figure.axes for text in axis.get_yticklabels()]
page = "".join(api_pages("% methods").values())
print(json.dumps({
    "rows": [method.label for here in found.values() for method in here],
    "plot": texts,
    "api": [name in page for name in (
        "npmerge.aggregate.weighted.weighted_mean", "automodule:: npmerge.models.layers",
        "automodule:: npmerge.data.sets.dotted", "automodule:: npmerge.experiments.weighing")],
    "color": Combination("weighted_mean", "permute").color,
}))
"""


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with one more file of each kind."""
    root = tmp_path_factory.mktemp("house")
    package = Path(npmerge.__file__).parent
    shutil.copytree(package, root / "npmerge", ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in FILES.items():
        (root / "npmerge" / name).write_text(text.lstrip())
    return root


def call(house: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], cwd=house, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(house), "MPLBACKEND": "agg"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_file_each_is_found_by_the_command_line(house: Path) -> None:
    listed = json.loads(call(house, "-m", "npmerge", "methods", "--json"))
    assert "weighted_mean" in [one["name"] for one in listed]
    help_ = call(house, "-m", "npmerge", "merge", "--help")
    assert all(name in help_ for name in ("weighted_mean", "two_layers", "dots"))
    assert "weighing" in call(house, "-m", "npmerge", "run", "--help")
    assert call(house, "-m", "npmerge", "data", "dots").startswith("dots: 200 training")


def test_one_file_each_is_run_recorded_and_shown(house: Path) -> None:
    where = ["--results", "results", "--zoo", "zoo", "--device", "cpu", "--seeds", "0", "1"]
    paths = call(house, "-m", "npmerge", "run", "weighing", *where, "--quiet").splitlines()
    assert any(path.endswith("permute-weighted_mean.json") for path in paths)
    shown = json.loads(call(house, "-c", SHOWN, "results"))
    assert "Weighted-P" in shown["rows"]
    assert "Weighted-P" in shown["plot"]
    assert shown["api"] == [True] * 4
    assert shown["color"].startswith("#")
    csv = call(house, "-m", "npmerge", "records", "--csv", "--results", "results")
    assert csv.count("weighted_mean") == 4  # top-1 and loss of two seeds


def test_a_method_added_to_an_experiment_adds_cells_and_the_others_stay_done(house: Path) -> None:
    where = ["--results", "more", "--zoo", "zoo", "--device", "cpu", "--seeds", "0"]
    file = house / "npmerge" / "experiments" / "weighing.py"
    whole = file.read_text()
    try:
        file.write_text(whole.replace('["mean", "weighted_mean"]', '["mean"]'))
        first = call(house, "-m", "npmerge", "run", "weighing", *where, "--quiet").splitlines()
        before = {path: (house / path).read_bytes() for path in first}
        file.write_text(whole)
        status = call(house, "-m", "npmerge", "status", "weighing", *where).splitlines()[1].split()
        assert status[:4] == ["weighing", str(len(first)), "0", "1"]
        call(house, "-m", "npmerge", "run", "weighing", *where, "--quiet")
        assert {path: (house / path).read_bytes() for path in first} == before
    finally:
        file.write_text(whole)
