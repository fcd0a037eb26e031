"""The block of transformers and Mixers, x + fc2(φ(fc1(x))), as two fused layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks, functional
from .modules import FusedResidualLinear


class FusedResidualMLP(nn.Module):
    """y = λ r + a drop(W₂ drop(φ(W₁ x + b₁)) + b₂), r being x or a residual. x [..., dim] -> [..., dim].

    Parameters `fc1.weight` [hidden, dim], `fc1.bias`, `fc2.weight` [dim, hidden], `fc2.bias`, drawn in this order
    as two nn.Linear draw theirs, and where learned `fc2.skip_scale` [], `fc2.branch_scale` [] or [dim]. The first
    layer's bias and φ, the second's bias, scales and residual are part of the products' kernels; where dropout drops,
    what follows the second product is one pass more.

    Args:
        dim: the size of x's last dimension.
        hidden: the size between the layers, 4 · dim where not given.
        bias: whether both layers have one.
        activation: φ, one of gelu, relu, silu, tanh, sin, none.
        approximate: of gelu: "none", exact, or "tanh".
        dropout: the probability that a number of φ(·), and of the branch, is dropped in training mode, by nn.Dropout's
            own draws.
        skip_scale: λ, or where it starts when learned.
        learn_skip_scale: λ is a parameter.
        branch_scale: a, or where it starts when learned.
        learn_branch_scale: a is a parameter: "scalar", or "channel" for one per feature.
        recompute: compute φ's argument again in backward instead of keeping it.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError: an option is of another type.
        ValueError: an option is unknown, out of range, or makes no sense with another.
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        bias: bool = True,
        *,
        activation: str = "gelu",
        approximate: str = "none",
        dropout: float = 0.0,
        skip_scale: float = 1.0,
        learn_skip_scale: bool = False,
        branch_scale: float = 1.0,
        learn_branch_scale: bool | str = False,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.dropout(dropout)
        checks.learned_scales(learn_skip_scale, learn_branch_scale)
        hidden = 4 * dim if hidden is None else hidden
        self.fc1 = FusedResidualLinear(
            dim, hidden, bias, activation=activation, approximate=approximate, skip=None, recompute=recompute,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.fc2 = _Second(
            hidden, dim, bias, dropout=dropout, skip_scale=skip_scale, learn_skip_scale=learn_skip_scale,
            branch_scale=branch_scale, learn_branch_scale=learn_branch_scale, device=device, dtype=dtype,
        )  # fmt: skip

    @property
    def dropout(self) -> float:
        """The probability that a number is dropped."""
        return self.fc2.dropout

    @dropout.setter
    def dropout(self, value: float) -> None:
        checks.dropout(value)
        self.fc2.dropout = value

    def reset_parameters(self) -> None:
        """nn.Linear's initialisation for the weights; the scales start where they were told to."""
        self.fc1.reset_parameters()
        self.fc2.reset_parameters()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [..., dim] -> [..., dim]; the residual, of that shape, is x where not given (x may be normalised)."""
        h = self.fc1(x)
        if self.training and self.dropout:
            h = F.dropout(h, self.dropout)
        return self.fc2(h, x if residual is None else residual)


class _Second(FusedResidualLinear):
    """λ r + a drop(x Wᵀ + b). x [..., K], r [..., N] -> [..., N]."""

    def __init__(self, in_features: int, out_features: int, bias: bool, *, dropout: float, **options: Any) -> None:
        learns_skip_scale = options.pop("learn_skip_scale")
        super().__init__(in_features, out_features, bias, activation="none", **options)
        self.dropout = dropout
        if learns_skip_scale:  # its skip is always there, whatever the sizes
            self.skip_scale = nn.Parameter(torch.empty((), device=self.weight.device, dtype=self.weight.dtype))
            self._reset_scales()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not (self.training and self.dropout) or residual is None:
            return super().forward(x, residual)
        branch = F.dropout(F.linear(x, self.weight, self.bias), self.dropout)
        return functional.residual(branch, residual, skip_scale=self.skip_scale, branch_scale=self.branch_scale)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", dropout={self.dropout}" if self.dropout else "")
