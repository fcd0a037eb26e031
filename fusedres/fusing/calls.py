"""The fused layer in the place of a model's operations: where it does not fit them, they are computed as written."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import explanation, functional
from ..reference import MODULES


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
    name: str,
) -> Tensor:
    """`functional.layer`, of the linear layer that is called so in the model."""
    tensors = (x, weight, bias, residual, projection_weight, projection_bias)
    try:
        if explanation.is_listening():
            with explanation.part(name):
                return functional.layer(*tensors, skip_scale, branch_scale, options)
        return functional.layer(*tensors, skip_scale, branch_scale, options)
    except (TypeError, ValueError, NotImplementedError):  # a residual that is broadcast, dtypes that promote, jvp
        return _as_written(*tensors, skip_scale, branch_scale, options)


def _as_written(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    projection_weight: Tensor | None,
    projection_bias: Tensor | None,
    skip_scale: float | Tensor,
    branch_scale: float | Tensor,
    options: tuple[Any, ...],
) -> Tensor:
    """By PyTorch's own operations, whose errors are the model's own."""
    activation, approximate, order, skip, *_ = options
    phi = MODULES["gelu_tanh" if approximate == "tanh" else activation]()
    z = F.linear(x, weight, bias)
    branch = _scaled(z if order == "post" else phi(z), branch_scale)
    if skip is None:
        return branch
    s = x if residual is None else residual
    if projection_weight is not None:
        s = F.linear(x, projection_weight, projection_bias)
    if skip == "concat":
        return torch.cat([_scaled(s, skip_scale), branch], -1)
    total = _scaled(s, skip_scale) + branch
    return phi(total) if order == "post" else total


def _scaled(value: Tensor, scale: float | Tensor) -> Tensor:
    return value if isinstance(scale, float) and scale == 1.0 else scale * value
