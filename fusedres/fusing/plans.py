"""Rewritten forwards: made of what a module's own forward does on one kind of call, and kept by kind."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.fx import Graph, Node, Proxy

from . import calls
from .layers import layers_of, owner, shapes_of, why_not
from .patterns import Match
from .rewriting import options, rewrite
from .stand_ins import SCALARS, Untraceable
from .watch import Watch

_MOST = 16  # kinds of calls of one module, after which its author's forward runs those not met before
_UNMET: Any = object()


class Layer(NamedTuple):
    """A fused layer: its linear layer's path, what it computes, how wide, and the passes over its output spared."""

    name: str
    formula: str
    out_features: int
    passes: int


class Plan:
    """One rewritten forward, the layers in it, and the modules that it ran through."""

    def __init__(
        self, module: nn.Module, args: Iterable[Any], kwargs: dict[str, Any], takes_childrens: bool = False
    ) -> None:
        """Raises Untraceable. `matches` is empty where there is nothing to fuse; then it cannot be called.

        takes_childrens: fuse what is inside children even where the module itself has no part in it.
        """
        shape_of = shapes_of(module)
        self.trace, self.matches = layers_of(module, list(args), kwargs, shape_of, takes_childrens)
        self.why_not = why_not(self.trace.graph, self.matches)
        self.layers = [
            Layer(owner(match.weight) or "", match.formula, (shape_of(match.weight) or (0,))[0], match.saved)
            for match in self.matches
        ]
        projections = [match.projection_weight for match in self.matches if match.projection_weight is not None]
        self.linears = {layer.name for layer in self.layers} | {owner(one) or "" for one in projections}
        self.run: Callable[..., Any] | None = None  # (None, what is given, what stands)
        if self.matches:
            graph = self.trace.graph
            names = {match: layer.name for match, layer in zip(self.matches, self.layers, strict=True)}

            def put(match: Match, tensors: tuple[Any, ...], scales: tuple[Any, ...]) -> Node:
                return graph.call_function(calls.layer, (*tensors, *scales, options(match), names[match]))

            rewrite(graph, self.matches, shape_of, put)
            self.run, self.places = _function(graph, module)

    def standing(self) -> list[Any] | None:
        """The parameters and the called children, where they stand now; None where one stands there no more."""
        try:
            return [place[name] for place, name in self.places]
        except KeyError:
            return None


def _function(graph: Graph, module: nn.Module) -> tuple[Callable[..., Any], list[tuple[dict[str, Any], str]]]:
    """A graph as a function of what is given, and of parameters and called children; and where those stand."""
    *_, last = (node for node in graph.nodes if node.op == "placeholder")
    stands: dict[tuple[str, str], Node] = {}
    places: list[tuple[dict[str, Any], str]] = []

    def standing(path: str, kind: str) -> Node:
        nonlocal last
        if (kind, path) not in stands:
            parent, _, name = path.rpartition(".")
            holder = module.get_submodule(parent)
            kinds = ("_modules",) if kind == "call_module" else ("_parameters", "_buffers")
            places.append(next((vars(holder)[one], name) for one in kinds if name in vars(holder)[one]))
            with graph.inserting_after(last):
                last = stands[kind, path] = graph.placeholder(f"standing_{len(stands)}")
        return stands[kind, path]

    for node in list(graph.nodes):
        if node.op not in ("get_attr", "call_module"):
            continue
        there = standing(str(node.target), node.op)
        if node.op == "call_module":
            with graph.inserting_before(node):
                result = graph.call_method("__call__", (there, *node.args), node.kwargs)
            node.replace_all_uses_with(result)
        else:
            node.replace_all_uses_with(there)
        graph.erase_node(node)
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(code.src, scope)
    return scope["forward"], places


def kind(value: Any) -> Any:
    """What a forward may decide by: of a number or a switch all of it, of tensors and objects that they are there."""
    if isinstance(value, Tensor):
        return Tensor
    return (type(value), value) if type(value) in SCALARS else type(value)


class Plans:
    """A fused module's rewritten forwards, by kind of call. A copy of the module begins with none."""

    def __init__(self) -> None:
        self.module: weakref.ref[nn.Module] | None = None
        self.watch: Watch | None = None
        self.known: dict[Any, Plan | None] = {}
        self.made = 0
        self.takes_childrens = False
        self.why_not: dict[str, str] = {}
        self.because = ""  # of the last one that could not be made

    def __reduce__(self) -> tuple[Any, ...]:
        return _fresh, (self.takes_childrens,)

    def found(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan | None:
        """The rewritten forward for a call; None where the author's is to run."""
        if self.module is None:
            self.module = weakref.ref(module)
        if self.module() is not module:  # a replica, which holds other tensors
            return None
        watch = self.watch
        if watch is not None and not watch.is_whole():
            self.watch, self.known = None, {}
            watch = None
        if watch is not None:
            if not watch.is_left_alone():
                return None
            plan: Plan | None = self.known.get(self._kind_of(watch, args, kwargs), _UNMET)
            if plan is not _UNMET:
                return plan
        return self.make(module, args, kwargs)

    def make(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan | None:
        """A new one, for calls of this kind; None where their forward cannot be recorded or has nothing to fuse."""
        if self.made >= _MOST:
            return None
        self.made, self.because = self.made + 1, ""
        plan: Plan | None
        try:
            if any(isinstance(one, Proxy) for one in (*args, *kwargs.values())):
                raise Untraceable("somebody else records it")
            plan = Plan(module, args, kwargs, self.takes_childrens)
            self.why_not |= plan.why_not
        except Untraceable as error:
            plan, self.because = None, str(error)
        else:
            inlined = {} if self.watch is None else self.watch.inlined
            if self.watch is None or not plan.trace.inlined.keys() <= inlined.keys():
                self.watch, self.known = Watch(module, inlined | plan.trace.inlined), {}
            plan = plan if plan.run is not None else None
        if self.watch is None:  # nothing is known that could change
            self.watch = Watch(module, {"": module})
        self.known[self._kind_of(self.watch, args, kwargs)] = plan
        return plan

    @staticmethod
    def _kind_of(watch: Watch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        named = tuple([(name, kind(one)) for name, one in kwargs.items()]) if kwargs else ()
        return tuple([kind(one) for one in args]), named, watch.options()


def _fresh(takes_childrens: bool) -> Plans:
    plans = Plans()
    plans.takes_childrens = takes_childrens
    return plans
