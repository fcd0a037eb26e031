"""Runs of layers within networks, in Triton: found, chosen, shown, and the same in whatever way they are called."""

from __future__ import annotations

import pytest
import torch
from laplacian import laplacian
from networks import NETWORKS, SINGLE, operator_arguments
from stacks import gradients, twins
from torch import nn
from torch.testing import assert_close

import fusedres
from fusedres import FusedResidualStack, Network, dispatch, reference, run_launch
from fusedres.run_ops import segments

pytestmark = pytest.mark.backends("triton")


@pytest.fixture
def launches(monkeypatch):
    """(direction, layers) of every launch of a run's kernel."""
    found = []

    def counted(name):
        call = getattr(run_launch, name)
        place = 0 if name == "forward" else 1
        return lambda *arguments: (found.append((name, len(arguments[place].layers))), call(*arguments))[1]

    for name in ("forward", "backward"):
        monkeypatch.setattr(run_launch, name, counted(name))
    return found


def spans(module):
    return [(one.first, one.last, one.run is not None) for one in segments(module._description.spec)]


def test_runs_are_neighbours_of_one_width_and_kind():
    stack = FusedResidualStack([5, 8, 8, 8, 8, 3, 3, 3], last_activation="none")
    assert spans(stack) == [(0, 1, False), (1, 4, True), (4, 5, False), (5, 6, False), (6, 7, False)]
    assert spans(FusedResidualStack([4] * 5, last_activation="none")) == [(0, 3, True), (3, 4, False)]
    assert spans(FusedResidualStack([4] * 5, skip=None)) == [(0, 4, True)]
    separate = Network([torch.zeros(4, 4)] * 3)
    assert [one.run for one in segments(separate.spec)] == [None] * 3
    stacked = Network(torch.zeros(3, 4, 4), last_activation="none")  # whose last layer is in no run
    assert [(one.first, one.last) for one in segments(stacked.spec)] == [(0, 2), (2, 3)]


def test_one_launch_each_way(device, launches):
    stack, _ = twins([6] * 40, {}, device)
    stack(torch.randn(9, 6, device=device)).sum().backward()
    assert launches == [("forward", 39), ("backward", 39)]
    launches.clear()
    with torch.no_grad():
        stack(torch.randn(9, 6, device=device))
    with fusedres.eager():
        stack(torch.randn(9, 6, device=device))
    with torch.autocast(device, torch.bfloat16):  # rows stay float32, as they do in eager
        assert stack(torch.randn(9, 6, device=device)).dtype == torch.float32
    assert launches == [("forward", 39)]


@pytest.mark.parametrize("branch_scale", ["scalar", "channel"])
def test_autocast(branch_scale, device, launches):
    """By the run's kernels where its rows are in autocast's dtype and stay there."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float16  # Triton's interpreter computes bf16 wrongly
    options = {"learn_branch_scale": branch_scale, "learn_skip_scale": True}
    stack, eager = twins([5, 6, 6, 6, 6, 2], options, device)
    x, found = torch.randn(9, 5, device=device), []
    for model in (stack, eager):
        with torch.autocast(device, dtype):
            y = model(x)
        y.float().square().sum().backward()
        found.append(y)
    assert found[0].dtype == found[1].dtype == (dtype if branch_scale == "scalar" else torch.float32)
    assert launches == ([("forward", 3), ("backward", 3)] if branch_scale == "scalar" else [])
    assert_close(*found, rtol=0.02, atol=0.02)
    theirs = dict(eager.named_parameters())
    for name, gradient in stack.by_layer({name: p.grad for name, p in stack.named_parameters()}).items():
        assert gradient.dtype == torch.float32
        assert_close(gradient, theirs[name].grad, rtol=0.03, atol=0.03)


def test_mixed_widths_are_shown(device, fused, capsys):
    stack, _ = twins([5, 8, 8, 8, 3, 3], {"skip": "projection"}, device)
    calls = fusedres.explain(nn.Sequential(stack), torch.randn(70, 5, device=device))
    assert [call.name for call in calls] == ["0.layers.0", "0.layers.1-2", "0.layers.3", "0.layers.4"]
    assert {call.backend for call in calls} == {fused}
    printed = capsys.readouterr().out
    assert "0.layers.1-2 [70, 8] -> [70, 8] torch.float32, 2 layers: triton" in printed
    assert (
        "2 × gelu, order pre, skip identity, in one kernel each way; rows between layers kept for backward" in printed
    )
    assert "backward StackTile(" in printed


@pytest.mark.parametrize("width", [17, 130, 257])
def test_every_way_to_call_it_gives_the_same(width, device, launches):
    """As a run where there is a tile, layer by layer where there is none, and through the operator."""
    options = {"learn_skip_scale": True, "learn_branch_scale": "channel", "order": "post", "activation": "silu"}
    stack, eager = twins([width] * 4, options, device)
    x, g = torch.randn(70, width, device=device), torch.randn(70, width, device=device)
    ours, theirs = gradients(stack, x, g), gradients(eager, x, g)
    assert len(launches) == (0 if width == 257 else 2)
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    named = dict(zip(dict(stack.named_parameters()), torch.autograd.grad(y, list(stack.parameters()), g), strict=True))
    for name, value in theirs.items():
        assert_close(ours[name], value, rtol=1e-3, atol=1e-4 * max(1.0, value.abs().max().item()))
    for name, value in stack.by_layer(named).items():
        assert_close(value, theirs[name], rtol=1e-3, atol=1e-4 * max(1.0, value.abs().max().item()))


def test_many_rows_of_wide_layers_go_layer_by_layer(device, launches, monkeypatch):
    monkeypatch.setattr(dispatch, "STACK_FEW_ROWS", 20)
    stack, eager = twins([130] * 3, {}, device)
    few, many = torch.randn(20, 130, device=device), torch.randn(21, 130, device=device)
    with torch.no_grad():
        for x, ways in ((few, 1), (many, 1), (few, 2)):
            assert_close(stack(x), eager(x), rtol=1e-3, atol=1e-4)
            assert len(launches) == ways
        for is_dynamic, ways in ((False, 3), (True, 3)):  # once as many rows as are compiled for, once any number
            compiled = torch.compile(stack, fullgraph=True, backend="aot_eager", dynamic=is_dynamic)
            assert_close(compiled(few), eager(few), rtol=1e-3, atol=1e-4)
            assert len(launches) == ways
        assert_close(compiled(many), eager(many), rtol=1e-3, atol=1e-4)
        assert len(launches) == 3


@pytest.mark.parametrize("options", [{}, {"drop_path": 0.4}, {"branch_scale": [0.1 * i for i in range(7)]}], ids=str)
def test_recomputing_gives_the_same_bits(options, device):
    x, g = torch.randn(45, 6, device=device), torch.randn(45, 6, device=device)
    found = [gradients(twins([6] * 8, options, device, recompute=way)[0], x, g) for way in (False, True)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_thousand_layers(device, launches):
    stack, eager = twins([16] * 1001, {"branch_scale": 0.03, "activation": "relu"}, device, recompute=True)
    x, g = torch.randn(3, 16, device=device), torch.randn(3, 16, device=device)
    ours, theirs = gradients(stack, x, g), gradients(eager, x, g)
    assert launches == [("forward", 1000), ("backward", 1000)]
    for kind in ("y", "dx", "weight", "bias"):
        a, b = (torch.cat([t[name].flatten() for name in theirs if name.endswith(kind)]) for t in (ours, theirs))
        assert_close(a, b, rtol=1e-2, atol=1e-3 * b.abs().max().item())


def test_recompute_auto_goes_by_what_is_kept():
    assert dispatch.stack_keeps(64, 65536, 128, torch.bfloat16, "auto") == 1
    assert dispatch.stack_keeps(64, 1 << 20, 128, torch.bfloat16, "auto") == 8
    assert dispatch.stack_keeps(64, 65536, 128, torch.bfloat16, False) == 1
    assert dispatch.stack_keeps(1000, 1, 16, torch.float32, True) == 32


@pytest.mark.parametrize("width", [20, 130])
def test_batch_invariance(width, device, monkeypatch):
    monkeypatch.setattr(dispatch, "STACK_FEW_ROWS", 100)
    stack, _ = twins([width] * 4, {}, device)
    x = torch.randn(200, width, device=device)
    with torch.no_grad(), fusedres.batch_invariant():
        assert torch.equal(stack(x)[:3], stack(x[:3]))


def test_transposed_and_expanded_inputs(device):
    stack, eager = twins([12] * 4, {}, device)
    for x in (torch.randn(12, 30, device=device).t(), torch.randn(1, 12, device=device).expand(30, 12)):
        assert_close(stack(x), eager(x), **SINGLE)
        (gradient,) = torch.autograd.grad(stack(x.requires_grad_()).sum(), x)
        assert_close(gradient, torch.autograd.grad(eager(x).sum(), x)[0], **SINGLE)
        x.requires_grad_(False)


def test_differentiated_again_and_batched(device):
    stack, eager = twins([3, 8, 8, 8, 1], {"activation": "tanh"}, device)
    x = torch.randn(6, 3, device=device)
    assert_close(laplacian(stack, x), laplacian(eager, x), rtol=1e-3, atol=1e-4)
    rows = torch.eye(6, device=device)[..., None]
    found = [
        torch.autograd.grad(model(x), list(model.parameters()), rows, is_grads_batched=True) for model in (stack, eager)
    ]
    ours = stack.by_layer(dict(zip(dict(stack.named_parameters()), (t[2] for t in found[0]), strict=True)))
    theirs = dict(zip(dict(eager.named_parameters()), (t[2] for t in found[1]), strict=True))
    for name, value in theirs.items():
        assert_close(ours[name], value, **SINGLE)


def test_what_changes_is_seen(device):
    stack, eager = twins([8] * 5, {}, device)
    x = torch.randn(5, 8, device=device)
    stack(x)
    for model in (stack, eager):
        with torch.no_grad():
            model.layers[2][0].weight.mul_(3)
    assert_close(stack(x), eager(x), **SINGLE)
    with pytest.raises(TypeError, match=r"layer 0: weight must be torch.float16, the dtype of x"):
        stack(x.half())
    if device == "cpu":  # eager has no float16 on a CPU worth the name
        stack.half()
        assert stack(x.half()).dtype == torch.float16


def test_scales_in_float64_under_autocast(device, launches):
    """Kernels compute scales in float32, and gradients come back in float64."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    stack, _ = twins([5, 6, 6, 6], {"learn_branch_scale": "scalar", "learn_skip_scale": True}, device)
    stack.double()
    with torch.autocast(device, dtype):
        y = stack(torch.randn(9, 5, device=device))
    y.float().sum().backward()
    assert launches == [("forward", 2), ("backward", 2)]
    assert {p.grad.dtype for p in stack.parameters()} == {torch.float64}


@pytest.mark.parametrize("name", ["medium", "projections", "stacked", "linear-head"])
def test_an_operator_of_any_network(name, device):
    """As one traced on a CPU, where it need not be a run, and called on a GPU."""
    case = NETWORKS[name]
    network = case.network(case.tensors())
    x, parameters, seeds, *encoded = operator_arguments(case)
    assert network.spec.is_run == (name == "stacked")
    x, parameters = x.to(device), [p.to(device) for p in parameters]
    y = torch.ops.fusedres.residual_network(x, parameters, seeds, *encoded)
    assert_close(y, reference.network(x, parameters, network.spec, seeds), **SINGLE)
    g, wanted = torch.randn_like(y), [True] * (1 + len(parameters))
    found = torch.ops.fusedres.residual_network_backward(g, x, parameters, seeds, *encoded, wanted)
    expected = reference.network_gradients(g, x, parameters, network.spec, seeds, wanted)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * max(1.0, theirs.abs().max().item()))
