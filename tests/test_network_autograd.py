"""A network's node in autograd's graph: what it keeps, what it costs, and that it can be differentiated again."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from networks import NETWORKS, SAME_BITS, SINGLE, Case, is_one_node, outcome
from test_operator import Log
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.autograd.profiler import profile
from torch.testing import assert_close

from fusedres import Network, dispatch, reference

pytestmark = pytest.mark.usefixtures("engine")


# ---------------------------------------------------------------------------------------------- one node


def test_one_node_for_all_layers():
    case = NETWORKS["medium"]
    tensors = case.tensors()
    y = case.network(tensors)(tensors["x"])
    assert is_one_node(y)
    assert {after.name() for after, _ in y.grad_fn.next_functions} == {"torch::autograd::AccumulateGrad"}


@contextmanager
def saved_bytes() -> Iterator[list[int]]:
    """The sizes of the memory that calls within leave for backward, beside their tensors."""
    found: list[int] = []

    def seen(t: Tensor) -> Tensor:
        if t.dtype == torch.uint8:
            found.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(seen, lambda t: t):
        yield found


def test_nothing_is_kept_without_gradients():
    """No node, and no memory for backward."""
    case = replace(NETWORKS["medium"], recompute=False)
    tensors = case.tensors()
    frozen = {name: t.detach() for name, t in tensors.items()}
    network = case.network(tensors)
    expected = network(tensors["x"]).detach()
    for context, call, given in (
        (torch.no_grad, network, tensors),
        (torch.inference_mode, network, tensors),
        (nullcontext, case.network(frozen), frozen),
    ):
        with context():
            call(given["x"])
            with saved_bytes() as saved, profile(profile_memory=True) as log:
                y = call(given["x"])
        assert y.grad_fn is None
        assert not saved
        assert allocated(log) == y.nbytes, "nothing but y"
        assert_close(y, expected, **SINGLE)


def allocated(log: Any) -> int:
    """Bytes that tensors took within a profile."""
    return sum(event.self_cpu_memory_usage for event in log.key_averages() if event.self_cpu_memory_usage > 0)


def test_what_recompute_keeps():
    kept = []
    for recompute in (False, True, "auto"):
        case = Case((64, 64, 64), leading=(40,), recompute=recompute)
        tensors = case.tensors()
        with saved_bytes() as saved:
            case.network(tensors)(tensors["x"])
        kept.append(sum(saved))
    assert kept[0] == kept[2] > 0
    assert kept[1] == 0


def test_auto_keeps_what_is_small():
    few, many = (dispatch.keeps(M, (64,) * 17, torch.float32, "blocks") for M in (1000, 1_000_000))
    assert (few, many) == (True, False)
    assert dispatch.keeps(65536, (64,) * 17, torch.float32, "lanes")
    assert dispatch.keeps(1_000_000, (1024, 1024), torch.float32, "layers")
    assert not dispatch.keeps(65536, (3,) * 14, torch.float32, "lanes")


def test_parameters_without_gradient_cost_nothing():
    """Backward takes memory for the gradients asked for alone, and they are the same bits."""
    case = Case((20, 20, 20), leading=(19,), skip_scale="scalar", branch_scale="channel")
    tensors = case.tensors()
    names = list(tensors)
    g = torch.randn(19, 20)
    full = outcome(lambda: case.network(tensors)(tensors["x"]), tensors, g)
    for wanted in (names, ["bias.1"], ["x"], ["weight.0", "skip_scale.1"], ["branch_scale.0", "bias.0"]):
        given = {name: t.detach().requires_grad_(name in wanted) for name, t in tensors.items()}
        for leaves in (given, tensors):  # where no others require a gradient, and where no others are asked for
            y = case.network(leaves)(leaves["x"])
            with profile(profile_memory=True) as log:
                found = torch.autograd.grad(y, [leaves[name] for name in wanted], g)
            assert allocated(log) == sum(t.nbytes for t in found)
            assert_close(found, tuple(full[f"d{name}"] for name in wanted), **SAME_BITS)


def test_memory_of_its_tensors_may_grow():
    y = Network([torch.randn(64, 64)])(torch.randn(1000, 64))
    expected = y.clone()
    y.resize_(2000, 64)
    assert torch.equal(y[:1000], expected)


@pytest.mark.skipif("FUSEDRES_SANITIZE" in os.environ, reason="sanitizers see memory that is never used twice")
def test_memory_of_its_tensors_comes_back():
    torch.use_deterministic_algorithms(False)  # which fills fresh memory, and takes it from torch then
    network, x = Network([torch.randn(64, 64)]), torch.randn(1000, 64)
    y = network(x)
    expected, place = y.clone(), y.data_ptr()
    y.resize_(2000, 64)
    again = network(x)
    assert again.data_ptr() == place
    assert torch.equal(again, expected)


def test_gradients_share_no_memory():
    torch.use_deterministic_algorithms(False)
    case = NETWORKS["projections"]
    tensors = case.tensors()
    found = torch.autograd.grad(case.network(tensors)(tensors["x"]).sum(), list(tensors.values()))
    assert len({t.untyped_storage().data_ptr() for t in found}) == len(found)


def test_a_gradient_outlives_the_others():
    """Small ones come in one block: each is a tensor with a storage of its own all the same, and keeps the block."""
    torch.use_deterministic_algorithms(False)  # which fills fresh memory, and takes it from torch then
    weights = [torch.randn(6, 6, requires_grad=True) for _ in range(5)]
    network, x = Network(weights), torch.randn(3, 6)
    y = network(x).sum()
    with profile(profile_memory=True) as log:
        first = torch.autograd.grad(y, weights)
    assert allocated(log) >= sum(g.nbytes for g in first), "the profiler is to see the block"
    one, expected = first[2], first[2].clone()
    assert [g.untyped_storage().nbytes() for g in first] == [6 * 6 * 4] * 5
    del first
    others = [torch.autograd.grad(network(torch.randn(3, 6)).sum(), weights) for _ in range(20)]
    assert_close(one, expected, **SAME_BITS)
    assert_close(one.resize_(7, 7).view(-1)[:36], expected.view(-1), **SAME_BITS)
    assert len({g.data_ptr() for some in others for g in some}) == 100


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_shared_tensors_sum_their_gradients(compiled):
    """One λ for all layers, and one weight for two of them."""
    x, weight, other = torch.randn(9, 20), torch.randn(20, 20) / 4, torch.randn(20, 20) / 4
    lam, bias = torch.tensor(0.8), torch.randn(20)
    leaves = [t.requires_grad_() for t in (weight, other, lam, bias)]
    network = Network([weight, other, weight], [bias, bias, None], skip_scale=lam)
    assert [id(t) for t in network.parameters] == [id(t) for t in (weight, bias, lam, other)]
    y = (torch.compile(network, fullgraph=True, backend="aot_eager") if compiled else network)(x)
    expected = x
    for w, b in ((weight, bias), (other, bias), (weight, None)):
        expected = reference.residual_linear(expected, w, b, skip_scale=lam)
    assert_close(y, expected, **SINGLE)
    g = torch.randn(9, 20)
    assert_close(torch.autograd.grad(y, leaves, g), torch.autograd.grad(expected, leaves, g), **SINGLE)


def test_a_saved_tensor_changed_in_place_is_an_error():
    case = Case((20, 20))
    tensors = case.tensors()
    y = case.network(tensors)(tensors["x"])
    with torch.no_grad():
        tensors["weight.0"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_backward_needs_nothing_but_its_node():
    """Neither the network, nor memory where it was: and a graph serves once unless it is retained."""
    case = Case((20, 20, 20), drop_path=0.5, recompute=False)
    tensors = case.tensors()
    leaves, g = list(tensors.values()), torch.randn(19, 20)
    torch.manual_seed(3)
    expected = torch.autograd.grad(case.network(tensors)(tensors["x"], training=True), leaves, g)
    torch.manual_seed(3)
    with save_on_cpu():
        y = case.network(tensors)(tensors["x"], training=True)
    gc.collect()
    for _ in range(2):
        assert_close(torch.autograd.grad(y, leaves, g, retain_graph=True), expected, **SAME_BITS)
    torch.autograd.grad(y, leaves, g)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, leaves, g)


def test_a_mode_around_backward_alone_sees_it():
    case = NETWORKS["medium"]
    tensors = case.tensors()
    y = case.network(tensors)(tensors["x"])
    with Log() as log:
        found = torch.autograd.grad(y.sum(), list(tensors.values()))
    assert log.seen.count("fusedres::residual_network_backward") == 1
    expected = torch.autograd.grad(case.network(tensors)(tensors["x"]).sum(), list(tensors.values()))
    assert_close(found, expected, **SINGLE)


def test_compiled_autograd_runs_it():
    from torch._dynamo import compiled_autograd

    case = NETWORKS["drop-path"]
    tensors = case.tensors()
    network = case.network(tensors)
    g = torch.randn(*case.leading, case.sizes[-1])
    torch.manual_seed(3)
    expected = torch.autograd.grad(network(tensors["x"], training=True), list(tensors.values()), g)
    torch.manual_seed(3)
    y = network(tensors["x"], training=True)
    with warnings.catch_warnings(), compiled_autograd._enable(torch.compile(backend="eager")):
        warnings.simplefilter("ignore")  # that it cannot look inside
        y.backward(g)
    assert_close(tuple(t.grad for t in tensors.values()), expected, **SAME_BITS)
    torch._dynamo.reset()


def test_a_batch_of_gradients_by_vmap():
    case = Case((6, 6, 6), leading=(4,))
    tensors = case.tensors()
    leaves, g = list(tensors.values()), torch.randn(3, 4, 6)
    y = case.network(tensors)(tensors["x"])
    found = torch.vmap(lambda g: torch.autograd.grad(y, leaves, g, retain_graph=True))(g)
    for i in range(3):
        expected = torch.autograd.grad(y, leaves, g[i], retain_graph=True)
        assert_close(tuple(t[i] for t in found), expected, **SINGLE)


# ---------------------------------------------------------------------------------------------- again


SMALL = {
    "lanes": Case((3, 3, 2), (4,), torch.float64, activation="silu", projections=True),
    "lanes-post": Case((3, 3, 3), (4,), torch.float64, activation="tanh", order="post"),
    "blocks": Case((17, 17), (5,), torch.float64, activation="sin"),
    "dots": Case((17, 17), (2,), torch.float64),
    "drop-path": Case((3, 3, 3), (6,), torch.float64, drop_path=0.4),
    "stacked": Case((3, 3, 3), (4,), torch.float64, stacked=True),
}


@pytest.mark.parametrize("mode", [nullcontext, Log], ids=["function", "operator"])
@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
def test_gradcheck_and_gradgradcheck(case, mode):
    """First derivatives by the kernels themselves, in float64; second ones by the formula from the same inputs."""
    is_large = max(case.sizes) > 16
    case = case if is_large else replace(case, skip_scale="scalar", branch_scale="channel")
    tensors = case.tensors()

    def network(*values: Tensor) -> Tensor:
        torch.manual_seed(1)
        given = dict(zip(tensors, values, strict=True))
        return case.network(given)(given["x"], training=True)

    with mode():
        assert torch.autograd.gradcheck(network, tuple(tensors.values()), fast_mode=is_large)
        assert torch.autograd.gradgradcheck(network, tuple(tensors.values()), fast_mode=is_large)


def test_a_batch_of_gradients():
    case = Case((6, 6, 6), leading=(4,))
    tensors = {name: t.detach() for name, t in case.tensors().items()}
    network = case.network(tensors)
    found = torch.autograd.functional.jacobian(network, tensors["x"], vectorize=True)
    assert_close(found, torch.autograd.functional.jacobian(network, tensors["x"]), **SINGLE)


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).square().sum())(x),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "vmap-of-grad": lambda f, x: torch.func.vmap(torch.func.grad(lambda x: f(x).square().sum()))(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).sum())(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms(transform):
    case = Case((6, 6, 4), leading=(3,))
    tensors = {name: t.detach() for name, t in case.tensors().items()}
    network = case.network(tensors)

    def layers(x: Tensor) -> Tensor:
        return case.by_layers(reference.residual_linear, {**tensors, "x": x})

    assert_close(transform(network, tensors["x"]), transform(layers, tensors["x"]), **SINGLE)
