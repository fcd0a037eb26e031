"""Which activation a stretch of a captured graph computes: found by its values, whatever it is written in."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from ..kernels.spec import ACTIVATIONS
from ..reference import MODULES

_MOST = 16  # operations in a row, far more than any φ is written in
_SAME = 1e-12  # of the largest value, in float64

# Number by number, without memory, chance or anything but its arguments.
_FUNCTIONS = {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.neg,
    operator.iadd, operator.isub, operator.imul, operator.itruediv,
    torch.add, torch.sub, torch.mul, torch.div, torch.pow, torch.square, torch.neg, torch.exp, torch.expm1, torch.log1p,
    torch.erf, torch.erfc, torch.tanh, torch.sigmoid, torch.special.expit, torch.sin, torch.cos, torch.relu,
    torch.relu_, torch.clamp, torch.clamp_min, torch.maximum,
    F.gelu, F.relu, F.relu_, F.silu, F.tanh, F.sigmoid, F.softplus, F.logsigmoid,
}  # fmt: skip
_METHODS = {
    "add", "sub", "mul", "div", "pow", "square", "neg", "exp", "erf", "erfc", "tanh", "sigmoid", "sin", "cos", "relu",
    "clamp", "clamp_min", "add_", "sub_", "mul_", "div_", "tanh_", "sigmoid_", "sin_", "relu_", "neg_", "clamp_",
}  # fmt: skip


def is_elementwise(node: Node) -> bool:
    """Whether a node computes number by number of its arguments, and nothing else."""
    if node.op == "call_function":
        return node.target in _FUNCTIONS
    return node.op == "call_method" and node.target in _METHODS


def activation_from(z: Node) -> tuple[str, float, Node]:
    """(φ, a, the node that is a φ(z)): the longest stretch from z that computes one of the layer's activations.

    ("none", 1.0, z) where nothing of the kind follows.
    """
    values: dict[Node, Tensor] = {z: _probe().clone()}
    found = ("none", 1.0, z)
    for node in _following(z):
        if len(values) > _MOST or not node.all_input_nodes or not is_elementwise(node):
            continue
        if not all(one in values for one in node.all_input_nodes):
            continue
        try:
            values[node] = _computed(node, values)
        except Exception:  # whatever it is, no activation
            continue
        if not _is_left_by(node, z, values):
            continue
        named = _named(values[node])
        if named is not None:
            found = (*named, node)
    return found


def _following(z: Node) -> list[Node]:
    """The nodes after z, as far as a stretch from it may go."""
    nodes: list[Node] = []
    node = z.next
    while node.op != "root" and len(nodes) < 4 * _MOST:
        nodes.append(node)
        node = node.next
    return nodes


def between(end: Node, z: Node) -> list[Node]:
    """The nodes on the way from z to end, of which end is computed, without z: in no order."""
    seen: set[Node] = set()
    waiting = [end]
    while waiting:
        node = waiting.pop()
        if node is z or node in seen:
            continue
        seen.add(node)
        waiting += node.all_input_nodes
    return list(seen)


def _is_left_by(end: Node, z: Node, values: dict[Node, Tensor]) -> bool:
    """Whether nobody but end uses what lies between z and it."""
    inside = {*between(end, z), z}
    return all(user in inside for node in inside - {end} for user in node.users)


@lru_cache(maxsize=1)
def _probe() -> Tensor:
    return torch.linspace(-7, 7, 57, dtype=torch.float64, device="cpu")


def _computed(node: Node, values: dict[Node, Tensor]) -> Tensor:
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda one: values[one].clone())
    with torch.no_grad(), torch.utils._python_dispatch._disable_current_modes():
        if node.op == "call_method":
            own, *rest = args
            method: Callable[..., Tensor] = getattr(own, str(node.target))
            return method(*rest, **kwargs)
        function: Callable[..., Tensor] = node.target  # type: ignore[assignment]
        return function(*args, **kwargs)


def _named(values: Tensor) -> tuple[str, float] | None:
    """(φ, a) of values that are a φ(probe)."""
    if not isinstance(values, Tensor) or values.shape != _probe().shape or not bool(torch.isfinite(values).all()):
        return None
    for name in ACTIVATIONS:
        phi = MODULES[name]()(_probe().clone())
        at = int(phi.abs().argmax())
        scale = float(values[at] / phi[at])
        is_same = bool(((values - scale * phi).abs() <= _SAME * values.abs().max()).all())
        if scale != 0 and is_same:
            return name, _rounded(scale)
    return None


def _rounded(scale: float) -> float:
    """The number that was written: a ratio of rounded numbers is next to it."""
    near = round(scale, 9)
    return near if math.isclose(near, scale, rel_tol=1e-13, abs_tol=0) else scale
