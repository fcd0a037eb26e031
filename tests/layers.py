"""Layers to test: what they are, their tensors, and their outputs and gradients by three ways of computing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusedres import functional, reference


@dataclass(frozen=True)
class Shape:
    leading: tuple[int, ...]
    N: int
    K: int


SHAPES = {
    "one-sample": Shape((), 5, 5),
    "one-feature": Shape((3,), 1, 1),
    "one-row": Shape((1,), 16, 16),
    "fewer-than-a-tile": Shape((3,), 7, 7),
    "exact-tiles": Shape((128,), 64, 64),
    "ragged-every-edge": Shape((131,), 67, 67),
    "skinny-many-columns": Shape((5, 3), 150, 150),
    "leading-dimensions": Shape((2, 3, 4), 18, 18),
    "deep-k": Shape((10,), 12, 300),
    "wide-n": Shape((70,), 140, 9),
}


@dataclass
class Case:
    """One layer: its shape and options; scales "scalar" or "channel" are learned, numbers are not."""

    shape: Shape
    dtype: torch.dtype = torch.float32
    activation: str = "gelu"
    approximate: str = "none"
    order: str = "pre"
    skip: str | None = "identity"  # or "residual", as a test's word for a residual tensor
    skip_scale: float | str = 1.0
    branch_scale: float | str = 1.0
    bias: bool = True
    drop_path: float = 0.0
    recompute: bool = False
    layout: Callable[[str, Tensor], Tensor] = field(default=lambda name, tensor: tensor)

    def tensors(self, device: str) -> dict[str, Tensor]:
        """Leaves in self.dtype, laid out by self.layout. Weights scale as K ** -0.5: outputs stay near one."""
        leading, N, K = self.shape.leading, self.shape.N, self.shape.K
        made = {"x": torch.randn(*leading, K), "weight": torch.randn(N, K) * max(K, 1) ** -0.5}
        if self.bias:
            made["bias"] = torch.randn(N)
        if self.skip == "residual":
            made["residual"] = torch.randn(*leading, N)
        if self.skip == "projection":
            made["projection_weight"] = torch.randn(N, K) * max(K, 1) ** -0.5
            if self.bias:
                made["projection_bias"] = torch.randn(N)
        if self.skip_scale == "scalar":
            made["skip_scale"] = torch.tensor(0.8)
        if isinstance(self.branch_scale, str):
            made["branch_scale"] = torch.tensor(1.3) if self.branch_scale == "scalar" else torch.randn(N)
        return {name: self.layout(name, t.to(device, self.dtype)).requires_grad_() for name, t in made.items()}

    def options(self) -> dict[str, Any]:
        return {
            "activation": self.activation,
            "approximate": self.approximate,
            "order": self.order,
            "skip": "auto" if self.skip == "residual" else self.skip,
            "drop_path": self.drop_path,
            "recompute": self.recompute,
        }

    def numbers(self) -> dict[str, float]:
        scales = {"skip_scale": self.skip_scale, "branch_scale": self.branch_scale}
        return {name: value for name, value in scales.items() if not isinstance(value, str)}


def outcome(
    layer: Callable[..., Tensor],
    case: Case,
    tensors: dict[str, Tensor],
    gradient: Callable[[Tensor], Tensor],
    seed: int,
) -> dict[str, Tensor]:
    """y and the gradient of every tensor, under one seed."""
    torch.manual_seed(seed)
    y = layer(**tensors, **case.options(), **case.numbers())
    found = torch.autograd.grad(y, list(tensors.values()), gradient(y))
    return {"y": y.detach(), **{f"d{name}": g for name, g in zip(tensors, found, strict=True)}}


def three_ways(
    case: Case, device: str, layout: Callable[[Tensor], Tensor] = lambda g: g
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """What the kernels, eager PyTorch, and eager PyTorch in float64 compute from the same values.

    The incoming gradient is drawn, and laid out by `layout`. In float64 nothing wider judges eager, whose error is then
    taken from what it makes of the same values in float32.
    """
    tensors = case.tensors(device)
    wide = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    made: list[Tensor] = []

    def gradient(y: Tensor) -> Tensor:
        if not made:
            g = torch.randn(y.shape, device=y.device).to(y.dtype)
            made.append(g * _is_off_the_kink(case, wide))
        return layout(made[0].to(y.dtype))

    fused = outcome(functional.residual_linear, case, tensors, gradient, seed=1)
    truth = outcome(reference.residual_linear, case, wide, gradient, seed=1)
    if case.dtype != torch.float64:
        return fused, outcome(reference.residual_linear, case, tensors, gradient, seed=1), truth
    narrow = {name: t.detach().float().requires_grad_() for name, t in tensors.items()}  # drawn in float32: all equal
    rounded = outcome(reference.residual_linear, case, narrow, gradient, seed=1)
    finer = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return fused, {name: truth[name] + (rounded[name] - truth[name]) * finer for name in truth}, truth


def _is_off_the_kink(case: Case, wide: dict[str, Tensor]) -> Tensor | bool:
    """Where relu's slope does not hang on how a sum of skip and branch was rounded; everywhere for the rest."""
    if case.activation != "relu" or case.order != "post":
        return True
    options = {**case.options(), **case.numbers(), "activation": "none", "drop_path": 0.0}
    total = reference.residual_linear(**wide, **options).detach()
    return total.abs() > 2 * torch.finfo(case.dtype).eps
