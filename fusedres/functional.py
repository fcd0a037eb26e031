"""The residual layer as a function: check, choose, call."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import checks, dispatch, explanation, ops, reference
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
        residual: s itself, [..., N], or [..., S] with skip="concat".
        activation: φ, one of gelu (approximate="none": exact, or "tanh"), relu, silu, tanh, sin, none.
        order: "pre", or "post" for an activation after the addition.
        skip: "auto" is the residual or the projection where one is given, else x where K = N, else nothing;
            "identity" is x; "projection" is x Pᵀ + p; "concat" puts x, or the residual, before the branch; None.
        skip_scale: λ, a number or a tensor [].
        branch_scale: a, a number or a tensor [] or [N].
        projection_weight, projection_bias: P [N, K], p [N].
        drop_path: while training, the probability that a row's branch is dropped; the others' are scaled by
            1 / (1 - drop_path). Drawn from torch's CPU generator on every device.
        recompute: compute z again in backward instead of keeping it.

    All tensors share x's dtype, unless autocast is on: then products run in its dtype and sums promote as eager's do.

    Raises:
        TypeError: an operand is no floating-point tensor, or of another dtype than x.
        ValueError: a shape, device or option does not fit.
        NotImplementedError: under forward-mode differentiation.
    """
    if getattr(forward_ad, "_current_level", -1) >= 0:
        raise NotImplementedError(
            "fusedres has no forward-mode derivative (jvp, dual tensors); use reverse mode, or "
            "fusedres.reference.residual_linear, which is plain PyTorch"
        )
    autocast = _autocast_dtype(x)
    operands, spec = checks.described(
        x,
        weight,
        bias,
        residual,
        activation=activation,
        approximate=approximate,
        order=order,
        skip=skip,
        skip_scale=skip_scale,
        branch_scale=branch_scale,
        projection_weight=projection_weight,
        projection_bias=projection_bias,
        drop_path=drop_path,
        training=training,
        recompute=recompute,
        batch_invariant=dispatch.is_batch_invariant(),
        is_autocast=autocast is not None,
    )

    choice = dispatch.choose(x.device, autocast or x.dtype, x.numel() == 0 or weight.shape[0] == 0)
    explanation.note(choice, operands, spec, autocast or x.dtype)
    if spec.drop_path > 0:
        operands = operands._replace(seed=ops.draw_seed())
    if isinstance(choice, dispatch.Eager):
        return reference.layer(operands, spec)
    if autocast is not None:
        operands, spec = _cast(operands, spec, autocast)
    return ops.residual_linear(operands, spec)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
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
        operands = operands._replace(residual=x)
        spec = spec._replace(skip="residual" if spec.skip == "identity" else "concat")
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
