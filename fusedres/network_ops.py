"""The whole network as PyTorch operators on the CPU, with fakes and gradients, for whoever is to see a call of it.

In eager mode a call is the engine's own (`kernels/cpu/node.h`), and comes here where its backward is differentiated
again, batched, or looked at. Double backward differentiates the reference, as a layer's does (`ops.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import dispatch, philox, recording, reference, run_launch
from .kernels.cpu import launch, plan
from .kernels.spec import NetworkSpec
from .launch import way_index

_ARGUMENTS = "Tensor x, Tensor[] parameters, Tensor? seeds, int[] codes, float[] numbers, int watch"
_LIBRARY = torch.library.Library("fusedres", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_LIBRARY.define(f"residual_network({_ARGUMENTS}) -> Tensor", tags=_TAGS)
_LIBRARY.define(f"residual_network_backward(Tensor g, {_ARGUMENTS}, bool[] wanted) -> Tensor[]", tags=_TAGS)
_LIBRARY.define(f"differentiable_backward(Tensor g, {_ARGUMENTS}, bool[] wanted, int network) -> Tensor[]")
_LIBRARY.define("draw_seeds(int[] layers, int depth) -> Tensor", tags=(*_TAGS, torch.Tag.nondeterministic_seeded))


# ---------------------------------------------------------------------------------------------- calling


def residual_network(
    x: Tensor,
    parameters: Sequence[Tensor],
    seeds: Tensor | None,
    codes: Sequence[int],
    numbers: Sequence[float],
    watch: int = 0,
) -> Tensor:
    """y by an operator that finds its way as it runs and keeps nothing; `plan.encoded` makes the codes."""
    return torch.ops.fusedres.residual_network(x, parameters, seeds, codes, numbers, watch)


def draw_seeds(layers: Sequence[int], depth: int) -> Tensor:
    """`philox.draw_seeds`, as an operator where a compiler is to see it."""
    is_traced = torch.compiler.is_compiling()
    return torch.ops.fusedres.draw_seeds(layers, depth) if is_traced else philox.draw_seeds(layers, depth)


# ---------------------------------------------------------------------------------------------- gradients


def _spread(values: Sequence[Any], wanted: Sequence[bool]) -> Sequence[Any]:
    """One entry per wish: the next value where it is one, else None."""
    rest = iter(values)
    return [next(rest) if is_wanted else None for is_wanted in wanted]


def _double_backward(
    gg: Sequence[Tensor], tensors: Sequence[Tensor], spec: NetworkSpec, seeds: Tensor | None, wanted: Sequence[bool]
) -> Sequence[Tensor]:
    """Gradients with respect to (g, x, *parameters) of the backward, given those of its outputs."""

    def gradients(g: Tensor, x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        return reference.network_gradients(g, x, parameters, spec, seeds, wanted)

    _, pull = reference.vjp(gradients, *tensors)
    return pull(tuple(gg))


# By the handle of the engine: the networks whose gradients have been differentiated again. Such a network does better
# by the formula from its forward on, wherever x requires a gradient.
differentiated_again: set[int] = set()
bound: set[int] = set()  # the networks that there are

# PyTorch's tanh and relu differentiate out of their results, which is less work than ours would be.
SMOOTH = ("gelu", "gelu_tanh", "silu", "sin")
_SMOOTH: reference.Activations = {
    **reference.ACTIVATIONS,
    **{name: partial(launch.activate, activation=name) for name in SMOOTH},
}


def differentiable(
    x: Tensor, parameters: Sequence[Tensor], spec: NetworkSpec, seeds: Tensor | None, watch: int = 0
) -> Tensor:
    """y by PyTorch's products and sums, with the engine's activations in float32; in others PyTorch's are quicker."""
    activations = _SMOOTH if x.dtype == torch.float32 else reference.ACTIVATIONS
    return reference.network(x, parameters, spec, seeds, activations, watch)


@torch.library.impl(_LIBRARY, "differentiable_backward", "CompositeImplicitAutograd")
def _differentiable_backward(
    g: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor],
    seeds: Tensor | None,
    codes: Sequence[int],
    numbers: Sequence[float],
    watch: int,
    wanted: Sequence[bool],
    network: int,
) -> list[Tensor]:
    """The engine's node's backward, where that is to be differentiated."""
    if network in bound:
        differentiated_again.add(network)
    spec = plan.decoded(tuple(codes), tuple(numbers))
    if watch:
        recording.spoil(watch, len(spec.layers))

    def formula(x: Tensor, *parameters: Tensor) -> Tensor:
        return differentiable(x, parameters, spec, seeds)

    return reference.differentiable_gradients(formula, (x, *parameters), g, wanted)


# ---------------------------------------------------------------------------------------------- operators


def _found(x: Tensor, codes: Sequence[int], numbers: Sequence[float]) -> tuple[NetworkSpec, int]:
    """The network, and the way to call it with x."""
    spec = plan.decoded(tuple(codes), tuple(numbers))
    return spec, way_index(dispatch.cpu_way(dispatch.rows(x, spec.widths[0], False), spec.widths, x.dtype))


def _goes_by_run(x: Tensor, spec: NetworkSpec) -> bool:
    """What was traced on a GPU is runs; what comes from a CPU, or is called by hand, may be any network."""
    return x.numel() > 0 and spec.is_run and run_launch.tiles(x, spec) is not None


@torch.library.impl(_LIBRARY, "residual_network", "CUDA")
@torch.library.impl(_LIBRARY, "residual_network", "CPU")
def _residual_network(
    x: Tensor,
    parameters: Sequence[Tensor],
    seeds: Tensor | None,
    codes: Sequence[int],
    numbers: Sequence[float],
    watch: int,
) -> Tensor:
    if isinstance(dispatch.backend(x.device, x.dtype), dispatch.Triton):
        spec = plan.decoded(tuple(codes), tuple(numbers))
        if not _goes_by_run(x, spec):
            return reference.network(x, parameters, spec, seeds)
        return run_launch.forward(spec, parameters, x, seeds, None)[0]
    spec, way = _found(x, codes, numbers)
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], spec.widths[-1])
    return launch.network_forward(spec, parameters, x, seeds, way)


@torch.library.register_fake("fusedres::residual_network", lib=_LIBRARY)
def _residual_network_fake(
    x: Tensor,
    parameters: Sequence[Tensor],
    seeds: Tensor | None,
    codes: Sequence[int],
    numbers: Sequence[float],
    watch: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes[-plan.CODES])


@torch.library.impl(_LIBRARY, "residual_network_backward", "CUDA")
@torch.library.impl(_LIBRARY, "residual_network_backward", "CPU")
def _residual_network_backward(
    g: Tensor,
    x: Tensor,
    parameters: Sequence[Tensor],
    seeds: Tensor | None,
    codes: Sequence[int],
    numbers: Sequence[float],
    watch: int,
    wanted: Sequence[bool],
) -> list[Tensor]:
    watched = recording.of(watch) if watch else None
    if isinstance(dispatch.backend(x.device, x.dtype), dispatch.Triton):
        spec = plan.decoded(tuple(codes), tuple(numbers))
        if not _goes_by_run(x, spec):
            return list(reference.network_gradients(g, x, parameters, spec, seeds, wanted))
        _, kept = run_launch.forward(spec, parameters, x, seeds, 1)
        gradients = run_launch.backward(g, spec, parameters, x, kept, seeds, 1, wanted, watched)
        return [gradient for gradient in gradients if gradient is not None]
    spec, way = _found(x, codes, numbers)
    if x.numel() == 0:
        return [torch.zeros_like(t) for t, is_wanted in zip((x, *parameters), wanted, strict=True) if is_wanted]
    return launch.network_backward(g, spec, parameters, x, seeds, way, wanted, watched)


@torch.library.impl(_LIBRARY, "residual_network_backward", "Batched")
def _residual_network_backward_batched(*arguments: Any) -> list[Tensor]:
    """A batch of gradients (is_grads_batched=True) has no kernel: the formula does it."""
    g, x, parameters, seeds, codes, numbers, _, wanted = arguments
    spec = plan.decoded(tuple(codes), tuple(numbers))
    return list(reference.network_gradients(g, x, parameters, spec, seeds, wanted))


@torch.library.register_vmap("fusedres::residual_network_backward", lib=_LIBRARY)
def _residual_network_backward_vmap(info: Any, in_dims: tuple, *arguments: Any) -> tuple[list[Tensor], list[int]]:
    """One call after the other: the formula under torch.func's own transforms would be one too many for it."""

    def at(i: int, value: Any, dim: Any) -> Any:
        if isinstance(value, Tensor):
            return value if dim is None else value.select(dim, i)
        is_batched = isinstance(dim, list | tuple)
        return [at(i, v, d) for v, d in zip(value, dim, strict=True)] if is_batched else value

    def call(i: int) -> list[Tensor]:
        given = (at(i, value, dim) for value, dim in zip(arguments, in_dims, strict=True))
        return torch.ops.fusedres.residual_network_backward(*given)

    found = [torch.stack(each) for each in zip(*map(call, range(info.batch_size)), strict=True)]
    return found, [0] * len(found)


@torch.library.register_fake("fusedres::residual_network_backward", lib=_LIBRARY)
def _residual_network_backward_fake(g: Tensor, x: Tensor, parameters: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    *_, wanted = rest
    return [t.new_empty(t.shape) for t, is_wanted in zip((x, *parameters), wanted, strict=True) if is_wanted]


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, parameters, seeds, ctx.codes, ctx.numbers, ctx.watch = inputs
    ctx.save_for_backward(x, seeds, *parameters)


def _operator_backward(ctx: Any, g: Tensor) -> tuple:
    x, seeds, *parameters = ctx.saved_tensors
    wants_x, wants_parameters, *_ = ctx.needs_input_grad
    wanted = [wants_x, *wants_parameters]
    watch = ctx.watch
    if watch and torch.is_grad_enabled():
        recording.spoil(watch, len(plan.decoded(tuple(ctx.codes), tuple(ctx.numbers)).layers))
        watch = 0
    given = (g, x, parameters, seeds, ctx.codes, ctx.numbers, watch, wanted)
    found = torch.ops.fusedres.residual_network_backward(*given)
    dx, *dparameters = _spread(found, wanted)
    return dx, dparameters, None, None, None, None


def _setup_backward_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    g, x, parameters, seeds, ctx.codes, ctx.numbers, _, ctx.wanted = inputs
    ctx.save_for_backward(seeds, g, x, *parameters)


def _operator_double_backward(ctx: Any, gg: Sequence[Tensor]) -> tuple:
    seeds, *tensors = ctx.saved_tensors
    spec = plan.decoded(tuple(ctx.codes), tuple(ctx.numbers))
    dg, dx, *dparameters = _double_backward(gg, tensors, spec, seeds, ctx.wanted)
    return dg, dx, dparameters, None, None, None, None, None


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
