"""Which activation a stretch of a captured graph computes: found by its values, whatever it is written in."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from ..kernels.spec import ACTIVATIONS
from ..reference import MODULES

_MOST = 16  # operations in a row, far more than any φ is written in
_SAME = 1e-12  # of each value and slope, in float64
_CANCELS = {"gelu": 1e-13, "gelu_tanh": 1e-13}  # of those that a formula takes as a difference

# Number by number, without memory, chance or anything but its arguments.
_FUNCTIONS = {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.neg,
    operator.iadd, operator.isub, operator.imul, operator.itruediv,
    torch.add, torch.sub, torch.mul, torch.div, torch.pow, torch.square, torch.neg, torch.exp, torch.expm1, torch.log1p,
    torch.erf, torch.erfc, torch.tanh, torch.sigmoid, torch.special.expit, torch.sin, torch.cos, torch.relu,
    torch.relu_,
    F.gelu, F.relu, F.relu_, F.silu, F.tanh, F.sigmoid, F.softplus, F.logsigmoid,
}  # fmt: skip
_METHODS = {
    "add", "sub", "mul", "div", "pow", "square", "neg", "exp", "erf", "erfc", "tanh", "sigmoid", "sin", "cos", "relu",
    "add_", "sub_", "mul_", "div_", "tanh_", "sigmoid_", "sin_", "relu_", "neg_",
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
    with ThreadPoolExecutor(1) as thread:  # whose operations nobody looks at: no modes, no hooks, gradients as ever
        return thread.submit(_longest, z).result()


def _longest(z: Node) -> tuple[str, float, Node]:
    probe = _probe().clone().requires_grad_()
    values: dict[Node, Tensor] = {z: probe * 1}  # as a product is, not a leaf: it may be changed in place
    found = ("none", 1.0, z)
    for node in _following(z):
        if len(values) > _MOST or not node.all_input_nodes or not is_elementwise(node):
            continue
        if not all(one in values for one in node.all_input_nodes):
            continue
        try:
            values[node] = _computed(node, values)
            named = _named(values[node], probe)
        except Exception:  # whatever it is, no activation
            continue
        if not _is_left_by(node, z, values):
            continue
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
    """Near 0 and far from it, where formulas that look alike are not."""
    few = [10.0**p for p in (-30, -13, -6, -3, 1, 2, 4)] + [20.0]
    middle = torch.linspace(-7, 7, 57, dtype=torch.float64, device="cpu")
    return torch.cat([middle, torch.tensor([0.0, *few, *(-one for one in few)], dtype=torch.float64, device="cpu")])


def _slopes(values: Tensor, z: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(values.sum(), z, retain_graph=True)
    return found


@lru_cache(maxsize=16)
def _truth(name: str) -> tuple[Tensor, Tensor]:
    """φ and φ' of the probe."""
    z = _probe().clone().requires_grad_()
    phi = MODULES[name]()(z)
    return phi.detach(), _slopes(phi, z)


def _computed(node: Node, values: dict[Node, Tensor]) -> Tensor:
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda one: values[one])
    if node.op == "call_method":
        own, *rest = args
        method: Callable[..., Tensor] = getattr(own, str(node.target))
        return method(*rest, **kwargs)
    function: Callable[..., Tensor] = node.target  # type: ignore[assignment]
    return function(*args, **kwargs)


def _named(values: Tensor, z: Tensor) -> tuple[str, float] | None:
    """(φ, a) of values that are a φ(z), with the slopes a φ'(z), of the probe z."""
    if not isinstance(values, Tensor) or values.shape != z.shape or not bool(torch.isfinite(values).all()):
        return None
    for name in ACTIVATIONS:
        phi, slope = _truth(name)
        at = int(phi[:57].abs().argmax())
        scale = float(values[at].detach() / phi[at])
        is_same = scale != 0 and _agrees(values.detach(), scale * phi, name)
        if is_same and _agrees(_slopes(values, z), scale * slope, name):
            return name, _rounded(scale)
    return None


def _agrees(values: Tensor, truth: Tensor, name: str) -> bool:
    return bool(((values - truth).abs() <= _SAME * truth.abs() + _CANCELS.get(name, 0.0)).all())


def _rounded(scale: float) -> float:
    """The number that was written: a ratio of rounded numbers is next to it."""
    near = round(scale, 9)
    return near if math.isclose(near, scale, rel_tol=1e-13, abs_tol=0) else scale
