"""Residual blocks as people write them, and how one that is fused is compared with one that is not."""

from __future__ import annotations

import math
from copy import deepcopy

import torch
import torch.nn.functional as F
from tolerances import rule_for
from torch import nn

D, H = 8, 12


class Written(nn.Module):
    """A block whose forward is written by `how`, with parts for any of them."""

    def __init__(self, how, act=None):
        super().__init__()
        self.fc, self.fc1, self.fc2 = nn.Linear(D, D), nn.Linear(D, H), nn.Linear(H, D)
        self.project, self.down, self.no_bias = nn.Linear(D, H), nn.Linear(D, 5), nn.Linear(D, D, bias=False)
        self.act, self.norm, self.drop = act or nn.GELU(), nn.LayerNorm(D), nn.Dropout(0.5)
        self.relu_ = nn.ReLU(inplace=True)
        self.net = nn.Sequential(nn.Linear(D, D), nn.SiLU())
        self.lam, self.a = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor([0.3]))
        self.gamma = nn.Parameter(torch.linspace(0.1, 1, D))
        self.number = 0.25
        self.how = how

    def forward(self, x):
        return self.how(self, x)


class GeluNew(nn.Module):
    def forward(self, z):
        return 0.5 * z * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * torch.pow(z, 3.0))))


def in_place(m, x):
    h = m.fc(x)
    h += x
    return h


def minus(m, x):
    return m.fc(x) - x


def from_x(m, x):
    return x - 0.5 * torch.tanh(m.fc(x))


def twice(m, x):
    h = x + F.gelu(m.fc(x))
    return h + F.gelu(m.no_bias(h))


# how it is written: (forward, the formulas of its layers in evaluation)
WRITINGS = {
    "function": (lambda m, x: x + F.gelu(m.fc(x)), ["x + gelu(x Wᵀ + b)"]),
    "module": (lambda m, x: m.act(m.fc(x)) + x, ["x + gelu(x Wᵀ + b)"]),
    "sequential": (lambda m, x: x + m.net(x), ["x + silu(x Wᵀ + b)"]),
    "torch-add": (lambda m, x: torch.add(x, m.net(x)), ["x + silu(x Wᵀ + b)"]),
    "method-add": (lambda m, x: m.net(x).add(x), ["x + silu(x Wᵀ + b)"]),
    "no-bias": (lambda m, x: x + torch.sin(m.no_bias(x)), ["x + sin(x Wᵀ)"]),
    "in-place-sum": (in_place, ["x + x Wᵀ + b"]),
    "in-place-activation": (lambda m, x: x + m.relu_(m.fc(x)), ["x + relu(x Wᵀ + b)"]),
    "no-skip": (lambda m, x: torch.relu(m.fc1(x)), ["relu(x Wᵀ + b)"]),
    "post": (lambda m, x: F.relu(x + m.fc(x)), ["relu(x + x Wᵀ + b)"]),
    "post-scaled": (lambda m, x: torch.tanh(m.lam * x + m.a * m.fc(x)), ["tanh(λ x + a (x Wᵀ + b))"]),
    "numbers": (lambda m, x: 0.5 * x + m.net(x) * 2, ["0.5 x + 2 silu(x Wᵀ + b)"]),
    "attribute": (lambda m, x: x + m.number * m.net(x), ["x + 0.25 silu(x Wᵀ + b)"]),
    "learned": (lambda m, x: m.lam * x + m.a * m.net(x), ["λ x + a silu(x Wᵀ + b)"]),
    "layer-scale": (lambda m, x: x + m.gamma * m.fc(x), ["x + a (x Wᵀ + b)"]),
    "minus-x": (minus, ["-1 x + x Wᵀ + b"]),
    "from-x": (from_x, ["x + -0.5 tanh(x Wᵀ + b)"]),
    "projection": (lambda m, x: m.project(x) + F.gelu(m.fc1(x)), ["(x Pᵀ + p) + gelu(x Wᵀ + b)"]),
    "projection-of-another": (lambda m, x: m.project(m.norm(x)) + F.gelu(m.fc1(x)), ["s + gelu(x Wᵀ + b)"]),
    "two-products": (lambda m, x: m.project(x) + m.fc1(x), ["(x Pᵀ + p) + x Wᵀ + b"]),
    "concat": (lambda m, x: torch.cat([x, F.relu(m.down(x))], dim=-1), ["[x, relu(x Wᵀ + b)]"]),
    "concat-scaled": (lambda m, x: torch.cat((m.lam * x, m.down(x)), -1), ["[λ x, x Wᵀ + b]"]),
    "other-residual": (lambda m, x: m.norm(x) + F.gelu(m.fc(x)), ["s + gelu(x Wᵀ + b)"]),
    "mlp": (lambda m, x: x + m.fc2(m.act(m.fc1(m.norm(x)))), ["gelu(x Wᵀ + b)", "s + x Wᵀ + b"]),
    "mlp-dropout": (
        lambda m, x: x + m.drop(m.fc2(m.drop(m.act(m.fc1(x))))),
        ["gelu(x Wᵀ + b)", "s + x Wᵀ + b"],
    ),
    "written-out-silu": (lambda m, x: x + (lambda z: z * torch.sigmoid(z))(m.fc(x)), ["x + silu(x Wᵀ + b)"]),
    "written-out-gelu": (
        lambda m, x: x + (lambda z: z * 0.5 * (1 + torch.erf(z / math.sqrt(2))))(m.fc(x)),
        ["x + gelu(x Wᵀ + b)"],
    ),
    "gelu-new": (lambda m, x: x + GeluNew()(m.fc(x)), ["x + gelu_tanh(x Wᵀ + b)"]),
    "sum-of-three": (lambda m, x: m.norm(x) + m.net(x) + x, ["s + silu(x Wᵀ + b)"]),
    "shape-gated": (lambda m, x: x + m.fc(x) if m.fc(x).shape == x.shape else m.fc(x), ["x + x Wᵀ + b"]),
    "shape-not-gated": (lambda m, x: torch.relu(m.fc1(x)) if m.fc1(x).shape != x.shape else x, ["relu(x Wᵀ + b)"]),
    "width-asked": (lambda m, x: x + m.net(x) if m.fc(x).size(-1) == D else x, ["x + silu(x Wᵀ + b)"]),
    "two-layers": (twice, ["x + gelu(x Wᵀ + b)", "x + gelu(x Wᵀ)"]),
}


def outcome(model, *inputs, **named):
    """y, and the gradients of what requires one."""
    given = [one.detach().clone().requires_grad_() if one.is_floating_point() else one for one in inputs]
    torch.manual_seed(5)
    y = model(*given, **named)
    y = getattr(y, "last_hidden_state", y)
    y = getattr(y, "logits", y)
    draw = torch.Generator().manual_seed(6)
    g = torch.randn(y.shape, generator=draw, dtype=torch.float64).to(y.dtype)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wanted = {f"dx{i}": one for i, one in enumerate(given) if one.requires_grad} | {
        f"d{name}": p for name, p in parameters.items()
    }
    found = torch.autograd.grad(y, list(wanted.values()), g, allow_unused=True)
    return {"y": y.detach(), **dict(zip(wanted, found, strict=True))}


def agrees(fused, eager, *inputs, terms=64.0, **named):
    """Output and every gradient of both, by the named rules; the truth is eager's in float64, of the same draws.

    Where a mask is drawn the truth is eager's own, since masks differ by dtype.
    """
    ours, theirs = outcome(fused, *inputs, **named), outcome(eager, *inputs, **named)
    drops = eager.training and any(isinstance(m, nn.Dropout) and m.p > 0 for m in eager.modules())
    if drops:
        truth = {name: None if one is None else one.double() for name, one in theirs.items()}
    else:
        wide = [one.double() if one.is_floating_point() else one for one in inputs]
        truth = outcome(deepcopy(eager).double(), *wide, **named)
    for name, value in ours.items():
        if theirs[name] is None:
            assert value is None or not value.any(), f"{name} has no gradient in eager"
            continue
        is_sum = name.endswith((".bias", ".lam", ".a")) or name in ("dlam", "da", "dgamma")
        rule_for(theirs[name].dtype, "dbias" if is_sum else "y").check(name, value, theirs[name], truth[name], terms)
