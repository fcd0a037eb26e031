"""FusedResidualMLP against the block in plain PyTorch."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from tolerances import rule_for
from torch import nn

import fusedres
from fusedres import FusedResidualMLP

pytestmark = pytest.mark.backends("triton", "cpu")


class Eager(nn.Module):
    """The same in PyTorch's own operations, with the names, and the draws, of the fused block."""

    def __init__(self, dim, hidden, *, bias=True, phi=None, dropout=0.0, skip_scale=1.0, branch_scale=1.0):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden, bias), nn.Linear(hidden, dim, bias)
        self.phi, self.drop = phi or nn.GELU(), nn.Dropout(dropout)
        if isinstance(skip_scale, nn.Parameter):
            self.fc2.skip_scale = skip_scale
        if isinstance(branch_scale, nn.Parameter):
            self.fc2.branch_scale = branch_scale
        self.scales = skip_scale, branch_scale

    def forward(self, x, residual=None):
        skip_scale, branch_scale = (
            getattr(self.fc2, name, value)
            for name, value in zip(("skip_scale", "branch_scale"), self.scales, strict=True)
        )
        branch = self.drop(self.fc2(self.drop(self.phi(self.fc1(x)))))
        return skip_scale * (x if residual is None else residual) + branch_scale * branch


def scale(*shape, value):
    return nn.Parameter(torch.full(shape, value))


CASES = {
    "plain": ({}, {}),
    "no-bias": ({"bias": False}, {"bias": False}),
    "relu": ({"activation": "relu"}, {"phi": nn.ReLU()}),
    "gelu-tanh": ({"approximate": "tanh"}, {"phi": nn.GELU("tanh")}),
    "numbers": ({"skip_scale": 0.5, "branch_scale": 2.0}, {"skip_scale": 0.5, "branch_scale": 2.0}),
    "learned": (
        {"skip_scale": 0.5, "learn_skip_scale": True, "branch_scale": 0.1, "learn_branch_scale": "scalar"},
        {"skip_scale": scale(value=0.5), "branch_scale": scale(value=0.1)},
    ),
    "layer-scale": (
        {"branch_scale": 0.1, "learn_branch_scale": "channel"},
        {"branch_scale": scale(8, value=0.1)},
    ),
    "dropout": ({"dropout": 0.5}, {"dropout": 0.5}),
    "dropout-learned": (
        {"dropout": 0.5, "learn_skip_scale": True, "learn_branch_scale": "channel"},
        {"dropout": 0.5, "skip_scale": scale(value=1.0), "branch_scale": scale(8, value=1.0)},
    ),
    "recompute": ({"recompute": True}, {}),
}


def twins(name, device):
    options, eager_options = CASES[name]
    torch.manual_seed(1)
    fused = FusedResidualMLP(8, 24, **options).to(device)
    torch.manual_seed(1)
    eager = Eager(8, 24, **deepcopy(eager_options)).to(device)
    assert set(fused.state_dict()) == set(eager.state_dict())
    for key, value in eager.state_dict().items():
        assert torch.equal(fused.state_dict()[key], value), f"{key} is drawn otherwise"
    return fused, eager


def gradients(model, x, residual, g):
    inputs = [x.detach().requires_grad_(), None if residual is None else residual.detach().requires_grad_()]
    torch.manual_seed(2)
    y = model(*(one for one in inputs if one is not None))
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(y, [one for one in inputs if one is not None] + list(parameters), g)
    keys = [
        "dx",
        *(["dresidual"] if residual is not None else []),
        *(f"d{name.split('.')[-1]} {name}" for name in names),
    ]
    return {"y": y.detach(), **dict(zip(keys, found, strict=True))}


@pytest.mark.parametrize("is_training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("has_residual", [False, True], ids=["x", "residual"])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_eager(name, has_residual, is_training, device):
    fused, eager = (twin.train(is_training) for twin in twins(name, device))
    x, residual, g = (torch.randn(3, 5, 8, device=device) for _ in range(3))
    given = x, residual if has_residual else None, g
    ours, theirs = gradients(fused, *given), gradients(eager, *given)
    if is_training and "dropout" in name:  # a mask is drawn for the dtype: the truth is eager's own
        truth = {key: value.double() for key, value in theirs.items()}
    else:
        truth = gradients(deepcopy(eager).double(), *(None if one is None else one.double() for one in given))
    for key, value in ours.items():
        rule_for(torch.float32, key.split()[0]).check(key, value, theirs[key], truth[key], terms=15)


def test_two_fused_operators_are_the_whole_block(device, fused):
    model = FusedResidualMLP(8, 24, dropout=0.1).to(device).eval()
    calls = fusedres.explain(model, torch.randn(4, 8, device=device))
    assert [(call.name, call.K, call.N, call.backend) for call in calls] == [
        ("fc1", 8, 24, fused),
        ("fc2", 24, 8, fused),
    ]
    assert [(call.spec.activation, call.spec.skip) for call in calls] == [("gelu", "none"), ("none", "residual")]


def test_where_dropout_drops_the_sum_is_one_call_more(device):
    model = FusedResidualMLP(8, 24, dropout=0.1).to(device)
    calls = fusedres.explain(model, torch.randn(4, 8, device=device))
    assert [(call.name, call.spec.skip) for call in calls] == [("fc1", "none"), ("fc2", "residual")]
    model.dropout = 0.0
    assert [call.shape for call in fusedres.explain(model, torch.randn(4, 8, device=device))] == [None, None]


def test_equal_sizes_take_the_residual_all_the_same(device):
    model = FusedResidualMLP(8, 8).to(device)
    x, residual = torch.randn(3, 8, device=device), torch.randn(3, 8, device=device)
    expected = residual + model.fc2.branch_scale * (
        nn.functional.gelu(x @ model.fc1.weight.T + model.fc1.bias) @ model.fc2.weight.T + model.fc2.bias
    )
    torch.testing.assert_close(model(x, residual), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dropout": 1.0}, ValueError, r"dropout must be a probability in \[0, 1\), got 1.0"),
        ({"dropout": "0.1"}, TypeError, "dropout must be a number, got str"),
        ({"activation": "elu"}, ValueError, "activation must be one of"),
        ({"learn_branch_scale": True}, ValueError, "learn_branch_scale must be False, 'scalar' or 'channel'"),
        ({"learn_skip_scale": 1}, ValueError, "learn_skip_scale must be True or False, got 1"),
    ],
    ids=str,
)
@pytest.mark.launches_nothing
def test_bad_options(options, error, message, backend):
    with pytest.raises(error, match=message):
        FusedResidualMLP(8, **options)


@pytest.mark.launches_nothing
def test_bad_inputs_and_a_bad_dropout_set_later(device):
    model = FusedResidualMLP(8).to(device)
    assert model.fc1.out_features == 32
    with pytest.raises(ValueError, match=r"x must be \[..., 8\]"):
        model(torch.randn(3, 7, device=device))
    with pytest.raises(ValueError, match=r"dropout must be a probability in \[0, 1\), got -1"):
        model.dropout = -1
