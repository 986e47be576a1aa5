"""The files that install, describe and publish the project say the same thing."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import npmerge
from npmerge.book import api_pages
from npmerge.methods import METHODS
from npmerge.report.cards import cards_page

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
CONSTRAINTS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
MAKEFILE = (ROOT / "Makefile").read_text()


def read_yaml(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def tracked() -> list[Path]:
    """The files of the project: those that git tracks, and new ones that it does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return [path for name in listed.stdout.splitlines() if (path := ROOT / name).is_file()]


def python_bound() -> str:
    bound = re.fullmatch(r">=(\d+\.\d+)", PROJECT["requires-python"])
    assert bound
    return bound[1]


def pip_arguments() -> list[str]:
    (pip,) = [d["pip"] for d in read_yaml("environment.yml")["dependencies"] if isinstance(d, dict)]
    return [argument for line in pip for argument in line.split()]


def test_conda_and_make_install_the_same_package_extras_and_versions() -> None:
    (command,) = re.findall(r"uv pip install --compile-bytecode --python \S+ (.*)", MAKEFILE)
    assert command.replace('"', "").split() == pip_arguments()
    (extras,) = re.findall(r"\.\[(.*)\]", command)
    assert set(extras.split(",")) == {"book", "test"} <= EXTRAS.keys()


def test_conda_make_and_ruff_have_the_package_s_python_bound() -> None:
    (python,) = [
        d for d in read_yaml("environment.yml")["dependencies"] if str(d).startswith("python")
    ]
    minor = [int(v[1]) for c in PROJECT["classifiers"] if (v := re.search(r":: 3\.(\d+)$", c))]
    assert python == f"python>={python_bound()},<3.{max(minor) + 1}"
    assert f"3.{min(minor)}" == python_bound()
    assert f"sys.version_info < ({python_bound().replace('.', ', ')})" in MAKEFILE
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert tools["ruff"]["target-version"] == f"py{python_bound().replace('.', '')}"
    assert tools["mypy"]["python_version"] == python_bound()


def test_workflows_test_every_supported_python() -> None:
    matrix = read_yaml(".github/workflows/tests.yml")["jobs"]["tests"]["strategy"]["matrix"]
    supported = [v for c in PROJECT["classifiers"] if (v := c.rpartition(" ")[2]).startswith("3.")]
    assert matrix["python"] == supported


@pytest.mark.parametrize(
    "line", [*PROJECT["dependencies"], *EXTRAS["book"], *EXTRAS["test"], *EXTRAS["dev"]]
)
def test_every_requirement_is_pinned_within_its_range(line: str) -> None:
    requirement = Requirement(line)
    if requirement.name == PROJECT["name"]:
        return
    pins = [pin for pin in CONSTRAINTS if pin.name == requirement.name]
    assert pins
    for pin in pins:
        (exact,) = pin.specifier
        assert exact.operator == "=="
        assert requirement.specifier.contains(exact.version)


def test_the_pins_install_on_the_oldest_python() -> None:
    """Each package is pinned exactly once for a given system, the first 3.11 included."""
    for version in (f"{python_bound()}.2", "3.12.0", "3.13.0"):
        environment = {**default_environment(), "python_full_version": version}
        environment["python_version"] = version.rpartition(".")[0]
        chosen = [p.name for p in CONSTRAINTS if not p.marker or p.marker.evaluate(environment)]
        assert len(chosen) == len(set(chosen))
        assert {"torch", "torchvision", "jupyter-book", "soupsieve", "uv"} <= set(chosen)


def test_jupyter_book_stays_at_the_line_that_reads_config_yml() -> None:
    (book,) = [pin for pin in CONSTRAINTS if pin.name == "jupyter-book"]
    (exact,) = book.specifier
    assert exact.version in SpecifierSet(">=1.0,<1.1")


def test_version_and_title_are_those_of_the_package() -> None:
    assert PROJECT["dynamic"] == ["version"]  # from npmerge/_version.py
    assert (
        read_yaml("CITATION.cff")["version"] == npmerge.__version__ == metadata.version("npmerge")
    )
    assert f"## [{npmerge.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_address_of_the_repository_stands_in_one_place() -> None:
    address = read_yaml("_config.yml")["repository"]["url"].removeprefix("https://")
    holders = [path.name for path in tracked() if address.encode() in path.read_bytes()]
    assert holders == ["_config.yml"]


def test_no_file_names_a_registry_or_a_folder_of_one_machine() -> None:
    hosts = r"pypi\.or[g]|pythonhoste[d]|registry\.npmj[s]|deb\.debia[n]"
    folders = r"/(?:wor[k]|roo[t]|hom[e])/[a-z]"
    pattern = re.compile(f"{hosts}|(?<![.\\w]){folders}".encode())
    assert [p.name for p in tracked() if pattern.search(p.read_bytes())] == []


def test_no_tracked_file_but_a_published_model_is_over_a_megabyte() -> None:
    large = [path for path in tracked() if path.stat().st_size > 2**20]
    assert [path.name for path in large if path.parent != ROOT / "models"] == []


def test_every_public_module_and_every_method_is_on_the_api_page() -> None:
    page = "".join(api_pages((ROOT / "book" / "api.md").read_text()).values())
    found = [m for m in pkgutil.walk_packages(npmerge.__path__, "npmerge.") if "._" not in m.name]
    modules = {module.name for module in found if not module.ispkg}
    packages = {module.name for module in found if module.ispkg}
    assert modules <= set(re.findall(r"automodule:: (\S+)", page)) <= modules | packages
    assert all(f"{one.module}.{one.name}`" in page for one in METHODS.values())


def test_only_cited_references_are_listed() -> None:
    keys = set(re.findall(r"^@\w+\{(\w+),", (ROOT / "book" / "references.bib").read_text(), re.M))
    sources = [*(ROOT / "book").glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]
    text = "".join(path.read_text() for path in sources) + cards_page()
    cited = {
        key.strip()
        for group in re.findall(r"\{cite:\w+\}`([^`]+)`", text)
        for key in group.split(",")
    }
    assert keys == cited


def test_ci_calls_make_test_and_is_executable() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o100
    assert re.search(r"^make test$", script.read_text(), re.M)
