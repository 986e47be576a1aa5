"""Names: each has one meaning, is registered where it is written, and is known without PyTorch."""

from __future__ import annotations

import gc
import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tiny import loader, net
from torch import nn

import npmerge as npm
from npmerge.catalogue import DATASETS, MODELS, experiment_names
from npmerge.experiments import EXPERIMENTS
from npmerge.methods import FAMILIES, GIVEN, KINDS, METHODS, Combination, find, method, of_kind
from npmerge.registry import Option, Registry

ROOT = Path(__file__).parents[1]


def modules() -> list[str]:
    found = pkgutil.walk_packages(npm.__path__, "npmerge.")
    return [one.name for one in found if not one.name.endswith("__main__")]


@pytest.mark.parametrize("registry", [METHODS, MODELS, DATASETS])
def test_what_is_read_from_the_files_is_what_their_modules_hold(registry: Registry) -> None:
    assert len(registry) >= 3
    for name, entry in registry.items():
        function = entry.function
        assert function.__name__ == name == entry.name
        signature = inspect.signature(function)
        assert tuple(signature.parameters) == entry.parameters
        keywords = {
            parameter.name: Option(str(parameter.annotation), parameter.default)
            for parameter in signature.parameters.values()
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not parameter.empty
        }
        assert dict(entry.keywords) == keywords
        assert entry.summary.endswith(".")


def test_no_public_function_has_the_name_of_a_module() -> None:
    names = {name.rpartition(".")[2] for name in modules()}
    functions = {
        name
        for module in map(importlib.import_module, modules())
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and not name.startswith("_")
        and value.__module__ == module.__name__
    }
    assert len(functions) > 100
    assert functions & names == set()


def test_every_reference_of_a_method_is_in_the_bibliography_and_every_family_has_a_colour() -> None:
    keys = re.findall(r"^@\w+\{(\w+),", (ROOT / "book" / "references.bib").read_text(), re.M)
    for one in METHODS.values():
        assert one.reference is None or one.reference in keys
        assert one.family in FAMILIES
        assert one.kind in KINDS
        assert not set(one.options) & GIVEN


def test_a_method_says_that_it_needs_data_if_and_only_if_it_takes_some() -> None:
    for one in METHODS.values():
        if one.kind in ("align", "aggregate", "correct"):
            assert ("data" in one.needs) == ("data" in one.parameters), one.name


def test_labels_tell_every_combination_of_methods_from_every_other() -> None:
    every = [
        Combination(aggregate, align, tuned, correct, many)
        for aggregate in of_kind("aggregate")
        for align in of_kind("align")
        for tuned in (False, True)
        for correct in (None, "reset_batchnorm")
        for many in (None, "tournament", "all_to_one")
    ]
    labels = [one.label for one in every]
    assert len(set(labels)) == len(labels)


def test_the_paper_s_names_are_the_labels() -> None:
    assert Combination("np_merge", "permute").label == "NP-P"
    assert Combination("finetune", "weight_matching").label == "Finetune-WM"
    assert Combination("mean", "identity").label == "Direct averaging"
    assert Combination("mean", "cca").label == "CCA Merge"
    assert Combination("base_models").label == "Base models avg."


@pytest.fixture
def halves() -> Iterator[str]:
    @method(kind="aggregate", label="Half of A", family="toys")
    def halved(a: nn.Module, b: nn.Module, *, share: float = 0.5) -> nn.Module:
        """A and B, by a share."""
        return npm.aggregate.mean(a, b, alpha=share)

    yield "halved"
    METHODS.remove("halved")


def test_a_function_of_one_s_own_is_a_method_once_it_is_decorated(halves: str) -> None:
    entry = METHODS[halves]
    assert entry.options == {"share": Option("float", 0.5)}
    assert entry.summary == "A and B, by a share."
    assert Combination(halves, "permute").label == "Half of A-P"
    assert re.fullmatch("#[0-9A-F]{6}", entry.color)
    ways = {"align": "identity", "aggregate": halves, "aggregate_options": {"share": 1.0}}
    merged = npm.merge([net(0), net(1)], loader(), correct=None, **ways)
    assert all(map(_equal, merged.model.parameters(), net(0).parameters()))


def _equal(x: nn.Parameter, y: nn.Parameter) -> bool:
    return bool((x == y).all())


def test_threads_may_ask_for_names_at_once() -> None:
    """Python 3.11 cannot parse in two threads: the collector of garbage lets another one run meanwhile."""

    def let_others(*_: object) -> None:
        time.sleep(5e-5)

    before = gc.get_threshold()
    gc.callbacks.append(let_others)
    gc.set_threshold(300)
    try:
        with ThreadPoolExecutor(3) as threads:
            found = [threads.submit(experiment_names) for _ in range(9)]
    finally:
        gc.callbacks.remove(let_others)
        gc.set_threshold(*before)
    assert all(one.result() == experiment_names() for one in found)


def test_two_methods_of_one_name_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"there is a method 'mean' already, in npmerge\.aggregate"
    ):

        @method(kind="aggregate", label="Mean")
        def mean() -> None:
            """Another mean."""


def test_a_method_of_another_kind_is_not_found_and_the_error_lists_those_there_are() -> None:
    with pytest.raises(
        ValueError, match="unknown alignment 'mean': choose one of identity, permute"
    ):
        find("mean", "align")
    with pytest.raises(ValueError, match="unknown model 'lenet': choose one of"):
        MODELS["lenet"]


QUICK = {
    "version": ["--version"],
    "help of merge": ["merge", "--help"],
    "methods": ["methods", "--json"],
    "unknown experiment": ["run", "magic"],
    "unknown profile": ["run", "ALL", "--profile", "huge"],
    "no such cell": ["run", "ALL", "--cells", "x*"],
    "unknown alignment": [
        *("merge", "a.safetensors", "b.safetensors", "--output", "c.safetensors"),
        *("--model", "resnet20", "--data", "digits", "--align", "magic"),
    ],
    "missing checkpoint": [
        *("merge", "a.safetensors", "b.safetensors", "--output", "c.safetensors"),
        *("--model", "resnet20", "--data", "digits"),
    ],
    "unknown data set": ["data", "mnist"],
    "records": ["records", "--csv", "--results", "nowhere"],
}


@pytest.mark.parametrize("case", QUICK)
def test_names_help_and_wrong_arguments_do_not_wait_for_pytorch(case: str, tmp_path: Path) -> None:
    code = """
import sys
from npmerge.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as stop:
    status = stop.code
slow = {"torch", "pandas", "matplotlib", "scipy", "sklearn", "pydantic"} & set(sys.modules)
print(f"\\nstatus {status}, slow {sorted(slow)}")
"""
    command = [sys.executable, "-c", code, *QUICK[case]]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    expected = 0 if case in ("version", "help of merge", "methods", "records") else 1
    schemas = ["pydantic"] * (case in ("no such cell", "records"))  # of profiles and records
    assert done.stdout.splitlines()[-1] == f"status {expected}, slow {schemas}"


def test_the_registry_is_listed_for_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    from npmerge.cli import main

    assert main(["methods", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in listed] == [n for kind in KINDS for n in of_kind(kind)]
    (np_merge,) = [one for one in listed if one["name"] == "np_merge"]
    assert np_merge["needs"] == ["data", "labels"]
    assert np_merge["reference"] == "npmerge2024"
    assert np_merge["options"]["lr"] == {"type": "float", "default": 0.01}
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in METHODS)


def test_experiments_are_in_the_paper_s_order() -> None:
    assert [one.table for one in EXPERIMENTS.values()][:5] == ["I", "II", "III", "IV", "Figure 1"]
