"""What can be chosen by name: one file an entry, registered where it is written, listed without importing it."""

from __future__ import annotations

import ast
import importlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from npmerge.checks import check_finite, check_whole

_PACKAGE = Path(__file__).parent
_PARSING = threading.Lock()


def statements(text: str) -> list[ast.stmt]:
    """The statements of a source: one thread at a time, as Python 3.11 fails if two parse at once."""
    with _PARSING:
        return ast.parse(text).body


@dataclass(frozen=True)
class Option:
    """A keyword of a registered function that its user may set.

    Attributes:
        type: its annotation, e.g. ``"float"``.
        default: its default value.
    """

    type: str
    default: Any

    def check(self, name: str, value: object) -> None:
        """Raise if the option cannot be this; of types that are neither numbers nor text nothing is known.

        Args:
            name: of the option.
            value: as it was given.

        Raises:
            ValueError: it is of another type, a whole number below 0, or a number that is not finite.
        """
        if self.type == "int":
            check_whole(name, value)
        elif self.type == "float":
            check_finite(name, value)
        elif self.type in ("bool", "str") and type(value).__name__ != self.type:
            raise ValueError(
                f"{name} is {value!r}: give {'True or False' if self.type == 'bool' else 'text'}"
            )


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A registered function.

    Attributes:
        name: the function's, and the one name it has everywhere.
        module: where it is written.
        summary: the first line of its docstring.
        parameters: the names of all its parameters.
        keywords: its keyword-only parameters that have a default.
        place: in lists and tables; those of one place are in the order of their files.
    """

    name: str
    module: str
    summary: str = ""
    parameters: tuple[str, ...] = ()
    keywords: Mapping[str, Option] = field(default_factory=dict)
    place: int = 100

    @cached_property
    def function(self) -> Callable[..., Any]:
        """The function itself; its module is imported now."""
        found: Callable[..., Any] = getattr(importlib.import_module(self.module), self.name)
        return found


E = TypeVar("E", bound=Entry)
F = TypeVar("F", bound=Callable[..., Any])


class Registry(Mapping[str, E], Generic[E]):
    """Entries by name: those written in the files of some folders of the package, and those registered since.

    The files are read, not imported: whoever lists names, or checks one, does not wait for PyTorch. What a
    registration says in a file of the package must therefore be literal.

    Args:
        noun: what an entry is, for errors.
        decorator: name of the decorator that registers one.
        kind: class of the entries; takes what the registration says.
        packages: where to look, e.g. ``"npmerge.align"``.
    """

    def __init__(self, noun: str, decorator: str, kind: type[E], packages: tuple[str, ...]) -> None:
        self.noun, self._decorator, self._kind, self._packages = noun, decorator, kind, packages
        self._added: dict[str, E] = {}

    @cached_property
    def _written(self) -> dict[str, E]:
        found = [entry for package in self._packages for entry in self._read(package)]
        return {entry.name: entry for entry in sorted(found, key=lambda entry: entry.place)}

    def __getitem__(self, name: str) -> E:
        """The entry of a name; a ``ValueError`` that lists what there is otherwise."""
        try:
            return (self._written | self._added)[name]
        except KeyError:
            known = ", ".join(self)
            raise ValueError(f"unknown {self.noun} {name!r}: choose one of {known}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._written or name in self._added

    def __iter__(self) -> Iterator[str]:
        return iter(self._written | self._added)

    def __len__(self) -> int:
        return len(self._written | self._added)

    def register(self, **words: Any) -> Callable[[F], F]:
        """Register the function that is decorated.

        Args:
            words: what the registration says; the fields of the entries' class.

        Raises:
            ValueError: another function has that name already.
        """

        def decorate(function: F) -> F:
            if function.__module__.partition(".")[0] == __name__.partition(".")[0] and (
                function.__name__ in self._written
            ):
                return function
            keywords, parameters = {}, []
            for parameter in inspect.signature(function).parameters.values():
                parameters.append(parameter.name)
                if parameter.kind is parameter.KEYWORD_ONLY and (
                    parameter.default is not parameter.empty
                ):
                    kind = inspect.formatannotation(parameter.annotation).strip("'")
                    keywords[parameter.name] = Option(kind, parameter.default)
            self.add(
                self._kind(
                    name=function.__name__,
                    module=function.__module__,
                    summary=_first_line(function.__doc__),
                    parameters=tuple(parameters),
                    keywords=keywords,
                    **words,
                ),
                function,
            )
            return function

        return decorate

    def add(self, entry: E, function: Callable[..., Any]) -> None:
        """Take a function in; see :meth:`register`."""
        if entry.name in self and self[entry.name].module != entry.module:
            raise ValueError(
                f"there is a {self.noun} {entry.name!r} already, in {self[entry.name].module}: take another name"
            )
        entry.__dict__["function"] = function
        self._added[entry.name] = entry

    def remove(self, name: str) -> None:
        """Take out an entry that :meth:`register` has taken in."""
        del self._added[name]

    def _read(self, package: str) -> Iterator[E]:
        root, *below = package.split(".")
        for file in sorted(_PACKAGE.joinpath(*below).glob("*.py")):
            text = file.read_text(encoding="utf-8")
            if not file.name.startswith("_") and f"@{self._decorator}(" in text:
                module = f"{root}.{'.'.join([*below, file.stem])}"
                for node in statements(text):
                    if isinstance(node, ast.FunctionDef):
                        for call in node.decorator_list:
                            if _called(call) == self._decorator:
                                yield self._entry(module, node, call)

    def _entry(self, module: str, node: ast.FunctionDef, call: Any) -> E:
        try:
            words = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
            keywords = {
                argument.arg: Option(
                    ast.unparse(argument.annotation) if argument.annotation else "",
                    ast.literal_eval(default),
                )
                for argument, default in zip(
                    node.args.kwonlyargs, node.args.kw_defaults, strict=True
                )
                if default is not None
            }
        except ValueError as error:
            raise ValueError(
                f"{module}.{node.name}: its registration and the defaults of its keywords must be literal"
            ) from error
        return self._kind(
            name=node.name,
            module=module,
            summary=_first_line(ast.get_docstring(node)),
            parameters=tuple(
                argument.arg
                for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            ),
            keywords=keywords,
            **words,
        )


def _called(call: ast.expr) -> str:
    if not isinstance(call, ast.Call):
        return ""
    function = call.func
    return function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")


def _first_line(text: str | None) -> str:
    return (text or "").strip().split("\n")[0]
