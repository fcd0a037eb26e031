"""Residual layers in a captured graph, whoever captured it: Linear, activation, scale, addition, in any writing."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from .regions import activation_from, between, is_elementwise

Shape = tuple[int, ...]
ShapeOf = Callable[[Node], Shape | None]  # the shape of a parameter's node, or of any; None where it is not known

_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
_SUB = {operator.sub, operator.isub, torch.sub, "sub", "sub_"}
_MUL = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
_CAT = {torch.cat, torch.concat, torch.concatenate}
_IN_PLACE = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow,
    operator.imatmul, operator.iand, operator.ior, operator.ixor, operator.setitem, "__setitem__",
    F.batch_norm, F.instance_norm, torch.batch_norm, torch.instance_norm,
}  # fmt: skip
# where blocks begin and end, in which the same operations mean something else
_BLOCKS = ("_set_", "set_", "_enter_", "_exit_", "_vmap_", "_grad_", "_jvp_", "_make_dual")


@dataclass(frozen=True)
class Match:
    """y = λ s + a φ(x Wᵀ + b), or φ(λ s + a z): where its operands stand in the graph, and what it would replace.

    Scales are numbers, or nodes of tensors [], [1] or [N].
    """

    linear: Node
    x: Node
    weight: Node
    bias: Node | None
    end: Node  # y
    activation: str = "none"  # of kernels.spec.ACTIVATIONS
    order: str = "pre"
    skip: str = "none"  # none, identity, residual, projection, concat
    residual: Node | None = None
    projection_weight: Node | None = None
    projection_bias: Node | None = None
    skip_scale: float | Node = 1.0
    branch_scale: float | Node = 1.0
    inside: frozenset[Node] = frozenset()  # what computes y of its operands, end included

    @property
    def operands(self) -> list[Node]:
        """The tensors that it reads."""
        every = (
            self.x, self.weight, self.bias, self.residual, self.projection_weight, self.projection_bias,
            self.skip_scale, self.branch_scale,
        )  # fmt: skip
        return [one for one in every if isinstance(one, Node)]

    @property
    def formula(self) -> str:
        """As in `λ x + a gelu(x Wᵀ + b)`."""
        z = "x Wᵀ" if self.bias is None else "x Wᵀ + b"
        is_post = self.order == "post"
        branch = z if is_post or self.activation == "none" else f"{self.activation}({z})"
        if self.branch_scale != 1.0:
            a = "a" if isinstance(self.branch_scale, Node) else f"{self.branch_scale:g}"
            branch = f"{a} ({branch})" if branch == z else f"{a} {branch}"
        if self.skip == "none":
            return branch
        skip = "(x Pᵀ + p)" if self.skip == "projection" else "x" if self.residual is None else "s"
        if self.skip_scale != 1.0:
            skip = f"{'λ' if isinstance(self.skip_scale, Node) else f'{self.skip_scale:g}'} {skip}"
        if self.skip == "concat":
            return f"[{skip}, {branch}]"
        return f"{self.activation}({skip} + {branch})" if is_post else f"{skip} + {branch}"

    @property
    def saved(self) -> int:
        """How many passes over y [M, N] the forward spares: what it replaces reads and writes, less what it reads."""
        products = {F.linear}
        passes = sum(1 + len(_tensors(node)) for node in self.inside if node.target not in products)
        return passes - (self.skip not in ("none", "projection"))


def _tensors(node: Node) -> list[Node]:
    """The rows that a node reads: not its scales."""
    return [one for one in node.all_input_nodes if one.op != "get_attr"]


def is_linear(node: Node) -> bool:
    return node.op == "call_function" and node.target is F.linear


def find(graph: Graph, shape_of: ShapeOf, admits: Callable[[Match], bool]) -> list[Match]:
    """The layers of a graph, none overlapping another, in its order: of each the longest that the caller admits."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    linears = [node for node in graph.nodes if is_linear(node) and node.users]
    starts = {node: activation_from(node) for node in linears}
    found: list[Match] = []
    taken: set[Node] = set()
    # a branch with an activation first: of two products that are added, the other is its projection, or its residual
    for is_activated in (True, False):
        for node in linears:
            if node in taken or (starts[node][0] != "none") != is_activated:
                continue
            match = _match(node, starts[node], shape_of, lambda one: admits(one) and is_safe(one, place))
            if match is not None and not match.inside & taken:
                found.append(match)
                taken |= match.inside
    return sorted(found, key=lambda match: place[match.end])


def _match(
    linear: Node, start: tuple[str, float, Node], shape_of: ShapeOf, admits: Callable[[Match], bool]
) -> Match | None:
    """The longest layer that begins at this product, or None where it is no more than a product."""
    x, weight, bias = arguments(linear)
    shape = shape_of(weight)
    if not isinstance(x, Node) or shape is None or len(shape) != 2:
        return None
    activation, scale, end = start
    inside = frozenset({linear, *between(end, linear)})
    match = Match(linear, x, weight, bias, end, activation, branch_scale=scale, inside=inside)
    candidates = [match] if activation != "none" else []
    match = _scaled(match, shape[0], shape_of)
    if match.activation != "none" and match.branch_scale != scale:
        candidates.append(match)
    for step in (_summed, _concatenated):
        if (longer := step(match, shape, shape_of)) is not None:
            candidates += [longer, *_activated(longer)]
    return next(filter(admits, reversed(candidates)), None)


def arguments(linear: Node) -> tuple[Node, Node, Node | None]:
    """x, weight and bias of a product."""
    names = ("input", "weight", "bias")
    given: dict[str, Any] = dict(zip(names, linear.args, strict=False)) | dict(linear.kwargs)
    return given["input"], given["weight"], given.get("bias")


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _scaled(match: Match, N: int, shape_of: ShapeOf) -> Match:
    """With a learned scale, where one follows."""
    user = _only_user(match.end)
    if user is None or user.target not in _MUL or match.branch_scale != 1.0:
        return match
    scale = _other(user, match.end)
    if not isinstance(scale, Node) or scale in match.inside or shape_of(scale) not in ((), (1,), (N,)):
        return match
    return replace(match, branch_scale=scale, end=user, inside=match.inside | {user})


def _summed(match: Match, shape: Shape, shape_of: ShapeOf) -> Match | None:
    """With the addition that follows, and what is added."""
    user = _only_user(match.end)
    if user is None or user.target not in _ADD | _SUB or user.kwargs.get("alpha", 1) != 1 or len(user.args) != 2:
        return None
    skip = _other(user, match.end)
    if not isinstance(skip, Node) or skip in match.inside:
        return None
    if _is_in_place(user) and user.args[0] is skip and not _is_fresh(skip, user):
        return None
    is_minuend = user.args[0] is match.end
    branch_scale, sign = match.branch_scale, 1.0
    if user.target in _SUB:
        if not is_minuend and isinstance(branch_scale, Node):
            return None
        branch_scale, sign = (branch_scale, -1.0) if is_minuend else (-branch_scale, 1.0)  # type: ignore[operator]
    longer = replace(match, branch_scale=branch_scale, end=user, inside=match.inside | {user})
    return _with_skip(longer, skip, sign, user, shape, shape_of)


def _concatenated(match: Match, shape: Shape, shape_of: ShapeOf) -> Match | None:
    """With the concatenation [λ s, a φ(z)] along the features that follows."""
    user = _only_user(match.end)
    if user is None or user.target not in _CAT:
        return None
    tensors = user.args[0] if user.args else user.kwargs.get("tensors")
    dim = user.args[1] if len(user.args) > 1 else user.kwargs.get("dim", user.kwargs.get("axis", 0))
    if dim != -1 or not isinstance(tensors, list | tuple) or len(tensors) != 2 or tensors[1] is not match.end:
        return None
    longer = replace(match, end=user, inside=match.inside | {user})
    skip = tensors[0]
    if not isinstance(skip, Node) or skip in match.inside:
        return None
    longer = _with_skip(longer, skip, 1.0, user, shape, shape_of)
    return replace(longer, skip="concat")


def _with_skip(match: Match, skip: Node, sign: float, user: Node, shape: Shape, shape_of: ShapeOf) -> Match:
    scale: float | Node = sign
    if sign == 1.0 and _only_user(skip) is user and skip.target in _MUL and len(skip.args) == 2:
        for own, factor in (skip.args, skip.args[::-1]):
            is_number = isinstance(factor, int | float) and not isinstance(factor, bool)
            is_scalar = isinstance(factor, Node) and shape_of(factor) in ((), (1,))
            if isinstance(own, Node) and (is_number or is_scalar) and not _is_in_place(skip):
                match = replace(match, inside=match.inside | {skip})
                skip, scale = own, float(factor) if is_number else factor  # type: ignore[assignment,arg-type]
                break
    if skip is match.x:
        return replace(match, skip="identity", skip_scale=scale)
    if is_linear(skip) and len(skip.users) == 1 and user.target not in _CAT:
        x, weight, bias = arguments(skip)
        if x is match.x and shape_of(weight) == shape:
            return replace(
                match, skip="projection", skip_scale=scale, projection_weight=weight, projection_bias=bias,
                inside=match.inside | {skip},
            )  # fmt: skip
    return replace(match, skip="residual", skip_scale=scale, residual=skip)


def _activated(match: Match) -> Iterable[Match]:
    """With the activation of the sum, where one follows and the branch has none."""
    if match.activation != "none" or match.skip == "concat" or len(match.end.users) == 0:
        return
    activation, scale, end = activation_from(match.end)
    if activation != "none" and scale == 1.0:
        yield replace(
            match, activation=activation, order="post", end=end, inside=match.inside | set(between(end, match.end))
        )


def _other(user: Node, one: Node) -> object:
    """The second of two arguments."""
    if len(user.args) != 2:
        return None
    first, second = user.args
    return second if first is one else first


def _is_in_place(node: Node) -> bool:
    """Whether a node changes one of its arguments."""
    if node.kwargs.get("inplace") is True or "out" in node.kwargs or node.target in _IN_PLACE:
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_function", "call_method") and name.endswith("_") and not name.endswith("__")


def _is_fresh(node: Node, changed_by: Node) -> bool:
    """Whether a node's memory is its own, and is read no more once it is changed."""
    if node.op != "call_function" or not (is_linear(node) or is_elementwise(node)) or _is_in_place(node):
        return False
    return all(
        user is changed_by or (user < changed_by and (is_linear(user) or is_elementwise(user))) for user in node.users
    )


def is_safe(match: Match, place: dict[Node, int]) -> bool:
    """Whether everything may be computed where y is: nothing on the way there changes what it reads."""
    first = min(place[node] for node in match.inside)
    for node in islice(place, first, place[match.end]):
        if node in match.inside:
            continue
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        is_call = node.op == "call_module" and not node.meta.get("is_pure")  # of what may change anything
        if _is_in_place(node) or is_call or (node.op != "placeholder" and name.startswith(_BLOCKS)):
            return False
    return True
