"""Layers of DTensors, run by torchrun: each case against one process, on integers whose results are exact.

python -m torch.distributed.run --nproc-per-node 2 tests/sharded.py OUT      what failed, by case, as JSON
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module
from torchrun import run_cases

from fusedres import FusedResidualLinear, FusedResidualMLP, functional, reference
from fusedres.parallel import FusedColwiseParallel, FusedRowwiseParallel

WHOLE, SUM = Replicate(), Partial()


def integers(*shape: int, seed: int = 0, most: int = 2) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=draw).float()


# ---------------------------------------------------------------------------------------------- operators


@dataclass
class Case:
    """A layer, how its tensors lie, and how y and the gradients are to lie; exchanges: how many both ways take."""

    leading: tuple[int, ...]
    N: int
    K: int
    lie: dict[str, Placement]
    y: Placement
    gradients: dict[str, Placement]
    options: dict[str, Any] = field(default_factory=dict)
    tensors: tuple[str, ...] = ("bias",)
    exchanges: int = 0
    g: Placement | None = None  # how y's gradient lies, if not as y

    def made(self) -> dict[str, Tensor]:
        N, K = self.N, self.K
        shapes = {
            "x": (*self.leading, K),
            "weight": (N, K),
            "bias": (N,),
            "residual": (*self.leading, N),
            "projection_weight": (N, K),
            "projection_bias": (N,),
            "skip_scale": (),
            "branch_scale": (N,),
        }
        names = ("x", "weight", *self.tensors)
        return {name: integers(*shapes[name], seed=i) + (name == "skip_scale") for i, name in enumerate(names)}


ROWS = {"x": Shard(0), "residual": Shard(0)}
BY_ROWS = {"x": Shard(0), "weight": SUM, "bias": SUM, "residual": Shard(0), "projection_weight": SUM,
           "projection_bias": SUM, "skip_scale": SUM, "branch_scale": SUM}  # fmt: skip
COLUMNS = {"weight": Shard(0), "bias": Shard(0), "residual": Shard(1), "projection_weight": Shard(0),
           "projection_bias": Shard(0), "branch_scale": Shard(0)}  # fmt: skip
BY_COLUMNS = COLUMNS | {"x": SUM, "skip_scale": SUM}
INNER = {"x": Shard(1), "weight": Shard(1)}
ALL = dict.fromkeys(BY_ROWS, WHOLE)
LEARNED = ("bias", "skip_scale", "branch_scale")
PROJECTED = (*LEARNED, "projection_weight", "projection_bias")
RELU = {"activation": "relu"}

CASES = {
    "whole": Case((8,), 8, 8, {}, WHOLE, ALL),
    "whole-then-rows": Case((7, 3), 8, 8, {}, WHOLE, BY_ROWS, {"order": "post"}, LEARNED, g=Shard(0)),
    "rows-identity": Case((8,), 8, 8, ROWS, Shard(0), BY_ROWS),
    "rows-no-skip": Case((8,), 8, 8, ROWS, Shard(0), BY_ROWS, {"skip": None}),  # the same tensors as the one before
    "rows-of-three-dimensions": Case((4, 5), 8, 8, ROWS, Shard(0), BY_ROWS, {"order": "post"}, LEARNED),
    "rows-uneven": Case((11,), 8, 6, ROWS, Shard(0), BY_ROWS, {"skip": "projection"}, PROJECTED),
    "rows-uneven-of-three-dimensions": Case((7, 3), 8, 8, ROWS, Shard(0), BY_ROWS, {}, LEARNED),
    "rows-concat": Case((8,), 4, 8, ROWS, Shard(0), BY_ROWS, {"skip": "concat"}, LEARNED),
    "rows-residual": Case((8,), 4, 8, ROWS, Shard(0), BY_ROWS, {}, (*LEARNED, "residual")),
    "rows-recomputed": Case((8,), 8, 8, ROWS, Shard(0), BY_ROWS, {"recompute": True}, LEARNED),
    "sequence": Case(
        (3, 8), 8, 8, {"x": Shard(1), "residual": Shard(1)}, Shard(1),
        BY_ROWS | {"x": Shard(1), "residual": Shard(1)}, {}, (*LEARNED, "residual"),
    ),
    "rows-dropped-are-gathered": Case((8,), 8, 8, ROWS, WHOLE, ALL, {"drop_path": 0.5}, exchanges=1),
    "columns-no-skip": Case((8,), 8, 8, COLUMNS, Shard(1), BY_COLUMNS, {"skip": None}),
    "columns-identity-are-gathered": Case((8,), 8, 8, COLUMNS, WHOLE, ALL, exchanges=2),
    "columns-residual": Case((8,), 8, 4, COLUMNS, Shard(1), BY_COLUMNS, {}, (*LEARNED, "residual")),
    "columns-plain-residual": Case(
        (8,), 8, 4, COLUMNS, Shard(1), BY_COLUMNS, {"skip_scale": 2.0}, ("bias", "residual")
    ),
    "columns-whole-residual": Case(
        (8,), 8, 4, COLUMNS | {"residual": WHOLE}, Shard(1), BY_COLUMNS, {}, ("bias", "residual")
    ),
    "columns-passing-residual": Case((8,), 8, 4, COLUMNS, Shard(1), BY_COLUMNS, {}, ("bias", "residual")),
    "columns-after-the-sum": Case(
        (8,), 8, 4, COLUMNS, Shard(1), BY_COLUMNS, {"order": "post"}, (*LEARNED, "residual")
    ),
    "columns-dropped": Case(
        (8,), 8, 4, COLUMNS, Shard(1), BY_COLUMNS, {"drop_path": 0.5}, (*LEARNED, "residual")
    ),
    "columns-projection": Case((8,), 8, 6, COLUMNS, Shard(1), BY_COLUMNS, {"skip": "projection"}, PROJECTED),
    "columns-uneven": Case((8,), 7, 6, COLUMNS, Shard(1), BY_COLUMNS, {"skip": "projection"}, PROJECTED),
    "columns-of-three-dimensions": Case(
        (3, 5), 8, 4, COLUMNS | {"residual": Shard(2)}, Shard(2), BY_COLUMNS | {"residual": Shard(2)}, {},
        (*LEARNED, "residual"),
    ),
    "columns-concat-are-gathered": Case(
        (8,), 8, 6, COLUMNS, WHOLE, ALL, {"skip": "concat"}, LEARNED, exchanges=3
    ),
    "inner-residual": Case(
        (8,), 8, 16, INNER, SUM, ALL | INNER, {"activation": "none"}, ("bias", "residual", "skip_scale")
    ),
    "inner-activation-is-gathered": Case((8,), 4, 8, INNER, WHOLE, ALL, exchanges=2),
    "inner-identity-is-gathered": Case((8,), 8, 8, INNER, WHOLE, ALL, {"activation": "none"}, exchanges=2),
    "fewer-rows-than-ranks-are-whole": Case((1,), 8, 8, ROWS, WHOLE, ALL, exchanges=1),
}  # fmt: skip


def outcome(tensors: dict[str, Tensor], options: dict[str, Any], lie: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    torch.manual_seed(3)
    y = functional.residual_linear(**leaves, **options)
    y.backward(lie(y))
    return {"y": y.detach(), **{name: t.grad for name, t in leaves.items()}}


def operator(case: Case, mesh: DeviceMesh) -> None:
    tensors, options = case.made(), RELU | case.options
    g = integers(*case.leading, case.N + (case.K if options.get("skip") == "concat" else 0), seed=20)
    alone = outcome(tensors, options, lambda y: g)
    shared = {name: distribute_tensor(t, mesh, [case.lie.get(name, WHOLE)]) for name, t in tensors.items()}
    placed = distribute_tensor(g, mesh, [case.g or (WHOLE if case.y == SUM else case.y)])
    with CommDebugMode() as exchanges:
        found = outcome(shared, options, lambda y: placed)
    assert {"y": found["y"].placements} == {"y": (case.y,)}
    lie = {name: t.placements[0] for name, t in found.items() if name != "y"}
    assert lie == {name: case.gradients[name] for name in lie}
    count = exchanges.get_total_counts()
    assert (count > 0) == (case.exchanges > 0), f"{count} exchanges"
    for name, value in alone.items():
        assert torch.equal(found[name].full_tensor(), value), name


def options_are_told_apart(mesh: DeviceMesh) -> None:
    """DTensor remembers its choice: a layer without skip and one that adds x have the same tensors."""
    for first, then in (("columns-no-skip", "columns-identity-are-gathered"), ("rows-identity", "rows-no-skip")):
        for name in (first, then, first):
            operator(CASES[name], mesh)


def a_rank_without_rows_gathers(mesh: DeviceMesh) -> None:
    """Nine rows are three for each of three ranks, and none for the fourth, for which there is no kernel."""
    if mesh.size() == 4:
        operator(Case((9,), 8, 8, ROWS, WHOLE, ALL, exchanges=1), mesh)


def two_mesh_dimensions(mesh: DeviceMesh) -> None:
    """Rows by one, columns by the other."""
    if mesh.size() < 4:
        return
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    case = Case((8,), 8, 4, {}, WHOLE, {}, tensors=(*LEARNED, "residual"))
    tensors, g = case.made(), integers(8, 8, seed=20)
    alone = outcome(tensors, RELU, lambda y: g)
    lie = {"x": (Shard(0), WHOLE), "residual": (Shard(0), Shard(1)), "weight": (WHOLE, Shard(0))}
    lie |= {"bias": (WHOLE, Shard(0)), "branch_scale": (WHOLE, Shard(0)), "skip_scale": (WHOLE, WHOLE)}
    shared = {name: distribute_tensor(t, grid, lie[name]) for name, t in tensors.items()}
    placed = distribute_tensor(g, grid, (Shard(0), Shard(1)))
    found = outcome(shared, RELU, lambda y: placed)
    assert found["y"].placements == (Shard(0), Shard(1))
    assert found["weight"].placements == (SUM, Shard(0))
    for name, value in alone.items():
        assert torch.equal(found[name].full_tensor(), value), name


def a_layer_of_dtensors_needs_no_style(mesh: DeviceMesh) -> None:
    """In gelu, which rounds: rows of a batch as DTensors through a module whose parameters are."""
    torch.manual_seed(0)
    alone, shared = FusedResidualLinear(16), FusedResidualLinear(16)
    shared.load_state_dict(alone.state_dict())
    for name in ("weight", "bias"):
        whole = distribute_tensor(getattr(shared, name).detach(), mesh, [WHOLE])
        shared.register_parameter(name, nn.Parameter(whole))
    x = torch.randn(32, 16)
    y = shared(distribute_tensor(x, mesh, [Shard(0)]))
    assert torch.equal(y.full_tensor(), alone(x))  # a row's bits do not depend on how many others there are
    exact = reference.residual_linear(x.double(), alone.weight.double(), alone.bias.double())
    torch.testing.assert_close(y.full_tensor().double(), exact, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------- styles


class Block(nn.Module):
    """x + fc2(φ(fc1(x))), as it is written by hand."""

    def __init__(self, width: int, hidden: int, **options: Any) -> None:
        super().__init__()
        self.fc1 = FusedResidualLinear(width, hidden, activation="relu", skip=None)
        self.fc2 = FusedResidualLinear(hidden, width, activation="none", **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x), x)


@dataclass
class Styled:
    """A module, a plan, and which dimension of the inputs and of y is divided; None where each rank has all of it."""

    made: Callable[[], nn.Module]
    plan: Any
    residual: int = 0  # columns of a second input, 0 for none
    given: int | None = None
    comes: int | None = None
    forward: tuple[str, ...] = ()  # the exchanges of a call
    backward: tuple[str, ...] = ()


layer = partial(FusedResidualLinear, activation="relu")
GATHER, REDUCE, SCATTER = "all_gather_into_tensor", "all_reduce", "reduce_scatter_tensor"
CHANNELS = {"learn_skip_scale": True, "learn_branch_scale": "channel", "branch_scale": 2.0}
MLP = {"fc1": FusedColwiseParallel(), "fc2": FusedRowwiseParallel()}
SEQUENCE = {
    "fc1": FusedColwiseParallel(input_layouts=Shard(0)),
    "fc2": FusedRowwiseParallel(output_layouts=Shard(0)),
}

STYLED = {
    "columns-of-x": Styled(lambda: layer(8), FusedColwiseParallel(), comes=-1, backward=(REDUCE,)),
    "columns-of-x-by-name": Styled(
        lambda: layer(8, skip="identity", skip_scale=2.0, **CHANNELS), FusedColwiseParallel(), comes=-1,
        backward=(REDUCE,),
    ),
    "gathered": Styled(
        lambda: layer(8), FusedColwiseParallel(output_layouts=WHOLE), forward=(GATHER,), backward=(REDUCE,)
    ),
    "as-dtensor": Styled(lambda: layer(8), FusedColwiseParallel(use_local_output=False), backward=(REDUCE,)),
    "projection": Styled(
        lambda: layer(8, 12, skip="projection", **CHANNELS), FusedColwiseParallel(), comes=-1, backward=(REDUCE,)
    ),
    "no-bias": Styled(lambda: layer(8, bias=False), FusedColwiseParallel(), comes=-1, backward=(REDUCE,)),
    "residual": Styled(
        lambda: layer(8, 12), FusedColwiseParallel(), residual=12, comes=-1, backward=(GATHER, REDUCE)
    ),
    "own-residual": Styled(
        lambda: layer(8, 12), FusedColwiseParallel(input_layouts=Shard(-1), residual_layouts=Shard(-1)), residual=12,
        given=-1, comes=-1, forward=(GATHER,), backward=(SCATTER,),
    ),
    "dropped": Styled(lambda: layer(8, drop_path=0.5), FusedColwiseParallel(), comes=-1, backward=(REDUCE,)),
    "sequence": Styled(
        lambda: layer(8), FusedColwiseParallel(input_layouts=Shard(0)), given=0, comes=-1, forward=(GATHER,),
        backward=(SCATTER,),
    ),
    "block": Styled(lambda: Block(8, 16), MLP, forward=(REDUCE,), backward=(REDUCE,)),
    "block-scaled": Styled(
        lambda: Block(8, 16, branch_scale=0.5, skip_scale=2.0), MLP, forward=(REDUCE,), backward=(REDUCE,)
    ),
    "block-learned": Styled(lambda: Block(8, 8, **CHANNELS), MLP, forward=(REDUCE,), backward=(REDUCE,)),
    "mlp": Styled(lambda: FusedResidualMLP(8, 16, activation="relu"), MLP, forward=(REDUCE,), backward=(REDUCE,)),
    "mlp-learned": Styled(
        lambda: FusedResidualMLP(8, 16, activation="relu", learn_branch_scale="channel", learn_skip_scale=True), MLP,
        forward=(REDUCE,), backward=(REDUCE,),
    ),
    "block-dropped": Styled(lambda: Block(8, 8, drop_path=0.5), MLP, forward=(REDUCE,), backward=(REDUCE,)),
    "block-sequence": Styled(
        lambda: Block(8, 8, **CHANNELS), SEQUENCE, given=0, comes=0, forward=(GATHER, SCATTER),
        backward=(GATHER, SCATTER),
    ),
    "rows-of-whole-x": Styled(
        lambda: FusedResidualLinear(8, 12, activation="none"), FusedRowwiseParallel(input_layouts=WHOLE),
        forward=(REDUCE,), backward=(GATHER,),
    ),
}  # fmt: skip


def part(t: Tensor, dim: int | None, mesh: DeviceMesh) -> Tensor:
    return t if dim is None else t.chunk(mesh.size(), dim)[mesh.get_local_rank()]


def style(case: Styled, mesh: DeviceMesh) -> None:
    alone, shared = case.made(), case.made()
    for i, parameter in enumerate(alone.parameters()):
        parameter.data = integers(*parameter.shape, seed=i)
    shared.load_state_dict(alone.state_dict())
    shared = parallelize_module(shared, mesh, case.plan)
    inputs = [integers(4, 3, 8, seed=10)] + ([integers(4, 3, case.residual, seed=11)] if case.residual else [])
    whole = [t.clone().requires_grad_() for t in inputs]
    mine = [part(t, case.given, mesh).clone().requires_grad_() for t in inputs]
    torch.manual_seed(2)
    y = alone(*whole)
    g = integers(*y.shape, seed=12)
    y.backward(g)
    torch.manual_seed(2)
    with CommDebugMode() as forward:
        own = shared(*mine)
    own = own.full_tensor() if isinstance(own, DTensor) else own
    with CommDebugMode() as backward:
        own.backward(part(g, case.comes, mesh))
        grads = [t.grad + 0 for t in mine]  # waits
    assert torch.equal(own, part(y, case.comes, mesh)), "y"
    for i, (t, grad) in enumerate(zip(whole, grads, strict=True)):
        assert torch.equal(grad, part(t.grad, case.given, mesh)), f"input {i}"
    for (name, one), many in zip(alone.named_parameters(), shared.parameters(), strict=True):
        assert torch.equal(many.full_tensor(), one), name
        assert torch.equal(many.grad.full_tensor(), one.grad), f"d{name}"
    if mesh.size() > 1:
        counts = [
            tuple(sorted({str(name).split(".")[-1] for name in mode.get_comm_counts()})) for mode in (forward, backward)
        ]
        assert counts == [tuple(sorted(case.forward)), tuple(sorted(case.backward))], counts


def the_mlp_sums_once(mesh: DeviceMesh) -> None:
    """One exchange forward and one backward, of a [..., width] each."""
    block = parallelize_module(Block(8, 16), mesh, MLP)
    with CommDebugMode() as exchanges:
        block(integers(4, 8).requires_grad_()).sum().backward()
    assert exchanges.get_total_counts() == 2, exchanges.get_comm_counts()


def state_dicts_hold_whole_tensors(mesh: DeviceMesh) -> None:
    made = layer(8, 12, skip="projection", **CHANNELS)
    before = {name: t.clone() for name, t in made.state_dict().items()}
    after = parallelize_module(made, mesh, FusedColwiseParallel()).state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name].full_tensor(), t) for name, t in before.items())


def the_styles_refuse(mesh: DeviceMesh) -> None:
    """What they cannot do right, in words."""
    linear, columns, rows = partial(FusedResidualLinear, activation="none"), FusedColwiseParallel, FusedRowwiseParallel
    odd = 8 * mesh.size() + 1
    at_once = [
        (nn.Linear(8, 8), columns(), TypeError, "FusedColwiseParallel is for a FusedResidualLinear, got Linear"),
        (nn.Linear(8, 8), rows(), TypeError, "FusedRowwiseParallel is for a FusedResidualLinear, got Linear"),
        (linear(8, odd), columns(), ValueError, f"out_features must be a multiple of {mesh.size()}, .* got {odd}"),
        (linear(odd, 8), rows(), ValueError, f"in_features must be a multiple of {mesh.size()}, .* got {odd}"),
        (linear(8, 8, skip="concat"), columns(), ValueError, "got skip='concat'"),
        (linear(8, 8, skip="concat"), rows(), ValueError, "got skip='concat'"),
        (linear(8, 12, skip="projection"), rows(), ValueError, "got skip='projection'"),
        (FusedResidualLinear(8), rows(), ValueError, "activation='none', got 'gelu'"),
        (linear(8), rows(output_layouts=SUM), ValueError, "output_layouts must be Replicate.. or Shard .*, got P"),
        (linear(8, drop_path=0.5), rows(output_layouts=Shard(0)), ValueError, "drop_path=0.5 counts rows"),
    ]
    for module, plan, kind, words in at_once:
        before = {name: type(t) for name, t in module.named_parameters()}
        with pytest.raises(kind, match=words):
            parallelize_module(module, mesh, plan)
        assert {name: type(t) for name, t in module.named_parameters()} == before
    called = [
        (linear(8), rows(input_layouts=WHOLE), (integers(4, 8),), "the skip is x itself"),
        (
            linear(8, 4),
            rows(input_layouts=WHOLE, output_layouts=Shard(1)),
            (integers(4, 8),),
            "a leading dimension of y",
        ),
        (linear(8, skip=None), rows(input_layouts=WHOLE), (integers(4, 8),) * 2, "residual is itself the skip"),
    ]
    for module, plan, inputs, words in called:
        with pytest.raises(ValueError, match=words):
            parallelize_module(module, mesh, plan)(*inputs)


WHOLE_TESTS = {
    one.__name__: one
    for one in (
        options_are_told_apart,
        a_rank_without_rows_gathers,
        two_mesh_dimensions,
        a_layer_of_dtensors_needs_no_style,
        the_mlp_sums_once,
        state_dicts_hold_whole_tensors,
        the_styles_refuse,
    )
}
EVERY: dict[str, Callable[[DeviceMesh], None]] = {
    **{f"operator-{name}": partial(operator, case) for name, case in CASES.items()},
    **{f"style-{name}": partial(style, case) for name, case in STYLED.items()},
    **WHOLE_TESTS,
}


if __name__ == "__main__":
    run_cases(sys.argv[1], EVERY)
