"""A network as a registered operator: compiled, exported, seen by modes and tensor subclasses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from networks import NETWORKS, SAME_BITS, SINGLE, Case, Module, operator_arguments, outcome
from test_operator import Log
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torch.testing._internal.two_tensor import TwoTensor

from fusedres import Network, network_ops
from fusedres.kernels.cpu import plan

pytestmark = pytest.mark.usefixtures("engine")


# ---------------------------------------------------------------------------------------------- registered


OPERATORS = ["narrow", "medium", "projections", "drop-path", "stacked", "one-sample"]


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    arguments = operator_arguments(NETWORKS[name])
    torch.library.opcheck(torch.ops.fusedres.residual_network, arguments)


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck_backward(name):
    x, parameters, *rest = operator_arguments(NETWORKS[name])
    g = torch.randn_like(torch.ops.fusedres.residual_network(x, parameters, *rest)).requires_grad_()
    for wanted in ([True] * (1 + len(parameters)), [True, False] + [True] * (len(parameters) - 1)):
        torch.library.opcheck(
            torch.ops.fusedres.residual_network_backward,
            (g, x, parameters, *rest, wanted),
            # torch.compile has no double backward
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


def test_opcheck_seeds():
    # other numbers every time, so that comparing outputs (test_aot_dispatch_dynamic) cannot apply
    torch.library.opcheck(torch.ops.fusedres.draw_seeds, ([1, 2], 4), test_utils=("test_schema", "test_faketensor"))


def test_the_operators_take_an_empty_batch():
    x, *rest = operator_arguments(Case((6, 6, 4), leading=(0,)))
    y = torch.ops.fusedres.residual_network(x, *rest)
    assert y.shape == (0, 4)
    found = torch.ops.fusedres.residual_network_backward(y, x, *rest, [True] * 5)
    assert [t.shape for t in found] == [x.shape, *(t.shape for t in rest[0])]
    assert not any(t.any() for t in found)


def test_codes_say_all_of_a_plan():
    for case in NETWORKS.values():
        spec = case.network(case.tensors()).spec
        codes, numbers = plan.encoded(spec)
        other = plan.decoded(tuple(codes), tuple(numbers))
        assert torch.equal(plan.plan(other), plan.plan(spec))


def test_equal_layers_pass_as_one():
    codes, numbers = plan.encoded(Network(torch.zeros(1000, 4, 4), skip_scale=0.5).spec)
    assert (codes[0], codes[-1], len(codes), numbers) == (4, 1000, plan.CODES, [0.5, 1.0, 0.0])
    of_one_tensor = Network([torch.zeros(4, 4)] * 3).spec
    assert len(plan.encoded(of_one_tensor)[0]) == 3 * plan.CODES
    unlike = Network(torch.zeros(4, 4, 4), branch_scale=[[1.0, 1.0, 2.0, 2.0]], last_activation="none").spec
    assert [layer.slice for layer in plan.decoded(*map(tuple, plan.encoded(unlike))).layers] == [0, 1, 2, 3]
    assert plan.encoded(unlike)[0][plan.CODES - 1 :: plan.CODES] == [2, 1, 1]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["medium", "projections", "drop-path", "stacked"])
def test_compiled(name, backend):
    case = replace(NETWORKS[name], recompute=True)
    torch._dynamo.reset()
    tensors = case.tensors()
    network = case.network(tensors)
    compiled = torch.compile(lambda x: network(x, training=True), fullgraph=True, backend=backend)
    for rows in (19, 3, 70):
        tensors["x"] = torch.randn(rows, case.sizes[0], requires_grad=True)
        g = torch.randn(rows, case.sizes[-1])
        ours, theirs = (outcome(lambda f=f: f(tensors["x"]), tensors, g) for f in (compiled, by_training(network)))
        assert_close(ours, theirs, **SINGLE)
    torch._dynamo.reset()


def by_training(network: Network) -> Callable[[Tensor], Tensor]:
    return lambda x: network(x, training=True)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_with_a_dynamic_batch(strict):
    module = Module()
    rows = ({0: torch.export.Dim("rows")},)
    exported = torch.export.export(module, (torch.randn(5, 6),), dynamic_shapes=rows, strict=strict)
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert targets == ["fusedres.residual_network.default"]
    for n in (2, 9, 70):
        x = torch.randn(n, 6)
        assert_close(exported.module()(x), module(x), **SINGLE)


def test_traced_by_make_fx():
    module, x = Module(), torch.randn(5, 6)
    traced = make_fx(module, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x)
    assert "fusedres.residual_network.default" in {str(node.target) for node in traced.graph.nodes}
    other = torch.randn(70, 6)
    assert_close(traced(other), module(other), **SINGLE)


def test_a_dispatch_mode_sees_one_operator_each_way():
    module = Module()
    with Log() as log:
        module(torch.randn(3, 6)).sum().backward()
    assert log.seen.count("fusedres::residual_network") == 1
    assert log.seen.count("fusedres::residual_network_backward") == 1


def test_fake_tensors():
    module = Module()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = module(mode.from_tensor(torch.randn(3, 6)))
    assert y.shape == (3, 6)


def test_a_tensor_subclass():
    module, x = Module(), torch.randn(4, 6)
    y = module(TwoTensor(x, 2 * x))
    assert type(y) is TwoTensor
    assert_close(y.a, module(x), **SAME_BITS)
    assert_close(y.b, module(2 * x), **SAME_BITS)


def test_the_call_of_the_operator_is_the_networks_own():
    """The launcher and the operator decode the same plan: what one drops, the other does."""
    case = NETWORKS["drop-path"]
    tensors = case.tensors()
    network = case.network(tensors)
    torch.manual_seed(2)
    seeds = network_ops.draw_seeds(network.spec.dropping, case.depth)
    y = torch.ops.fusedres.residual_network(tensors["x"], network._tensors, seeds, *plan.encoded(network.spec), 0)
    torch.manual_seed(2)
    assert_close(network(tensors["x"], training=True), y, **SINGLE)
