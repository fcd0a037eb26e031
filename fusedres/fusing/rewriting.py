"""A captured graph with the layers that were found in it as calls of the fused layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

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


def rewrite(graph: Graph, matches: list[Match], put: Callable[..., Node]) -> None:
    """Every match becomes the node that put(match, (x, weight, bias, residual, P, p), (λ, a)) makes where y is."""
    made: dict[Node, Node] = {}
    for match in matches:
        operands = (
            match.x, match.weight, match.bias, match.residual, match.projection_weight, match.projection_bias,
            match.skip_scale, match.branch_scale,
        )  # fmt: skip
        given: list[Any] = [made.get(one, one) if isinstance(one, Node) else one for one in operands]
        *tensors, skip_scale, branch_scale = given
        with graph.inserting_before(match.end):
            y = put(match, tuple(tensors), (skip_scale, branch_scale))
            y.meta.update(match.end.meta)
        made[match.end] = y
        match.end.replace_all_uses_with(y)
        for node in sorted(match.inside, reverse=True):
            graph.erase_node(node)


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
