"""Stand-ins for tensors, which record what is done to them and know of shapes what does not depend on a call."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import Attribute, GraphAppendingTracer
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from ..dispatch import is_any_autocast_enabled
from .regions import is_elementwise
from .scrutiny import Scrutiny
from .values import Untraceable, is_constant

_is_grad_enabled, _is_inference_mode_enabled = torch.is_grad_enabled, torch.is_inference_mode_enabled
_ATTRIBUTES = {"dtype", "device", "shape", "ndim", "T", "mT", "H", "is_cuda", "itemsize", "layout"}
_TELLING = {"is_contiguous", "is_floating_point", "is_complex", "item", "tolist", "numpy", "is_leaf", "backward"}
_SAME_SHAPE = {F.dropout, F.layer_norm}
_SWITCHES = "its forward switches gradients, autocast or what is saved for backward"
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


class _Dim:
    """The size of a last dimension, shared by tensors that are bound to agree in it."""

    size: int | None = None


class Value(Proxy):
    """A stand-in for an argument or a result. Of a tensor it knows whose leading sizes it has, and its last one."""

    is_tensor = False  # for certain
    is_object = False  # something else for certain: to be handed on, not to be asked
    tracer: Recorder
    like: Any = None  # whose leading dimensions it has
    last: _Dim

    def __init__(self, node: Node, tracer: Recorder) -> None:
        super().__init__(node, tracer)
        self.like, self.last = self, _Dim()

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """What `isinstance` is to see in an author's code; to torch, whose C++ trusts the answer, it is a Proxy."""
        if not self.tracer.scrutiny.asks_isinstance:
            return Value
        if not self.is_tensor:
            raise Untraceable("its forward asks what a value is that only a call decides")
        return Tensor

    @property
    def shape(self) -> _Shape:
        return _Shape(self, "shape")

    def __getattr__(self, name: str) -> Any:
        if self.is_object or name in _TELLING or not (name in _ATTRIBUTES or callable(getattr(Tensor, name, None))):
            raise Untraceable(f"its forward asks for {name} of a value that only a call decides")
        return super().__getattr__(name)

    def size(self, dim: int | None = None) -> Any:
        if dim is None:
            return self.shape
        return self.shape[dim]

    def __bool__(self) -> bool:
        raise Untraceable("its forward decides something by the values of a tensor, or by sizes that only a call tells")

    def __len__(self) -> int:
        raise Untraceable("its forward asks for a length that only a call tells")


def _changing(name: str) -> Callable[[Value, Any], Any]:
    function = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"):
    setattr(Value, f"__i{_name}__", _changing(f"i{_name}"))


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
    def __init__(self, graph: Graph, module: nn.Module) -> None:
        super().__init__(graph)
        self.names, self.shared = _named(module)  # of parameters and buffers; of those that have several
        self.path = [""]  # of the modules being run, innermost last
        self.state = ambient_state()
        self.scrutiny = Scrutiny(module)

    def proxy(self, node: Node) -> Value:
        return Value(node, self)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any) -> Node:
        if ambient_state() != self.state:
            raise Untraceable(_SWITCHES)
        node = super().create_node(kind, target, args, kwargs, *rest)
        node.meta["path"] = self.path[-1]
        return node

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Value:
        found: Value = super().create_proxy(kind, target, args, kwargs, *rest, **more)  # type: ignore[assignment]
        values = [one for one in (*args, *kwargs.values()) if type(one) is Value]
        if found.node.target is F.linear and len(args) > 1 and type(args[0]) is Value:
            _of_linear(found, args[0], args[1])
        elif is_elementwise(found.node):
            found.is_tensor = True
            _of_elementwise(found, [*args, *kwargs.values()])
        elif found.node.target in _SAME_SHAPE and values:
            found.is_tensor, found.like, found.last = True, values[0].like, values[0].last
        return found

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, Proxy):
            if id(a) not in self.names:
                raise Untraceable("its forward uses a tensor that is no parameter and no buffer of it")
            if id(a) in self.shared:
                raise Untraceable(f"its forward uses {self.names[id(a)]}, which has another name too")
            return self.create_node("get_attr", self.names[id(a)], (), {})
        return super().create_arg(a)

    def to_bool(self, obj: Proxy) -> bool:
        raise Untraceable("its forward decides something that only a call tells")

    def iter(self, obj: Proxy) -> Iterator[Any]:
        raise Untraceable("its forward loops over something that only a call tells")

    keys = iter  # type: ignore[assignment]


def _of_linear(y: Value, x: Value, weight: Any) -> None:
    y.is_tensor, y.like = True, x.like
    if isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(weight, Proxy):
        y.last.size = weight.shape[0]
        x.last.size = weight.shape[1]


def _of_elementwise(y: Value, operands: Sequence[Any]) -> None:
    """The shape of its operands, where they agree and none is broadcast that a call could broadcast otherwise."""
    first = next((one for one in operands if isinstance(one, Proxy)), None)  # none where parameters alone are changed
    if type(first) is Value and all(_keeps(one, first) for one in operands):
        y.like, y.last = first.like, first.last


def _keeps(one: Any, first: Value) -> bool:
    if type(one) is Value:
        a, b = one.last, first.last
        return one.like is first.like and (a is b or (a.size is not None and a.size == b.size))
    if isinstance(one, Proxy):
        return False
    if isinstance(one, Tensor):
        return one.dim() == 0 or (one.dim() == 1 and one.shape[0] in (1, first.last.size))
    return True


def _named(module: nn.Module) -> tuple[dict[int, str], set[int]]:
    """Parameters and buffers by identity, and those that stand in several places."""
    names: dict[int, str] = {}
    shared: set[int] = set()
    for every in (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)):
        for name, tensor in every:
            if id(tensor) in names:
                shared.add(id(tensor))
            names[id(tensor)] = name
    return names, shared


def modes() -> tuple[Any, ...]:
    """Those of gradients and autocast: a forward may decide by them."""
    if not is_any_autocast_enabled():
        return _is_grad_enabled(), _is_inference_mode_enabled()
    devices = [one for one in ("cpu", "cuda", "xpu", "mps") if torch.is_autocast_enabled(one)]
    autocast = tuple((one, torch.get_autocast_dtype(one)) for one in devices)
    return _is_grad_enabled(), _is_inference_mode_enabled(), autocast


def ambient_state() -> tuple[Any, ...]:
    """What blocks around an operation may change of it."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda *_: None)
    return *modes(), top(False)


class OfParameters(TorchFunctionMode):
    """Records operations on parameters alone too, and those on nothing."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat = torch.utils._pytree.arg_tree_leaves(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__set__" or (name == "__get__" and _property(func) not in _ATTRIBUTES):
            raise Untraceable(f"its forward asks for, or changes, {_property(func)} of a tensor")
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


def _property(func: Any) -> str:
    return getattr(getattr(func, "__self__", None), "__name__", "")


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
    """What a forward is given in the place of an argument: itself, where it is a constant."""
    if is_constant(value):
        return value
    stand_in = recorder.create_proxy("placeholder", f"given_{len(recorder.graph.nodes)}", (), {})
    stand_in.is_tensor = isinstance(value, Tensor)
    stand_in.is_object = not stand_in.is_tensor
    return stand_in
