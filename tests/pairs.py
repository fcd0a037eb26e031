"""Fused modules, each with a twin in plain PyTorch: the same parameters under the same names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from fusedres import FusedResidualLinear, FusedResidualMLP, FusedResidualStack
from fusedres.reference import ResidualStack

WIDTH = 6  # of x and of y
SIZES = [WIDTH, WIDTH, WIDTH, 4, WIDTH]  # a run, and layers by themselves
LEARNED: dict[str, Any] = {"learn_skip_scale": True, "learn_branch_scale": "channel"}
every_kind = pytest.mark.parametrize("kind", ["layer", "mlp", "stack"])
layer_or_stack = pytest.mark.parametrize("kind", ["layer", "stack"])
OPERATORS = {"layer": "residual_linear", "mlp": "residual_linear", "stack": "residual_network"}

# Two computations of numbers near one, in single and in double precision.
CLOSE = {torch.float32: {"rtol": 1e-4, "atol": 2e-5}, torch.float64: {"rtol": 1e-10, "atol": 1e-12}}
SINGLE = CLOSE[torch.float32]


class PlainLayer(nn.Linear):
    """y = λ x + a gelu(x Wᵀ + b), named as FusedResidualLinear names it. x [..., d] -> [..., d]."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.skip_scale, self.branch_scale = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.skip_scale * x + self.branch_scale * F.gelu(super().forward(x))


class PlainMLP(nn.Module):
    """y = λ x + a fc2(gelu(fc1(x))), named as FusedResidualMLP names it. x [..., d] -> [..., d]."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 9), nn.Linear(9, WIDTH)
        self.fc2.skip_scale, self.fc2.branch_scale = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2.skip_scale * x + self.fc2.branch_scale * self.fc2(F.gelu(self.fc1(x)))


def fused_module(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """x [..., WIDTH] -> [..., WIDTH]."""
    if kind == "layer":
        return FusedResidualLinear(WIDTH, **LEARNED, **options, dtype=dtype)
    if kind == "mlp":
        return FusedResidualMLP(WIDTH, 9, **LEARNED, **options, dtype=dtype)
    return FusedResidualStack(SIZES, skip="projection", **LEARNED, **options, dtype=dtype)


def pair(kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """(fused, plain), always the same, with learned scales that are not alike."""
    torch.manual_seed(0)
    fused = fused_module(kind, dtype)
    plain: nn.Module
    if kind == "stack":
        plain = ResidualStack(SIZES, skip="projection", **LEARNED)
    else:
        plain = PlainLayer() if kind == "layer" else PlainMLP()
    with torch.no_grad():
        for value in fused.parameters():
            value.add_(0.2 * torch.rand_like(value))
    plain.to(dtype).load_state_dict(fused.state_dict())
    return fused, plain


def by_name(module: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Tensors that are named as the module's parameters, by default those, under the names of its twin."""
    tensors = dict(module.named_parameters()) if tensors is None else tensors
    return module.by_layer(tensors) if isinstance(module, FusedResidualStack) else dict(tensors)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return by_name(module, {name: p.grad for name, p in module.named_parameters()})


class Rows(Dataset):
    """A fused module's output and its sum's gradient, of inputs that it draws itself, as a teacher's would be."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Tensor:
        x = torch.randn(1000, WIDTH, generator=torch.Generator().manual_seed(i)).requires_grad_()
        y = self.module(x)
        return torch.stack([y.detach(), *torch.autograd.grad(y.square().sum(), x)])
