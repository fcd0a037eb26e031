"""The stack's answers: outputs, every gradient, depth, dropped layers, against eager and float64."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from networks import SINGLE, Case, is_one_node
from stacks import SIZES_A, every_stack, gradients, kind_of, twins
from tolerances import SINGLE_SUM, rule_for
from torch import nn
from torch.testing import assert_close

import fusedres
from fusedres import reference
from fusedres.kernels.cpu import launch
from fusedres.kernels.spec import WAYS, NetworkSpec

pytestmark = pytest.mark.backends("triton", "cpu")


# ------------------------------------------------------------------------------------------------ right answers


@every_stack
@pytest.mark.parametrize("leading", [(), (1,), (37,), (2, 3)], ids=str)
def test_outputs_and_gradients_are_as_near_to_float64_as_eager(sizes, options, leading, device):
    fused, eager = twins(sizes, options, device)
    exact = copy.deepcopy(eager).double()
    x, g = torch.randn(*leading, sizes[0], device=device), torch.randn(*leading, sizes[-1], device=device)
    ours, theirs, truth = gradients(fused, x, g), gradients(eager, x, g), gradients(exact, x.double(), g.double())
    assert list(ours) == list(truth)
    rows = max(1, x[..., 0].numel())
    for name, value in truth.items():
        rule_for(torch.float32, kind_of(name)).check(name, ours[name], theirs[name], value, float(rows * len(sizes)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_other_dtypes(dtype, backend):
    fused, eager = (twin.to(dtype) for twin in twins([8, 8, 8, 8, 3], {"learn_skip_scale": True}))
    x, g = torch.randn(33, 8).to(dtype), torch.randn(33, 3).to(dtype)
    ours, theirs = gradients(fused, x, g), gradients(eager, x, g)
    truth = gradients(copy.deepcopy(eager).double(), x.double(), g.double())
    for name, value in truth.items():
        rule_for(dtype, kind_of(name)).check(name, ours[name], theirs[name], value, 33.0 * 4)


@pytest.mark.parametrize("width", [1, 3, 17, 64, 100, 128])
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_a_thousand_layers(width, backend):
    fused, eager = twins([width] * 1001, {"branch_scale": 0.03})
    rows = 5 if width > 17 else 40
    x, g = torch.randn(rows, width), torch.randn(rows, width)
    ours, theirs = gradients(fused, x, g), gradients(eager, x, g)
    truth = gradients(eager.double(), x.double(), g.double())
    assert len(dict(fused.named_parameters())) == 2
    for kind in ("y", "dx", "dweight", "dbias"):  # of all layers: one of a thousand is always the worst
        tensors = [
            torch.cat([t[name].flatten() for name in truth if kind_of(name) == kind]) for t in (ours, theirs, truth)
        ]
        rule = SINGLE_SUM if kind.startswith("dw") or kind == "dbias" else rule_for(torch.float32, kind)  # over rows
        rule.check(kind, *tensors, float(rows))


def test_it_is_the_same_as_layer_by_layer(device):
    sizes = [6, 6, 6, 4, 4, 4, 4, 9]
    stack, _ = twins(sizes, {"skip": "projection"}, device)
    layers = []
    for i, layer in enumerate(stack.layers):
        K, N = sizes[i : i + 2]
        one = fusedres.FusedResidualLinear(K, N, skip=layer.resolved_skip, device=device)
        names = {"weight": layer[0].weight, "bias": layer[0].bias}
        if layer.resolved_skip == "projection":
            names |= {f"projection.{name}": value for name, value in stack.projections[str(i)].named_parameters()}
        one.load_state_dict(names)
        layers.append(one)
    x = torch.randn(70, 6, device=device)
    assert_close(stack(x), nn.Sequential(*layers)(x), **SINGLE)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_it_is_one_node(backend):
    fused, _ = twins(SIZES_A, {})
    assert is_one_node(fused(torch.ones(3)))
    assert [tuple(p.shape) for p in fused.parameters()] == [(12, 3, 3), (36,), (1, 3), (1,)]


def test_rows_do_not_depend_on_the_batch_and_bits_repeat(device):
    stack, _ = twins([20] * 6, {}, device)
    x = torch.randn(130, 20, device=device)
    x[7] = float("nan")
    with torch.no_grad():
        y, again, part = stack(x), stack(x), stack(x[:100])
    assert torch.equal(y.nan_to_num(), again.nan_to_num())
    assert torch.equal(y[:100].nan_to_num(), part.nan_to_num())
    assert y.isnan().any(-1).nonzero().flatten().tolist() == [7]


@pytest.mark.launches_nothing
def test_empty_batches(device):
    stack, _ = twins([4, 4, 2], {}, device)
    x = torch.randn(0, 4, device=device, requires_grad=True)
    stack(x).sum().backward()
    assert x.grad.shape == (0, 4)
    assert all((p.grad == 0).all() for p in stack.parameters())


# ------------------------------------------------------------------------------------------------ stochastic depth


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("width", [6, 20, 140])
@pytest.mark.parametrize(
    "options", [{}, {"learn_branch_scale": "channel"}, {"learn_skip_scale": True}, {"order": "post"}], ids=str
)
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_layers_that_the_whole_batch_drops(rows, width, options, backend):
    fused, eager = twins([width] * 41, options | {"drop_path": 0.7})
    x, g = torch.randn(rows, width), torch.randn(rows, width)
    for _ in range(3):
        ours, theirs = gradients(fused, x, g), gradients(eager, x, g)
        idle = sum((theirs[f"layers.{i}.0.weight"] == 0).all().item() for i in range(40))
        assert idle > 0
        for name, value in theirs.items():
            assert_close(ours[name], value, rtol=1e-3, atol=1e-4 * max(1.0, value.abs().max().item()))


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_a_stack_all_of_whose_layers_are_dropped(backend):
    fused, _ = twins([8] * 4, {"drop_path": 0.999})
    x = torch.randn(2, 8, requires_grad=True)
    y = fused(x)
    y.sum().backward()
    assert torch.equal(y, x)
    assert torch.equal(x.grad, torch.ones(2, 8))
    assert all((p.grad == 0).all() for p in fused.parameters())


SKIPS = {
    "scaled": {"skip_scale": 0.5},
    "post": {"order": "post"},
    "projection": {"projections": True, "sizes": (20, 20, 24, 24)},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_a_dropped_layer_reads_no_weight(skip, way, backend):
    """In every way to cut the work, in backward at least: with weights that are NaN it gives the same bits."""
    case = Case(**{"sizes": (20, 20, 20, 20), "leading": (5,), "drop_path": 1 - 2**-20} | SKIPS[skip])
    tensors = {name: t.detach() for name, t in case.tensors().items()}
    network, seeds = case.network(tensors), torch.tensor([3, 4, 5])
    spec = NetworkSpec(
        [
            layer._replace(spec=layer.spec._replace(drop_path=layer.spec.drop_path if i == 1 else 0.0))
            for i, layer in enumerate(network.spec.layers)
        ]
    )
    x, whole = tensors["x"], list(network._tensors)
    broken = [t * float("nan") if t is network._tensors[spec.layers[1].slots.weight] else t for t in whole]
    wanted, found = [True] * (1 + len(whole)), []
    for parameters in (whole, broken):
        y = launch.network_forward(spec, parameters, x, seeds, WAYS.index(way))
        found.append((y, *launch.network_backward(y, spec, parameters, x, seeds, WAYS.index(way), wanted)))
    assert all(torch.equal(*pair) and pair[0].isfinite().all() for pair in zip(*found, strict=True))
    assert_close(found[0][0], reference.network(x, whole, spec, seeds), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found[0][1:], reference.network_gradients(y, x, whole, spec, seeds, wanted), strict=True):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize("skip_scale", [1.0, 0.5])
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_a_layer_that_the_whole_batch_drops_is_not_computed(skip_scale, backend):
    def seconds(drop_path):
        stack, _ = twins([256] * 201, {"drop_path": drop_path, "skip_scale": skip_scale})
        x = torch.randn(1, 256)
        times = []
        for _ in range(7):
            start = time.perf_counter()
            with torch.no_grad():
                stack(x)
            times.append(time.perf_counter() - start)
        return min(times)

    assert seconds(0.99) < 0.4 * seconds(0.0)
