"""fuse_ and unfuse_: what is found in which writing, that it computes the same, and what the report says."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from blocks import WRITINGS, D, Written, agrees
from torch import nn

import fusedres

pytestmark = pytest.mark.backends("cpu")


def pair(model):
    """The model fused, and as it was."""
    eager = deepcopy(model)
    report = fusedres.fuse_(model)
    return model, eager, report


def layers_in(call):
    return len(getattr(call.spec, "layers", [call]))


def formulas(report):
    """Of what runs in evaluation. A child that a forward never calls is fused by itself."""
    return [one.formula for one in report.fused if one.when != "training" and not one.module.endswith("net")]


@pytest.mark.parametrize("is_training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", WRITINGS)
def test_every_writing_is_found_and_computes_the_same(name, is_training, device):
    how, expected = WRITINGS[name]
    fused, eager, report = pair(Written(how).to(device).train(is_training))
    assert formulas(report) == expected
    for shape in [(3, 5, D), (D,)]:
        agrees(fused, eager, torch.randn(shape, device=device))
    fused.eval(), eager.eval()
    agrees(fused, eager, torch.randn(4, D, device=device))
    with torch.no_grad():
        calls = fusedres.explain(fused, torch.randn(4, D, device=device))
    assert sum(layers_in(call) for call in calls) == len(expected)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("name", ["function", "mlp", "post-scaled", "projection", "concat"])
def test_on_triton(name, device):
    how, expected = WRITINGS[name]
    fused, eager, report = pair(Written(how).to(device))
    assert formulas(report) == expected
    agrees(fused, eager, torch.randn(5, D, device=device))


class TwoConvolutions(nn.Module):
    """System C's block by matrices: φ after the sum."""

    def __init__(self):
        super().__init__()
        self.f1, self.f2, self.relu = nn.Linear(D, D), nn.Linear(D, D), nn.ReLU()

    def forward(self, x):
        return self.relu(self.f2(self.relu(self.f1(x))) + x)


def test_an_activation_after_the_sum_of_a_block(device):
    fused, eager, report = pair(nn.Sequential(TwoConvolutions(), TwoConvolutions()).to(device))
    assert formulas(report) == ["relu(x Wᵀ + b)", "relu(s + x Wᵀ + b)"] * 2
    agrees(fused, eager, torch.randn(5, D, device=device))


@pytest.mark.launches_nothing
def test_the_report_says_what_and_how_much_and_why_not(backend):
    model = nn.ModuleDict({"block": Written(WRITINGS["mlp-dropout"][0]), "head": nn.Linear(D, 2)})
    del model["block"].net
    report = fusedres.fuse_(model)
    fc1, fc2 = report.fused
    assert (fc1.linear, fc1.module, fc1.when, fc1.out_features) == ("block.fc1", "block", "always", 12)
    assert (fc2.linear, fc2.module, fc2.when, fc2.out_features) == ("block.fc2", "block", "evaluation", D)
    assert (fc1.passes, fc2.passes) == (
        2,
        2,
    )  # φ reads and writes; the sum reads two and writes one, and reads one still
    assert report.numbers_spared == 2 * 12 + 2 * D
    left = {layer.linear: layer.because for layer in report.left}
    assert left["head"] == "no activation and no addition follows it that a fused layer has"
    text = str(report)
    assert "2 of 7 linear layers fused, in 1 module" in text
    assert "block.fc2: s + x Wᵀ + b   in evaluation" in text
    assert "head: no activation" in text


@pytest.mark.launches_nothing
def test_a_model_with_nothing_to_fuse_is_not_touched(backend):
    model = nn.Sequential(nn.Conv1d(3, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(6, 2))
    before = [type(module) for module in model.modules()]
    report = fusedres.fuse_(model)
    assert not report.fused
    assert "none of 1 linear layers fused" in str(report)
    assert [type(module) for module in model.modules()] == before


def test_unfuse_restores_exactly(device):
    model = nn.Sequential(Written(WRITINGS["mlp"][0]), nn.Linear(D, D), nn.Dropout()).to(device)
    before = [(module, type(module), dict(vars(module))) for module in model.modules()]
    names = list(model.state_dict())
    fusedres.fuse_(model)
    assert type(model[0]) is not Written
    assert isinstance(model[0], Written)
    model(torch.randn(3, D, device=device))
    fusedres.unfuse_(model)
    for module, kind, attributes in before:
        assert type(module) is kind
        assert vars(module) == attributes
    assert list(model.state_dict()) == names
    assert not fusedres.explain(model, torch.randn(3, D, device=device))


def test_fusing_again_is_fusing_anew(device):
    model = Written(WRITINGS["function"][0]).to(device)
    first, second = str(fusedres.fuse_(model)), str(fusedres.fuse_(model))
    assert first == second
    assert type(model).__mro__[1] is Written
    model(torch.randn(3, D, device=device))


def test_what_forwards_depend_on_is_seen_when_it_changes(device):
    fused, eager, _ = pair(Written(WRITINGS["attribute"][0]).to(device))
    x = torch.randn(3, D, device=device)
    for number in (0.25, 3.0, 0.25, 1.0):
        fused.number = eager.number = number
        agrees(fused, eager, x)
    fused.net[1] = eager.net[1] = nn.Tanh()
    agrees(fused, eager, x)
    fused.net[0] = eager.net[0] = nn.Linear(D, D, device=device)
    agrees(fused, eager, x)
    fused.double(), eager.double()
    agrees(fused, eager, x.double())


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.other = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x, residual=None, *, scale=1.0, twice=False):
        h = x if residual is None else residual
        y = h + scale * torch.relu(self.fc(x))
        return torch.relu(self.other(y)) if twice else y


def test_each_kind_of_call_has_its_own_forward(device):
    fused, eager, _ = pair(Optional().to(device))
    x, r = torch.randn(3, D, device=device), torch.randn(3, D, device=device)
    for args, named in [
        ((x,), {}),
        ((x, r), {}),
        ((x, None), {}),
        ((x,), {"scale": 2.0}),
        ((x,), {"scale": 0.5, "twice": True}),
        ((x,), {"twice": True, "scale": 0.5}),
    ]:
        agrees(fused, eager, *(one for one in args if one is not None), **named)
    named = fused(x, residual=r, twice=True)
    torch.testing.assert_close(named, eager(x, residual=r, twice=True))


def test_operands_that_no_fused_layer_takes_are_computed_as_written(device):
    """A residual that is broadcast, an input of another dtype, and eager's own errors."""

    fused, eager, report = pair(Written(lambda m, x: x[:1] + torch.relu(m.fc(x))).to(device))
    assert formulas(report) == ["s + relu(x Wᵀ + b)"]
    x = torch.randn(5, D, device=device)
    torch.testing.assert_close(fused(x), eager(x))
    fused(torch.randn(1, D, device=device))  # where it is one row, it fits
    for wrong in (torch.randn(5, D + 1), torch.randn(5, D).double(), torch.ones(5, D, dtype=torch.int64)):
        with pytest.raises(RuntimeError) as theirs:
            eager(wrong.to(device))
        with pytest.raises(RuntimeError) as ours:
            fused(wrong.to(device))
        assert str(ours.value) == str(theirs.value)
    _, dual = torch.func.jvp(fused, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(dual, torch.func.jvp(eager, (x,), (torch.ones_like(x),))[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, device):
    fused, eager, _ = pair(Written(WRITINGS["mlp"][0]).to(device))
    fused(torch.randn(4, D, device=device))
    x = torch.randn(4, D, device=device)
    with torch.autocast(device, dtype):
        ours, theirs = fused(x), eager(x)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.launches_nothing
@pytest.mark.parametrize("call", [fusedres.fuse_, fusedres.unfuse_])
def test_no_module(call, backend):
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got function"):
        call(lambda x: x)


def test_attributes_that_are_no_numbers_are_watched_too(device):
    """A function, an object, one that was the class's until now."""

    class Attributes(nn.Module):
        gain = 1.0

        def __init__(self):
            super().__init__()
            self.fc, self.phi = nn.Linear(D, D), torch.relu

        def forward(self, x):
            return x + self.gain * self.phi(self.fc(x))

    fused, eager, report = pair(Attributes().to(device))
    assert formulas(report) == ["x + relu(x Wᵀ + b)"]
    x = torch.randn(3, D, device=device)
    for name, value in (("phi", torch.tanh), ("gain", 3.0), ("phi", lambda z: z * z), ("gain", 1.0)):
        setattr(fused, name, value), setattr(eager, name, value)
        torch.testing.assert_close(fused(x), eager(x))
