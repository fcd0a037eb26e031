"""Launchers of the CPU engine: one layer, as a network of one, and whole networks. No checks.

`layer` and `run` make a node in autograd's graph where something requires a gradient, the others none.

    x [..., K]   residual [..., N]   y, g [..., N]      kept: bytes that forward leaves for backward; empty for nothing

Skips that meet the branch in no sum are PyTorch's: λ s put before the branch by concatenation, and the gradient of a
residual whose value backward does not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..record import Recording
from ..spec import ACTIVATIONS, Gradients, LayerSpec, NetworkSpec, Operands, Terms, View, Wanted, WantedTerms
from .plan import layer_plan, plan


class _Engine:
    """The engine's operators, each looked up once."""

    def __getattr__(self, name: str) -> Any:
        operator = getattr(torch.ops.fusedres_cpu, name).default
        call = getattr(operator, "_op", operator)  # private, and 0.2 µs quicker than the Python around it
        setattr(self, name, call)
        return call


_engine = _Engine()


def capabilities() -> int:
    """Bit 0: torch's brgemm multiplies float32 here; bit 1: bfloat16."""
    return _engine.capabilities()


# ---------------------------------------------------------------------------------------------- one layer


def forward(operands: Operands, spec: LayerSpec, way: int, keep: bool) -> tuple[Tensor, Tensor]:
    """y and kept: what backward will read for those operands that require a gradient."""
    if spec.skip == "concat":
        branch, kept = forward(*_without_skip(operands, spec), way, keep)
        return torch.cat([_scaled(_skip_of(operands), operands, spec), branch], -1), kept
    x, residual, seed = operands.x, operands.residual, operands.seed
    parameters, layer = _bound(operands, spec)
    wanted = [t is not None and t.requires_grad for t in (x, residual, *parameters)] if keep else ()
    seeds = None if seed is None else seed.view(1)
    return _engine.forward(layer, parameters, x, residual, seeds, way, wanted, keep)


def layer(
    planned: Tensor,
    way: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    keep: bool,
    seed: Tensor | None,
    more: Sequence[Tensor],
) -> Tensor:
    """y of a layer that is planned, with its node in autograd's graph where something requires a gradient.

    more: projection_weight, projection_bias, skip_scale and branch_scale, as far as there are any.
    """
    if keep and seed is None and not more:
        return _engine.layer(planned, way, x, weight, bias, residual)  # each argument costs its conversion
    return _engine.layer(planned, way, x, weight, bias, residual, keep, None if seed is None else seed.view(1), more)


def backward(
    g: Tensor,
    operands: Operands,
    kept: Tensor | None,
    spec: LayerSpec,
    wanted: Wanted,
    way: int,
    recording: Recording | None = None,
) -> Gradients:
    if spec.skip == "concat":
        return _backward_of_concat(g, operands, kept, spec, wanted, way, recording)
    is_read = operands.skip_scale is not None or spec.activates_sum
    if spec.skip == "residual" and not is_read:
        alone, without = _without_skip(operands, spec)
        gradients = backward(g, alone, kept, without, wanted._replace(residual=False), way, recording)
        return gradients._replace(residual=_scaled(g, operands, spec)) if wanted.residual else gradients

    parameters, layer = _bound(operands, spec)
    seeds = None if operands.seed is None else operands.seed.view(1)
    if kept is None:
        kept = g.new_empty(0)
    order = (0, 3, 1, 2, 4, 5, 6, 7)  # of operands, as the engine has them: x, residual, parameters
    wishes = [wanted[i] for i in order if operands[i] is not None or i == 3]
    given = (layer, parameters, operands.x, operands.residual, seeds, kept, g, way, wishes)
    if recording is None or not wanted.x:
        found = iter(_engine.backward(*given))
    else:
        *gradients, rows = _engine.backward(*given, float(recording.unscale))
        recording.note(rows.unsqueeze(0))
        found = iter(gradients)
    spread: list[Tensor | None] = [None] * len(order)
    for i in order:
        if wanted[i]:
            spread[i] = next(found)
    return Gradients(*spread)


def _bound(operands: Operands, spec: LayerSpec) -> tuple[list[Tensor], Tensor]:
    """The parameters that there are, in the order of `Slots`, and the plan of a network of this one layer."""
    _, weight, bias, _, projection_weight, projection_bias, skip_scale, branch_scale, _ = operands
    N, K = weight.shape
    if projection_weight is skip_scale is branch_scale is None:
        parameters = [weight] if bias is None else [weight, bias]
        has: tuple[bool, ...] = _WEIGHT if bias is None else _WEIGHT_AND_BIAS
    else:
        every = (weight, bias, projection_weight, projection_bias, skip_scale, branch_scale)
        parameters = [t for t in every if t is not None]
        has = tuple([t is not None for t in every])
    return parameters, layer_plan(spec, N, K, has)


_WEIGHT = (True, False, False, False, False, False)
_WEIGHT_AND_BIAS = (True, True, False, False, False, False)


def _without_skip(operands: Operands, spec: LayerSpec) -> tuple[Operands, LayerSpec]:
    return operands._replace(residual=None, skip_scale=None), spec._replace(skip="none", skip_scale=1.0)


def _skip_of(operands: Operands) -> Tensor:
    return operands.x if operands.residual is None else operands.residual


def _scaled(value: Tensor, operands: Operands, spec: LayerSpec) -> Tensor:
    """λ times value, a skip or its gradient."""
    if operands.skip_scale is not None:
        return value * operands.skip_scale
    return value if spec.skip_scale == 1.0 else value * spec.skip_scale


def _backward_of_concat(
    g: Tensor,
    operands: Operands,
    kept: Tensor | None,
    spec: LayerSpec,
    wanted: Wanted,
    way: int,
    recording: Recording | None,
) -> Gradients:
    skip = _skip_of(operands)
    g_skip, g_branch = g[..., : skip.shape[-1]], g[..., skip.shape[-1] :]
    alone, without = _without_skip(operands, spec)
    of_branch = wanted._replace(residual=False, skip_scale=False)
    takes_x = operands.residual is None
    gradients = backward(g_branch, alone, kept, without, of_branch, way, None if takes_x else recording)
    if wanted.skip_scale:
        wide = torch.promote_types(g.dtype, torch.float32)
        total = (g_skip.to(wide) * skip).sum(dtype=wide)
        gradients = gradients._replace(skip_scale=total.to(operands.skip_scale.dtype))
    if operands.residual is not None and wanted.residual:
        gradients = gradients._replace(residual=_scaled(g_skip, operands, spec))
    elif takes_x and wanted.x:
        branch = gradients.x
        gradients = gradients._replace(x=branch + _scaled(g_skip, operands, spec))
        if recording is not None:
            recording.note(statistics([gradients.x], [branch], float(recording.unscale)).unsqueeze(0))
    return gradients


# ---------------------------------------------------------------------------------------------- a network


def bind(spec: NetworkSpec, parameters: Sequence[Tensor]) -> int:
    """A handle for `run`, to be given back to `unbind`: until then the engine holds the tensors themselves."""
    return _engine.bind(plan(spec), parameters)


def unbind(handle: int) -> None:
    _engine.unbind(handle)


def run(handle: int, x: Tensor, way: int, seeds: Tensor | None, keep: bool, watch: int = 0) -> Tensor:
    """y of a bound network, with its node in autograd's graph where something requires a gradient.

    Without seeds no row drops; keep: whether backward finds activations, which are kept for a node alone; watch: the
    number by which gradients are recorded.
    """
    if watch:
        return _engine.run(handle, x, way, seeds, keep, watch)
    if seeds is None and keep:
        return _engine.run(handle, x, way)  # each argument costs its conversion
    return _engine.run(handle, x, way, seeds, keep)


def activate(z: Tensor, activation: str) -> Tensor:
    """φ(z) of float32 or float64 numbers, differentiable without end, each derivative in one pass."""
    return _engine.activate(z, ACTIVATIONS.index(activation))


def network_forward(
    spec: NetworkSpec, parameters: Sequence[Tensor], x: Tensor, seeds: Tensor | None, way: int
) -> Tensor:
    """y, nothing kept."""
    return _engine.forward(plan(spec), parameters, x, None, seeds, way, (), False)[0]


def network_backward(
    g: Tensor,
    spec: NetworkSpec,
    parameters: Sequence[Tensor],
    x: Tensor,
    seeds: Tensor | None,
    way: int,
    wanted: Sequence[bool],
    recording: Recording | None = None,
) -> list[Tensor]:
    """The gradients of those wanted among x and the parameters, in their order; activations are computed again."""
    wishes = (wanted[0], False, *wanted[1:])
    given = (plan(spec), parameters, x, None, seeds, g.new_empty(0), g, way, wishes)
    if recording is None:
        return _engine.backward(*given)
    *gradients, rows = _engine.backward(*given, float(recording.unscale))
    recording.note(rows.unsqueeze(0))
    return gradients


def statistics(totals: Sequence[Tensor], branches: Sequence[Tensor], unscale: float) -> Tensor:
    """A row (`kernels/record.py`) for each gradient, and the half of it that came through a branch, if any."""
    return _engine.statistics(totals, branches, unscale)


# ---------------------------------------------------------------------------------------------- a sum of two terms


def residual_forward(terms: Terms, spec: LayerSpec, view: View) -> Tensor:
    """y = a drop(branch) + λ x, laid as both terms are."""
    branch, x, branch_scale, skip_scale, seed = terms
    return _engine.residual(branch, x, branch_scale, skip_scale, *_numbers(spec, seed), view)


def residual_backward(
    g: Tensor, terms: Sequence[Tensor | None], spec: LayerSpec, view: View, wanted: WantedTerms
) -> list[Tensor]:
    """The wanted gradients alone; terms are `Terms`, without those that backward does not read."""
    branch, x, branch_scale, skip_scale, seed = terms
    return _engine.residual_backward(g, branch, x, branch_scale, skip_scale, *_numbers(spec, seed), view, wanted)


def _numbers(spec: LayerSpec, seed: Tensor | None) -> tuple:
    if seed is None:
        return spec.branch_scale, spec.skip_scale, None, 0, 1.0
    return spec.branch_scale, spec.skip_scale, seed, spec.drop_threshold, spec.keep_scale
