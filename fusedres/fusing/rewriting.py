"""A captured graph with the layers that were found in it as calls of the fused layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from .chains import Chain
from .patterns import Match


def without_idle_dropout(graph: Graph) -> None:
    """Dropout that drops nothing stands in nobody's way."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in (F.dropout, torch.dropout):
            names = ("input", "p", "training" if node.target is F.dropout else "train", "inplace")
            given = {"p": 0.5, "training": True} | dict(zip(names, node.args, strict=False)) | node.kwargs
            trains = given.get("train", given["training"])
            if (trains is False or given["p"] == 0) and isinstance(given["input"], Node):
                node.replace_all_uses_with(given["input"])
                graph.erase_node(node)


def rewrite(graph: Graph, chains: list[Chain], put: Callable[[Chain], Node]) -> None:
    """Every chain becomes the node that put(chain) makes where the last y is, of operands that stand in the graph."""
    made: dict[Node, Node] = {}
    for chain in chains:
        end = chain[-1].end
        with graph.inserting_before(end):
            y = put([_with(made, match) for match in chain])
            y.meta.update(end.meta)
        made[end] = y
        end.replace_all_uses_with(y)
        for match in reversed(chain):
            for node in sorted(match.inside, reverse=True):
                graph.erase_node(node)


def _with(made: dict[Node, Node], match: Match) -> Match:
    """The match with what others have become in the places of its operands."""
    fields = (
        "x", "weight", "bias", "residual", "projection_weight", "projection_bias", "skip_scale", "branch_scale",
    )  # fmt: skip
    there = {name: getattr(match, name) for name in fields}
    changed: dict[str, Any] = {name: made[one] for name, one in there.items() if one in made}
    return replace(match, **changed)


def options(match: Match) -> tuple[Any, ...]:
    """Those of `functional.layer`, in its order."""
    is_tanh = match.activation == "gelu_tanh"
    skip = "auto" if match.skip in ("residual", "projection") else None if match.skip == "none" else match.skip
    return (
        "gelu" if is_tanh else match.activation,
        "tanh" if is_tanh else "none",
        match.order,
        skip,
        0.0,
        False,
        False,
    )
