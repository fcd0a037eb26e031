"""warmup: what it leaves as it was, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fusedres
from fusedres import FusedResidualLinear, FusedResidualStack

pytestmark = pytest.mark.backends("triton", "cpu")


def test_it_leaves_no_trace(device):
    model = nn.Sequential(FusedResidualStack([6, 6, 6, 4]), nn.BatchNorm1d(4), FusedResidualLinear(4, drop_path=0.5))
    model.to(device)
    model(torch.randn(3, 6, device=device)).sum().backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    fusedres.warmup(model, [(2, 6), (65, 6)])
    fusedres.warmup(model, (5, 6), backward=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, old) for p, old in zip(model.parameters(), gradients, strict=True))


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_every_shape_is_called_forward_and_backward(backend, device):
    stack, seen = FusedResidualStack([6, 6, 6], device=device), []
    stack.register_forward_hook(lambda module, inputs, y: seen.append((tuple(inputs[0].shape), y.requires_grad)))
    fusedres.warmup(stack, [(2, 6), (3, 6)])
    with torch.no_grad():
        fusedres.warmup(stack, (6,))
    fusedres.warmup(stack, (7, 6), backward=False)
    assert seen == [((2, 6), True), ((3, 6), True), ((6,), True), ((7, 6), False)]
    stack.requires_grad_(False)
    fusedres.warmup(stack, (2, 6))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("rows", [1, 300])
def test_a_warm_stack_can_be_captured(rows, backend):
    stack = FusedResidualStack([32, 64, 64, 64, 64, 8], device="cuda")
    x = torch.randn(rows, 32, device="cuda")
    fusedres.warmup(stack, x.shape)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = stack(x)
        gradients = torch.autograd.grad(y.square().sum(), list(stack.parameters()))
    x.normal_()
    graph.replay()
    expected = stack(x)
    assert torch.equal(y, expected)
    for a, b in zip(gradients, torch.autograd.grad(expected.square().sum(), list(stack.parameters())), strict=True):
        assert torch.equal(a, b)


@pytest.mark.launches_nothing
@pytest.mark.parametrize(
    ("module", "shapes", "error", "message"),
    [
        (torch.sin, (3, 3), TypeError, "module must be a torch.nn.Module, got builtin_function_or_method"),
        (nn.ReLU(), (3, 3), TypeError, "ReLU has no floating parameter or buffer"),
        (nn.Linear(3, 3), [], ValueError, r"shapes must be shapes \[..., K\] of integers, got \[\]"),
        (nn.Linear(3, 3), [(3.0, 3)], ValueError, r"got \(3.0, 3\)"),
        (nn.Linear(3, 3), ["33"], ValueError, "got '33'"),
        (nn.Linear(3, 3), [(-1, 3)], ValueError, r"got \(-1, 3\)"),
    ],
    ids=["no-module", "no-parameters", "no-shape", "no-integers", "a-string", "negative"],
)
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_what_it_refuses(module, shapes, error, message, backend):
    with pytest.raises(error, match=message):
        fusedres.warmup(module, shapes)
