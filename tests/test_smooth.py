"""Activations that the engine differentiates again and again, and networks whose gradients are differentiated."""

from __future__ import annotations

import gc

import pytest
import torch
from laplacian import laplacian
from networks import is_one_node
from stacks import twins
from torch.testing import assert_close

from fusedres import FusedResidualStack, network_ops
from fusedres.kernels.cpu import launch
from fusedres.reference import ACTIVATIONS as FORMULAS

pytestmark = pytest.mark.usefixtures("engine")
POINTS = torch.cat([torch.linspace(-9, 9, 3001), torch.tensor([0.0, -0.0, 1e-8, -30.0, 30.0])])


def derivative(phi, z, order):
    """φ⁽ⁿ⁾ at every z, by backward of backward; the last one is not to be differentiated, as in training."""
    z = z.clone().requires_grad_()
    value = phi(z)
    for i in range(order):
        (value,) = torch.autograd.grad(value.sum(), z, create_graph=i < order - 1, materialize_grads=True)
    return value.detach()


@pytest.mark.parametrize("order", range(6))  # two beyond what the engine has itself
@pytest.mark.parametrize("activation", network_ops.SMOOTH)
def test_every_derivative_is_as_near_to_float64_as_eager_s(activation, order):
    formula = FORMULAS[activation]
    ours = derivative(lambda z: launch.activate(z, activation), POINTS, order)
    eager, exact = derivative(formula, POINTS, order), derivative(formula, POINTS.double(), order)
    assert ours.isfinite().all()
    known = exact.isfinite() & eager.isfinite()  # eager's higher ones of gelu_tanh overflow
    assert known.sum() > 3000
    worst = (ours - exact)[known].abs().max()
    allowed = 2 * torch.maximum((eager - exact)[known].abs().max(), 2.0**-23 * exact[known].abs().max())
    assert worst <= allowed, f"error {worst:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("activation", network_ops.SMOOTH)
def test_products_and_all_their_gradients(activation):
    """A polynomial of slopes, differentiated by hand-written formulas in float64."""

    def value(phi, z, f, v):
        (p,) = torch.autograd.grad(phi(z), z, f, create_graph=True)  # φ' f
        (q,) = torch.autograd.grad(p, z, v, create_graph=True)  # φ'' f v
        return (q * q + p).sum()

    z, f, v = (torch.randn(7, 300, dtype=torch.float64) for _ in range(3))
    exact = [t.clone().requires_grad_() for t in (z, f, v)]
    single = [t.float().requires_grad_() for t in (z, f, v)]
    truth = torch.autograd.grad(value(FORMULAS[activation], *exact), exact)
    ours = torch.autograd.grad(value(lambda t: launch.activate(t, activation), *single), single)
    for a, b in zip(ours, truth, strict=True):
        assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_a_bad_number_stays_alone(activation, bad):
    z = torch.tensor([0.5] * 20 + [bad])
    for order in range(4):
        value = derivative(lambda z: launch.activate(z, activation), z, order)
        assert value[:-1].isfinite().all()
        if bad != bad:
            assert value[-1].isnan()
        elif order > 1:
            assert value[-1] == 0  # φ is a line out there


def test_strided_and_empty_numbers():
    z = torch.randn(6, 8).t()
    assert_close(launch.activate(z, "sin"), torch.sin(z))
    assert launch.activate(torch.empty(0, 4), "gelu").shape == (0, 4)
    many = torch.randn(300_001)  # several threads
    assert_close(launch.activate(many, "sin"), torch.sin(many))
    with pytest.raises(RuntimeError, match="activation 4 has no derivatives here"):
        launch.activate(many, "tanh")
    with pytest.raises(RuntimeError, match="float32 on the CPU expected, got Double on cpu"):
        launch.activate(torch.ones(3, dtype=torch.float64), "sin")


def test_a_network_whose_gradients_are_differentiated_takes_the_formula_from_then_on():
    stack, eager = twins([2, 16, 16, 16, 1], {"activation": "tanh", "last_activation": "none"})
    x = torch.randn(9, 2)
    assert is_one_node(stack(x.clone().requires_grad_()))
    first = laplacian(stack, x)
    y = stack(x.clone().requires_grad_())
    assert not is_one_node(y)
    assert is_one_node(stack(x))  # whose gradient in x nobody can ask for
    with torch.no_grad():
        assert_close(stack(x.clone().requires_grad_()), y)
    assert_close(laplacian(stack, x), first, rtol=1e-4, atol=1e-5)
    assert_close(first, laplacian(eager, x), rtol=1e-3, atol=1e-4)
    other = FusedResidualStack([2, 16, 1])
    assert is_one_node(other(x.clone().requires_grad_()))
    before = len(network_ops.differentiated_again)
    del stack, y, first
    gc.collect()
    assert len(network_ops.differentiated_again) == before - 1


def test_dropped_rows_are_the_same_in_the_formula():
    stack, _ = twins([6, 6, 6, 6], {"drop_path": 0.5, "activation": "sin"})
    x = torch.randn(40, 6, requires_grad=True)
    torch.manual_seed(3)
    y = stack(x)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    torch.manual_seed(3)
    again = stack(x)
    assert_close(again, y)
    assert_close(torch.autograd.grad(again.sum(), x)[0], slope.detach(), rtol=1e-4, atol=1e-5)


def test_frozen_parameters_and_unused_ones():
    stack, eager = twins([3, 8, 8, 1], {"activation": "sin"})
    for model in (stack, eager):
        model.layers[0].requires_grad_(False)
    assert_close(laplacian(stack, torch.ones(4, 3)), laplacian(eager, torch.ones(4, 3)), rtol=1e-3, atol=1e-4)
