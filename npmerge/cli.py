"""The command line: ``npmerge run | status | merge | book | claims | data``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.contrib.logging import logging_redirect_tqdm

import npmerge
from npmerge import experiments
from npmerge.align import METHODS
from npmerge.book import BookError, make_book
from npmerge.data.datasets import DATASETS, DataError, load
from npmerge.experiments.schedule import duration
from npmerge.figures import verdict_table
from npmerge.merge import AGGREGATE
from npmerge.merge_command import MergeOptions, merge_checkpoints
from npmerge.models import MODELS
from npmerge.paper import CLAIMS, verdicts
from npmerge.parameters import validated
from npmerge.results import Results, table
from npmerge.training import OutOfMemoryError, TrainingError

log = logging.getLogger("npmerge")

EXPERIMENTS = ", ".join([experiments.ALL, *experiments.EXPERIMENTS])


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
    except (ValueError, DataError, BookError, TrainingError, OutOfMemoryError, OSError) as error:
        sys.stderr.write(f"npmerge: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"npmerge: stopped; {options.stopped}\n")
        return 130
    return 0


def _run(options: argparse.Namespace) -> None:
    paths = experiments.run(
        options.experiment,
        **_selection(options),
        recompute=options.recompute,
        deterministic=options.deterministic,
        at_once=options.at_once,
        dry_run=options.dry_run,
        time_budget=options.time_budget,
        progress=not options.quiet,
    )
    for path in paths:
        sys.stdout.write(f"{path}\n")


def _selection(options: argparse.Namespace) -> dict[str, Any]:
    """Which units, where they run and where their files are."""
    return {
        "profile": options.profile,
        "seeds": options.seeds,
        "pattern": options.units,
        "device": options.device,
        "results": options.results,
        "zoo": options.zoo,
    }


STATES = ["done", "running", "missing", "stale", "damaged"]


def _status(options: argparse.Namespace) -> None:
    found = experiments.status(options.experiment or experiments.ALL, **_selection(options))
    rows = {
        one.experiment: [*(one.units[state] for state in STATES), duration(one.seconds)]
        for one in found
    }
    shown = pd.DataFrame.from_dict(rows, orient="index", columns=[*STATES, "time left"])
    sys.stdout.write(shown.to_string() + "\n")


def _merge(options: argparse.Namespace) -> None:
    device = experiments.pick_device(options.device)
    choices = MergeOptions(
        **{field.name: getattr(options, field.name) for field in fields(MergeOptions)}
    )
    if "" not in sys.path:  # factories of the current folder
        sys.path.insert(0, "")
    scores = merge_checkpoints(
        options.a,
        options.b,
        options.output,
        choices,
        device=device,
        force=options.force,
        progress=not options.quiet,
    )
    sys.stdout.write(f"{'':8} {'accuracy':>9} {'loss':>9}\n")
    for name, found in scores.items():
        sys.stdout.write(f"{name:8} {found.top1:8.2f}% {found.loss:9.4f}\n")
    sys.stdout.write(f"{options.output}\n")


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
    names = experiments.names(options.experiment or experiments.ALL)
    contents = {name: results.read(options.profile, name) for name in names}
    if not any(contents.values()):
        asked = " ".join(options.experiment) or experiments.ALL
        raise ValueError(
            f"no records of {', '.join(names)} at {options.profile!r} in {results.folder}: "
            f"run `npmerge run {asked} --profile {options.profile}` first"
        )
    for name, records in contents.items():
        if not CLAIMS.get(name):
            continue
        if not records:
            sys.stdout.write(f"{name}: no records\n")
            continue
        found = verdicts(name, table(records))
        for column in ("status", "evidence"):
            sys.stdout.write(verdict_table(found, column).to_string() + "\n")


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
    parser.set_defaults(stopped="finished units are kept, the same command goes on from there")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run experiments; finished units are kept")
    run.add_argument("experiment", nargs="+", metavar="EXPERIMENT", help=EXPERIMENTS)
    _add_experiment_options(run)
    _add_units(run)
    run.add_argument(
        "--time-budget",
        type=float,
        metavar="SECONDS",
        help="begin nothing that would not end in time; the same command goes on from there",
    )
    run.add_argument(
        "--deterministic",
        action="store_true",
        help="the same bits in every run on this device: slower on a GPU, free on a CPU",
    )
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="rehearse every unit with one epoch of two batches and keep nothing",
    )
    run.add_argument(
        "--at-once",
        type=int,
        metavar="N",
        help="models to train at the same time (default: 1 on a CPU, 16 on a GPU)",
    )
    run.set_defaults(command=_run)

    status = commands.add_parser("status", help="count what is done, running and missing")
    status.add_argument(
        "experiment", nargs="*", metavar="EXPERIMENT", help=f"{EXPERIMENTS} (default: ALL)"
    )
    _add_units(status)
    _add_places(status)
    status.set_defaults(command=_status)

    _add_merge(commands.add_parser("merge", help="merge two checkpoints into a third"))

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
        "experiment", nargs="*", metavar="EXPERIMENT", help=f"{EXPERIMENTS} (default: ALL)"
    )
    claims.add_argument(
        "--profile", default="digits", help=f"{', '.join(experiments.PROFILES)} (default: digits)"
    )
    _add_results(claims)
    claims.set_defaults(command=_claims)

    data = commands.add_parser("data", help="download and check the data sets")
    data.add_argument("name", nargs="*", help=f"{', '.join(DATASETS)} (default: all)")
    data.add_argument("--quiet", action="store_true", help="no progress")
    data.set_defaults(command=_data)
    return parser


def _add_merge(merge: argparse.ArgumentParser) -> None:
    merge.add_argument("a", metavar="A", help="state dict of model A: .safetensors, .pt or .pth")
    merge.add_argument("b", metavar="B", help="of model B, of the same architecture")
    merge.add_argument(
        "--output",
        required=True,
        metavar="FILE",
        help="the merged model (.safetensors); NP Merge's alpha goes to .alpha.safetensors beside it",
    )
    merge.add_argument(
        "--model",
        required=True,
        help=f"{', '.join(MODELS)}, or package.module:factory, called as factory(classes)",
    )
    merge.add_argument("--width", type=float, help="of a named model (default: 1)")
    merge.add_argument("--data", required=True, help=", ".join(DATASETS))
    merge.add_argument("--image-size", type=int, metavar="N", help="average-pool to N pixels")
    merge.add_argument(
        "--align", default="permute", help=f"{', '.join(METHODS)} (default: permute)"
    )
    merge.add_argument("--aggregate", default="np", help=f"{', '.join(AGGREGATE)} (default: np)")
    merge.add_argument("--epochs", type=int, default=10, metavar="N", help="default: 10")
    merge.add_argument(
        "--lr", type=float, default=0.01, help="Adam's learning rate (default: 0.01)"
    )
    merge.add_argument("--batch-size", type=int, default=500, metavar="N", help="default: 500")
    merge.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    merge.add_argument(
        "--device", default="auto", help="cpu, cuda, ... (default: a GPU if there is one)"
    )
    merge.add_argument("--force", action="store_true", help="replace the output if it exists")
    merge.add_argument("--quiet", action="store_true", help="no progress")
    merge.set_defaults(command=_merge, stopped="nothing was written")


def _add_units(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--units",
        metavar="PATTERN",
        help="only these, a shell pattern such as 'disjoint_splits/*dirichlet*' (default: all)",
    )


def _add_experiment_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recompute", action="store_true", help="make every record again")
    _add_places(parser)


def _add_places(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile", default="digits", help=f"{', '.join(experiments.PROFILES)} (default: digits)"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2"
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, ... (default: a GPU if there is one)"
    )
    parser.add_argument(
        "--zoo",
        default=os.environ.get("NPMERGE_ZOO", "zoo"),
        metavar="DIR",
        help="folder of the base models",
    )
    _add_results(parser)


def _add_results(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--results",
        default=os.environ.get("NPMERGE_RESULTS", "results"),
        metavar="DIR",
        help="folder of the records",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")
