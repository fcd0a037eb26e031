"""The residual layer as a function: check, choose, call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import (
    checks,
    dispatch,
    explanation,
    ops,
    plain_layer,
    plans,
    recording,
    reference,
    residual_dispatch,
    residual_ops,
)
from .kernels.spec import LayerSpec, Operands


def residual_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str = "gelu",
    approximate: str = "none",
    order: str = "pre",
    skip: str | None = "auto",
    skip_scale: float | Tensor = 1.0,
    branch_scale: float | Tensor = 1.0,
    projection_weight: Tensor | None = None,
    projection_bias: Tensor | None = None,
    drop_path: float = 0.0,
    training: bool = True,
    recompute: bool = False,
) -> Tensor:
    """y = λ s(x) + a φ(x Wᵀ + b), or φ(λ s(x) + a (x Wᵀ + b)) with order="post", differentiable in every tensor.

    Shapes: x [..., K], weight [N, K], bias [N] -> y [..., N]; with skip="concat" y [..., S + N] = [λ s, a φ(z)].

    Args:
        x: [..., K], floating point.
        weight: W [N, K].
        bias: b [N].
        residual: s itself, [..., N], or [..., S] with skip="concat".
        activation: φ, one of gelu, relu, silu, tanh, sin, none.
        approximate: of gelu: "none", exact, or "tanh".
        order: "pre", or "post" for an activation after the addition.
        skip: "auto" is the residual or the projection where one is given, else x where K = N, else nothing;
            "identity" is x; "projection" is x Pᵀ + p; "concat" puts x, or the residual, before the branch; None.
        skip_scale: λ, a number or a tensor [].
        branch_scale: a, a number or a tensor [] or [N].
        projection_weight: P [N, K].
        projection_bias: p [N].
        drop_path: while training, the probability that a row's branch is dropped; the others' are scaled by
            1 / (1 - drop_path). Drawn from torch's CPU generator on every device.
        training: whether rows drop.
        recompute: compute z again in backward instead of keeping it.

    All tensors share x's dtype, unless autocast is on: then products run in its dtype and sums promote as eager's do.

    Raises:
        TypeError: an operand is no floating-point tensor, or of another dtype than x.
        ValueError: a shape, device or option does not fit.
        NotImplementedError: under forward-mode differentiation.
    """
    options = (activation, approximate, order, skip, drop_path, training, recompute)
    return layer(x, weight, bias, residual, projection_weight, projection_bias, skip_scale, branch_scale, options)


def residual(
    branch: Tensor,
    x: Tensor,
    *,
    skip_scale: float | Tensor = 1.0,
    branch_scale: float | Tensor = 1.0,
    channel_dim: int = -1,
    drop_path: float = 0.0,
    training: bool = True,
) -> Tensor:
    """y = a branch + λ x, the sum that ends a residual block, differentiable in every tensor. branch, x, y [...].

    Args:
        branch: what the block gives for x.
        x: the block's input.
        skip_scale: λ, a number or a tensor [].
        branch_scale: a, a number or a tensor [] or [C], one per channel.
        channel_dim: the dimension of x, of size C, along which a is one per channel.
        drop_path: while training, the probability that a sample's branch is dropped, a sample being an index of the
            first dimension; the others' are scaled by 1 / (1 - drop_path). Drawn from torch's CPU generator.
        training: whether samples drop.

    dtypes may differ, and promote as those of the formula do.

    Raises:
        TypeError: a term or a scale is no floating-point tensor, or a number is none.
        ValueError: a shape or a device does not fit, or an option is out of range.
    """
    terms, spec = checks.described_sum(branch, x, skip_scale, branch_scale, channel_dim, drop_path, training)
    choice = residual_dispatch.choose(terms, spec)
    if explanation.is_listening():
        explanation.note_residual(choice, terms.x, spec)
    if spec.drop_path > 0:
        terms = terms._replace(seed=ops.draw_seed())
    if isinstance(choice, dispatch.Eager):
        return reference.residual(terms, spec)
    return residual_ops.residual(terms, spec, choice)


def layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    projection_weight: Tensor | None,
    projection_bias: Tensor | None,
    skip_scale: float | Tensor,
    branch_scale: float | Tensor,
    options: tuple[Any, ...],
    watch: int = 0,
) -> Tensor:
    """`residual_linear` with its options in one tuple, in the order of its arguments: what modules call.

    watch: the number by which the gradient of x is recorded, 0 for none.
    """
    if not watch and not torch.compiler.is_compiling() and type(x) is Tensor and x.is_cpu:
        y = plain_layer.call(
            x, weight, bias, residual, projection_weight, projection_bias, skip_scale, branch_scale, options
        )
        if y is not None:
            return y
    if getattr(forward_ad, "_current_level", -1) >= 0:
        raise NotImplementedError(
            "fusedres has no forward-mode derivative (jvp, dual tensors); use reverse mode, or "
            "fusedres.reference.residual_linear, which is plain PyTorch"
        )
    autocast = autocast_dtype(x) if dispatch.is_any_autocast_enabled() else None
    given = Operands(x, weight, bias, residual, projection_weight, projection_bias)
    facts = None if autocast else checks.facts(given, skip_scale, branch_scale, options)
    spec = checks.recall(facts)
    if spec is None:
        given, spec = checks.described(given, skip_scale, branch_scale, options, autocast is not None)
        checks.remember(facts, spec)
    if watch:
        spec = spec._replace(watch=watch)
    return call(given, spec, autocast)


def call(given: Operands, spec: LayerSpec, autocast: torch.dtype | None) -> Tensor:
    """y of a layer that is checked, by what dispatch chooses; products in autocast's dtype where there is one."""
    if dispatch.is_batch_invariant():
        spec = spec._replace(batch_invariant=True)
    x, weight, residual = given.x, given.weight, given.residual
    is_empty = x.numel() == 0 or weight.numel() == 0 or (residual is not None and residual.numel() == 0)
    fused = choice = dispatch.choose(x.device, autocast or x.dtype, is_empty)
    if isinstance(fused, dispatch.Native):
        choice = _native_or_eager(fused, given, spec, autocast)
    elif isinstance(fused, dispatch.Triton) and not torch.compiler.is_compiling() and plans.may_be_eager(fused):
        choice = _triton_or_eager(fused, given, spec, autocast, ops.needs_grad(given))
    is_eager = isinstance(choice, dispatch.Eager)
    if autocast is not None and not is_eager:
        given, spec = _cast(given, spec, autocast)
    if explanation.is_listening():
        in_training = choice
        if isinstance(fused, dispatch.Triton):
            in_training = _triton_or_eager(fused, given, spec, autocast, trains=True)
        explanation.note(choice, given, spec, autocast or x.dtype, in_training)
    if spec.drop_path > 0:
        given = given._replace(seed=ops.draw_seed())
    if is_eager:
        return reference.layer(given, spec)
    return ops.residual_linear(given, spec)


def _native_or_eager(
    choice: dispatch.Native, given: Operands, spec: LayerSpec, autocast: torch.dtype | None
) -> dispatch.Native | dispatch.Eager:
    if autocast is not None:
        cast, _ = _cast(given, spec._replace(watch=0), autocast)
        if any(t.dtype != autocast for t in cast if t is not None):
            return dispatch.Eager("autocast leaves operands of unlike dtypes, and the C++ engine computes in one")
    if type(given.x.numel()) is not int or torch.compiler.is_compiling():  # traced: the operator finds its way later
        return choice
    way = dispatch.layer_way(given, spec, autocast or given.x.dtype)
    return way if isinstance(way, dispatch.Eager) else choice


def _triton_or_eager(
    choice: dispatch.Triton, given: Operands, spec: LayerSpec, autocast: torch.dtype | None, trains: bool
) -> dispatch.Triton | dispatch.Eager:
    is_traced = type(given.x.numel()) is not int or torch.compiler.is_compiling()
    if autocast is not None or is_traced:  # the operator runs its kernels
        return choice
    why = plans.why_eager(given, spec, choice, trains)
    return dispatch.Eager(why) if why else choice


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast would give a linear layer of x: None without it, and for float64, which it leaves."""
    if not isinstance(x, Tensor) or x.dtype == torch.float64 or x.is_meta:  # autocast does not know meta tensors
        return None
    if not torch.is_autocast_enabled(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)


def _cast(operands: Operands, spec: LayerSpec, dtype: torch.dtype) -> tuple[Operands, LayerSpec]:
    """Operands of the products in autocast's dtype; the skip and the scales keep theirs, and the sum promotes."""

    def low(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(dtype)

    x = operands.x
    if x.dtype != dtype and spec.skip in ("identity", "concat") and operands.residual is None:
        x, skip = (x, x) if not spec.watch else recording.apart(x, spec.watch, has_skip=True)
        operands = operands._replace(residual=skip)
        spec = spec._replace(skip="residual" if spec.skip == "identity" else "concat", watch=0)
    return (
        operands._replace(
            x=x.to(dtype),
            weight=operands.weight.to(dtype),
            bias=low(operands.bias),
            projection_weight=low(operands.projection_weight),
            projection_bias=low(operands.projection_bias),
        ),
        spec,
    )
