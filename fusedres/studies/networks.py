"""The networks of systems A and D through the fused layer; parameters, names and draws are those of eager."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from ..functional import residual_linear
from ..reference import ProjectionStack, ShapeGatedStack


class FusedShapeGatedStack(ShapeGatedStack):
    """System A, every layer in one call: x [..., d₀] -> [..., d_L]."""

    def forward(self, x: Tensor) -> Tensor:
        for linear, takes_skip in zip(_linears(self.layers), self.skips, strict=True):
            x = residual_linear(x, linear.weight, linear.bias, skip="identity" if takes_skip else None)
        return x


class FusedProjectionStack(ProjectionStack):
    """System D, every layer with its shortcut in one call: x [..., d₀] -> [..., d_L]."""

    def forward(self, x: Tensor) -> Tensor:
        for i, linear in enumerate(_linears(self.layers)):
            if str(i) in self.projections:
                projection = cast(nn.Linear, self.projections[str(i)])
                x = residual_linear(
                    x,
                    linear.weight,
                    linear.bias,
                    skip="projection",
                    projection_weight=projection.weight,
                    projection_bias=projection.bias,
                )
            else:
                x = residual_linear(x, linear.weight, linear.bias, skip="identity" if self.use_shortcut else None)
        return x


def _linears(layers: nn.ModuleList) -> list[nn.Linear]:
    return [cast(nn.Linear, cast(nn.Sequential, layer)[0]) for layer in layers]
