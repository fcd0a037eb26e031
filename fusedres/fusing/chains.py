"""Layers of a graph that follow one another, each taking what the one before returns and nobody else does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch.fx import Graph, Node

from .patterns import Match, ShapeOf, arguments, is_linear, is_safe

Chain = list[Match]


def chains(
    graph: Graph,
    matches: list[Match],
    shape_of: ShapeOf,
    admits: Callable[[Match], bool],
    may_join: Callable[[Chain], bool],
) -> list[Chain]:
    """All matches, in order, those together that one network computes; a product that ends one is in it too.

    admits: of a product alone, whether it may be touched. may_join: whether the caller wants these in one.
    """
    place = {node: i for i, node in enumerate(graph.nodes)}
    inside = {node for match in matches for node in match.inside}
    of_input = {match.x: match for match in matches}
    found: list[Chain] = []
    taken: set[Node] = set()
    for match in matches:
        if match.end in taken:
            continue
        chain = [match]
        while True:
            end = chain[-1].end
            longer = of_input.get(end) or _product(end, inside, shape_of, admits)
            if longer is None or not _is_one([*chain, longer], place) or not may_join([*chain, longer]):
                break
            chain.append(longer)
        found.append(chain)
        taken |= {one.end for one in chain}
    return found


def _product(x: Node, inside: set[Node], shape_of: ShapeOf, admits: Callable[[Match], bool]) -> Match | None:
    """The linear layer of x that is in no match, as one without activation and skip."""
    linear = next(iter(x.users), None)
    if linear is None or not is_linear(linear) or linear in inside:
        return None
    of, weight, bias = arguments(linear)
    if of is not x or shape_of(weight) is None:
        return None
    match = Match(linear, x, weight, bias, linear, inside=frozenset({linear}))
    return match if admits(match) else None


def _is_one(chain: Chain, place: dict[Node, int]) -> bool:
    """Whether a network computes them: one φ but for the last layer's, no skip from elsewhere, no result in between."""
    *first, last = chain
    kinds = {(one.activation, one.order) for one in first}
    if len(kinds) > 1 or not (last.activation == "none" or (last.activation, last.order) in kinds):
        return False
    if any(one.residual is not None or one.skip == "concat" for one in chain):
        return False
    if not set(chain[-2].end.users) <= last.inside:
        return False
    return is_safe(replace(last, inside=last.inside | chain[-2].inside), place)  # with those before it was asked before
