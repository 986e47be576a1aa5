"""The command line: ``npmerge run | book | claims | data``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm.contrib.logging import logging_redirect_tqdm

import npmerge
from npmerge import experiments
from npmerge.book import BookError, make_book
from npmerge.data.datasets import DATASETS, DataError, load
from npmerge.figures import verdict_table
from npmerge.paper import verdicts
from npmerge.parameters import validated
from npmerge.results import Results, table
from npmerge.training import TrainingError

log = logging.getLogger("npmerge")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; those of the process by default.

    Returns:
        The exit status: 0, or 1 with one line on stderr that says what to do, or 130 after an interrupt.
    """
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.WARNING if options.quiet else logging.INFO, format="%(message)s"
    )
    try:
        with logging_redirect_tqdm():
            options.command(options)
    except (ValueError, DataError, BookError, TrainingError, OSError) as error:
        sys.stderr.write(f"npmerge: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(
            "npmerge: stopped; finished units are kept, the same command goes on from there\n"
        )
        return 130
    return 0


def _run(options: argparse.Namespace) -> None:
    for name in options.experiment:  # every name and seed is checked before the first one runs
        experiments.units(name, options.profile, options.seeds)
    for name in options.experiment:
        paths = experiments.run(
            name,
            profile=options.profile,
            seeds=options.seeds,
            device=options.device,
            results=options.results,
            zoo=options.zoo,
            recompute=options.recompute,
            progress=not options.quiet,
        )
        for path in paths:
            sys.stdout.write(f"{path}\n")


def _book(options: argparse.Namespace) -> None:
    parameters = validated(
        {
            "profile": options.profile,
            "seeds": options.seeds,
            "device": options.device,
            "recompute": options.recompute,
            "results": str(Path(options.results).resolve()),
            "zoo": str(Path(options.zoo).resolve()),
        }
    )
    page = make_book(
        parameters.model_dump(mode="json"),
        root=options.root,
        output=options.output,
        progress=not options.quiet,
    )
    sys.stdout.write(f"\nThe book is ready. Open {os.path.relpath(page)}\n({page.as_uri()})\n")


def _claims(options: argparse.Namespace) -> None:
    results = Results(options.results)
    for name in experiments.EXPERIMENTS:
        contents = results.read(options.profile, name)
        if not contents:
            raise ValueError(
                f"no records of {name} at {options.profile!r} in {results.folder}: "
                f"run `npmerge run {name} --profile {options.profile}` first"
            )
        rows = verdict_table(verdicts(name, table(contents)))
        sys.stdout.write(rows.to_string(index=False) + "\n")


def _data(options: argparse.Namespace) -> None:
    for name in options.name or DATASETS:
        data = load(name)
        sys.stdout.write(
            f"{name}: {len(data.train.labels)} training and {len(data.test.labels)} test images, "
            f"{data.classes} classes\n"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="npmerge", description=npmerge.__doc__)
    parser.add_argument("--version", action="version", version=f"npmerge {npmerge.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run experiments; finished units are kept")
    run.add_argument("experiment", nargs="+", help=", ".join(experiments.EXPERIMENTS))
    _add_experiment_options(run)
    run.set_defaults(command=_run)

    book = commands.add_parser("book", help="execute the notebooks and render the book")
    _add_experiment_options(book)
    book.add_argument(
        "--root", default=".", metavar="DIR", help="the project's folder (default: this one)"
    )
    book.add_argument(
        "--output", default="_build", metavar="DIR", help="where to build (default: _build)"
    )
    book.set_defaults(command=_book)

    claims = commands.add_parser("claims", help="hold the paper's claims against the records")
    claims.add_argument(
        "--profile", default="digits", help=f"{', '.join(experiments.PROFILES)} (default: digits)"
    )
    claims.add_argument(
        "--results",
        default="results",
        metavar="DIR",
        help="folder of the records (default: results)",
    )
    claims.add_argument("--quiet", action="store_true", help="no progress")
    claims.set_defaults(command=_claims)

    data = commands.add_parser("data", help="download and check the data sets")
    data.add_argument("name", nargs="*", help=f"{', '.join(DATASETS)} (default: all)")
    data.add_argument("--quiet", action="store_true", help="no progress")
    data.set_defaults(command=_data)
    return parser


def _add_experiment_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile", default="digits", help=f"{', '.join(experiments.PROFILES)} (default: digits)"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2"
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, ... (default: a GPU if there is one)"
    )
    parser.add_argument("--recompute", action="store_true", help="make every record again")
    parser.add_argument(
        "--results",
        default=os.environ.get("NPMERGE_RESULTS", "results"),
        metavar="DIR",
        help="folder of the records",
    )
    parser.add_argument(
        "--zoo",
        default=os.environ.get("NPMERGE_ZOO", "zoo"),
        metavar="DIR",
        help="folder of the base models",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
