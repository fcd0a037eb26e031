"""The gradient that reaches every layer's input, in its two halves: through the layer's branch and through its skip.

Exactly, in float64, by autograd: branch and skip each read a view of the input of their own, g = ∂L/∂y:

    x ──┬── view ── branch ──┐          dx through the branch:  dz W
        └── view ── skip ────┴── y      dx through the skip:    λ g, or λ g P where the skip is projected by P
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import residual_linear
from ..stack import FusedResidualStack


class Reached(NamedTuple):
    """A layer's input x, ∂L/∂x through its branch and through its skip (None without one); g = ∂L/∂y at its output."""

    x: Tensor
    branch: Tensor
    skip: Tensor | None
    g: Tensor

    @property
    def total(self) -> Tensor:
        """∂L/∂x."""
        return self.branch if self.skip is None else self.branch + self.skip


def reached(stack: FusedResidualStack, x: Tensor, loss_fn: Callable[[Tensor], Tensor]) -> list[Reached]:
    """Of every layer of the stack, whose scales are numbers, for L = loss_fn(stack(x)), without stochastic depth."""
    twin = stack.to_eager().double()
    h = x.detach().double().requires_grad_()
    places: list[tuple[Tensor, Tensor, Tensor | None]] = []
    for i, layer in enumerate(twin.recipe.layers):
        through_branch = h.view_as(h)
        through_skip = None if layer.skip == "none" else h.view_as(h)
        skip = through_skip
        if layer.skip == "projection":
            skip = twin.projections[str(i)](through_skip)
        name, _, approximate = layer.activation.partition("_")
        places.append((h, through_branch, through_skip))
        h = residual_linear(
            through_branch,
            twin.layers[i][0].weight,
            twin.layers[i][0].bias,
            skip,
            skip=None if skip is None else "auto",
            activation=name,
            approximate=approximate or "none",
            order=layer.order,
            skip_scale=layer.skip_scale,
            branch_scale=layer.branch_scale,
        )
    wanted = [one for place in places for one in place if one is not None]
    gradients = iter(torch.autograd.grad(loss_fn(h), [*wanted, h]))
    found = [tuple(None if one is None else next(gradients) for one in place) for place in places]
    outputs = [*(of_x for of_x, _, _ in found[1:]), next(gradients)]
    return [
        Reached(h.detach(), branch, skip, g)
        for (h, _, _), (_, branch, skip), g in zip(places, found, outputs, strict=True)
    ]


def through_skips_alone(layers: list[Reached], scales: list[float]) -> list[float]:
    """‖Π λ_i g‖ at the input of every layer: what of a gradient comes by skips alone, from the end of the last row of
    layers with a skip; 0 before a layer without one. scales: λ of every layer; skips are identities.
    """
    found: list[float] = []
    norm: float | None = None  # None: after the last layer with a skip there is nothing yet to carry
    for layer, scale in zip(reversed(layers), reversed(scales), strict=True):
        if layer.skip is None:
            norm = None if norm is None else 0.0
        else:
            norm = abs(scale) * (layer.g.norm().item() if norm is None else norm)
        found.append(norm or 0.0)
    return found[::-1]
