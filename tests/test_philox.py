"""Stochastic depth: the generator, and which rows it drops on every backend."""

from __future__ import annotations

import pytest
import torch

import fusedres
from fusedres import philox
from fusedres.functional import residual_linear
from fusedres.kernels.spec import LayerSpec

pytestmark = pytest.mark.backends("triton", "cpu")


def test_words_match_the_published_vector():
    """Random123's known answers: Philox4x32-10 of the zero counter under the zero key begins 6627e8d5."""
    zero = torch.zeros((), dtype=torch.int64)
    assert philox.words(zero, zero[None]).tolist() == [0x6627E8D5]


def test_words_use_both_halves_of_seed_and_counter():
    seeds = [0, 1, 1 << 32, (1 << 63) - 1]
    counters = torch.tensor([0, 1, 1 << 32, (1 << 40) + 1])
    words = torch.stack([philox.words(torch.tensor(seed), counters) for seed in seeds])
    assert words.flatten().unique().numel() == 16
    assert ((words >= 0) & (words < 2**32)).all()


@pytest.mark.parametrize("drop_path", [0.1, 0.5, 0.9])
def test_the_share_of_dropped_rows(drop_path):
    rows = 200_000
    spec = LayerSpec(drop_path=drop_path)
    kept = philox.kept_rows(philox.draw_seed(), torch.Size([rows]), spec.drop_threshold, torch.device("cpu"))
    deviation = (drop_path * (1 - drop_path) / rows) ** 0.5
    assert abs(1 - kept.double().mean() - drop_path) < 5 * deviation


def dropped(x: torch.Tensor, weight: torch.Tensor, **options: object) -> torch.Tensor:
    """Rows that came out as they went in."""
    return (residual_linear(x, weight, drop_path=0.5, **options) == x).all(-1)


def test_every_backend_drops_the_same_rows(device):
    x, weight = torch.randn(7, 30, 12, device=device), torch.randn(12, 12, device=device)
    torch.manual_seed(5)
    fused = dropped(x, weight)
    torch.manual_seed(5)
    with fusedres.eager():
        eager = dropped(x, weight)
    torch.manual_seed(5)
    on_the_cpu = dropped(x.double().cpu(), weight.double().cpu())
    assert 0.3 < fused.double().mean() < 0.7
    assert torch.equal(fused, eager)
    assert torch.equal(fused.cpu(), on_the_cpu)


def test_every_call_draws_its_own_rows_and_manual_seed_repeats_them(device):
    x, weight = torch.randn(64, 12, device=device), torch.randn(12, 12, device=device)
    torch.manual_seed(5)
    first, second = dropped(x, weight), dropped(x, weight)
    torch.manual_seed(5)
    assert torch.equal(first, dropped(x, weight))
    assert not torch.equal(first, second)


def test_kept_rows_are_scaled_and_dropped_rows_have_no_branch_gradient(device):
    x = torch.randn(40, 12, device=device, requires_grad=True)
    weight = torch.randn(12, 12, device=device)
    plain = residual_linear(x, weight) - x
    torch.manual_seed(5)
    y = residual_linear(x, weight, drop_path=0.75)
    rows = (y == x).all(-1)
    torch.testing.assert_close((y - x)[~rows], 4 * plain[~rows], rtol=1e-5, atol=1e-5)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx[rows], torch.ones_like(dx[rows]))
    assert (dx[~rows] != 1).any()


def test_nothing_drops_in_eval_mode(device):
    layer = fusedres.FusedResidualLinear(12, drop_path=0.9, device=device).eval()
    x = torch.randn(30, 12, device=device)
    assert torch.equal(layer(x), residual_linear(x, layer.weight, layer.bias))


def test_a_nan_branch_that_is_dropped_is_gone(device):
    x, residual = torch.full((64, 12), float("nan"), device=device), torch.randn(64, 12, device=device)
    y = residual_linear(x, torch.randn(12, 12, device=device), residual=residual, drop_path=0.5)
    rows = y.isfinite().all(-1)
    assert 0 < rows.sum() < 64
    assert torch.equal(y[rows], residual[rows])
