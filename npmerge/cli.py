"""The command line: ``npmerge run | status | plan | models | records | methods | merge | book | claims | data``.

Nothing here imports PyTorch before a command's work begins, so that names, help and wrong arguments answer at once.
"""

from __future__ import annotations

import argparse
import codecs
import csv
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npmerge._version import __version__
from npmerge.catalogue import (
    ALL,
    DATASETS,
    MODELS,
    check_profile,
    chosen_experiments,
    experiment_names,
    profile_names,
)
from npmerge.checks import check_seeds
from npmerge.merge_command import SCHEDULES, Beside, MergeOptions, check_request
from npmerge.methods import GROUPS, KINDS, of_kind

if TYPE_CHECKING:
    from npmerge.run.engine import Progress
    from npmerge.store.records import Cell

PROGRAM = "npmerge"
DEVICES = re.compile(r"auto|[a-z]+(:\d+)?")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; those of the process by default.

    Returns:
        The exit status: 0, or 1 with one line on stderr that says what to do, or 130 after an interrupt from the
        keyboard or by ``SIGTERM``. Where the environment variable ``NPMERGE_TRACEBACK`` is set, the line has the
        traceback before it.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may have no Unicode
        codecs.register_error(PROGRAM, _plain)
        sys.stdout.reconfigure(errors=PROGRAM)
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.WARNING if options.quiet else logging.INFO, format="%(message)s"
    )
    before = {
        number: signal.signal(number, signal.default_int_handler)
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        _check_places(options)
        options.command(options)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has read enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, RuntimeError, ArithmeticError, MemoryError) as error:
        if not _expected(error):
            raise
        if "NPMERGE_TRACEBACK" in os.environ:
            traceback.print_exc()
        sys.stderr.write(f"{PROGRAM}: {_said(error)}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"{PROGRAM}: stopped; {options.stopped}\n")
        return 130
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _expected(error: Exception) -> bool:
    """Whether an error is one that its message explains: a wrong argument, or one of npmerge's own."""
    own = type(error).__module__.startswith("npmerge.")
    return own or isinstance(error, ValueError | OSError) or _is_memory(error)


def _said(error: Exception) -> str:
    """What an error says to somebody who gave a command."""
    if _is_memory(error):
        return "the memory is full: take a narrower network or smaller batches"
    if isinstance(error, shutil.Error):  # a list of what could not be copied, and why
        return str(error.args[0][0][-1])
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    text = str(error)
    if "Original Traceback" in text:  # of a process that decodes images
        return text.strip().splitlines()[-1].partition(": ")[2]
    return text


def _is_memory(error: Exception) -> bool:
    """Whether the memory is full, which PyTorch says of a CPU's in words alone."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def _plain(error: UnicodeError) -> tuple[str, int]:
    """What stands for characters that an output cannot show."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    shown = error.object[error.start : error.end].translate(_ASCII)
    return shown.encode("ascii", "replace").decode(), error.end


_ASCII = str.maketrans(
    {"\u2212": "-", "\u2013": "-", "\u2014": "-", "\u00d7": "x", "\u00b1": "+-", "\u2265": ">=",
     "\u2264": "<=", "\u2192": "->", "\u03b1": "alpha"}
)  # fmt: skip


def _check_places(options: argparse.Namespace) -> None:
    """Words that no file can be called, and files where folders belong, are refused before anything is looked for."""
    for name, given in vars(options).items():
        for word in given if isinstance(given, list) else [given]:
            if isinstance(word, str) and re.search("[\0\ud800-\udfff]", word):
                raise ValueError(
                    f"{name} is {word!r}: give UTF-8, and rename a file whose name is not"
                )
    for name in ("results", "zoo", "models"):
        folder = getattr(options, name, None)
        if folder is not None and Path(folder).is_file():
            raise ValueError(f"{name} is {folder}, a file: give a folder")


def _run(options: argparse.Namespace) -> None:
    _check_cells(options)
    _check_device(options.device)
    if options.time_budget is not None and not options.time_budget > 0:
        raise ValueError(f"time_budget is {options.time_budget:g}: give more than 0")
    from npmerge.run.cluster import check_cluster

    check_cluster(options.cluster, options.scheduler, options.workers)
    from tqdm.contrib.logging import logging_redirect_tqdm

    from npmerge.run.engine import run_experiments

    with logging_redirect_tqdm():
        paths = run_experiments(
            options.experiment,
            **_selection(options),
            recompute=options.recompute,
            deterministic=options.deterministic,
            workers=options.workers,
            cluster=options.cluster,
            scheduler=options.scheduler,
            dry_run=options.dry_run,
            time_budget=options.time_budget,
            progress=not options.quiet,
        )
    for path in paths:
        sys.stdout.write(f"{path}\n")


def _selection(options: argparse.Namespace) -> dict[str, Any]:
    """Which cells, where they run and where their files are."""
    return {
        "profile": options.profile,
        "seeds": options.seeds,
        "pattern": options.cells,
        "device": options.device,
        "results": options.results,
        "zoo": options.zoo,
        "models": options.models,
    }


def _check_cells(options: argparse.Namespace) -> list[Cell]:
    """The cells that are asked for; what is wrong with the arguments is said before anything slow is imported."""
    chosen_experiments(options.experiment or ALL)
    check_profile(options.profile)
    check_seeds(options.seeds)
    from npmerge.experiments import cells
    from npmerge.experiments.listing import matching

    return matching(cells(options.experiment or ALL, options.profile, options.seeds), options.cells)


def _check_device(device: str) -> None:
    if not DEVICES.fullmatch(device):
        raise ValueError(f"device is {device!r}: give auto, cpu, cuda, cuda:1, ...")


def _status(options: argparse.Namespace) -> None:
    _check_cells(options)
    _check_device(options.device)
    from npmerge.run.engine import status_of
    from npmerge.store.records import STATES

    found = status_of(options.experiment or ALL, **_selection(options))
    rows = [["", *STATES, "time left"]]
    rows += [
        [one.experiment, *(str(one.cells[state]) for state in STATES), _left(one)] for one in found
    ]
    _write_table(rows, str.rjust)
    for name, reason in (pair for one in found for pair in one.failed.items()):
        sys.stdout.write(f"failed: {name}: {reason}\n")


def _plan(options: argparse.Namespace) -> None:
    chosen = _check_cells(options)
    _check_device(options.device)
    for name in ("workers", "speed"):
        for value in getattr(options, name):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value:g}: give a number above 0")
    if options.measure and options.measured:
        raise ValueError("both --measure and --measured are given: times are made, or read")
    from npmerge.device import pick_device
    from npmerge.report.planning import (
        plan_table,
        prediction_table,
        rates_sentence,
        speed_sentence,
    )
    from npmerge.run.planning import plan_experiments
    from npmerge.run.rates import Rates, read_timed, records_on, time_cells, times_of, write_timed
    from npmerge.store.origins import device_label

    if options.measure:
        write_timed(Path(options.measure), time_cells(chosen, options.device))
    source = options.measure or options.measured
    timed = read_timed(source) if source else []
    device = timed[0].device if timed else device_label(pick_device(options.device))
    records = records_on(device, options.results)
    known = list(times_of(records))
    if not timed and not known:
        raise ValueError(
            f"no records of {device} in {options.results}: time it with `npmerge plan --measure FILE`"
        )
    sys.stdout.write(rates_sentence(timed or known, source or options.results) + "\n")
    for speed in options.speed:
        plans = plan_experiments(
            options.experiment or ALL, profile=options.profile, seeds=options.seeds,
            pattern=options.cells, workers=options.workers, rates=Rates(timed or known),
            records=() if timed else records, speed=speed,
        )  # fmt: skip
        text = plan_table(plans).to_string()
        sys.stdout.write(f"\n{speed_sentence(device, speed)}\n{text}\n")
    if known:
        text = prediction_table(known, timed).to_string()
        sys.stdout.write(
            f"\nPredicted / measured in records (lowest to highest; how many):\n{text}\n"
        )


def _write_table(rows: Sequence[Sequence[str]], adjust: Callable[[str, int], str]) -> None:
    """Write rows in columns, the first one to the left, the others as ``adjust`` says."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        rest = (adjust(text, width) for text, width in zip(others, widths[1:], strict=True))
        sys.stdout.write("  ".join([first.ljust(widths[0]), *rest]).rstrip() + "\n")


def _models(options: argparse.Namespace) -> None:
    chosen = _check_cells(options)
    from npmerge.report.words import duration
    from npmerge.run.publishing import bases_of, copies_of, megabytes, publish

    bases = bases_of(chosen)
    if options.publish:
        for path in publish(bases, options.zoo, options.models):
            sys.stdout.write(f"{path}\n")
        return
    rows = [["file", "size", "trained for", "on"]]
    for folder in (options.models, options.zoo):
        rows += [
            [str(path), megabytes(path.stat().st_size), duration(about["seconds"]), about["device"]]
            for path, about in copies_of(bases, folder).items()
        ]
    _write_table(rows, str.ljust)


def _left(one: Progress) -> str:
    from npmerge.report.words import duration

    return duration(one.seconds)


def _records(options: argparse.Namespace) -> None:
    if options.profile is not None:
        check_profile(options.profile)
    from npmerge.store.records import COLUMNS, Records, flat

    records = Records(options.results)
    profiles = [options.profile] if options.profile else profile_names()
    rows = [
        row
        for profile in profiles
        for experiment in experiment_names()
        for row in flat(records.whole(profile, experiment))
    ]
    if options.csv:
        writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return
    for row in rows:
        about = "/".join(str(row[name]) for name in COLUMNS[:4])
        what = " ".join(str(row[name]) for name in ("many", "align", "aggregate") if row[name])
        sys.stdout.write(f"{about}: {what}: {row['metric']} {row['value']:.4f}\n")


def _methods(options: argparse.Namespace) -> None:
    every = [one for kind in KINDS for one in of_kind(kind).values()]
    if options.json:
        sys.stdout.write(json.dumps([one.describe() for one in every], indent=1) + "\n")
        return
    rows = [["name", "kind", "family", "needs", "options", "reference"]]
    rows += [
        [
            one.name,
            one.kind,
            one.family,
            ", ".join(one.needs) or "-",
            ", ".join(f"{name}={option.default}" for name, option in one.options.items()) or "-",
            one.reference or "-",
        ]
        for one in every
    ]
    _write_table(rows, str.ljust)


class _ListMethods(argparse.Action):
    """Explain the methods, grouped by what they do and what they need."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        lines = []
        for kind, group in product(KINDS, GROUPS):
            found = [one for one in of_kind(kind).values() if one.group == group]
            lines += [f"\n{kind}, needs {group}"] * bool(found)
            for one in found:
                options = ", ".join(f"{n}={o.default}" for n, o in one.options.items())
                lines.append(f"  {one.name} ({one.label}): {one.summary}")
                lines += [
                    f"      {text}" for text in (one.use, options and f"options: {options}") if text
                ]
        with suppress(BrokenPipeError):
            sys.stdout.write("\n".join(lines).lstrip() + "\n")
        parser.exit()


def _merge(options: argparse.Namespace) -> None:
    _check_device(options.device)
    request = MergeOptions(
        model=options.model,
        data=options.data,
        classes=options.classes,
        width=options.width,
        image_size=options.image_size,
        mean=tuple(options.mean) if options.mean else None,
        std=tuple(options.std) if options.std else None,
        transform=options.transform,
        align=options.align or "",
        aggregate=options.aggregate,
        correct=None if options.correct == "none" else options.correct,
        many=options.many,
        base=None if options.base is None else Path(options.base),
        options={
            kind: _pairs(getattr(options, f"{kind}_option"))
            for kind in ("align", "aggregate", "correct", "many")
        },
        batch_size=options.batch_size,
        validation=options.validation,
        patience=options.patience,
        schedule=options.schedule,
        loss=options.loss,
        metric=options.metric,
        hold_unknown=options.hold_unknown,
        seed=options.seed,
    )
    for name in ("epochs", "lr"):
        if getattr(options, name) is not None:
            request.options["aggregate"][name] = getattr(options, name)
    if options.output is None and not options.report:
        raise ValueError("no output: give --output, or --report to look at the models alone")
    beside = Beside(
        *(Path(path) if path else None for path in (options.save_alignment, options.history))
    )
    output = None if options.report else options.output
    check_request(options.checkpoints, output, request, beside=beside, force=options.force)
    from npmerge.device import pick_device
    from npmerge.merge_command import inspect_checkpoints, merge_checkpoints

    if "" not in sys.path:  # factories of the current folder
        sys.path.insert(0, "")
    device = pick_device(options.device)
    if options.report:
        sys.stdout.write(inspect_checkpoints(options.checkpoints, request, device=device) + "\n")
        return
    scores = merge_checkpoints(
        options.checkpoints,
        options.output,
        request,
        beside=beside,
        device=device,
        force=options.force,
        progress=not options.quiet,
    )
    columns = list(scores["merged"])
    sys.stdout.write(f"{'':8}" + "".join(f" {column:>9}" for column in columns) + "\n")
    for name, found in scores.items():
        cells = (f" {found[c]:8.2f}%" if c == "accuracy" else f" {found[c]:9.4f}" for c in columns)
        sys.stdout.write(f"{name:8}{''.join(cells)}\n")
    sys.stdout.write(f"{options.output}\n")


def _pairs(given: Sequence[str]) -> dict[str, Any]:
    """Options from ``NAME=VALUE``; a value that is no number, list or other literal is text."""
    import ast

    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"option {text!r} has no value: write NAME=VALUE")
        try:
            found[name] = ast.literal_eval(value)
        except (
            ValueError,
            SyntaxError,
            RecursionError,
            MemoryError,
        ):  # the last two: nested too deep
            found[name] = value
    return found


def _book(options: argparse.Namespace) -> None:
    _check_device(options.device)
    check_profile(options.profile)
    check_seeds(options.seeds)
    from npmerge.parameters import validated

    parameters = validated(
        {
            "profile": options.profile,
            "seeds": options.seeds,
            "device": options.device,
            "recompute": options.recompute,
            "results": str(Path(options.results).resolve()),
            "zoo": str(Path(options.zoo).resolve()),
            "models": str(Path(options.models).resolve()),
        }
    )
    from npmerge.device import pick_device

    pick_device(options.device)
    from npmerge.book import make_book, make_pdf

    page = make_book(
        parameters.model_dump(mode="json"),
        root=options.root,
        output=options.output,
        progress=not options.quiet,
    )
    sys.stdout.write(f"\nThe book is ready. Open {os.path.relpath(page)}\n({page.as_uri()})\n")
    if options.pdf:
        sys.stdout.write(f"{os.path.relpath(make_pdf(options.output))} is all of it\n")


def _claims(options: argparse.Namespace) -> None:
    asked = chosen_experiments(options.experiment or ALL)
    check_profile(options.profile)
    from npmerge.store.records import Records

    records = Records(options.results)
    contents = {name: list(records.whole(options.profile, name)) for name in asked}
    if not any(contents.values()):
        words = " ".join(options.experiment) or ALL
        raise ValueError(
            f"no records of {', '.join(asked)} at {options.profile!r} in {records.folder}: "
            f"run `npmerge run {words} --profile {options.profile}` first"
        )
    from npmerge.report.claims import CLAIMS, verdicts
    from npmerge.report.pages import today
    from npmerge.report.tables import verdict_table

    for name, found in contents.items():
        if not CLAIMS.get(name):
            continue
        if not found:
            sys.stdout.write(f"{name}: no records\n")
            continue
        kept = today(found)
        if len(kept) < len(found):
            sys.stdout.write(
                f"{name}: {len(found) - len(kept)} of {len(found)} records were made under another configuration and "
                "are left out\n"
            )
        judged = verdicts(kept) if kept else []
        for column in ("status", "evidence") if judged else ():
            sys.stdout.write(verdict_table(judged, column).to_string() + "\n")


def _data(options: argparse.Namespace) -> None:
    chosen = [DATASETS[name].name for name in options.name] or [
        name for name, one in DATASETS.items() if one.at_hand
    ]
    from npmerge.data import load

    for name in chosen:
        data = load(name)
        sys.stdout.write(
            f"{name}: {len(data.train.labels)} training and {len(data.test.labels)} test images, "
            f"{data.classes} classes\n"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Merge neural networks that were trained apart."
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    parser.set_defaults(stopped="finished cells are kept, the same command goes on from there")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    experiments = ", ".join([ALL, *experiment_names()])

    run = commands.add_parser("run", help="run experiments; finished cells are kept")
    run.add_argument("experiment", nargs="+", metavar="EXPERIMENT", help=experiments)
    _add_recompute(run)
    _add_places(run)
    _add_cells(run)
    run.add_argument(
        "--time-budget", type=float, metavar="SECONDS",
        help="begin nothing that would not end in time; the same command goes on from there",
    )  # fmt: skip
    run.add_argument(
        "--deterministic", action="store_true",
        help="the same bits in every run on this device: slower on a GPU, free on a CPU",
    )  # fmt: skip
    run.add_argument(
        "--dry-run", action="store_true",
        help="rehearse every cell with one epoch of two batches and keep nothing",
    )  # fmt: skip
    run.add_argument(
        "--workers", type=int, metavar="N",
        help="processes that do cells side by side (default: as the cores allow on a CPU, 1 on a GPU)",
    )  # fmt: skip
    run.add_argument(
        "--cluster", metavar="KIND:N",
        help="do cells on N workers that are started with Dask: local:N on this machine, slurm:N as jobs of SLURM",
    )  # fmt: skip
    run.add_argument(
        "--scheduler", metavar="ADDRESS",
        help="do cells on the workers of a Dask scheduler, e.g. tcp://10.0.0.1:8786",
    )  # fmt: skip
    run.set_defaults(command=_run)

    status = commands.add_parser("status", help="count what is done, running, missing and failed")
    status.add_argument(
        "experiment", nargs="*", metavar="EXPERIMENT", help=f"{experiments} (default: ALL)"
    )
    _add_cells(status)
    _add_places(status)
    status.set_defaults(command=_status)

    plan = commands.add_parser("plan", help="say what experiments would cost on so many devices")
    plan.add_argument(
        "experiment", nargs="*", metavar="EXPERIMENT", help=f"{experiments} (default: ALL)"
    )
    _add_cells(plan)
    _add_which(plan)
    plan.add_argument(
        "--device", default="auto",
        help="that was timed, or is to be: cpu, cuda, ... (default: a GPU if there is one)",
    )  # fmt: skip
    plan.add_argument(
        "--workers", type=int, nargs="+", default=[1, 8, 64], metavar="N",
        help="devices that each do one thing at a time (default: 1 8 64)",
    )  # fmt: skip
    plan.add_argument(
        "--measure", metavar="FILE",
        help="time a few steps of every network on the device, write the times there and plan by them",
    )  # fmt: skip
    plan.add_argument(
        "--measured", metavar="FILE",
        help="plan by the times that --measure wrote, on this device or another (default: by the records)",
    )  # fmt: skip
    plan.add_argument(
        "--speed", type=float, nargs="+", default=[1.0], metavar="X",
        help="assume devices X times as fast as the one that was timed (default: 1)",
    )  # fmt: skip
    _add_results(plan)
    plan.set_defaults(command=_plan, stopped="nothing was written")

    models = commands.add_parser("models", help="list the trained base models, or publish them")
    models.add_argument(
        "experiment", nargs="*", metavar="EXPERIMENT", help=f"{experiments} (default: ALL)"
    )
    models.add_argument(
        "--publish", action="store_true",
        help="copy those that these cells need from the zoo to the published ones",
    )  # fmt: skip
    _add_cells(models)
    _add_which(models)
    _add_stores(models)
    models.add_argument("--quiet", action="store_true", help=argparse.SUPPRESS)
    models.set_defaults(command=_models)

    records = commands.add_parser("records", help="print every number with where it comes from")
    records.add_argument("--profile", help=f"{', '.join(profile_names())} (default: all)")
    records.add_argument("--csv", action="store_true", help="as comma-separated values")
    _add_results(records)
    records.set_defaults(command=_records)

    methods = commands.add_parser("methods", help="list the methods and what they need")
    methods.add_argument("--json", action="store_true", help="with their options and summaries")
    methods.add_argument("--quiet", action="store_true", help=argparse.SUPPRESS)
    methods.set_defaults(command=_methods)

    _add_merge(commands.add_parser("merge", help="merge checkpoints into one"))

    book = commands.add_parser("book", help="execute the notebooks and render the book")
    _add_recompute(book)
    _add_places(book)
    book.add_argument(
        "--root", default=".", metavar="DIR", help="the project's folder (default: this one)"
    )
    book.add_argument(
        "--output", default="_build", metavar="DIR", help="where to build (default: _build)"
    )
    book.add_argument("--pdf", action="store_true", help="print all of it as one PDF too")
    book.set_defaults(command=_book)

    claims = commands.add_parser("claims", help="hold the paper's claims against the records")
    claims.add_argument(
        "experiment", nargs="*", metavar="EXPERIMENT", help=f"{experiments} (default: ALL)"
    )
    claims.add_argument(
        "--profile", default="digits", help=f"{', '.join(profile_names())} (default: digits)"
    )
    _add_results(claims)
    claims.set_defaults(command=_claims)

    data = commands.add_parser("data", help="download and check the data sets")
    data.add_argument("name", nargs="*", help=f"{', '.join(DATASETS)} (default: all)")
    data.add_argument("--quiet", action="store_true", help="no progress")
    data.set_defaults(command=_data)
    return parser


def _add_merge(merge: argparse.ArgumentParser) -> None:
    def listed(kind: Any) -> str:
        return ", ".join(of_kind(kind))

    merge.add_argument("--list", action=_ListMethods, nargs=0, help="explain the methods, and stop")
    merge.add_argument(
        "checkpoints", nargs="+", metavar="CHECKPOINT",
        help="two or more of one architecture: .safetensors, .pt, .pth, .ckpt or Hugging Face folders; the first is A",
    )  # fmt: skip
    merge.add_argument(
        "--output", metavar="FILE",
        help="the merged model (.safetensors, or a folder where folders are merged); a model card goes beside it, and "
        "NP Merge's alpha",
    )  # fmt: skip
    merge.add_argument(
        "--report", action="store_true",
        help="look at the first two models instead: groups, parameters that can move, barriers, batch norm",
    )  # fmt: skip
    merge.add_argument(
        "--model",
        help=f"{', '.join(MODELS)}, torchvision:NAME, timm:NAME, or package.module:factory; folders have their own",
    )  # fmt: skip
    merge.add_argument(
        "--classes", type=int, metavar="N", help="outputs of the model (default: the data's)"
    )
    merge.add_argument("--width", type=float, help="of a named model (default: 1)")
    merge.add_argument(
        "--data", required=True,
        help=f"{', '.join(DATASETS)}, a folder of images (a folder a class, in train, validation and test if there are "
        "such), or package.module:function, which returns batches, or a dictionary of train, validation and test",
    )  # fmt: skip
    merge.add_argument("--image-size", type=int, metavar="N", help="height and width in pixels")
    for name in ("mean", "std"):
        merge.add_argument(
            f"--{name}", type=float, nargs="+", metavar="X",
            help="of a folder's pixels / 255, per channel (default: ImageNet's)",
        )  # fmt: skip
    merge.add_argument(
        "--transform", metavar="MODULE:FUNCTION", help="of a folder's images, instead of these"
    )
    merge.add_argument(
        "--validation", type=float, default=0.0, metavar="SHARE",
        help="of the training images, to choose the best epoch on (default: none)",
    )  # fmt: skip
    merge.add_argument(
        "--patience", type=int, metavar="N", help="stop after N epochs that validate no better"
    )
    for name, what in (
        ("loss", "to learn by"),
        ("metric", "to validate by, the higher the better"),
    ):
        merge.add_argument(
            f"--{name}", metavar="MODULE:FUNCTION", help=f"{what}, of (outputs, batch)"
        )
    merge.add_argument(
        "--align",
        help=f"{listed('align')}; or a file of --save-alignment (default: permute, or identity where the aggregation "
        "finds an alignment of its own or starts from a base)",
    )  # fmt: skip
    merge.add_argument(
        "--hold-unknown", action="store_true",
        help="hold fixed what an operation of unknown symmetry touches, instead of refusing the model",
    )  # fmt: skip
    merge.add_argument("--save-alignment", metavar="FILE", help="keep the alignment of two models")
    merge.add_argument("--history", metavar="FILE", help="write the losses, as .csv or .json")
    merge.add_argument(
        "--aggregate", default="np_merge", help=f"{listed('aggregate')} (default: np_merge)"
    )
    merge.add_argument(
        "--correct", default="reset_batchnorm",
        help=f"{listed('correct')}; none (default: reset_batchnorm)",
    )  # fmt: skip
    merge.add_argument(
        "--many",
        help=f"how more than two become one: {listed('many')} (default: tournament, or all_to_one where the "
        "aggregation takes any number)",
    )  # fmt: skip
    merge.add_argument(
        "--base",
        metavar="CHECKPOINT",
        help="that all others were trained from, for methods that need it",
    )
    for kind in ("align", "aggregate", "correct", "many"):
        merge.add_argument(
            f"--{kind}-option", action="append", default=[], metavar="NAME=VALUE",
            help=f"of the method of --{kind}; --list says which there are",
        )  # fmt: skip
    merge.add_argument(
        "--epochs", type=int, metavar="N", help="of learning (default: the method's)"
    )
    merge.add_argument("--lr", type=float, help="of learning (default: the method's)")
    merge.add_argument(
        "--schedule",
        help=f"how the learning rate falls to 0, {' or '.join(SCHEDULES)} (default: it stays)",
    )  # fmt: skip
    merge.add_argument("--batch-size", type=int, default=500, metavar="N", help="default: 500")
    merge.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    merge.add_argument(
        "--device", default="auto", help="cpu, cuda, ... (default: a GPU if there is one)"
    )
    merge.add_argument("--force", action="store_true", help="replace the output if it exists")
    merge.add_argument("--quiet", action="store_true", help="no progress")
    merge.set_defaults(command=_merge, stopped="nothing was written")


def _add_cells(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cells", metavar="PATTERN",
        help="only these, a shell pattern such as 'disjoint_splits/*dirichlet*' (default: all)",
    )  # fmt: skip


def _add_recompute(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recompute", action="store_true", help="make every record again")


def _add_places(parser: argparse.ArgumentParser) -> None:
    _add_which(parser)
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, ... (default: a GPU if there is one)"
    )
    _add_stores(parser)
    _add_results(parser)


def _add_which(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile", default="digits", help=f"{', '.join(profile_names())} (default: digits)"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2"
    )


def _add_stores(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--zoo", default=os.environ.get("NPMERGE_ZOO", "zoo"), metavar="DIR",
        help="folder of the base models",
    )  # fmt: skip
    parser.add_argument(
        "--models", default=os.environ.get("NPMERGE_MODELS", "models"), metavar="DIR",
        help="folder of published base models, which are taken first",
    )  # fmt: skip


def _add_results(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--results", default=os.environ.get("NPMERGE_RESULTS", "results"), metavar="DIR",
        help="folder of the records",
    )  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="no progress")
