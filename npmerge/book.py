"""Execute the notebooks and render the book."""

from __future__ import annotations

import logging
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from itertools import chain
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

import npmerge
from npmerge.experiments import EXPERIMENTS, load_profiles
from npmerge.methods import KINDS, of_kind
from npmerge.parameters import validated
from npmerge.report import coefficients, transformers
from npmerge.report.cards import cards_page
from npmerge.report.comparison import (
    GRID,
    answer,
    grid_points,
    other_points,
    paper_points,
    plot_comparison,
)
from npmerge.report.ledger import hold_claims
from npmerge.report.machines import cluster_findings
from npmerge.report.pages import everything, today
from npmerge.report.plots import style
from npmerge.report.report_card import (
    claims_page,
    disagreements,
    every_number,
    first_page,
    numbers_page,
)
from npmerge.report.robustness import robustness_parts
from npmerge.report.vector import standalone
from npmerge.report.words import NOTHING
from npmerge.run.engine import run_experiments
from npmerge.run.workers import executor
from npmerge.store.records import Record

log = logging.getLogger(__name__)

JUPYTER_BOOK = "from jupyter_book.cli.main import main; main()"  # it cannot be run as a module
SOURCES = ("book", "notebooks", "results", "_config.yml", "_toc.yml")
SIDE_BY_SIDE = 4
"""Notebooks at a time, at most: each holds a process with PyTorch."""
PACKAGES = ("npmerge.experiments", "npmerge.models", "npmerge.data", "npmerge.symmetry.rules")
"""Packages that have functions of their own."""
OPTIONS = ("   :members:", "   :ignore-module-all:")
"""Of the API page's modules."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
"""Commands that print a page."""
MARK = ".npmerge-book"
"""A file that says that a folder is ours to empty."""
METHODS_HERE = "% methods"
"""The line of the API's first page that stands for what is made from the registry."""


class BookError(RuntimeError):
    """A notebook failed or the book did not build; nothing was published."""


def make_book(
    parameters: dict[str, Any],
    *,
    root: Path | str = ".",
    output: Path | str = "_build",
    progress: bool = True,
) -> Path:
    """Run the notebooks' experiments, execute the notebooks with papermill, and render the book around them.

    The sources are copied to ``<output>/source`` and executed there, so the committed notebooks stay as they are. The
    new pages replace the old ones only once everything has succeeded.

    Args:
        parameters: given to every notebook.
        root: the project's folder, with ``_config.yml``, ``_toc.yml``, ``book/`` and ``notebooks/``.
        output: where to build.
        progress: show a progress bar for the experiments.

    Returns:
        The first page, ``<output>/html/index.html``.

    Raises:
        BookError: the sources are not there, the output is a folder with something else in it, a notebook failed, or
            Jupyter Book warned or failed.
        CellsFailedError: cells of an experiment failed.
        DataError: a data set is not there.
        ValueError: a record file is damaged.
    """
    root, output = Path(root).resolve(), Path(output).resolve()
    missing = [name for name in SOURCES if not (root / name).exists()]
    if missing:
        raise BookError(f"{root} is not the project's folder: {missing[0]} is not there")
    if output.exists() and not (output / MARK).exists() and any(output.iterdir()):
        raise BookError(
            f"{output} is not empty and holds no book of ours: give another folder, or empty it yourself"
        )
    stage = output / "source"
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    (output / MARK).touch()
    made_anew = (one.name for one in load_profiles(demonstration=True))
    ignored = shutil.ignore_patterns(".*", "__pycache__", *made_anew)
    for name in SOURCES:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, stage / name, ignore=ignored)
        else:
            shutil.copy(source, stage / name)
    first = (stage / "book" / "api.md").read_text(encoding="utf-8")
    for name, text in api_pages(first).items():
        page = stage / "book" / f"{name}.md"
        page.parent.mkdir(exist_ok=True)
        page.write_text(text, encoding="utf-8")
    notebooks = sorted((stage / "notebooks").glob("*.ipynb"))
    _run_experiments(notebooks, parameters, progress=progress)
    _execute_all(notebooks, {**parameters, "recompute": False})
    records = _all_records(stage, parameters)
    write_record_pages(stage, records)
    return _render(stage, output)


def _run_experiments(
    notebooks: Sequence[Path], parameters: Mapping[str, Any], *, progress: bool
) -> None:
    """Run the experiments that the notebooks ask for, all at once, so that no core waits for the end of a chapter."""
    text = "".join(notebook.read_text(encoding="utf-8") for notebook in notebooks)
    named = set(re.findall(r"run_experiments[(]\\\"(\w+)", text))
    given: dict[str, list[str]] = {}
    for name in EXPERIMENTS:
        if name in named:
            given.setdefault(validated(parameters).profile_of(name), []).append(name)
    for profile, names in given.items():
        log.info("running %s at %s", ", ".join(names), profile)
        chosen = validated({**parameters, "profile": profile}).model_dump()
        here = notebooks[0].parent
        chosen |= {name: here / chosen[name] for name in ("results", "zoo", "models")}
        run_experiments(names, **chosen, progress=progress)


def _execute_all(notebooks: Sequence[Path], parameters: Mapping[str, Any]) -> None:
    """Execute notebooks in place, as many side by side as there are cores, up to a few."""
    count = min(SIDE_BY_SIDE, os.cpu_count() or 1)
    pool = executor(count)
    running: set[Future[None]] = set()
    try:
        for notebook in notebooks:
            if len(running) == count:
                ended, running = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    future.result()
            log.info("executing %s", notebook.name)
            running.add(pool.submit(execute, notebook, notebook, parameters, progress=False))
        for future in running:
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def api_pages(text: str) -> dict[str, str]:
    """The pages of the API: the first one with the table of methods, and one for every room.

    Args:
        text: the first one, Markdown with the line :data:`METHODS_HERE`.

    Returns:
        Markdown by the page's name: ``"api"``, ``"api/align"``, ...
    """
    rows = [
        f"| {{py:func}}`~{one.module}.{one.name}` | {one.kind} | {one.label} | {', '.join(one.needs) or NOTHING} "
        f"| {', '.join(f'`{name}={option.default!r}`' for name, option in one.options.items()) or NOTHING} "
        f"| {f'{{cite:p}}`{one.reference}`' if one.reference else NOTHING} |"
        for kind in KINDS
        for one in of_kind(kind).values()
    ]
    head = "| Name | Kind | Label | Needs | Options | Source |\n|---|---|---|---|---|---|\n"
    rooms: dict[str, list[str]] = {}
    for name in public_modules():
        _, _, below = name.partition(".")
        room, dot, _ = below.partition(".")
        rooms.setdefault(room if dot else "npmerge", []).append(name)
    pages = {"api": text.replace(METHODS_HERE, head + "\n".join(rows))}
    for room, modules in sorted(rooms.items()):
        title = room if room == "npmerge" else f"npmerge.{room}"
        lines = [f"# {title}", "", "```{eval-rst}"]
        for name in modules:
            lines += [f".. automodule:: {name}", *OPTIONS, ""]
        pages[f"api/{room}"] = "\n".join([*lines, "```", ""])
    return pages


def public_modules() -> list[str]:
    """The modules of the package, by their names; packages are shown by what is in them."""
    found = [
        one.name
        for one in pkgutil.walk_packages(npmerge.__path__, "npmerge.")
        if not one.ispkg or one.name in PACKAGES
    ]
    return sorted(name for name in found if "._" not in name)


def execute(
    source: Path, target: Path, parameters: Mapping[str, Any], *, progress: bool = True
) -> None:
    """Execute one notebook and write it without times and paths, so that equal runs give equal files.

    Args:
        source: the notebook.
        target: where to write it; only written on success.
        parameters: for its cell tagged ``parameters``.
        progress: show a progress bar for the cells.

    Raises:
        BookError: a cell raised; the message ends with the error.
    """
    import nbformat
    import papermill

    partial = target.with_suffix(".partial.ipynb")
    try:
        notebook = papermill.execute_notebook(
            str(source),
            str(partial),
            parameters=dict(parameters),
            cwd=str(source.parent),
            kernel_name="python3",
            progress_bar=progress,
        )
    except papermill.PapermillExecutionError as error:
        where = f"{source.name}, cell [{error.exec_count}]"
        raise BookError(f"{where} failed: {error.ename}: {error.evalue}") from error
    except RuntimeError as error:  # of Jupyter: its process does not start, or has died
        raise BookError(f"{source.name} was not executed: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    clean(notebook)
    write: Callable[[Any, str], None] = nbformat.write
    write(notebook, str(target))


def clean(notebook: Any) -> None:
    """Take times, paths, progress bars and papermill's cell out of an executed notebook, in place.

    Args:
        notebook: an ``nbformat`` notebook.
    """
    notebook.metadata.pop("papermill", None)
    notebook.metadata.pop("widgets", None)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02d}"
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
    notebook.cells = [
        cell
        for cell in notebook.cells
        if "injected-parameters" not in cell.metadata.get("tags", [])
    ]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for count, cell in enumerate(code, 1):  # without a gap where papermill's cell was
        cell.execution_count = count
        for one in cell.outputs:
            if "execution_count" in one:
                one.execution_count = count


def _all_records(stage: Path, parameters: dict[str, Any]) -> dict[str, list[Record]]:
    """The records that today's configuration gives, by profile, the largest first: published, and those just made."""
    given = validated(parameters)
    folders = {one.name: stage / "results" for one in load_profiles(demonstration=False)}
    folders |= dict.fromkeys(
        (one.name for one in load_profiles(demonstration=True)),
        stage / "notebooks" / given.results,
    )
    return {name: today(everything(str(folder), name)) for name, folder in folders.items()}


def _of(experiment: str, records: Mapping[str, Sequence[Record]]) -> list[Record]:
    """An experiment's records of the largest profile that has any."""
    every = (
        [one for one in some if one.cell.experiment == experiment] for some in records.values()
    )
    return next(filter(None, every), [])


def draw_result(stage: Path, records: Mapping[str, Sequence[Record]]) -> str:
    """Draw the first page's figure: NP Merge minus fine-tuning wherever records have both, the paper's beside it.

    Args:
        stage: the book's sources.
        records: by profile.

    Returns:
        What the picture, ``book/_static/result.svg`` in the stage, shows, in words.
    """
    published = {one.name for one in load_profiles(demonstration=False)}
    grids = [
        [record for record in some if record.cell.experiment == GRID]
        for profile, some in records.items()
        if profile in published
    ]
    points = [
        *chain.from_iterable(map(grid_points, grids)),
        *other_points(list(chain.from_iterable(records.values()))),
        *paper_points(),
    ]
    target = stage / "book" / "_static" / "result.svg"
    mpl.use("agg")
    with plt.rc_context():
        style()
        figure = plot_comparison(points)
        target.write_text(standalone(figure), encoding="utf-8")
        plt.close(figure)
    return str(figure.get_label())


def write_record_pages(stage: Path, records: Mapping[str, Sequence[Record]]) -> None:
    """Put the report card, the claims and the numbers into their pages, and the records beside them to be downloaded.

    Args:
        stage: the book's sources.
        records: by profile.
    """
    rows, numbers = hold_claims(records), every_number(records)
    torture = stage / "results" / "benchmarks" / "torture.csv"
    made = {
        ("index", "% report card"): first_page(rows),
        ("index", "% result"): draw_result(stage, records),
        ("claims", "% claims"): claims_page(rows),
        ("numbers", "% numbers"): numbers_page(numbers),
        ("every_method", "% cards"): cards_page(),
        ("clusters", "% kills"): cluster_findings(stage / "results" / "benchmarks" / "cluster.csv"),
        ("protocol", "% disagreements"): disagreements(rows),
        **{("robustness", f"% {part}"): text for part, text in robustness_parts(torture).items()},
        ("when_to_use", "% grid"): answer(grid_points(_of(GRID, records))),
        ("when_to_use", "% transformers"): transformers.findings(_of("transformers", records)),
        ("when_to_use", "% coefficients"): coefficients.findings(_of("coefficients", records)),
    }
    for (name, here), text in made.items():
        page = stage / "book" / f"{name}.md"
        page.write_text(page.read_text(encoding="utf-8").replace(here, text), encoding="utf-8")
    numbers.to_csv(stage / "book" / "_static" / "numbers.csv", index=False)
    shutil.make_archive(str(stage / "book" / "_static" / "records"), "zip", stage / "results")


def make_pdf(output: Path | str = "_build") -> Path:
    """Print the book as one PDF, by Chromium or Chrome.

    Args:
        output: where the book was made, by :func:`make_book`.

    Returns:
        ``<output>/book.pdf``.

    Raises:
        BookError: there is no book, or no browser, or one of the two steps failed.
    """
    output = Path(output).resolve()
    stage, built, pdf = output / "source", output / "single", output / "book.pdf"
    if not stage.is_dir():
        raise BookError(f"there is no book in {output}: make it first")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise BookError(f"no browser to print with was found: install one of {', '.join(BROWSERS)}")
    _build("singlehtml", stage, built, output / "pdf.log")
    pages = built / "_build" / "singlehtml"
    first = re.findall(r"url=([^\"]+)", (pages / "index.html").read_text(encoding="utf-8"))[0]
    whole = pages / "whole.html"  # where its links into the folder hold
    shutil.copy(pages / first, whole)
    command = [
        browser, "--headless", "--disable-gpu", "--disable-background-networking",
        "--no-pdf-header-footer", "--virtual-time-budget=120000",  # milliseconds, for the formulas
        *(["--no-sandbox"] if os.geteuid() == 0 else []), f"--print-to-pdf={pdf}", whole.as_uri(),
    ]  # fmt: skip
    pdf.unlink(missing_ok=True)
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603
    if done.returncode or not pdf.exists():
        raise BookError(f"{browser} did not print the book:\n{done.stderr[-2000:]}")
    shutil.rmtree(built)
    return pdf


def _build(builder: str, stage: Path, built: Path, log_file: Path, *options: str) -> None:
    """Build the staged sources with Jupyter Book."""
    shutil.rmtree(built, ignore_errors=True)
    command = [sys.executable, "-c", JUPYTER_BOOK, "build", "--builder", builder, *options]
    done = subprocess.run(  # noqa: S603
        [*command, "--path-output", str(built), str(stage)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )
    text = done.stdout + done.stderr
    log_file.write_text(text)
    if done.returncode:
        raise BookError(f"the book did not build; {log_file} has all of it:\n{_last_words(text)}")


def _render(stage: Path, output: Path) -> Path:
    built = output / "new"
    _build("html", stage, built, output / "build.log", "-W", "-n", "--keep-going", "--all")
    html = output / "html"
    shutil.rmtree(html, ignore_errors=True)
    shutil.move(built / "_build" / "html", html)
    shutil.rmtree(built)
    first = html / "index.html"  # only leads to the first page, before a browser has its icon
    icon = '<link rel="icon" href="data:,">'
    first.write_text(icon + first.read_text(encoding="utf-8"), encoding="utf-8")
    return first


def _last_words(text: str) -> str:
    lines: Sequence[str] = re.sub("\x1b[^m]*m", "", text).splitlines()
    marked = [line for line in lines if "WARNING" in line or "ERROR" in line or "Exception" in line]
    return "\n".join(marked[-20:] or lines[-20:])
