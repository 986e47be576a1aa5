"""Which architectures npmerge reads the symmetry off, beside the package ``rebasin``.

Every model of the catalogue (``tests/architecture_zoo.py``) is built with random weights, its symmetry groups are
found, and all are permuted at random. In float64 the outputs must stay what they were. A model runs in a process of its
own. Rows that the record holds already stay as they are, so an interrupted run goes on where it was.

``rebasin`` is not installed with npmerge; without it the benchmark runs alone. It needs no more than:

    pip install --no-deps --target DIR rebasin torchview graphviz
    PYTHONPATH=DIR python benchmarks/architectures.py
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import importlib
import io
import multiprocessing
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import npmerge as npm
from npmerge.report.architectures import COLUMNS
from npmerge.store.files import write_atomically
from npmerge.store.origins import revision
from npmerge.symmetry import compare

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from architecture_zoo import Architecture, Inputs, catalogue

FILE = "architectures.csv"
TOLD = "status", "reason", "groups", "moved", "difference", "seconds", "rebasin"
Row = dict[str, str]

RIGHT = 1e-8
"""Relative difference up to which two outputs in float64 count as the same."""
LIMIT = {"npmerge": 600, "rebasin": 60}
"""Seconds that a model may take."""


def built(one: Architecture) -> tuple[nn.Module, Inputs]:
    torch.manual_seed(0)
    return one.make().eval(), one.inputs()


def ours(one: Architecture) -> Row:
    """Whether the symmetry that is found is right, and how long it took to find."""
    model, (example, named) = built(one)
    row = {"parameters": str(sum(p.numel() for p in model.parameters()))}
    start = time.process_time()
    try:
        npm.find_symmetry(model, *example, **named)
        row["seconds"] = f"{time.process_time() - start:.2f}"
        check = npm.check_symmetry(model, *example, **named)
    except npm.SymmetryError as error:
        return {**row, "status": "refused", "reason": str(error)}
    return {
        **row,
        "status": "right" if check.difference < RIGHT else "wrong",
        "groups": str(check.groups),
        "moved": f"{check.moved:.6f}",
        "difference": f"{check.difference:.1e}",
    }


def theirs(one: Architecture) -> Row:
    """What ``rebasin`` does when every permutation that it finds is a rotation: whether the outputs stay."""
    model, (example, named) = built(one)
    model = model.double()
    before, after = copy.deepcopy(model), model
    given: Any = {k: _double(v) for k, v in named.items()} or tuple(map(_double, example))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            descent = importlib.import_module("rebasin").PermutationCoordinateDescent(
                before, after, given
            )
        for permutation, _ in descent.pinit.model_graph.permutation_to_info:
            permutation.perm_indices = permutation.perm_indices.roll(1)
        with torch.no_grad():
            descent.apply_permutations()
    except Exception as error:  # noqa: BLE001 - whatever another package raises
        return {"rebasin": f"fails: {type(error).__name__}", "rebasin_moved": ""}
    moved = sum(
        int((p != q).sum()) for p, q in zip(before.parameters(), after.parameters(), strict=True)
    )
    share = moved / sum(p.numel() for p in before.parameters())
    with torch.no_grad():
        difference = compare(
            before, after, *map(_double, example), **{k: _double(v) for k, v in named.items()}
        )
    status = "wrong" if not difference < RIGHT else "right" if moved else "nothing moved"
    return {"rebasin": status, "rebasin_moved": f"{share:.6f}"}


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def alone(measure: Callable[[Architecture], Row], one: Architecture, limit: float) -> Row | str:
    """What a function says of a model in a process of its own, or why it says nothing."""
    context = multiprocessing.get_context("fork")  # the libraries are imported once
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, measure, one))
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit):
            return f"more than {limit:g} s"
        answer: Row | str = receiver.recv()
        return answer
    except EOFError:
        return "out of memory, or crashed"
    finally:
        process.kill()
        process.join()


def _send(sender: Connection, measure: Callable[[Architecture], Row], one: Architecture) -> None:
    try:
        sender.send(measure(one))
    except Exception as error:  # noqa: BLE001 - a row says what happened
        reason = (str(error).strip() or "no message").split("\n")[0]
        sender.send(f"{type(error).__name__}: {reason}")


def read(path: Path | None) -> dict[tuple[str, str], Row]:
    if path is None or not path.exists():
        return {}
    with path.open(newline="") as file:
        return {(row["source"], row["name"]): row for row in csv.DictReader(file)}


def write(path: Path, rows: list[Row]) -> None:
    def to(part: Path) -> None:
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, to)


def versions(source: str) -> str:
    names = {"torchvision": ["torchvision"], "timm": ["timm"], "Hugging Face": ["transformers"]}
    python = f"python {sys.version_info.major}.{sys.version_info.minor}"
    return ", ".join([python, *(f"{n} {version(n)}" for n in ("torch", *names[source]))])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="PATTERN", default="", help="in source/family/name")
    parser.add_argument("--again", action="store_true", help="npmerge's rows too that are there")
    parser.add_argument("--alone", action="store_true", help="leave rebasin out")
    parser.add_argument("--record", type=Path, metavar="DIR", help="write a record there too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    path = options.record and options.record / FILE
    found = list(catalogue())
    rows = {(one.source, one.name): Row() for one in found}
    rows |= {key: row for key, row in read(path).items() if key in rows}
    chosen = [
        one for one in found if re.search(options.only, f"{one.source}/{one.family}/{one.name}")
    ]
    beside = not options.alone and all(map(find_spec, ("rebasin", "torchview", "graphviz")))
    source = revision()
    for number, one in enumerate(chosen, 1):
        row = rows[one.source, one.name]
        row |= {key: getattr(one, key) for key in ("source", "family", "name", "note")}
        if options.again or not row.get("status"):
            answer = alone(ours, one, LIMIT["npmerge"])
            for key in ("status", "reason", "groups", "moved", "difference", "seconds"):
                row.pop(key, None)
            row |= {"status": "error", "reason": answer} if isinstance(answer, str) else answer
            row |= {"revision": source, "versions": versions(one.source)}
        if beside and not row.get("rebasin"):
            answer = alone(theirs, one, LIMIT["rebasin"])
            row |= {"rebasin": answer} if isinstance(answer, str) else answer
        told = (row.get(key, "") for key in TOLD)
        print(f"{number}/{len(chosen)}", one.source, one.name, *told, sep="  ", flush=True)
        if path is not None:
            write(path, [r for r in rows.values() if r])
    counts = Counter((one.source, rows[one.source, one.name]["status"]) for one in chosen)
    for (library, status), count in sorted(counts.items()):
        print(f"{library}: {count} {status}")


if __name__ == "__main__":
    main()
