"""The whole network as one PyTorch operator on the CPU, with its fake and its gradients; the only caller of its launch.

Two ways in: a plain autograd.Function in eager mode, one node for all layers; and fusedres::residual_network where
compiling, exporting or under a dispatch mode. Transforms of torch.func go layer by layer (`network.py`).
Double backward differentiates the reference, as a layer's does (`ops.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dispatch, philox, reference
from .kernels.cpu import launch, plan
from .kernels.spec import NetworkSpec
from .launch import way_index
from .ops import needs_operator

_ARGUMENTS = "Tensor x, Tensor[] parameters, Tensor? seeds, int[] codes, float[] numbers"
_LIBRARY = torch.library.Library("fusedres", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_LIBRARY.define(f"residual_network({_ARGUMENTS}) -> Tensor", tags=_TAGS)
_LIBRARY.define(f"residual_network_backward(Tensor g, {_ARGUMENTS}, bool[] wanted) -> Tensor[]", tags=_TAGS)
_LIBRARY.define("draw_seeds(int[] layers, int depth) -> Tensor", tags=(*_TAGS, torch.Tag.nondeterministic_seeded))


class Call(NamedTuple):
    """One call of a network: all but its tensors."""

    spec: NetworkSpec
    seeds: Tensor | None  # int64 [layers], without which no row drops
    way: int
    keeps: bool


# ---------------------------------------------------------------------------------------------- calling


def residual_network(x: Tensor, parameters: Sequence[Tensor], call: Call) -> Tensor:
    """y of a network whose tensors are checked and on the CPU, where nobody else is to see the call."""
    return _Network.apply(call, x, *parameters)


def residual_network_operator(
    x: Tensor, parameters: Sequence[Tensor], seeds: Tensor | None, codes: Sequence[int], numbers: Sequence[float]
) -> Tensor:
    """The same as an operator, which finds its way as it runs and keeps nothing; `plan.encoded` makes the codes."""
    return torch.ops.fusedres.residual_network(x, parameters, seeds, codes, numbers)


def draw_seeds(layers: Sequence[int], depth: int) -> Tensor:
    """`philox.draw_seeds`, as an operator where a compiler is to see it."""
    is_traced = torch.compiler.is_compiling()
    return torch.ops.fusedres.draw_seeds(layers, depth) if is_traced else philox.draw_seeds(layers, depth)


# ---------------------------------------------------------------------------------------------- gradients


class _Network(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, *parameters: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[1:]
        keep = call.keeps and True in wanted
        y, kept = launch.network_forward(call.spec, parameters, x, call.seeds, call.way, wanted, keep)
        ctx.save_for_backward(x, kept if keep else None, *parameters)
        ctx.call = call
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        x, kept, *parameters = ctx.saved_tensors
        call, wanted = ctx.call, ctx.needs_input_grad[1:]
        if torch.is_grad_enabled() or dispatch.transforms_are_active():
            return (None, *_Gradients.apply(call, wanted, kept, g, x, *parameters))
        return (None, *_gradients(call, wanted, kept, g, x, parameters))


def _gradients(
    call: Call, wanted: Sequence[bool], kept: Tensor | None, g: Tensor, x: Tensor, parameters: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """One entry for x and for each parameter, None where it is not wanted."""
    found: Sequence[Tensor]
    if dispatch.is_legacy_batch(g):  # a batch of gradients (is_grads_batched=True) has no kernel: the formula does it
        found = reference.network_gradients(g, x, parameters, call.spec, call.seeds, wanted)
    elif needs_operator((g, x)):
        codes, numbers = plan.encoded(call.spec)
        found = torch.ops.fusedres.residual_network_backward(g, x, parameters, call.seeds, codes, numbers, list(wanted))
    else:
        found = launch.network_backward(g, call.spec, parameters, x, call.seeds, kept, call.way, wanted)
    return _spread(found, wanted)


def _spread(values: Sequence[Any], wanted: Sequence[bool]) -> Sequence[Any]:
    """One entry per wish: the next value where it is one, else None."""
    if len(values) == len(wanted):
        return values
    rest = iter(values)
    return [next(rest) if is_wanted else None for is_wanted in wanted]


class _Gradients(torch.autograd.Function):
    """The backward as a differentiable function of g, x and the parameters; what was kept only spares it work."""

    @staticmethod
    def forward(
        call: Call, wanted: Sequence[bool], kept: Tensor | None, g: Tensor, x: Tensor, *parameters: Tensor
    ) -> tuple:
        return tuple(_gradients(call, wanted, kept, g, x, parameters))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.call, ctx.wanted, _, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *gg: Tensor | None) -> tuple:
        given = [t for t, is_wanted in zip(gg, ctx.wanted, strict=True) if is_wanted]
        found = _double_backward(given, ctx.saved_tensors, ctx.call.spec, ctx.call.seeds, ctx.wanted)
        return (None, None, None, *found)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, call: Call, wanted: Sequence[bool], kept: Any, *tensors: Any) -> tuple:
        def gradients(g: Tensor, x: Tensor, *parameters: Tensor) -> tuple:
            return reference.network_gradients(g, x, parameters, call.spec, call.seeds, wanted)

        # a batch of gradients, or of weights, has no kernel: the formula does it
        some = torch.vmap(gradients, in_dims[3:], randomness=info.randomness)(*tensors)
        return tuple(_spread(some, wanted)), tuple(_spread((0,) * len(some), wanted))


def _double_backward(
    gg: Sequence[Tensor], tensors: Sequence[Tensor], spec: NetworkSpec, seeds: Tensor | None, wanted: Sequence[bool]
) -> Sequence[Tensor]:
    """Gradients with respect to (g, x, *parameters) of the backward, given those of its outputs."""

    def gradients(g: Tensor, x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        return reference.network_gradients(g, x, parameters, spec, seeds, wanted)

    _, pull = reference.vjp(gradients, *tensors)
    return pull(tuple(gg))


# ---------------------------------------------------------------------------------------------- operators


def _call(x: Tensor, seeds: Tensor | None, codes: Sequence[int], numbers: Sequence[float]) -> Call:
    spec = plan.decoded(tuple(codes), tuple(numbers))
    way = dispatch.cpu_way(dispatch.rows(x, spec.widths[0], False), spec.widths, x.dtype)
    return Call(spec, seeds, way_index(way), keeps=False)


@torch.library.impl(_LIBRARY, "residual_network", "CPU")
def _residual_network(
    x: Tensor, parameters: Sequence[Tensor], seeds: Tensor | None, codes: Sequence[int], numbers: Sequence[float]
) -> Tensor:
    call = _call(x, seeds, codes, numbers)
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], call.spec.widths[-1])
    wanted = [False] * (1 + len(parameters))
    return launch.network_forward(call.spec, parameters, x, seeds, call.way, wanted, False)[0]


@torch.library.register_fake("fusedres::residual_network", lib=_LIBRARY)
def _residual_network_fake(
    x: Tensor, parameters: Sequence[Tensor], seeds: Tensor | None, codes: Sequence[int], numbers: Sequence[float]
) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes[-plan.CODES])


@torch.library.impl(_LIBRARY, "residual_network_backward", "CPU")
def _residual_network_backward(
    g: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor],
    seeds: Tensor | None,
    codes: Sequence[int],
    numbers: Sequence[float],
    wanted: Sequence[bool],
) -> list[Tensor]:
    call = _call(x, seeds, codes, numbers)
    if x.numel() == 0:
        return [torch.zeros_like(t) for t, is_wanted in zip((x, *parameters), wanted, strict=True) if is_wanted]
    return launch.network_backward(g, call.spec, parameters, x, seeds, None, call.way, wanted)


@torch.library.register_fake("fusedres::residual_network_backward", lib=_LIBRARY)
def _residual_network_backward_fake(
    g: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor],
    seeds: Tensor | None,
    codes: Sequence[int],
    numbers: Sequence[float],
    wanted: Sequence[bool],
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, is_wanted in zip((x, *parameters), wanted, strict=True) if is_wanted]


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, parameters, seeds, ctx.codes, ctx.numbers = inputs
    ctx.save_for_backward(x, seeds, *parameters)


def _operator_backward(ctx: Any, g: Tensor) -> tuple:
    x, seeds, *parameters = ctx.saved_tensors
    wants_x, wants_parameters, *_ = ctx.needs_input_grad
    wanted = [wants_x, *wants_parameters]
    found = torch.ops.fusedres.residual_network_backward(g, x, parameters, seeds, ctx.codes, ctx.numbers, wanted)
    dx, *dparameters = _spread(found, wanted)
    return dx, dparameters, None, None, None


def _setup_backward_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    g, x, parameters, seeds, ctx.codes, ctx.numbers, ctx.wanted = inputs
    ctx.save_for_backward(seeds, g, x, *parameters)


def _operator_double_backward(ctx: Any, gg: Sequence[Tensor]) -> tuple:
    seeds, *tensors = ctx.saved_tensors
    spec = plan.decoded(tuple(ctx.codes), tuple(ctx.numbers))
    dg, dx, *dparameters = _double_backward(gg, tensors, spec, seeds, ctx.wanted)
    return dg, dx, dparameters, None, None, None, None


torch.library.register_autograd(
    "fusedres::residual_network", _operator_backward, setup_context=_setup_context, lib=_LIBRARY
)
torch.library.register_autograd(
    "fusedres::residual_network_backward",
    _operator_double_backward,
    setup_context=_setup_backward_context,
    lib=_LIBRARY,
)
torch.library.impl(_LIBRARY, "draw_seeds", "CompositeExplicitAutograd")(philox.draw_seeds)


@torch.library.register_fake("fusedres::draw_seeds", lib=_LIBRARY)
def _draw_seeds_fake(layers: Sequence[int], depth: int) -> Tensor:
    return torch.empty(depth, dtype=torch.int64, device="cpu")
