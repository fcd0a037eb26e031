"""Which stretches of a graph are activations: by their values and slopes, near 0 and far from it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fusedres.fusing.patterns import is_linear
from fusedres.fusing.regions import activation_from


def found(phi):
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return phi(F.linear(x, self.fc.weight))

    graph = torch.fx.symbolic_trace(Module()).graph
    (linear,) = filter(is_linear, graph.nodes)
    return activation_from(linear)[:2]


@pytest.mark.parametrize(
    ("phi", "expected"),
    [
        (F.gelu, ("gelu", 1.0)),
        (lambda z: F.gelu(z, approximate="tanh"), ("gelu_tanh", 1.0)),
        (lambda z: 0.5 * z * (1 + torch.erf(z / math.sqrt(2))), ("gelu", 1.0)),
        (lambda z: z * 0.5 * (1 + torch.tanh(0.7978845608028654 * (z + 0.044715 * z * z * z))), ("gelu_tanh", 1.0)),
        (F.relu, ("relu", 1.0)),
        (lambda z: 3 * F.relu(z), ("relu", 3.0)),
        (lambda z: F.silu(z) * -0.1, ("silu", -0.1)),
        (lambda z: z * torch.sigmoid(z), ("silu", 1.0)),
        (lambda z: z / (1 + torch.exp(-z)), ("none", 1.0)),  # whose slope is NaN where exp is infinite
        (torch.tanh, ("tanh", 1.0)),
        (lambda z: 2 * torch.sigmoid(2 * z) - 1, ("none", 2.0)),  # tanh in other roundings; 2 z is what it knows
        (torch.sin, ("sin", 1.0)),
        (lambda z: z * 2, ("none", 2.0)),
        (lambda z: -z, ("none", -1.0)),
        (lambda z: z + 1e-12, ("none", 1.0)),
        (lambda z: torch.relu(z) + 1e-12, ("relu", 1.0)),
        (lambda z: F.relu(z) - 0.1 * F.relu(-z), ("none", 1.0)),
        (lambda z: torch.sin(z) * torch.exp(-z * 1e-9), ("none", 1.0)),
        (lambda z: (lambda t: z * t)(z.sigmoid_()), ("none", 1.0)),
    ],
)
def test_what_is_found(phi, expected):
    assert found(phi) == expected
