"""What a user names as ``package.module:attribute``: imported, and called with what it takes."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any


def attribute(name: str, what: str) -> Any:
    """Import what is named.

    Args:
        name: ``package.module:attribute``.
        what: what it is, for the message.

    Raises:
        ValueError: there is no such thing.
    """
    module, _, inner = name.partition(":")
    try:
        return getattr(importlib.import_module(module), inner)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{what} {name!r} does not work ({_first_line(error)}): give package.module:name"
        ) from error


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
    try:
        known, _, _ = takes(function)
        return function(**{key: value for key, value in offered.items() if key in known})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} {name!r} does not work ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
