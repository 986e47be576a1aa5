"""What the axes of tensors enumerate, and how two axes come to enumerate the same things.

An axis is a sum (a concatenation) of segments. A segment is a product of factors, the outermost first. A factor is an
atom, or a sum again, as in heads x (q + k + v). An atom is a set of interchangeable indices; that of variable 0 is
rigid: its indices stay where they are. Whatever cannot be expressed is pinned, that is made rigid: the identity
satisfies every constraint, so pinning is always sound.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple


class Atom(NamedTuple):
    """A set of interchangeable indices; those of variable 0 stay where they are."""

    variable: int
    size: int


Axis = tuple[Any, ...]
"""A tuple of segments; a segment is a tuple of factors, each an :class:`Atom` or an axis."""
Segment = tuple[Any, ...]
Layout = list[Axis]
"""The axes of a tensor."""

UNIT: Axis = ((),)
"""An axis of length 1."""
SECTIONS = 4
"""The most parts that an axis of a view may hold side by side, as q, k and v; a longer one is a product."""


class MismatchError(Exception):
    """Two axes of different lengths were said to enumerate the same things."""


def rigid(size: int) -> Axis:
    """An axis whose indices stay where they are."""
    return () if size == 0 else UNIT if size == 1 else ((Atom(0, size),),)


def length(axis: Axis) -> int:
    """How many indices an axis has."""
    return sum(map(segment_length, axis))


def segment_length(segment: Segment) -> int:
    """How many indices a segment has."""
    return prod(map(factor_length, segment))


def factor_length(factor: Any) -> int:
    """How many values a factor takes."""
    return factor.size if isinstance(factor, Atom) else length(factor)


def atoms_of(axis: Axis) -> Iterator[Atom]:
    """The atoms of an axis, rigid ones included."""
    for segment in axis:
        for factor in segment:
            if isinstance(factor, Atom):
                yield factor
            else:
                yield from atoms_of(factor)


def is_rigid(axis: Axis) -> bool:
    """Whether nothing of a resolved axis can move."""
    return not any(atom.variable for atom in atoms_of(axis))


def single(axis: Axis) -> Atom | None:
    """The atom that is all of an axis, if one is."""
    if len(axis) == 1 and len(axis[0]) == 1 and isinstance(axis[0][0], Atom):
        return axis[0][0]
    return None


@dataclass(frozen=True)
class _Pending:
    """An atom that was viewed as several: a product, or a sum inside one if an index of a short one is selected."""

    whole: Atom
    parts: tuple[Atom, ...]


class Atoms:
    """The unknowns, and what they were found to be.

    Attributes:
        frozen: while it is set, looking an axis up decides nothing.
    """

    def __init__(self) -> None:
        self.frozen = False
        self._bound: dict[int, Axis] = {}
        self._count = 0
        self._pending: dict[int, _Pending] = {}
        self._parts: dict[int, list[Axis]] = {}  # of a selected view: an axis for each index of s
        self._selected: dict[int, tuple[Atom, ...]] = {}  # whose parts an index of s selects

    def fresh(self, size: int) -> Axis:
        """An axis of which nothing is known yet."""
        return rigid(size) if size < 2 else ((self._atom(size),),)

    def _atom(self, size: int) -> Atom:
        self._count += 1
        return Atom(self._count, size)

    # --- Normal form -------------------------------------------------------------------------

    def resolve(self, axis: Axis) -> Axis:
        """An axis in the atoms that are known by now; rigid neighbours are one."""
        result: list[Segment] = []
        for segment in axis:
            for part in self._segments(segment):
                if result and is_rigid((part,)) and is_rigid((result[-1],)):
                    result[-1] = rigid(segment_length(part) + segment_length(result[-1]))[0]
                else:
                    result.append(part)
        return tuple(result)

    def _segments(self, segment: Segment) -> list[Segment]:
        parts = [self._factor(factor) for factor in segment]
        if () in parts:
            return []
        parts = [part for part in parts if part != UNIT]
        if not parts:
            return [()]
        inner: list[Any] = []
        for part in parts[1:]:
            inner.extend(part[0] if len(part) == 1 else (part,))
        return [_joined((*outer, *inner)) for outer in parts[0]]

    def _factor(self, factor: Any) -> Axis:
        if not isinstance(factor, Atom):
            return self.resolve(factor)
        number = factor.variable
        if number == 0:
            return rigid(factor.size)
        if number in self._pending:
            self._settle(self._pending[number])
        if number in self._parts and not self.frozen:
            first, *others = self._parts.pop(number)
            for other in others:
                self.unify(first, other)
            self._bound[number] = first
        if number in self._bound:
            self._bound[number] = self.resolve(self._bound[number])
            return self._bound[number]
        return ((factor,),)

    # --- Constraints -------------------------------------------------------------------------

    def pin(self, axis: Axis) -> None:
        """Say that the indices of an axis stay where they are."""
        for atom in atoms_of(self.resolve(axis)):
            if atom.variable:
                self._bound[atom.variable] = rigid(atom.size)

    def unify(self, first: Axis, second: Axis) -> None:
        """Say that two axes enumerate the same things.

        Raises:
            MismatchError: they have different lengths.
        """
        if first == second:
            return
        a, b = self.resolve(first), self.resolve(second)
        if length(a) != length(b):
            raise MismatchError(f"joins axes of {length(a)} and {length(b)}")
        while a != b:
            if is_rigid(a) or is_rigid(b):
                self.pin(a)
                self.pin(b)
                return
            if self._bind(a, b) or self._bind(b, a):
                return
            if len(a) == len(b) == 1:
                self._unify_products(a[0], b[0])
                return
            count = min(segment_length(a[0]), segment_length(b[0]))
            (head_a, a), (head_b, b) = self.cut(a, count), self.cut(b, count)
            self.unify(head_a, head_b)
            a, b = self.resolve(a), self.resolve(b)

    def _bind(self, axis: Axis, value: Axis) -> bool:
        """Bind an axis that is one atom to what it equals; return whether that is done."""
        atom = single(axis)
        if atom is None:
            return False
        if atom in atoms_of(value):
            self.pin(axis)
            return False
        self._bound[atom.variable] = value
        return True

    def _unify_products(self, p: Segment, q: Segment) -> None:
        if factor_length(p[0]) < factor_length(q[0]):
            p, q = q, p
        f, g = p[0], q[0]
        ratio, remainder = divmod(factor_length(f), factor_length(g))
        if remainder or (ratio > 1 and not isinstance(f, Atom)):
            self.pin((p,))
            self.pin((q,))
        elif ratio == 1:
            self.unify(((f,),), ((g,),))
            self.unify((p[1:],), (q[1:],))
        else:
            outer, inner = self._halves(f, ratio)
            self.unify(((outer,),), ((g,),))
            self.unify(((inner, *p[1:]),), (q[1:],))

    def _halves(self, atom: Atom, inner: int) -> tuple[Atom, Atom]:
        """Make an atom a product of two."""
        if atom.variable == 0:
            return Atom(0, atom.size // inner), Atom(0, inner)
        halves = self._atom(atom.size // inner), self._atom(inner)
        self._bound[atom.variable] = (halves,)
        return halves

    # --- Structure ---------------------------------------------------------------------------

    def cut(self, axis: Axis, at: int) -> tuple[Axis, Axis]:
        """Cut an axis in two before an index; an atom that lies across it becomes a sum."""
        head: list[Segment] = []
        todo = list(reversed(self.resolve(axis)))
        while todo and at > 0:
            segment = todo.pop()
            size = segment_length(segment)
            if size <= at:
                head.append(segment)
                at -= size
                continue
            first, rest = segment[0], segment[1:]
            count, remainder = divmod(at, segment_length(rest))
            if remainder:
                self.pin((segment,))
                first, rest, count = Atom(0, size), (), at
            if first.variable == 0:  # an outermost factor is an atom, once it is resolved
                todo.extend((part, *rest) for part in (Atom(0, first.size - count), Atom(0, count)))
            else:
                self._bound[first.variable] = self.fresh(count) + self.fresh(first.size - count)
                todo.extend(reversed(self.resolve((segment,))))
        return self.resolve(tuple(head)), self.resolve(tuple(reversed(todo)))

    def split(self, axis: Axis, inner: int) -> tuple[Axis, Axis]:
        """Write an axis as a product of an outer and an inner one; pinned if it is none.

        Args:
            axis: its length is a multiple of ``inner``.
            inner: length of the inner axis.
        """
        axis = self.resolve(axis)
        size = length(axis)
        if inner == size:
            return UNIT, axis
        if inner == 1:
            return axis, UNIT
        outers: list[Segment] = []
        inners: list[Axis] = []
        for segment in axis:
            halves = self._split_segment(self.resolve((segment,)), inner)
            if halves is None:
                self.pin(axis)
                return rigid(size // inner), rigid(inner)
            outers.append(halves[0])
            inners.append((halves[1],))
        for other in inners[1:]:
            self.unify(inners[0], other)
        return self.resolve(tuple(outers)), self.resolve(inners[0])

    def _split_segment(self, axis: Axis, inner: int) -> tuple[Segment, Segment] | None:
        if len(axis) != 1:
            return None
        left: list[Any] = list(axis[0])
        right: list[Any] = []
        while inner > 1:
            if not left:
                return None
            factor = left.pop()
            size = factor_length(factor)
            if inner % size == 0:
                right.insert(0, factor)
                inner //= size
            elif size % inner == 0:
                halves = self._halves if isinstance(factor, Atom) else self.split
                outer, last = halves(factor, inner)
                left.append(outer)
                right.insert(0, last)
                inner = 1
            else:
                return None
        return tuple(left), tuple(right)

    def reshape(self, layout: Sequence[Axis], old: Sequence[int], new: Sequence[int]) -> Layout:
        """The axes of a tensor after a row-major reshape.

        Args:
            layout: the axes before.
            old: the shape before.
            new: the shape after.
        """
        if 0 in old:
            return [rigid(size) for size in new]
        result: Layout = [UNIT] * len(new)
        left, right = ([k for k, n in enumerate(shape) if n > 1] for shape in (old, new))
        while left:
            sources, targets = [left.pop(0)], [right.pop(0)]
            # The smallest blocks of axes before and after that hold equally many entries.
            while (p := prod(old[k] for k in sources)) != (q := prod(new[k] for k in targets)):
                if p < q:
                    sources.append(left.pop(0))
                else:
                    targets.append(right.pop(0))
            parts = self._viewed([layout[k] for k in sources], [new[k] for k in targets])
            for k, part in zip(targets, parts, strict=True):
                result[k] = part
        return result

    def _viewed(self, axes: list[Axis], sizes: list[int]) -> list[Axis]:
        """Some axes that are viewed as others of these sizes."""
        if len(axes) == 1:
            if len(sizes) == 1:
                return axes
            parts = self._postponed(axes[0], sizes)
            if parts is not None:
                return parts
        axis: Axis = axes[0] if len(axes) == 1 else (tuple(axes),)
        parts = []
        for size in reversed(sizes[1:]):
            axis, part = self.split(axis, size)
            parts.insert(0, part)
        return [axis, *parts]

    # --- (3, heads, size of a head): what it is turns out when somebody selects from the 3 -----------

    def _postponed(self, axis: Axis, sizes: list[int]) -> list[Axis] | None:
        atom = single(self.resolve(axis))
        if min(sizes[:-1]) > SECTIONS or atom is None or atom.variable == 0:
            return None
        pending = _Pending(atom, tuple(self._atom(size) for size in sizes))
        self._pending.update(dict.fromkeys((a.variable for a in (atom, *pending.parts)), pending))
        return [((part,),) for part in pending.parts]

    def _settle(self, pending: _Pending) -> None:
        """Nobody has selected: a product."""
        self._forget(pending)
        self._bound[pending.whole.variable] = (pending.parts,)

    def _forget(self, pending: _Pending) -> None:
        for atom in (pending.whole, *pending.parts):
            self._pending.pop(atom.variable)

    def _cut_open(self, pending: _Pending, s: Atom) -> None:
        """Somebody selects from s: what lies inside it is another thing at each index, what lies outside is not."""
        self._forget(pending)
        at = pending.parts.index(s)
        outside, inside = pending.parts[:at], pending.parts[at + 1 :]
        for part in inside:
            self._parts[part.variable] = [self.fresh(part.size) for _ in range(s.size)]
        apart: Axis = tuple(
            tuple(self._parts[part.variable][k] for part in inside) for k in range(s.size)
        )
        self._bound[pending.whole.variable] = ((*outside, apart),) if outside else apart
        self._bound[s.variable] = rigid(s.size)
        self._selected[s.variable] = inside

    def stack(self, layouts: Sequence[Layout], at: int) -> Layout:
        """The axes of tensors stacked along a new axis; what they enumerate meets only where the stack is used whole.

        Args:
            layouts: of the tensors.
            at: number of the new axis.
        """
        result: Layout = []
        apart: list[Atom] = []
        for axes in zip(*layouts, strict=True):
            axis = axes[0]
            if any(other != axis for other in axes):
                atom = self._atom(length(axis))
                self._parts[atom.variable] = list(axes)
                apart.append(atom)
                axis = ((atom,),)
            result.append(axis)
        s = self._atom(len(layouts))
        self._bound[s.variable] = rigid(len(layouts))
        self._selected[s.variable] = tuple(apart)
        result.insert(at, ((s,),))
        return result

    def select(self, layout: Sequence[Axis], axis: int, index: int) -> Layout:
        """The axes of what is selected by one index of an axis.

        Args:
            layout: the axes before.
            axis: from which the index selects.
            index: which.
        """
        atom = single(layout[axis])
        number = 0 if atom is None else atom.variable
        pending = self._pending.get(number)
        if pending is not None and atom in pending.parts[:-1] and length(layout[axis]) <= SECTIONS:
            self._cut_open(pending, atom)
        others = [other for k, other in enumerate(layout) if k != axis]
        if number not in self._selected:
            self.pin(layout[axis])
            return others
        mine = {part.variable for part in self._selected[number]} & self._parts.keys()
        for k, other in enumerate(others):
            whole = single(other)
            if whole is not None and whole.variable in mine:
                others[k] = self._parts[whole.variable][index]
        return others


def _joined(segment: Segment) -> Segment:
    """A segment in which rigid neighbours are one."""
    result: list[Any] = []
    for factor in segment:
        before: Any = result[-1] if result else None
        both = isinstance(factor, Atom) and isinstance(before, Atom)
        if both and factor.variable == before.variable == 0:
            result[-1] = Atom(0, before.size * factor.size)
        else:
            result.append(factor)
    return tuple(result)
