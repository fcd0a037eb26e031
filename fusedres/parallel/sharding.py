"""How DTensor may divide a layer's operators among the ranks of a mesh dimension, forward and backward.

    cut        x         weight, bias   y, residual, kept   dx        dweight, dbias   numbers' gradients
    whole      Replicate Replicate      Replicate           Replicate Replicate        Replicate
    rows d     Shard(d)  Replicate      Shard(d)            Shard(d)  Partial          Partial
    columns    Replicate Shard(0)       Shard(-1)           Partial   Shard(0)         Partial
    inner      Shard(-1) Shard(1)       Partial, not kept   Shard(-1) Shard(1)         Replicate

A layer that takes no other cut than the whole is gathered: DTensor redistributes its operands, and the answer is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import prod
from typing import Any, NamedTuple

import torch
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensorMode
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from ..kernels.spec import Gradients, LayerSpec, Operands, Wanted
from ..ops import N_OPERANDS

Specs = Any  # Operands, of DTensor's descriptions (placements, mesh, shape) in the places of tensors
Rule = tuple[list[Placement | None], list[Placement | None]]  # of outputs, of inputs

_Operands: Any = Operands  # of placements
_Gradients: Any = Gradients


class Cut(NamedTuple):
    """Placements of a layer's operands, of its output, and of its gradients, for one mesh dimension."""

    x: Placement
    weight: Placement  # [N, K]: of the projection too
    bias: Placement  # [N]: of the projection and of scales per channel too
    y: Placement  # [..., N]
    residual: Placement
    dx: Placement
    dweight: Placement
    dbias: Placement
    dnumber: Placement  # of learned scales []
    g: Placement  # of y's gradient, and of the residual's, which backward meets as the caller laid it out

    def operands(self, given: Specs, residual: Placement) -> list[Placement | None]:
        """One entry per operand, None for one that is not there."""
        scale = given.branch_scale
        placements: Any = _Operands(
            x=self.x,
            weight=self.weight,
            bias=self.bias,
            residual=residual,
            projection_weight=self.weight,
            projection_bias=self.bias,
            skip_scale=Replicate(),
            branch_scale=self.bias if scale is not None and scale.ndim else Replicate(),
            seed=Replicate(),
        )
        return [None if one is None else placement for one, placement in zip(given, placements, strict=True)]

    def gradients(self, given: Specs, wanted: Wanted) -> list[Placement | None]:
        """One entry per gradient; those that nobody asked for are empty, and everywhere alike."""
        scale = given.branch_scale
        placements: Any = _Gradients(
            x=self.dx,
            weight=self.dweight,
            bias=self.dbias,
            residual=self.g,
            projection_weight=self.dweight,
            projection_bias=self.dbias,
            skip_scale=self.dnumber,
            branch_scale=self.dbias if scale is not None and scale.ndim else self.dnumber,
        )
        return [one if is_wanted else Replicate() for one, is_wanted in zip(placements, wanted, strict=True)]


def _whole() -> Cut:
    return Cut(*[Replicate()] * len(Cut._fields))


def _rows(dim: int) -> Cut:
    row, all_, sum_ = Shard(dim), Replicate(), Partial()
    return Cut(
        x=row, weight=all_, bias=all_, y=row, residual=row, dx=row, dweight=sum_, dbias=sum_, dnumber=sum_, g=row
    )


def _columns(last: int) -> Cut:
    own, column, sum_ = Shard(0), Shard(last), Partial()
    return Cut(
        x=Replicate(), weight=own, bias=own, y=column, residual=column, dx=sum_, dweight=own, dbias=own, dnumber=sum_,
        g=column,
    )  # fmt: skip


def _inner(last: int) -> Cut:
    along, all_, sum_ = Shard(last), Replicate(), Partial()
    return Cut(
        x=along, weight=Shard(1), bias=sum_, y=sum_, residual=sum_, dx=along, dweight=Shard(1), dbias=all_,
        dnumber=all_, g=all_,
    )  # fmt: skip


def cuts(given: Specs, spec: LayerSpec) -> list[Cut]:
    """The ways in which a mesh dimension may divide this layer.

    Rows that are dropped are counted from the first of the batch (`philox.py`), and a gradient is recorded where it is
    whole, so that neither goes with rows divided, nor a record with any cut.
    """
    found = [_whole()]
    if spec.watch or not _TELLS_OPTIONS_APART:
        return found
    x, last = given.x, given.x.ndim - 1
    if spec.drop_path == 0:
        found += [_rows(dim) for dim in range(last) if _gives_each_one(x.shape[dim], x.mesh.shape)]
    # x itself as the skip is [..., K]: with columns divided its own ones would have to be picked, along K they meet all
    N, K = given.weight.shape
    if spec.skip in ("none", "residual", "projection") and _gives_each_one(N, x.mesh.shape):
        found.append(_columns(last))
    is_linear = spec.activation == "none" and given.branch_scale is None
    if is_linear and spec.skip in ("none", "residual") and _gives_each_one(K, x.mesh.shape):
        found.append(_inner(last))
    return found


def _gives_each_one(size: int, mesh: Sequence[int]) -> bool:
    """Whether no rank is left without any, whichever mesh dimensions divide: kernels are not called for nothing."""
    chosen = (some for n in range(1, len(mesh) + 1) for some in combinations(mesh, n))
    return all(_is_full(size, some) for some in chosen if prod(some) <= size) and size > 0


def _is_full(size: int, ranks: Sequence[int]) -> bool:
    """Whether chunks of chunks hold something each; all are of one size but for the last."""
    if not ranks:
        return size > 0
    share = -(-size // ranks[0])
    return all(_is_full(part, ranks[1:]) for part in (share, size - share * (ranks[0] - 1)))


def _unpacked(arguments: Sequence[Any]) -> tuple[Specs, LayerSpec, Any]:
    *flat, last = arguments
    return Operands(*flat[:N_OPERANDS]), LayerSpec(*flat[N_OPERANDS:]), last


def _forward(*arguments: Any) -> list[Rule]:
    given, spec, _ = _unpacked(arguments)
    others: list[Placement | None] = [None] * (len(arguments) - N_OPERANDS)
    _, *stored = _shapes(*arguments)
    rules = []
    for cut in cuts(given, spec):
        outputs: list[Placement | None] = [cut.y, *(cut.y if prod(shape) else Replicate() for shape in stored)]
        rules.append((outputs, cut.operands(given, cut.residual) + others))
    return rules


def _shapes(*arguments: Any) -> list[torch.Size]:
    """Of what the forward operator returns: y, and what it keeps, [0] where that is nothing."""

    def stand_in(one: Any) -> Any:
        if not hasattr(one, "tensor_meta"):
            return one
        return torch.empty(one.shape, dtype=one.tensor_meta.dtype, device=one.mesh.device_type)

    with detect_fake_mode() or FakeTensorMode():  # a compiler's, whose sizes may be symbols
        return [one.shape for one in _OPERATORS[0](*map(stand_in, arguments))]


def _backward(g: Any, kept: Any, s: Any, *arguments: Any) -> list[Rule]:
    given, spec, flags = _unpacked(arguments)
    wanted = Wanted(*flags)
    others: list[Placement | None] = [None] * (len(arguments) - N_OPERANDS)
    reads_residual = wanted.residual or spec.activates_sum or given.skip_scale is not None
    rules = []
    for cut in cuts(given, spec):
        stored: list[Placement | None] = [cut.y if prod(one.shape) else Replicate() for one in (kept, s)]
        if isinstance(cut.bias, Partial):  # which a sum without activation does not read again
            cut = cut._replace(bias=Replicate())
        operands = cut.operands(given, cut.g if reads_residual else Replicate())
        rules.append((cut.gradients(given, wanted), [cut.g, *stored, *operands, *others]))
    return rules


def _tells_options_apart(*operators: Any) -> bool:
    """Whether DTensor remembers its choice by a layer's options too, as told here; of numbers and names it would not.

    It remembers by tensors and by what follows the first integer, and an activation or a skip decides which cuts are
    right. torch has no public word for it.
    """
    try:
        known = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
        for operator in operators:
            names = [argument.name for argument in operator._schema.arguments]
            known[operator].static_argnum = names.index("activation")
    except (AttributeError, KeyError):
        return False
    return True


_OPERATORS = (torch.ops.fusedres.residual_linear.default, torch.ops.fusedres.residual_linear_backward.default)
for _operator, _rule in zip(_OPERATORS, (_forward, _backward), strict=True):
    register_sharding(_operator)(_rule)
_TELLS_OPTIONS_APART = _tells_options_apart(*_OPERATORS)
