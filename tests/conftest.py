"""What the tests share: the built book."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--book",
        type=Path,
        metavar="HTML",
        help="check the book that is built in this folder already, instead of building one",
    )


@pytest.fixture(scope="session")
def html(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the book's pages, built afresh: with no results, no trained models and no earlier build."""
    built: Path | None = request.config.getoption("--book")
    if built is None:
        folder = tmp_path_factory.mktemp("book")
        program = Path(sys.executable).with_name("npmerge")
        command = [str(program), "book", "--profile", "digits"]
        for option in ("output", "results", "zoo"):
            command += [f"--{option}", str(folder / option)]
        subprocess.run(command, cwd=request.config.rootpath, check=True)
        built = folder / "output" / "html"
    assert (built / "index.html").is_file(), f"no book in {built}"
    return built
