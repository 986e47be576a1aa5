"""What a user names as ``package.module:attribute``: imported, and called with what it takes."""

from __future__ import annotations

import importlib
import inspect
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


class UserCodeError(ValueError):
    """A user's own code has failed; the message says which, how and where."""


@contextmanager
def user_code(what: str, advice: str = "") -> Iterator[None]:
    """Run a user's own code: whatever it raises becomes an error of one line, with the first one behind it.

    What npmerge itself raises on purpose, and that the device's memory is full, stay as they are.

    Args:
        what: what is run, for the message.
        advice: what to do, in the message.

    Raises:
        UserCodeError: it raises something, or ends the program.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (Exception, SystemExit) as error:
        if type(error).__module__.partition(".")[0] == __name__.partition(".")[0]:
            raise
        words = f"{type(error).__name__}: {first_line(error)}".removesuffix(": ")
        raise UserCodeError(
            f"{what} does not work ({words}{_place(error)}){f': {advice}' if advice else ''}"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of what an error says; the last one where a process of a ``DataLoader`` passes an error on.

    Args:
        error: any.
    """
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    lines = text.strip().splitlines() or [""]
    return lines[-1] if lines[0].startswith("Caught ") else lines[0]


_OTHERS = (str(Path(__file__).parent), *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")))


def _place(error: BaseException) -> str:
    """The line of the user's own code that was reached last."""
    if isinstance(error, SyntaxError) and error.filename:
        return f", {error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        f for f in frames if not f.filename.startswith("<") and not f.filename.startswith(_OTHERS)
    ]
    return f", {own[-1].filename}:{own[-1].lineno}" if own else ""


def attribute(name: str, what: str) -> Any:
    """Import what is named.

    Args:
        name: ``package.module:attribute``.
        what: what it is, for the message.

    Raises:
        ValueError: there is no such thing.
    """
    module, _, inner = name.partition(":")
    with user_code(f"{what} {name!r}", "give package.module:name"):
        return getattr(importlib.import_module(module), inner)


def takes(function: Callable[..., Any]) -> tuple[set[str], bool, list[str]]:
    """What can be given to a function.

    Args:
        function: any.

    Returns:
        The names of its parameters, whether it takes any keyword, and the names of those that must be given by place
        or may be, and have no default.
    """
    parameters = inspect.signature(function).parameters.values()
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return (
        {p.name for p in parameters},
        any(p.kind is p.VAR_KEYWORD for p in parameters),
        [p.name for p in parameters if p.kind in places and p.default is p.empty],
    )


def called(name: str, what: str, **offered: Any) -> Any:
    """Call what is named with those of the keywords that it takes.

    Args:
        name: ``package.module:function``.
        what: what it is, for the message.
        **offered: by name.

    Raises:
        ValueError: there is no such function, or it does not take them.
    """
    function = attribute(name, what)
    with user_code(f"{what} {name!r}"):
        known, _, _ = takes(function)
        return function(**{key: value for key, value in offered.items() if key in known})
