"""The layers that one module puts together, in the graph of what its forward does."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, Node
from torch.nn.parameter import is_lazy

from . import patterns
from .chains import Chain, chains
from .linears import why_left
from .rewriting import without_idle_dropout
from .tracing import Trace, trace
from .values import Untraceable

NOTHING_FOLLOWS = "no activation and no addition follows it that a fused layer has"


def layers_of(
    module: nn.Module, args: list[Any], kwargs: dict[str, Any], shape_of: patterns.ShapeOf, takes_childrens: bool
) -> tuple[Trace, list[Chain]]:
    """The trace and its layers, some of which the module puts together itself; none where its children have all."""
    is_allowed = partial(_is_allowed, module=module)

    def found(only: set[str] | None = None) -> tuple[Trace, list[Chain]]:
        traced = trace(module, args, kwargs, only)
        without_idle_dropout(traced.graph)
        matches = patterns.find(traced.graph, shape_of, is_allowed)
        return traced, chains(traced.graph, matches, shape_of, is_allowed, _stands)

    whole, every = found()
    if not every or not (takes_childrens or any(_is_own(_children(chain, whole)) for chain in every)):
        return whole, []
    needed = {child for chain in every for child in _children(chain, whole)} - {""}
    try:
        return found(needed)
    except Untraceable:  # a child that takes no part is asked for its result's shape
        return whole, every


def why_not(graph: Graph, matches: list[patterns.Match]) -> dict[str, str]:
    """Why linear layers of a graph are in none of its layers, by path."""
    inside = {node for match in matches for node in match.inside}
    found: dict[str, str] = {}
    for node in graph.nodes:
        if patterns.is_linear(node) and node not in inside and (name := owner(patterns.arguments(node)[1])) is not None:
            drops = [user for user in node.users if user.target is F.dropout]
            found[name] = (
                "dropout stands between it and what follows"
                if drops
                else "its result is used more than once"
                if len(node.users) > 1
                else NOTHING_FOLLOWS
            )
    return found


def _is_own(children: set[str]) -> bool:
    """Whether no child has all of some layers inside it."""
    return len(children) > 1 or children == {""}


def _children(chain: Chain, whole: Trace) -> set[str]:
    """The paths of the children, outermost, that have a part in these layers; "" for the module's own forward."""
    paths = {node.meta["path"] for match in chain for node in match.inside}
    return {next((one for one in upwards(path) if one in whole.inlined), "") for path in paths}


def _stands(chain: Chain) -> bool:
    """Whether every tensor of these layers is a parameter or a buffer, the same at every call."""
    return all(one.op == "get_attr" for match in chain for one in match.operands if one is not match.x)


def upwards(path: str) -> list[str]:
    """A path and those it goes through."""
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


def owner(weight: Node) -> str | None:
    """The path of the module whose parameter this is, as it is or transposed."""
    while weight.op == "call_method" and weight.all_input_nodes:
        weight = weight.all_input_nodes[0]
    return str(weight.target).rpartition(".")[0] if weight.op == "get_attr" else None


def _is_allowed(match: patterns.Match, module: nn.Module) -> bool:
    """Whether the linear layers in it may be touched. A parameter of another module's is its author's to multiply."""
    for weight in (match.weight, match.projection_weight):
        name = None if weight is None else owner(weight)
        if weight is not None and name is None:
            return False
        part = module.get_submodule(name) if name else None
        if isinstance(part, nn.Linear) and why_left(part) is not None:
            return False
    return True


def shapes_of(module: nn.Module) -> patterns.ShapeOf:
    """The shapes of a module's parameters and buffers, as they are and transposed."""
    shapes = {
        name: tuple(tensor.shape)
        for kind in (module.named_parameters, module.named_buffers)
        for name, tensor in kind()
        if not is_lazy(tensor)
    }

    def shape_of(node: Node) -> patterns.Shape | None:
        if node.op == "call_method" and node.target == "t" and isinstance(node.args[0], Node):
            inner = shape_of(node.args[0])
            return None if inner is None else inner[::-1]
        return shapes.get(str(node.target)) if node.op == "get_attr" else None

    return shape_of
