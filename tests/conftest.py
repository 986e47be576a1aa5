"""What the tests share: the precision, and the built book."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--book",
        type=Path,
        metavar="HTML",
        help="check the book that is built in this folder already, instead of building one",
    )


@pytest.fixture(scope="session", autouse=True)
def float32_by_default() -> Iterator[None]:
    """The same numbers whatever the processor: nothing learns in bfloat16 unless a test asks for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
        yield


@pytest.fixture(scope="session")
def html(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the book's pages, built afresh.

    `make test` gives an empty folder of results, which the check of the notebooks shares; without it, one is made here.
    """
    built: Path | None = request.config.getoption("--book")
    if built is None:
        folder = tmp_path_factory.mktemp("book")
        program = Path(sys.executable).with_name("npmerge")
        command = [str(program), "book", "--profile", "digits"]
        command += ["--output", str(folder / "output")]
        for option in ("results", "zoo"):
            given = os.environ.get(f"NPMERGE_{option.upper()}")
            command += [f"--{option}", given or str(folder / option)]
        subprocess.run(command, cwd=request.config.rootpath, check=True)
        built = folder / "output" / "html"
    assert (built / "index.html").is_file(), f"no book in {built}"
    return built
