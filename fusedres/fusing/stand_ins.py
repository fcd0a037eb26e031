"""Stand-ins for tensors, which record what is done to them and know of shapes what does not depend on a call."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import Attribute, GraphAppendingTracer
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from .regions import is_elementwise

SCALARS = (bool, int, float, str, type(None))
_SAME_SHAPE = {F.dropout, F.layer_norm}
_SWITCHES = "its forward switches gradients, autocast or what is saved for backward"
_INSIDERS = ("torch", "fusedres")
_FACTORIES = {
    "rand",
    "randn",
    "randint",
    "zeros",
    "ones",
    "empty",
    "full",
    "arange",
    "tensor",
    "eye",
    "linspace",
    "normal",
}


class Untraceable(BaseException):
    """Why a forward cannot be recorded. No author's `except Exception` is to catch it."""


class _Dim:
    """The size of a last dimension, shared by tensors that are bound to agree in it."""

    size: int | None = None


class Value(Proxy):
    """A stand-in for an argument or a result. Of a tensor it knows whose leading sizes it has, and its last one."""

    is_tensor = False
    like: Any = None  # whose leading dimensions it has
    last: _Dim

    def __init__(self, node: Node, tracer: Recorder) -> None:
        super().__init__(node, tracer)
        self.like, self.last = self, _Dim()

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """What `isinstance` is to see in an author's code; to torch, whose C++ trusts the answer, it is a Proxy."""
        if not _asks_isinstance(sys._getframe(1)):
            return Value
        if not self.is_tensor:
            raise Untraceable("its forward asks what a value is that only a call decides")
        return Tensor

    @property
    def shape(self) -> _Shape:
        return _Shape(self, "shape")

    @property
    def requires_grad(self) -> bool:
        raise Untraceable("its forward asks whether gradients are wanted")

    def size(self, dim: int | None = None) -> Any:
        if dim is None:
            return self.shape
        return self.shape[dim]

    def __bool__(self) -> bool:
        raise Untraceable("its forward decides something by the values of a tensor, or by sizes that only a call tells")

    def __len__(self) -> int:
        raise Untraceable("its forward asks for a length that only a call tells")


def _asks_isinstance(frame: FrameType) -> bool:
    """Whether the expression that is being evaluated is a call of isinstance, in code that is not torch's or ours."""
    code = frame.f_code
    if "isinstance" not in code.co_names or frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDERS:
        return False
    if sys.version_info < (3, 11):
        raise Untraceable("its forward calls isinstance, and this Python does not tell of what")
    line, _, start, _ = next(islice(code.co_positions(), frame.f_lasti // 2, None))
    return linecache.getline(code.co_filename, line or 0).encode()[start or 0 :].startswith(b"isinstance")


class _Shape(Attribute):
    """A stand-in for a shape, which can tell whether it equals another where that does not depend on a call."""

    def __getitem__(self, index: Any) -> Any:
        if index == -1 and self.root.last.size is not None:
            return self.root.last.size
        return super().__getitem__(index)  # type: ignore[misc]

    def __eq__(self, other: object) -> Any:
        if type(other) is _Shape and self.root.like is other.root.like:
            mine, theirs = self.root.last, other.root.last
            if mine is theirs:
                return True
            if mine.size is not None and theirs.size is not None:
                return mine.size == theirs.size
        raise Untraceable("its forward compares sizes that only a call tells")

    def __ne__(self, other: object) -> Any:
        return not self == other

    __hash__ = object.__hash__


class Recorder(GraphAppendingTracer):
    def __init__(self, graph: Graph, names: Mapping[int, str]) -> None:
        super().__init__(graph)
        self.names = names  # of parameters and buffers
        self.path = [""]  # of the modules being run, innermost last
        self.state = _ambient_state()

    def proxy(self, node: Node) -> Value:
        return Value(node, self)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any) -> Node:
        if _ambient_state() != self.state:
            raise Untraceable(_SWITCHES)
        node = super().create_node(kind, target, args, kwargs, *rest)
        node.meta["path"] = self.path[-1]
        return node

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Value:
        found: Value = super().create_proxy(kind, target, args, kwargs, *rest, **more)  # type: ignore[assignment]
        values = [one for one in (*args, *kwargs.values()) if type(one) is Value]
        if found.node.target is F.linear and type(args[0]) is Value:
            _of_linear(found, args[0], args[1] if len(args) > 1 else kwargs["weight"], self)
        elif is_elementwise(found.node):
            found.is_tensor = True
            _of_elementwise(found, values)
        elif found.node.target in _SAME_SHAPE and values:
            found.is_tensor, found.like, found.last = True, values[0].like, values[0].last
        return found

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, Proxy):
            if id(a) not in self.names:
                raise Untraceable("its forward uses a tensor that is no parameter and no buffer of it")
            return self.create_node("get_attr", self.names[id(a)], (), {})
        return super().create_arg(a)

    def to_bool(self, obj: Proxy) -> bool:
        raise Untraceable("its forward decides something that only a call tells")

    def iter(self, obj: Proxy) -> Iterator[Any]:
        raise Untraceable("its forward loops over something that only a call tells")

    keys = iter  # type: ignore[assignment]


def _of_linear(y: Value, x: Value, weight: Any, recorder: Recorder) -> None:
    y.is_tensor, y.like = True, x.like
    if isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(weight, Proxy):
        y.last.size = weight.shape[0]
        x.last.size = weight.shape[1]


def _of_elementwise(y: Value, values: Sequence[Value]) -> None:
    """The shape of its operands, where they agree."""
    first, *others = values
    if all(one.like is first.like and _agree(one.last, first.last) for one in others):
        y.like, y.last = first.like, first.last


def _agree(a: _Dim, b: _Dim) -> bool:
    return a is b or (a.size is not None and a.size == b.size)


def _ambient_state() -> tuple[Any, ...]:
    """What blocks around an operation may change of it."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda *_: None)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), top(False)


class OfParameters(TorchFunctionMode):
    """Records operations on parameters alone too, and those on nothing."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat = torch.utils._pytree.arg_tree_leaves(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if any(type(one) in (Value, Attribute, _Shape) for one in flat):
            return func(*args, **kwargs)  # by the stand-in
        if not any(isinstance(one, Tensor) for one in flat):
            if name in _FACTORIES:
                return self.recorder.create_proxy("call_function", func, args, kwargs)
            if "set_" in name:
                raise Untraceable(_SWITCHES if name == "_set_grad_enabled" else f"its forward calls {name}")
            return func(*args, **kwargs)
        if name == "__get__" or not _computes(name):
            return func(*args, **kwargs)
        kind = "call_method" if is_tensor_method_or_property(func) else "call_function"
        return self.recorder.create_proxy(kind, name if kind == "call_method" else func, args, kwargs)


def _computes(name: str) -> bool:
    """Whether an operation of this name makes a tensor, and does not tell a fact of one."""
    facts = (
        "size",
        "dim",
        "numel",
        "nelement",
        "stride",
        "is_",
        "__len__",
        "__repr__",
        "__format__",
        "ndimension",
        "get_",
    )
    return not name.startswith(facts) and name not in ("data_ptr", "element_size", "type", "__hash__")


def stand_in(recorder: Recorder, value: Any) -> Any:
    if type(value) in SCALARS:
        return value
    place = len(recorder.graph.nodes)
    stand_in = recorder.create_proxy("placeholder", f"given_{place}", (), {})
    stand_in.is_tensor = isinstance(value, Tensor)
    return stand_in
