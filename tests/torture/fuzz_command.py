"""Words for the command line that nobody has thought of: ``python fuzz_command.py FOLDER SECONDS SEED``.

The words come from the parser itself: each option of each command, with values of the right and of the wrong kind.
Whatever they are, the command ends with a status of 0, 1, 2 or 130 and without a traceback. The last line of the output
says how many were tried of each command, and what was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from types import FrameType

HERE = Path(__file__).resolve().parent
sys.path[0:1] = [str(HERE.parent), str(HERE)]

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from tiny import net, tiny_profile

from npmerge import cli
from npmerge.catalogue import DATASETS, MODELS, experiment_names, profile_names
from npmerge.methods import METHODS

SMALL = 150
"""Commands that are tried in small."""
LIMIT = 60
"""Seconds that one may take."""
MEMORY = 16 * 2**30
NASTY = (
    "", " ", "-", "--", "-1", "0", "1", "2", "nan", "inf", "-inf", "1e999", "0x10", "1_0", "9" * 30, "\N{BOM}", "\0",
    "a\nb", "\udc80", "é" * 300, "..", "/", "/dev/null", "/proc/self/mem", "~nobody/x", "%s", "{}", "[", "None", "True",
    "mine:net", "mine:batches", "mine:none", "json:loads", "os:getcwd", "none:none", ":", "cpu", "cuda", "cuda:99",
    "meta", "mps", "a.pt", "b.pt", "other.pt", "text.pt", "images", "lr=1", "lr=nan", "lr=[]", "epochs=0", "alpha=2",
    "x=" + "(" * 99,
)  # fmt: skip
NAMES = (*experiment_names(), *profile_names(), *DATASETS, *METHODS, *list(MODELS)[:3])
GUARDS = {
    "run": ["--time-budget", "1e-9", "--workers", "1", "--results", "results", "--zoo", "zoo"],
    "book": ["--root", "nowhere", "--output", "built"],
    "models": ["--zoo", "zoo", "--models", "models"],
}
"""What comes last, so that nothing long is begun."""


class TooLongError(BaseException):
    """A command takes too long."""


def commands() -> dict[str, argparse.ArgumentParser]:
    parser = cli._parser()
    (action,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


values = st.one_of(
    st.sampled_from(NASTY), st.sampled_from(NAMES), st.integers(-3, 12).map(str), st.integers().map(str),
    st.floats().map(str), st.text(max_size=12),
)  # fmt: skip


@st.composite
def lines(draw: st.DrawFn) -> list[str]:
    """A command with some of its options."""
    every = commands()
    name = draw(st.sampled_from(sorted(every)))
    actions = [a for a in every[name]._actions if not isinstance(a, argparse._HelpAction)]
    words: list[str] = []
    if name == "merge" and draw(st.integers(0, 4)):  # most of them begin with what is right
        words = [
            "a.pt",
            "b.pt",
            "--model",
            "mine:net",
            "--data",
            "mine:batches",
            "--aggregate",
            "mean",
        ]
        words += [
            "--output",
            draw(st.sampled_from(["merged.safetensors", "below/merged.safetensors"])),
            "--force",
        ]
    for action in draw(st.lists(st.sampled_from(actions), max_size=4)):
        words += [draw(st.sampled_from(action.option_strings))] if action.option_strings else []
        if action.nargs != 0:
            most = 3 if action.nargs in ("+", "*") else 1
            words += draw(st.lists(values, min_size=1, max_size=most))
    if name == "merge" and draw(st.booleans()):
        words += ["--epochs", draw(st.sampled_from(["1", "0", "-1", "x"]))]
    return [name, *words, *GUARDS.get(name, [])]


def main() -> None:
    folder, seconds, first = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    os.chdir(folder)
    files(folder)
    os.environ["NPMERGE_DATA"] = str(folder / "no data")
    for name in ("NPMERGE_IMAGENET", "NPMERGE_RESULTS", "NPMERGE_ZOO", "NPMERGE_MODELS"):
        os.environ.pop(name, None)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGALRM, late)
    tiny_profile(pytest.MonkeyPatch())
    torch.set_num_threads(1)
    tried: Counter[str] = Counter()
    wrong: dict[str, tuple[str, str, str]] = {}
    end = time.monotonic() + seconds

    @given(lines())
    @settings(
        max_examples=SMALL, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    def run(words: list[str]) -> None:
        if seconds and time.monotonic() > end:
            return
        tried[words[0]] += 1
        if found := outcome(words):
            where = found[1].partition("|")[0]
            wrong.setdefault(
                f"{found[0]} {where}",
                (words[0], found[0], f"{found[1]} | {' '.join(map(repr, words))}"),
            )

    while True:
        seed(first)(run)()
        first += 1
        if time.monotonic() > end:
            break
    print(json.dumps({"tried": tried, "wrong": list(wrong.values())}))


def files(folder: Path) -> None:
    """What the commands find."""
    for number, name in enumerate(("a.pt", "b.pt")):
        torch.save(net(number).state_dict(), folder / name)
    torch.save({"weight": torch.zeros(3)}, folder / "other.pt")
    (folder / "text.pt").write_text("text")
    (folder / "images" / "a").mkdir(parents=True)
    (folder / "nowhere").mkdir()
    shutil.copy(HERE / "mine.py", folder)


def late(_: int, __: FrameType | None) -> None:
    raise TooLongError


def outcome(words: list[str]) -> tuple[str, str] | None:
    """What is wrong with what a command does."""
    out, err = io.StringIO(), io.StringIO()
    signal.alarm(LIMIT)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli.main(words)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 2
    except TooLongError:
        return "does not end", ""
    except BaseException as error:  # noqa: BLE001 - what must not come out
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = (str(error).splitlines() or [""])[0][:150]
        return (
            "traceback",
            f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}| {text}",
        )
    finally:
        signal.alarm(0)
    if "Traceback" in err.getvalue():
        return "traceback", err.getvalue()[-300:]
    return None if status in (0, 1, 2, 130) else ("status", str(status))


if __name__ == "__main__":
    main()
