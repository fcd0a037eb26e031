"""The fused layer in the place of a model's operations: where it does not fit them, they are computed as written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import explanation, functional
from ..dispatch import is_any_autocast_enabled
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
    if type(skip_scale) is not float or type(branch_scale) is not float:
        of_skip, of_branch = _as_scalar(skip_scale, x), _as_scalar(branch_scale, x)
        if of_skip is None or of_branch is None:
            return _as_written(*tensors, skip_scale, branch_scale, options)
        skip_scale, branch_scale = of_skip, of_branch
    try:
        if explanation.is_listening():
            with explanation.part(name):
                return functional.layer(*tensors, skip_scale, branch_scale, options)
        return functional.layer(*tensors, skip_scale, branch_scale, options)
    except (TypeError, ValueError, NotImplementedError):  # a residual that is broadcast, dtypes that promote, jvp
        return _as_written(*tensors, skip_scale, branch_scale, options)
    except RuntimeError:
        if x.is_nested or any(one is not None and one.layout is not torch.strided for one in tensors):
            return _as_written(*tensors, skip_scale, branch_scale, options)
        raise


class NothingReturned(Exception):
    """A child gave None, of which a recording knows nothing."""


def child(module: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a child returns that is called as it is."""
    result = module(*args, **kwargs)
    if result is None:
        raise NothingReturned
    return result


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


def _as_scalar(scale: float | Tensor, x: Tensor) -> float | Tensor | None:
    """A scale [1] as []; None where it takes part in promotion as it is, and would not as a scalar."""
    if not isinstance(scale, Tensor) or scale.dim() == 0:
        return scale
    if scale.dtype != x.dtype or is_any_autocast_enabled():
        return None
    return scale.reshape(()) if scale.numel() == 1 else scale


def _scaled(value: Tensor, scale: float | Tensor) -> Tensor:
    return value if isinstance(scale, float) and scale == 1.0 else scale * value
