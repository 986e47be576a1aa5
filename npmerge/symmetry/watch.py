"""Watching one forward pass: every operation that runs relates the axes of its outputs to those of its inputs."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from npmerge.symmetry.atoms import Atoms, Axis, Layout, MismatchError, is_rigid, length, rigid
from npmerge.symmetry.call import Call
from npmerge.symmetry.groups import Role, SymmetryError
from npmerge.symmetry.rules import RULES

SAME = {
    **dict.fromkeys(
        (
            *(
                "cudnn_batch_norm",
                "miopen_batch_norm",
                "native_batch_norm",
                "_batch_norm_no_update",
            ),
            *("_native_batch_norm_legit", "_native_batch_norm_legit_no_training"),
            *("_batch_norm_with_update", "_batch_norm_impl_index"),
        ),
        "batch_norm",
    ),
    **dict.fromkeys(("_convolution", "cudnn_convolution", "mkldnn_convolution"), "convolution"),
}
"""Operations that a device or a layer's mode may run in the place of another one."""

STRUCTURAL = frozenset(
    (
        *("view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze", "expand"),
        *("permute", "transpose", "t", "numpy_T", "select", "unbind", "slice", "split"),
        *("split_with_sizes", "clone", "_to_copy", "detach", "alias", "lift_fresh", "contiguous"),
    )
)
"""What shows a tensor as it is, or a part of it: a parameter is still one, and q, k and v in one tensor stay apart."""
SCALING = frozenset(("mul", "div", "neg"))


@dataclass(frozen=True)
class Event:
    """What came out of one operation, and where it ran."""

    path: str
    operation: str
    occurrence: int
    layouts: list[Layout]
    measurable: bool


class Watch(TorchDispatchMode):
    """Follows what the axes of all tensors enumerate through a pass.

    Args:
        model: whose parameters are followed.
        strict: refuse an operation without a rule; else hold all that it touches fixed.
    """

    def __init__(self, model: nn.Module, strict: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # PyTorch's hook has no types
        self.atoms, self.modules, self.strict = Atoms(), Modules(model), strict
        self.events: list[Event] = []
        self.pinned: Counter[str] = Counter()
        self.restricted: list[tuple[Axis, str]] = []
        self.roles: dict[tuple[int, int], Role] = {}
        self.touched: set[int] = set()
        self._layouts: dict[int, Layout] = {}
        self._alive: list[Tensor] = []  # an id is a tensor's for as long as it lives
        self._tainted: dict[int, list[Axis]] = {}
        self._weights: set[int] = set()  # parameters, and what is computed of nothing else
        self._origins: dict[int, tuple[int, tuple[int | None, ...]]] = {}
        own = {id(tensor) for tensor in (*model.parameters(), *_statistics(model))}
        self._state: dict[int, Tensor] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor.is_floating_point() and id(tensor) not in self._state:  # tied ones are one
                self._state[id(tensor)] = tensor
                # Other buffers are constants, alike in all models; those of a parametrisation belong to its weight.
                if id(tensor) in own or "parametrizations." in name:
                    self.track(tensor, [self.atoms.fresh(size) for size in tensor.shape])
                    self._weights.add(id(tensor))
                    self._origins[id(tensor)] = id(tensor), tuple(range(tensor.ndim))
        self._meta = any(tensor.is_meta for tensor in self._state.values())

    def track(self, tensor: Tensor, layout: Layout) -> None:
        """Say what the axes of a tensor enumerate."""
        self._layouts[id(tensor)] = layout
        self._alive.append(tensor)

    def state_layout(self, tensor: Tensor) -> Layout | None:
        """What a tensor of the state dict enumerates; ``None`` if the pass did not use it or took it as a constant."""
        if id(tensor) not in self.touched:
            return None
        layout = self._layouts.get(id(tensor))
        return None if layout is None else [self.atoms.resolve(axis) for axis in layout]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        operation = operation_of(func)
        occurrence = self.modules.tick(operation)
        found = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if str(kwargs.get("device")) == "meta" and not any(t.is_meta for t in found):
            kwargs["device"] = torch.device("cpu")  # constants have values
        if not any(map(self.known, found)):
            return func(*args, **kwargs)  # constants: looked at when they are used
        schema = func._schema.arguments
        named = SimpleNamespace(
            **{x.name: x.default_value if x.has_default_value() else None for x in schema}
        )
        vars(named).update(zip((x.name for x in schema), args, strict=False))
        vars(named).update(kwargs)
        call = Call(self, operation, named, found)
        self.touched.update(map(id, found))
        out = func(*args, **kwargs) if not self._meta else _on_meta(func, args, kwargs)
        call.outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        written = {
            id(leaf)
            for x in schema
            if x.alias_info is not None and x.alias_info.is_write
            for leaf in tree_leaves(getattr(named, x.name))
            if isinstance(leaf, Tensor)
        }
        layouts, measurable = self._infer(func, call)
        self._note(func, call, layouts, written)
        if not all(map(self.is_weight, call.outputs)):
            shown = [
                layout if output.is_floating_point() else []
                for output, layout in zip(call.outputs, layouts, strict=True)
            ]
            self.events.append(Event(self.modules.path, operation, occurrence, shown, measurable))
        return out

    def _infer(self, func: Any, call: Call) -> tuple[list[Layout], bool]:
        """The layouts of an operation's outputs, and whether its output shows what neurons answer."""
        name = call.operation.removesuffix("_")
        found = RULES.get(call.operation) or RULES.get(name)
        if found is None and torch.Tag.pointwise in func.tags:
            found = RULES["add"]
        if name not in STRUCTURAL:  # it may mix q, k and v while they lie in one tensor
            for tensor in call.inputs:
                for axis in call.of(tensor):
                    self.atoms.resolve(axis)
        if found is None:
            if self.strict:
                raise SymmetryError(
                    f"{call} has no symmetry rule: add one ('Teach it an operation' says how), "
                    "or hold what it touches fixed with strict=False"
                )
            self.pinned[f"{call.operation} in {self.modules.path or 'the model'}"] += 1
            call.pin_all()
            return call.rigid_outputs(), False
        try:
            layouts = found.function(call)
        except MismatchError as error:
            raise SymmetryError(f"{call} {error}: no permutation symmetry is known") from error
        for output, layout in zip(call.outputs, layouts, strict=True):
            if [length(axis) for axis in layout] != list(output.shape):
                raise SymmetryError(
                    f"{call}: its rule does not fit an output of shape {tuple(output.shape)}; "
                    "report it, or leave the operation out of the model to be aligned"
                )
        return layouts, found.measurable

    def _note(self, func: Any, call: Call, layouts: list[Layout], written: set[int]) -> None:
        """Remember what came out of an operation."""
        followed = [tensor for tensor in call.inputs if id(tensor) in self._layouts]
        only_weights = bool(followed) and all(id(tensor) in self._weights for tensor in followed)
        plain = call.operation in STRUCTURAL
        scaled = call.operation in SCALING and len(call.inputs) == 1
        origins = [self._origins.get(id(tensor)) for tensor in call.inputs]
        for tensor, origin in zip(call.inputs, origins, strict=True):
            if origin is not None and not (plain or scaled or id(tensor) in call.stated):
                for axis in range(tensor.ndim):
                    self.note_role(tensor, axis, "tied", call)
        for tensor in call.inputs:
            if self._meta and id(tensor) in written and id(tensor) not in self._layouts:
                self._taint(tensor, [axis for layout in layouts for axis in layout])
        for output, layout in zip(call.outputs, layouts, strict=True):
            # transpose_() and the like give the tensor another layout; other writes must fit that it has.
            if id(output) in written and torch.Tag.inplace_view not in func.tags:
                self._write(output, layout)
                if not only_weights:
                    self._weights.discard(id(output))
                continue
            self.track(output, layout)
            if only_weights:
                self._weights.add(id(output))
                if (plain or scaled) and origins[0] is not None:
                    self._inherit(output, layout, call.of(call.inputs[0]), origins[0])

    def _inherit(
        self,
        output: Tensor,
        layout: Layout,
        before: Layout,
        origin: tuple[int, tuple[int | None, ...]],
    ) -> None:
        """A view of a parameter knows which of its axes are which of the parameter's."""
        places = {id(axis): k for k, axis in enumerate(before) if axis}
        axes = [origin[1][places[id(axis)]] if id(axis) in places else None for axis in layout]
        self._origins[id(output)] = origin[0], tuple(axes)

    def _write(self, tensor: Tensor, layout: Layout) -> None:
        if id(tensor) in self._layouts:
            for old, new in zip(self._layouts[id(tensor)], layout, strict=True):
                self.atoms.unify(old, new)
        else:
            self._taint(tensor, layout)
            self.track(tensor, layout)

    def _taint(self, tensor: Tensor, axes: list[Axis]) -> None:
        """Something that moves was written into a constant: whoever reads its memory otherwise pins that."""
        self._tainted.setdefault(_memory(tensor), []).extend(axes)
        self._alive.append(tensor)

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether a tensor is a parameter, or computed of nothing else."""
        return id(tensor) in self._weights

    def known(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on the model's parameters or inputs."""
        return id(tensor) in self._layouts or (
            bool(self._tainted) and _memory(tensor) in self._tainted
        )

    def layout_of(self, tensor: Tensor) -> Layout:
        """What the axes of a tensor enumerate.

        Of a constant, an axis along which it does not vary is free, anew at every use.
        """
        if id(tensor) in self._layouts:
            return self._layouts[id(tensor)]
        if tensor.is_meta:  # nobody knows its values
            return [rigid(size) for size in tensor.shape]
        written = self._tainted.get(_memory(tensor)) if self._tainted else None
        if written is not None:
            for axis in written:
                self.atoms.pin(axis)
            return [rigid(size) for size in tensor.shape]
        return [
            self.atoms.fresh(size)
            if size > 1 and bool((tensor == tensor.narrow(axis, 0, 1)).all())
            else rigid(size)
            for axis, size in enumerate(tensor.shape)
        ]

    def note_role(self, tensor: Tensor, axis: int, role: Role, call: Call) -> None:
        """Remember how an axis is used, if it is one of a parameter's."""
        origin = self._origins.get(id(tensor))
        if origin is None:
            return
        parameter, axes = origin
        targets = (
            [axes[axis]] if axes[axis] is not None else list(range(self._state[parameter].ndim))
        )
        for target in targets:
            role = role if len(targets) == 1 else "tied"
            key = parameter, int(target or 0)
            before = self.roles.setdefault(key, role)
            if before != role or role == "tied":
                self.roles[key] = "tied"
                self.restrict(self._layouts[parameter][key[1]], call)

    def restrict(self, axis: Axis, call: Call) -> None:
        """Remember that only permutations of an axis are allowed, and by what."""
        self.restricted.append((axis, str(call)))


class Modules:
    """The path of the module that runs, and how often an operation ran in it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._names = {id(module): name for name, module in model.named_modules()}
        self._stack: list[str] = []
        self._counts: Counter[tuple[str, str]] = Counter()
        self.failed: str | None = None

    @property
    def path(self) -> str:
        """Name of the innermost module that runs; empty for the model itself."""
        return self._stack[-1] if self._stack else ""

    def describe(self, path: str | None = None) -> str:
        """A module in words."""
        path = self.path if path is None else path
        if not path:
            return "the model's own forward"
        return f"module {path!r} ({type(self._model.get_submodule(path)).__name__})"

    def tick(self, operation: str) -> int:
        """Count a run of an operation; return how often it has run in this module before."""
        self._counts[self.path, operation] += 1
        return self._counts[self.path, operation] - 1

    @contextlib.contextmanager
    def follow(self) -> Iterator[None]:
        """Know in which module an operation runs; recurrent layers run operation by operation."""
        flags: list[Any] = []

        def enter(module: nn.Module, _: Any) -> None:
            self._stack.append(self._names.get(id(module), self.path))
            if isinstance(module, nn.RNNBase):
                flags.append((torch.backends.mkldnn.set_flags(False), torch.backends.cudnn.enabled))
                torch.backends.cudnn.enabled = False

        def leave(module: nn.Module, _i: Any, _o: Any) -> None:
            if self.failed is None and sys.exc_info()[0] is not None:
                self.failed = self.path
            self._stack.pop()
            if isinstance(module, nn.RNNBase):
                mkldnn, cudnn = flags.pop()
                torch.backends.mkldnn.set_flags(*mkldnn)
                torch.backends.cudnn.enabled = cudnn

        hooks = (
            register_module_forward_pre_hook(enter),
            register_module_forward_hook(leave, always_call=True),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


READS = {"tolist", "item", "__bool__", "__float__", "__int__", "__index__"}
ESCAPES = {
    "numpy",
    "__array__",
    "__dlpack__",
    "data_ptr",
    "set_",
    "resize_",
    "untyped_storage",
    "storage",
}


class Escapes(TorchFunctionMode):
    """Refuses what takes a tensor out of the dispatcher's sight; values that are only read are held fixed."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        assigned = name == "__set__" and getattr(func, "__self__", None) is Tensor.data
        if assigned or name in ESCAPES or name in READS:
            atoms = self._watch.atoms
            for tensor in tree_leaves(args):
                if isinstance(tensor, Tensor) and self._watch.known(tensor):
                    moving = [
                        axis
                        for axis in self._watch.layout_of(tensor)
                        if not is_rigid(atoms.resolve(axis))
                    ]
                    if moving and name not in READS:
                        where = self._watch.modules.describe()
                        raise SymmetryError(
                            f"Tensor.{'data =' if assigned else name} in {where} takes channels out of "
                            "PyTorch's sight: use tensor operations"
                        )
                    for axis in moving:
                        atoms.pin(axis)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def plain_operations() -> Iterator[None]:
    """Attention and the encoder's fast path run operation by operation; nothing is recorded for gradients."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and without what it has kept from its parameters.

    Every module's mode is restored.
    """
    modes = {module: module.training for module in model.modules()}
    model.train()
    model.eval()
    try:
        yield
    finally:
        model.train()  # gives up what was kept meanwhile
        for module, mode in modes.items():
            module.training = mode


def operation_of(func: Any) -> str:
    """The name of an ATen operation; one for all that are the same."""
    name = str(func._schema.name).replace("::", ".").removeprefix("aten.")
    return SAME.get(name, name)


def _statistics(model: nn.Module) -> Iterator[Tensor]:
    """The buffers of normalisations, frozen ones included: they follow the channels as parameters do."""
    for module in model.modules():
        buffers = dict(module.named_buffers(recurse=False))
        if {"running_mean", "running_var"} <= buffers.keys():
            yield from (tensor for tensor in buffers.values() if tensor is not None)


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _on_meta(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on shapes alone, where one of its tensors has nothing more."""
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if any(leaf.is_meta for leaf in leaves):
        args, kwargs = tree_map_only(
            Tensor, lambda t: t if t.is_meta else t.to("meta"), (args, kwargs)
        )
    return func(*args, **kwargs)
