"""Torture npmerge: ``python tests/torture [--small] [--output FILE] [PART...]``."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from torture import table
from torture.parts import PARTS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "part", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)"
    )
    parser.add_argument("--small", action="store_true", help="as the tests do, in a minute")
    parser.add_argument(
        "--seconds", type=float, default=300, help="how long the fuzzers look for something"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the moments, the bits and the examples"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write a table; other parts' rows stay"
    )
    options = parser.parse_args()
    unknown = set(options.part) - PARTS.keys()
    if unknown:
        parser.error(f"unknown part {min(unknown)!r}: choose of {', '.join(PARTS)}")
    wrong = 0
    for name in options.part or PARTS:
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="torture-") as folder:
            share = 0.0 if options.small else options.seconds
            cases = list(PARTS[name](Path(folder), share, options.seed))
        wrong += table.told(name, cases, time.monotonic() - start)
        if options.output:
            table.write(options.output, name, cases, time.monotonic() - start)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
