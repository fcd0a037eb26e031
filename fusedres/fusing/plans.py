"""Rewritten forwards: made of what a module's own forward does on one kind of call, and kept by kind."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import nn
from torch.fx import Graph, Node, Proxy

from . import calls
from .chains import Chain
from .layers import layers_of, owner, shapes_of, why_not
from .networks import Layers, parts_of
from .rewriting import options, rewrite
from .stand_ins import modes
from .values import Untraceable, kind
from .watch import Watch

_RECORDING = threading.RLock()
_MOST = 32  # kinds of calls of one module, after which its author's forward runs those not met before
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
        self.trace, chains = layers_of(module, list(args), kwargs, shape_of, takes_childrens)
        self.matches = [match for chain in chains for match in chain]
        self.why_not = why_not(self.trace.graph, self.matches)
        self.layers = [
            Layer(owner(match.weight) or "", match.formula, (shape_of(match.weight) or (0,))[0], match.saved)
            for match in self.matches
        ]
        projections = [match.projection_weight for match in self.matches if match.projection_weight is not None]
        self.linears = {layer.name for layer in self.layers} | {owner(one) or "" for one in projections}
        self.networks: list[Layers] = []
        self.run: Callable[..., Any] | None = None  # (None, what is given, what stands)
        if self.matches:
            rewrite(self.trace.graph, chains, self._put)
            self.run, self.places = _function(self.trace.graph, module)

    def _put(self, chain: Chain) -> Node:
        """The call of one layer, or of those that follow one another."""
        graph, first = self.trace.graph, chain[0]
        names = [owner(match.weight) or "" for match in chain]
        if len(chain) > 1:
            parts, nodes = parts_of(chain, names)
            self.networks.append(Layers(parts))
            return graph.call_function(self.networks[-1], (first.x, *nodes))
        given = (
            first.x, first.weight, first.bias, first.residual, first.projection_weight, first.projection_bias,
            first.skip_scale, first.branch_scale,
        )  # fmt: skip
        return graph.call_function(calls.layer, (*given, options(first), names[0]))

    def standing(self) -> list[Any] | None:
        """The parameters and the called children, where they stand now; None where one stands there no more."""
        try:
            return [own[kind][name] for own, kind, name in self.places]
        except KeyError:
            return None


def _function(graph: Graph, module: nn.Module) -> tuple[Callable[..., Any], list[tuple[dict[str, Any], str, str]]]:
    """A graph as a function of what is given, and of parameters and called children; and where those stand."""
    *_, last = (graph._root, *(node for node in graph.nodes if node.op == "placeholder"))
    stands: dict[tuple[str, str], Node] = {}
    places: list[tuple[dict[str, Any], str, str]] = []

    def standing(path: str, kind: str) -> Node:
        nonlocal last
        if (kind, path) not in stands:
            parent, _, name = path.rpartition(".")
            holder = module.get_submodule(parent)
            kinds = ("_modules",) if kind == "call_module" else ("_parameters", "_buffers")
            places.append(next((vars(holder), one, name) for one in kinds if name in vars(holder)[one]))
            with graph.inserting_after(last):
                last = stands[kind, path] = graph.placeholder(f"standing_{len(stands)}")
        return stands[kind, path]

    for node in list(graph.nodes):
        if node.op not in ("get_attr", "call_module"):
            continue
        there = standing(str(node.target), node.op)
        if node.op == "call_module":
            with graph.inserting_before(node):
                result = graph.call_function(calls.child, (there, *node.args), node.kwargs)
            node.replace_all_uses_with(result)
        else:
            node.replace_all_uses_with(there)
        graph.erase_node(node)
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(code.src, scope)
    return scope["forward"], places


class Plans:
    """A fused module's rewritten forwards, by kind of call. A copy of the module begins with none."""

    def __init__(self, takes_childrens: bool = False) -> None:
        self.takes_childrens = takes_childrens
        self.module: weakref.ref[nn.Module] | None = None
        self.watch: Watch | None = None
        self.known: dict[Any, Plan | None] = {}
        self.held: list[tuple[Any, ...]] = []
        self.made = 0
        self.why_not: dict[str, str] = {}
        self.because = ""  # of the last one that could not be made

    def __reduce__(self) -> tuple[Any, ...]:
        return Plans, (self.takes_childrens,)

    def refuse(self, plan: Plan) -> None:
        """Run it no more: a call went otherwise than what was recorded."""
        self.known = {key: None if one is plan else one for key, one in self.known.items()}

    def let_go(self) -> None:
        """Before tensors may change places with others."""
        for plan in self.known.values():
            for layers in plan.networks if plan is not None else ():
                layers.let_go()

    def found(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan | None:
        """The rewritten forward for a call; None where the author's is to run."""
        if self.module is None and not getattr(module, "_is_replica", False):  # a copy's first call
            self.module = weakref.ref(module)
        if self.module is None or self.module() is not module:  # a replica, which holds other tensors
            return None
        if self.watch is not None:
            if not self.watch.is_left_alone():
                return None
            try:
                plan: Plan | None = self.known.get(self._kind_of(self.watch, args, kwargs), _UNMET)
            except (KeyError, TypeError):  # attributes taken away, or values that cannot be compared
                return None
            if plan is not _UNMET:
                return plan
        return self.make(module, args, kwargs)

    def make(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan | None:
        """A new one, for calls of this kind; None where their forward cannot be recorded or has nothing to fuse."""
        if self.made >= _MOST or not _RECORDING.acquire(blocking=False):  # one at a time, children being taken over
            return None
        try:
            self.made, self.because = self.made + 1, ""
            return self._made(module, args, kwargs)
        finally:
            _RECORDING.release()

    def _made(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan | None:
        plan = None
        try:
            if any(isinstance(one, Proxy) for one in (*args, *kwargs.values())):
                raise Untraceable("somebody else records it")
            plan = Plan(module, args, kwargs, self.takes_childrens)
            self.why_not |= plan.why_not
        except Untraceable as error:
            self.because = str(error)
        except Exception as error:  # whatever it is, the author's forward is there
            self.because = f"fusing failed: {type(error).__name__}: {error}"
        watch = self._watching(module, plan)
        plan = plan if plan is not None and plan.run is not None else None
        self.known[self._kind_of(watch, args, kwargs)] = plan
        self.held.append(watch.held())
        return plan

    def _watching(self, module: nn.Module, plan: Plan | None) -> Watch:
        """A watch over all that plans take for granted, this one too; what is known is known by its facts."""
        watch = self.watch
        there = dict(module.named_modules())
        before = {"": module} if watch is None else watch.inlined
        inlined = {path: there[path] for path in before if path in there}
        names = set() if watch is None else watch.names
        if plan is not None:
            inlined, names = inlined | plan.trace.inlined, names | plan.trace.names
        if watch is None or inlined != watch.inlined or names != watch.names:
            watch = self.watch = Watch(module, inlined, names)
            self.known, self.held = {}, []
        return watch

    @staticmethod
    def _kind_of(watch: Watch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        named = tuple([(name, kind(one)) for name, one in kwargs.items()]) if kwargs else ()
        return tuple(map(kind, args)), named, modes(), watch.facts()
