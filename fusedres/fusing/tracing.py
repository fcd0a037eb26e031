"""What one module's forward computes, as a graph: run once on stand-ins that record what is done to them.

Children that take part are run through, the others are recorded as calls. Nothing outside the module is touched: its
children hand their calls over while it is traced, in this thread alone. What a recording cannot show raises.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import Graph, Node, Proxy

from .linears import hooked, is_linear_like, linear_of, why_left
from .stand_ins import OfParameters, Recorder, Value, stand_in
from .undone import Undone
from .values import Untraceable, is_constant

# whose outputs are tensors shaped as their input, and which change nothing that they are given
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_PASSING = (nn.Dropout, nn.Identity)  # often nothing, and in the way


@dataclass
class Trace:
    """The graph of a module's forward on these arguments, and the modules it ran through, by path; "" is the module."""

    graph: Graph
    inlined: dict[str, nn.Module]
    called: dict[str, str] = field(default_factory=dict)  # path of a child that is called as it is: why
    names: set[str] = field(default_factory=set)  # all that the code which was run names


def trace(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], only: set[str] | None = None) -> Trace:
    """The graph of `type(module).forward` on these arguments, of which tensors and objects stand for any.

    only: the paths of the children that may be run through, with all that is in them; all that can be where not given.

    Raises:
        Untraceable: why this forward has no such graph.
    """
    graph = Graph()
    recorder = Recorder(graph, module)
    scrutiny = recorder.scrutiny
    found = Trace(graph, {"": module})
    given = [stand_in(recorder, one) for one in args]
    named = {name: stand_in(recorder, one) for name, one in kwargs.items()}
    with Undone(module) as undone, _handed_over(module, found, recorder, only), OfParameters(recorder):
        try:
            with scrutiny.installed():
                result = forward_of(module)(module, *given, **named)
            own = {id(one): name for part in module.modules() for name, one in vars(part).items()}
            _refuse_other_results(result, own)
            recorder.create_node("output", "output", (recorder.create_arg(result),), {})
        except Exception as error:
            raise Untraceable(
                f"its forward cannot be run on stand-ins: {type(error).__name__}: {_short(error)}"
            ) from error
    undone.check()
    scrutiny.check()
    found.names = scrutiny.names
    found.inlined |= scrutiny.run
    return found


def _refuse_other_results(result: Any, own: dict[int, str]) -> None:
    """A graph returns new tuples, lists and dicts; what somebody made of one, or keeps, is another thing."""
    if type(result) in (list, dict) and id(result) in own:
        raise Untraceable(f"its forward returns {own[id(result)]} itself")
    if type(result) in (tuple, list, dict):
        for one in result.values() if type(result) is dict else result:
            _refuse_other_results(one, own)
    elif not (isinstance(result, Proxy) or is_constant(result)):
        raise Untraceable(f"its forward returns a {type(result).__name__}")


def _short(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:160]


def forward_of(module: nn.Module) -> Callable[..., Any]:
    """The forward of a module as its author wrote it."""
    return getattr(type(module), "fused_from", type(module)).forward


@contextmanager
def _handed_over(module: nn.Module, found: Trace, recorder: Recorder, only: set[str] | None) -> Iterator[None]:
    """The children's calls, in this thread, come here instead."""
    paths = {part: name for name, part in module.named_modules()}
    places = Counter(part for _, part in module.named_modules(remove_duplicate=False))
    reasons = {part: _why_called(part) for part in paths}
    here = threading.get_ident()

    def takes_part(part: nn.Module, path: str) -> bool:
        if only is None or isinstance(part, _PASSING):
            return True
        return any(f"{path}.".startswith(f"{one}.") for one in only)

    def taken_over(part: nn.Module) -> Callable[..., Any]:
        path = paths[part]

        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != here:
                return (compiled[part] or part._call_impl)(*args, **kwargs)
            if places[part] > 1:
                raise Untraceable(f"its forward calls {path}, which has another name too")
            reason = reasons[part] if takes_part(part, path) else "it takes no part"
            if reason is None:
                return _run_through(part, path, args, kwargs, found, recorder)
            return _as_a_call(part, path, args, kwargs, found, recorder, reason)

        return call

    compiled = {part: part.__dict__.get("_compiled_call_impl") for part in paths if part is not module}
    try:
        for part in compiled:
            part.__dict__["_compiled_call_impl"] = taken_over(part)
        yield
    finally:
        for part, own in compiled.items():
            part.__dict__["_compiled_call_impl"] = own
            if own is None:
                del part.__dict__["_compiled_call_impl"]


def _why_called(part: nn.Module) -> str | None:
    """Why a child is to be called as it is; None where it may be run through."""
    if reason := hooked(part):
        return reason
    if isinstance(part, _NORMS):
        return "a norm"
    return why_left(part) if is_linear_like(part) or hasattr(part, "lora_A") else None


def _run_through(part: nn.Module, path: str, args: Any, kwargs: Any, found: Trace, recorder: Recorder) -> Any:
    """The child's own forward on the stand-ins; as a call, with nothing recorded of it, where that fails."""
    last = next(iter(reversed(recorder.graph.nodes)), None)
    inlined, called = dict(found.inlined), dict(found.called)
    found.inlined[path] = part
    recorder.path.append(path)
    try:
        as_linear = linear_of(part)
        if as_linear is not None and len(args) == 1 and not kwargs:
            return as_linear(args[0])
        return forward_of(part)(part, *args, **kwargs)
    except (Exception, Untraceable) as error:
        reason = str(error) if isinstance(error, Untraceable) else f"{type(error).__name__}: {_short(error)}"
        _forget_after(recorder.graph, last)
        found.inlined, found.called = inlined, called
        recorder.scrutiny.install()
    finally:
        recorder.path.pop()
    return _as_a_call(part, path, args, kwargs, found, recorder, reason)


def _forget_after(graph: Graph, last: Node | None) -> None:
    for node in reversed(list(graph.nodes)):
        if node is last:
            break
        graph.erase_node(node)


def _has_container(value: Any) -> bool:
    return isinstance(value, list | dict | set) or (isinstance(value, tuple) and any(map(_has_container, value)))


def _as_a_call(
    part: nn.Module, path: str, args: Any, kwargs: Any, found: Trace, recorder: Recorder, reason: str
) -> Value:
    if any(map(_has_container, (*args, *kwargs.values()))):
        raise Untraceable(f"its forward gives {path} a list or a dict, which that may change")
    found.called[path] = reason
    y = recorder.create_proxy("call_module", path, args, kwargs)
    if isinstance(part, _NORMS) and args and type(args[0]) is Value:
        y.is_tensor, y.like, y.last = True, args[0].like, args[0].last
        y.node.meta["is_pure"] = True
    return y
