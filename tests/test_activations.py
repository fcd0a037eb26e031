"""φ and φ' of the kernels alone, through a layer whose product is exact: z = x · 1."""

from __future__ import annotations

import pytest
import torch
from test_layer import ACTIVATIONS, named

from fusedres import functional, reference

pytestmark = pytest.mark.backends("triton", "cpu")


def through(layer, x, activation):
    """φ(x) and φ'(x) of a column x [M, 1]."""
    y = layer(x, torch.ones(1, 1, device=x.device, dtype=x.dtype), skip=None, **named(activation))
    (slope,) = torch.autograd.grad(y, x, torch.ones_like(y))
    return y.detach(), slope


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_slopes_over_the_line(activation, device):
    """Within a few roundings of the value everywhere, tails and neighbourhood of zero included."""
    near = torch.logspace(-30, 1, 400, dtype=torch.float64)
    x = torch.cat([-near.flip(0), torch.zeros(1, dtype=torch.float64), near]).float()[:, None]
    x = x.to(device).requires_grad_()
    wide = x.detach().double().requires_grad_()
    eps = torch.finfo(torch.float32).eps
    for ours, eager, truth in zip(
        through(functional.residual_linear, x, activation),
        through(reference.residual_linear, x, activation),
        through(reference.residual_linear, wide, activation),
        strict=True,
    ):
        # beyond 1e-3 the formulas add ones, in eager as here, and one rounding of one counts: 1 + erf, 1 - tanh²
        absolute = 2 * eps * (x.detach().abs() > 1e-3)
        allowed = torch.maximum(4 * eps * truth.abs(), torch.maximum(2 * (eager - truth).abs(), absolute))
        wrong = (ours - truth).abs() > allowed
        assert not wrong.any(), f"at x = {x[wrong][:3].tolist()}: {ours[wrong][:3].tolist()}"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_infinities_and_nan_come_out_as_in_float64(activation, backend, device):
    """Values; slopes at infinity are inf · 0, NaN or not from formula to formula."""
    x = torch.tensor([[float("inf")], [float("-inf")], [float("nan")], [-0.0], [1e4], [-1e4]], device=device)
    x.requires_grad_()
    ours, slopes = through(functional.residual_linear, x, activation)
    truth, true_slopes = through(reference.residual_linear, x.detach().double().requires_grad_(), activation)
    if backend == "cpu" and activation in ("gelu", "gelu-tanh", "silu"):
        truth[1] = 0.0  # the limit, where torch multiplies inf by 0
    torch.testing.assert_close(ours.double(), truth, equal_nan=True)
    torch.testing.assert_close(slopes[2:].double(), true_slopes[2:], equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
@pytest.mark.backends("triton")
def test_the_short_gelu_is_rounded_gelu(dtype, device):
    """Half a unit in the last place is the rounding itself. Numbers of 16 bits between -8 and 8, every seventh one."""
    x = torch.arange(-(2**15), 2**15, 7).to(torch.int16).view(dtype)
    x = x[x.abs() <= 8][:, None].to(device).requires_grad_()
    wide = x.detach().double().requires_grad_()
    both = through(functional.residual_linear, x, "gelu"), through(reference.residual_linear, wide, "gelu")
    for ours, truth, cancelled in zip(*both, (0.0, 3e-6), strict=True):  # where the slope is 0, two terms cancel
        unit = torch.finfo(dtype).eps * 2.0 ** truth.abs().clamp_min(torch.finfo(dtype).tiny).log2().floor()
        wrong = (ours.double() - truth).abs() > 0.53 * unit + cancelled * (truth.abs() < 0.1)
        assert not wrong.any(), (
            f"at x = {x[wrong][:3].tolist()}: {ours[wrong][:3].tolist()}, {truth[wrong][:3].tolist()}"
        )
