"""What becomes of a stack in the hands of its users: modules replaced, tensors shared, hooks, parametrizations."""

from __future__ import annotations

import pytest
import torch
from networks import SINGLE
from stacks import twins
from torch import nn
from torch.testing import assert_close

from fusedres import FusedResidualStack, Network

pytestmark = pytest.mark.backends("triton", "cpu")
both = pytest.mark.parametrize("backend", ["triton", "cpu"], indirect=True)


def same_gradients(fused, eager, call):
    """After `call` of each, which goes backward."""
    for model in (fused, eager):
        model.zero_grad()
        call(model)
    found = fused.by_layer({name: p.grad for name, p in fused.named_parameters()})
    for name, value in eager.named_parameters():
        assert_close(found[name], value.grad, rtol=1e-3, atol=1e-4 * max(1.0, value.grad.abs().max().item()))


@pytest.mark.parametrize("rows", [1, 4, 16, 100])
@pytest.mark.parametrize("sizes", [[2, 64, 64, 64, 1], [64, 2, 2, 2, 64]], ids=str)
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_dropped_rows_are_counted_by_the_input(rows, sizes, backend):
    fused, eager = twins(sizes, {"drop_path": 0.5})
    x = torch.randn(rows, sizes[0])
    for seed in range(4):
        found = []
        for model in (fused, eager):
            torch.manual_seed(seed)
            found.append(model(x))
        assert_close(*found, **SINGLE)


@both
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_inputs_that_hang_together_count_once_where_a_graph_is_made(backend, device):
    fused, eager = twins([8] * 4, {}, device)
    x = torch.randn(5, 8, device=device)
    same_gradients(fused, eager, lambda m: m(m(x)).sum().backward(create_graph=True))
    W = (torch.randn(4, 4, device=device) / 2).requires_grad_()
    stacked = torch.stack([W, W, W])

    def formula(x):
        for _ in range(3):
            x = x + torch.nn.functional.gelu(x @ W.T)
        return x

    x = torch.randn(3, 4, device=device)
    (expected,) = torch.autograd.grad(formula(x).sum(), W)
    for network in (Network([W, W, W]), Network(stacked)):
        (found,) = torch.autograd.grad(network(x).sum(), W, create_graph=True)
        assert_close(found, expected, **SINGLE)


@both
def test_hooks_run_once_where_a_graph_is_made(backend, device):
    fused, eager = twins([8] * 4, {}, device)
    x = torch.randn(5, 8, device=device, requires_grad=True)
    x.register_hook(lambda g: g * 0.5)
    found = [torch.autograd.grad(m(x).sum(), x, create_graph=True)[0] for m in (fused, eager)]
    assert_close(*found, **SINGLE)


@both
def test_replaced_modules_are_seen(backend, device):
    fused, eager = twins([2, 16, 16, 16, 1], {"skip": "projection"}, device)
    x = torch.randn(5, 2, device=device)

    def head(model):
        model.layers[-1][0] = nn.Linear(16, 1, device=device)

    def layer(model):
        model.layers[-1] = nn.Sequential(nn.Linear(16, 1, device=device), nn.GELU())

    def projection(model):
        model.projections["0"] = nn.Linear(2, 16, device=device)

    def weight_norm(model):
        torch.nn.utils.parametrizations.weight_norm(model.layers[0][0])

    def scaled(model):
        with torch.no_grad():
            model.layers[0][0].parametrizations.weight.original0.mul_(2)

    for change in (head, layer, projection, weight_norm, scaled):
        fused(x)
        for model in (fused, eager):
            torch.manual_seed(3)
            change(model)
        assert_close(fused(x), eager(x), **SINGLE)
    for _ in range(2):
        same_gradients(fused, eager, lambda m: m(x).square().sum().backward())
    other = FusedResidualStack([2, 16, 16, 16, 1], skip="projection", device=device)
    fused.runs, fused.layers, fused.projections = other.runs, other.layers, other.projections
    assert_close(fused(x), other(x), **SINGLE)


@pytest.mark.launches_nothing
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_a_lost_or_changed_parameter_is_refused(backend):
    x = torch.randn(5, 4)
    lost, _ = twins([4, 4, 4, 2], {})
    lost.layers[-1][0].bias = None
    with pytest.raises(ValueError, match="layer 2: bias must stay what it was, a tensor or None"):
        lost(x)
    lost, _ = twins([4, 4, 4, 2], {})
    lost.runs["0-1"].bias = None
    with pytest.raises(ValueError, match="layer 0: bias must stay what it was"):
        lost(x)
    weight = torch.randn(3, 4, 4, requires_grad=True)
    for other in (torch.randn(5, 4, 4), torch.randn(2, 4, 4), torch.randn(3, 2, 8)):
        network = Network([weight])
        network(x)
        before, weight.data = weight.data, other
        with pytest.raises((ValueError, RuntimeError), match=r"weight must stay|has changed its shape"):
            network(x)
        weight.data = before


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_vectorised_hessians(backend):
    fused, eager = twins([3, 8, 8, 8, 1], {"activation": "tanh"})
    x = torch.randn(3)
    hessian = torch.autograd.functional.hessian
    assert_close(*(hessian(lambda x, m=m: m(x).sum(), x, vectorize=True) for m in (fused, eager)), **SINGLE)
    x = torch.randn(4, 3, requires_grad=True)
    jacobians = [
        torch.autograd.grad(m(x), x, torch.eye(4)[..., None], is_grads_batched=True)[0] for m in (fused, eager)
    ]
    assert_close(*jacobians, **SINGLE)
    (slope,) = torch.autograd.grad(fused(x).sum(), x, create_graph=True)
    torch.autograd.grad(slope, x, torch.ones(2, 4, 3), is_grads_batched=True, create_graph=True)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_a_negated_gradient_and_a_backward_under_autocast(backend):
    fused, eager = twins([3, 8, 1], {"activation": "tanh", "skip": None})
    x = torch.randn(1, 3, requires_grad=True)
    g = torch.randn(1, 1, dtype=torch.complex64).conj().imag
    assert g.is_neg()
    found = [torch.autograd.grad(m(x), x, g, create_graph=True)[0] for m in (fused, eager)]
    assert_close(*found, **SINGLE)
    y = twins([3, 8, 1], {})[0](x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.autograd.grad(y.sum(), x, create_graph=True)[0].dtype == torch.float32


def test_layers_are_a_module_list_like_eager_s():
    fused, eager = twins([2, 8, 8, 8, 1], {})
    assert [n for n, _ in fused.layers.named_parameters()] == [n for n, _ in eager.layers.named_parameters()]
    assert list(fused.layers.state_dict()) == list(eager.layers.state_dict())
    part, other = nn.Sequential(*fused.layers[1:3]), nn.Sequential(*eager.layers[1:3])
    assert list(part.state_dict()) == list(other.state_dict())
    x = torch.randn(3, 8)
    assert_close(part(x), other(x), **SINGLE)
    assert list(fused.state_dict({}, "p.")) == [f"p.{name}" for name in eager.state_dict()]


class Hidden(nn.Module):
    """A head that begins at 0, so that its output says nothing of what stands before it."""

    def __init__(self, kind):
        super().__init__()
        layers = [nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(2)]
        self.layers = nn.ModuleList([*layers, nn.Sequential(nn.Linear(8, 1))])
        self.kind = kind
        if kind == "dropout":
            self.drop = nn.Dropout(0.1)
        for value in self.layers[-1].parameters():
            nn.init.zeros_(value)

    def forward(self, x):
        for layer in self.layers:
            y = layer(x)
            if self.kind == "dropout":
                y = self.drop(y)
            if y.shape == x.shape and self.kind != "plain":
                y = y + (x.detach() if self.kind == "detached" else x)
            x = y
        return x


def test_from_eager_is_not_taken_in():
    assert FusedResidualStack.from_eager(Hidden("plain")).skips == [False, False, False]
    assert FusedResidualStack.from_eager(Hidden("residual")).skips == [True, True, False]
    with pytest.raises(TypeError, match="module must have `layers` and `projections` alone, got drop, Dropout"):
        FusedResidualStack.from_eager(Hidden("dropout"))
    with pytest.raises(ValueError, match="Hidden computes something else"):
        FusedResidualStack.from_eager(Hidden("detached"))
    hidden = Hidden("plain").eval()
    state = torch.get_rng_state()
    with torch.no_grad():
        FusedResidualStack.from_eager(hidden)
    assert torch.equal(state, torch.get_rng_state())
