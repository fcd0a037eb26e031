"""Whole networks on the CPU: outputs and every gradient against float64, and all that PyTorch may do with one."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import pytest
import torch
from test_operator import LAYOUTS, Log
from tolerances import rule_for
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import save_on_cpu
from torch.autograd.profiler import profile
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torch.testing._internal.two_tensor import TwoTensor

import fusedres
from fusedres import Network, dispatch, native, network_ops, philox, reference
from fusedres.dispatch import Eager, Way
from fusedres.kernels.cpu import launch, plan
from fusedres.kernels.spec import WAYS
from fusedres.studies.networks import FusedProjectionStack, FusedShapeGatedStack

SAME_BITS = {"rtol": 0.0, "atol": 0.0}
SINGLE = {"rtol": 1e-4, "atol": 2e-5}  # two computations in single precision of numbers near one


@pytest.fixture(autouse=True)
def _engine(monkeypatch) -> Iterator[None]:
    """The C++ engine, in the place of the interpreter that the rest of the suite runs on a CPU."""
    if reason := native.missing():
        pytest.skip(reason)
    if find_spec("triton") is not None:
        import fusedres.kernels.triton.layer_backward  # noqa: F401 : interpreted, as later tests expect it
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch._cached_backend.cache_clear()
    yield
    dispatch._cached_backend.cache_clear()


@dataclass
class Case:
    """A network; scales "scalar" and "channel" are learned by every layer, numbers are not."""

    sizes: tuple[int, ...]
    leading: tuple[int, ...] = (19,)
    dtype: torch.dtype = torch.float32
    activation: str = "gelu"
    approximate: str = "none"
    order: str = "pre"
    bias: bool = True
    projections: bool = False  # where sizes differ
    skip: str | None = "auto"
    skip_scale: float | str = 1.0
    branch_scale: float | str = 1.0
    last_activation: str = "same"
    drop_path: float = 0.0
    recompute: bool | str = "auto"
    stacked: bool = False  # every parameter [L, ...]

    def tensors(self) -> dict[str, Tensor]:
        """Leaves "x", and "weight.0", "bias.0" and so on; weights scale as K ** -0.5, so that outputs stay near one."""
        made = {"x": torch.randn(*self.leading, self.sizes[0])}
        for i, (K, N) in enumerate(pairwise(self.sizes)):
            made[f"weight.{i}"] = torch.randn(N, K) * K**-0.5
            if self.bias:
                made[f"bias.{i}"] = torch.randn(N) * 0.5
            if self.projections and K != N:
                made[f"projection_weight.{i}"] = torch.randn(N, K) * K**-0.5
                if self.bias:
                    made[f"projection_bias.{i}"] = torch.randn(N) * 0.5
            if self.skip_scale == "scalar" and self.has_skip(i):
                made[f"skip_scale.{i}"] = torch.rand(()) * 0.5 + 0.5
            if isinstance(self.branch_scale, str):
                made[f"branch_scale.{i}"] = torch.rand(()) + 0.5 if self.branch_scale == "scalar" else torch.randn(N)
        if self.stacked:
            names = dict.fromkeys(name.partition(".")[0] for name in made if name != "x")
            runs = {
                name: torch.stack([t for other, t in made.items() if other.startswith(f"{name}.")]) for name in names
            }
            made = {"x": made["x"], **runs}
        return {name: t.to(self.dtype).requires_grad_() for name, t in made.items()}

    def has_skip(self, i: int) -> bool:
        return self.skip is not None and (self.sizes[i] == self.sizes[i + 1] or self.projections)

    @property
    def depth(self) -> int:
        return len(self.sizes) - 1

    def scale(self, name: str, i: int, tensors: dict[str, Tensor]) -> float | Tensor:
        value = getattr(self, name)
        return tensors.get(f"{name}.{i}", 1.0) if isinstance(value, str) else value

    def network(self, tensors: dict[str, Tensor]) -> Network:
        def of(name: str) -> Any:
            return [tensors.get(f"{name}.{i}") for i in range(self.depth)]

        described: dict[str, Any]
        if self.stacked:
            described = {"weights": tensors["weight"], "biases": tensors.get("bias")}
            described |= {name: tensors.get(name, getattr(self, name)) for name in ("skip_scale", "branch_scale")}
        else:
            described = {"weights": of("weight"), "biases": of("bias")}
            described |= {"projection_weights": of("projection_weight"), "projection_biases": of("projection_bias")}
            for name in ("skip_scale", "branch_scale"):
                described[name] = [self.scale(name, i, tensors) for i in range(self.depth)]
        options = ("activation", "approximate", "order", "skip", "last_activation", "drop_path", "recompute")
        return Network(**described, **{name: getattr(self, name) for name in options})

    def by_layers(self, layer: Callable[..., Tensor], tensors: dict[str, Tensor]) -> Tensor:
        """The network by calls of one layer each."""
        if self.stacked:
            runs = {name: t for name, t in tensors.items() if name != "x"}
            tensors = {f"{name}.{i}": t[i] for name, t in runs.items() for i in range(self.depth)} | {"x": tensors["x"]}
        x = tensors["x"]
        for i in range(self.depth):
            is_last = i == self.depth - 1 and self.last_activation == "none"
            x = layer(
                x,
                tensors[f"weight.{i}"],
                tensors.get(f"bias.{i}"),
                activation="none" if is_last else self.activation,
                approximate="none" if is_last else self.approximate,
                order=self.order,
                skip=self.skip,
                skip_scale=self.scale("skip_scale", i, tensors),
                branch_scale=self.scale("branch_scale", i, tensors),
                projection_weight=tensors.get(f"projection_weight.{i}"),
                projection_bias=tensors.get(f"projection_bias.{i}"),
                drop_path=self.drop_path,
            )
        return x


def outcome(call: Callable[[], Tensor], tensors: dict[str, Tensor], g: Tensor) -> dict[str, Tensor]:
    """y, and the gradient of every tensor."""
    torch.manual_seed(1)
    y = call()
    found = torch.autograd.grad(y, list(tensors.values()), g.to(y.dtype))
    return {"y": y.detach(), **{f"d{name}": t for name, t in zip(tensors, found, strict=True)}}


def check(case: Case, layout: Callable[[str, Tensor], Tensor] = lambda name, t: t) -> None:
    """The network is as near to float64 as its layers in eager PyTorch are, in y and in every gradient."""
    tensors = case.tensors()
    wide = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    g = layout("g", torch.randn(*case.leading, case.sizes[-1]))

    def of(call: Callable[[dict[str, Tensor]], Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        return outcome(lambda: call({name: layout(name, t) for name, t in leaves.items()}), leaves, g)

    fused = of(lambda given: case.network(given)(given["x"], training=True), tensors)
    eager, truth = (of(lambda given: case.by_layers(reference.residual_linear, given), ts) for ts in (tensors, wide))
    for name in truth:
        kind = name.partition(".")[0]
        terms = max(1.0, truth["y"].numel() / max(truth[name].numel(), 1)) / (1 - case.drop_path)
        rule_for(case.dtype, kind).check(name, fused[name], eager[name], truth[name], terms)


def forced(monkeypatch, name: str) -> None:
    """Every network goes this way."""
    way = Way(WAYS.index(name), name, "this test says so")
    monkeypatch.setattr(dispatch, "cpu_way", lambda M, widths, dtype: way)


# ---------------------------------------------------------------------------------------------- right


NETWORKS = {
    "narrow": Case((3, 3, 3, 3, 1)),
    "narrow-many-rows": Case((3, 3, 5, 5), leading=(700,)),
    "deep-and-narrow": Case((6,) * 30, branch_scale=0.3),
    "one-layer": Case((21, 21)),
    "one-row": Case((21, 40, 40, 7), leading=(1,)),
    "one-sample": Case((21, 40, 40, 7), leading=()),
    "medium": Case((33, 64, 64, 64, 10), leading=(150,)),
    "exact-tiles": Case((64, 64, 64), leading=(128,)),
    "wide": Case((130, 200, 200, 17), leading=(70,)),
    "mixed-widths": Case((5, 150, 3, 64, 64, 1), leading=(40,)),
    "leading-dimensions": Case((18, 18, 18), leading=(2, 3, 4)),
    "no-bias": Case((20, 20, 20), bias=False),
    "projections": Case((24, 24, 16, 8, 1), projections=True, skip_scale="scalar", branch_scale="scalar"),
    "projections-wide": Case((140, 24, 160), projections=True, skip_scale="scalar", branch_scale="channel"),
    "numbers": Case((20, 20, 20), skip_scale=0.7, branch_scale=-0.5),
    "no-skip": Case((20, 20, 20), skip=None, branch_scale="channel"),
    "linear-head": Case((20, 20, 3), last_activation="none"),
    "post-linear-head": Case((20, 20, 20), order="post", last_activation="none", skip_scale="scalar"),
    "drop-path": Case((20, 20, 20), leading=(5, 30), drop_path=0.4, skip_scale="scalar", branch_scale="channel"),
    "stacked": Case((20,) * 5, stacked=True, skip_scale="scalar", branch_scale="channel"),
    "stacked-scalars": Case((5,) * 5, stacked=True, skip_scale="scalar", branch_scale="scalar", order="post"),
}
every_network = pytest.mark.parametrize("case", NETWORKS.values(), ids=NETWORKS)


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@every_network
def test_against_float64(case, recompute):
    check(replace(case, recompute=recompute))


@pytest.mark.parametrize("order", ["pre", "post"])
@pytest.mark.parametrize("activation", ["gelu", "gelu-tanh", "relu", "silu", "tanh", "sin", "none"])
def test_every_activation_and_order(activation, order):
    phi, approximate = ("gelu", "tanh") if activation == "gelu-tanh" else (activation, "none")
    case = Case((21, 21, 7), order=order, activation=phi, approximate=approximate, projections=True)
    check(replace(case, skip_scale="scalar", branch_scale="channel"))


BFLOAT16 = ["narrow", "medium", "wide", "projections", "numbers", "post-linear-head", "drop-path", "stacked"]


@pytest.mark.parametrize("name", BFLOAT16)
def test_bfloat16(name):
    choice = dispatch.backend(torch.device("cpu"), torch.bfloat16)
    if isinstance(choice, Eager):
        pytest.skip(choice.because)
    check(replace(NETWORKS[name], dtype=torch.bfloat16))


WIDE_ENOUGH = {"lanes": (3, 3, 7, 7), "dots": (5, 33, 33, 150), "blocks": (5, 33, 33, 128), "layers": (5, 33, 33, 150)}


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("rows", [1, 3, 4, 65, 200])
@pytest.mark.parametrize("way", WAYS)
def test_every_way(way, rows, recompute, monkeypatch):
    forced(monkeypatch, way)
    case = Case(WIDE_ENOUGH[way], leading=(rows,), projections=True, recompute=recompute)
    check(replace(case, skip_scale="scalar", branch_scale="channel"))


@pytest.fixture(params=[1, 2])
def threads(request) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("way", WAYS)
def test_two_runs_give_the_same_bits(way, threads, monkeypatch):
    forced(monkeypatch, way)
    case = Case(WIDE_ENOUGH[way], leading=(333,), projections=True, skip_scale="scalar", branch_scale="channel")
    check(case)
    tensors, g = case.tensors(), torch.randn(333, case.sizes[-1])
    network = case.network(tensors)
    first, second = (outcome(lambda: network(tensors["x"]), tensors, g) for _ in range(2))
    assert_close(first, second, **SAME_BITS)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("what", ["x", "g", "weight", "bias", "projection_weight", "branch_scale"])
@pytest.mark.parametrize("sizes", [(3, 5, 5), (33, 40, 40), (33, 140, 140)], ids=["lanes", "blocks", "layers"])
def test_any_strides(sizes, what, layout):
    case = Case(sizes, leading=(2, 9), projections=True, branch_scale="channel")
    check(case, lambda name, t: layout(t) if name.partition(".")[0] == what else t)


def test_lazily_negated_tensors_keep_their_sign():
    x, weight, g = (torch._neg_view(torch.randn(*shape)) for shape in ((9, 16), (16, 16), (9, 16)))
    outcomes = []
    for tensors in ((x, weight, g), tuple(t.resolve_neg().clone() for t in (x, weight, g))):
        weight = tensors[1].detach().requires_grad_()
        network = Network([weight])
        with torch.no_grad():
            y = network(tensors[0])
        outcomes.append([y, *torch.autograd.grad(network(tensors[0]), weight, tensors[2])])
    assert_close(*outcomes, **SAME_BITS)


@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)], ids=str)
def test_an_empty_batch(leading):
    case = Case((6, 6, 4), leading=leading)
    tensors = case.tensors()
    found = outcome(lambda: case.network(tensors)(tensors["x"]), tensors, torch.randn(*leading, 4))
    assert found["y"].shape == (*leading, 4)
    assert not any(t.any() for t in found.values())


# ---------------------------------------------------------------------------------------------- one node


def test_one_node_for_all_layers():
    case = NETWORKS["medium"]
    tensors = case.tensors()
    y = case.network(tensors)(tensors["x"])
    assert is_one_node(y)
    assert {after.name() for after, _ in y.grad_fn.next_functions} == {"torch::autograd::AccumulateGrad"}


def is_one_node(y: Tensor) -> bool:
    return "ResidualNetwork" in y.grad_fn.name()


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


def test_memory_of_its_tensors_comes_back_and_may_grow():
    torch.use_deterministic_algorithms(False)  # which fills fresh memory, and takes it from torch then
    network, x = Network([torch.randn(64, 64)]), torch.randn(1000, 64)
    y = network(x)
    expected, place = y.clone(), y.data_ptr()
    y.resize_(2000, 64)
    assert torch.equal(y[:1000], expected)
    assert y.data_ptr() != place
    again = network(x)
    assert again.data_ptr() == place
    assert torch.equal(again, expected)


def test_gradients_share_no_memory():
    case = NETWORKS["projections"]
    tensors = case.tensors()
    found = torch.autograd.grad(case.network(tensors)(tensors["x"]).sum(), list(tensors.values()))
    assert len({t.untyped_storage().data_ptr() for t in found}) == len(found)


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


# ---------------------------------------------------------------------------------------------- drop path


def test_drop_path_drops_what_the_layers_would():
    case = Case((20, 20, 20, 20), leading=(50,), drop_path=0.5)
    tensors = case.tensors()
    network = case.network(tensors)
    torch.manual_seed(5)
    y = network(tensors["x"], training=True)
    after = torch.rand(3)
    torch.manual_seed(5)
    expected = case.by_layers(fusedres.functional.residual_linear, tensors)
    assert_close(y, expected, **SINGLE)
    assert torch.equal(after, torch.rand(3)), "and leaves the generator where they do"
    with torch.no_grad():
        torch.manual_seed(5)
        assert_close(network(tensors["x"], training=True), y, **SINGLE)
        assert_close(network(tensors["x"]), replace(case, drop_path=0.0).by_layers(reference.residual_linear, tensors))


def test_drop_path_by_layer():
    x, weights = torch.randn(200, 8), [torch.randn(8, 8) / 3 for _ in range(3)]
    network = Network(weights, drop_path=[0.0, 0.5, 0.0])
    torch.manual_seed(5)
    y = network(x, training=True)
    torch.manual_seed(5)
    expected = x
    for weight, drop_path in zip(weights, (0.0, 0.5, 0.0), strict=True):
        expected = reference.residual_linear(expected, weight, drop_path=drop_path)
    assert_close(y, expected, **SINGLE)


@pytest.mark.parametrize("layers", [[0, 1, 2, 3], [1, 3], [2]], ids=str)
def test_seeds_drawn_at_once_are_those_drawn_one_by_one(layers):
    torch.manual_seed(7)
    seeds = philox.draw_seeds(layers, 4)
    after = torch.rand(3)
    torch.manual_seed(7)
    assert [int(seeds[i]) for i in layers] == [int(philox.draw_seed()) for _ in layers]
    assert all(seeds[i] == 0 for i in range(4) if i not in layers)
    assert torch.equal(after, torch.rand(3))


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


# ---------------------------------------------------------------------------------------------- registered


def operator_arguments(case: Case) -> tuple:
    tensors = case.tensors()
    network = case.network(tensors)
    seeds = philox.draw_seeds(network.spec.dropping, case.depth) if case.drop_path else None
    return (tensors["x"], list(network._tensors), seeds, *plan.encoded(network.spec))


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


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(6, 6) / 3 for _ in range(3))
        self.network = Network(self.weights)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x, self.training)


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


# ---------------------------------------------------------------------------------------------- choices


def test_explain_tells_the_way_and_its_reason(capsys):
    case = NETWORKS["medium"]
    tensors = case.tensors()
    (call,) = fusedres.explain(case.network(tensors), tensors["x"])
    assert (call.backend, call.M, call.K, call.N, call.way.name) == ("native", 150, 33, 10, "blocks")
    printed = capsys.readouterr().out
    assert printed.strip() == str(call)
    for words in ("network [150, 33] -> [150, 10] torch.float32, 4 layers: native", "no width is above 128", "threads"):
        assert words in printed
    assert "2 × gelu, order pre, skip none; 2 × gelu, order pre, skip identity; activations kept" in printed
    fusedres.explain(replace(case, recompute=True).network(tensors), tensors["x"])
    assert "activations computed again in backward" in capsys.readouterr().out


def test_the_table_of_ways():
    def way(M: int, *widths: int) -> str:
        return dispatch.cpu_way(M, widths, torch.float32).name

    assert [way(M, 3, 15) for M in (1, 100_000)] == ["lanes", "lanes"]
    assert [way(M, 3, 16) for M in (dispatch.DOTS_UP_TO, dispatch.DOTS_UP_TO + 1)] == ["dots", "blocks"]
    assert [way(100, 64, width, 1) for width in (128, 129)] == ["blocks", "layers"]


def test_where_eager_is_quicker_it_runs(monkeypatch):
    monkeypatch.setattr(dispatch, "cpu_way", lambda M, widths, dtype: Eager("this test says so"))
    case = NETWORKS["medium"]
    tensors = case.tensors()
    network = case.network(tensors)
    (call,) = fusedres.explain(network, tensors["x"])
    assert (call.backend, call.choice.because) == ("eager", "this test says so")
    assert not is_one_node(network(tensors["x"]))
    with Log() as log:  # an operator that is called has no choice but its own kernels
        y = torch.ops.fusedres.residual_network(*operator_arguments(case))
    assert y.shape == (150, 10)
    assert "fusedres::residual_network" in log.seen


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_layer_by_layer_where_the_engine_is_not(dtype, monkeypatch):
    """In a dtype that it has not, with a reason for each layer; and within fusedres.eager()."""
    case = Case((6, 6, 4), dtype=dtype)
    tensors = case.tensors()
    network = case.network(tensors)
    with fusedres.eager() if dtype == torch.float32 else nullcontext():
        calls = fusedres.explain(network, tensors["x"])
        y = network(tensors["x"])
    assert [call.backend for call in calls] == ["eager", "eager"]
    expected = "fusedres.eager() is in force" if dtype == torch.float32 else "no kernels for torch.float16"
    assert expected in calls[0].choice.because
    assert_close(y, case.by_layers(reference.residual_linear, tensors))


def test_autocast_goes_layer_by_layer():
    case = Case((6, 6, 4))
    tensors = case.tensors()
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = case.network(tensors)(tensors["x"]), case.by_layers(reference.residual_linear, tensors)
    assert y.dtype == expected.dtype
    assert_close(y, expected, rtol=0.05, atol=0.05)


# ---------------------------------------------------------------------------------------------- bound


def test_it_sees_what_becomes_of_its_tensors():
    module, x = Module(), torch.randn(5, 6)

    def check_now() -> None:
        expected = x.to(module.weights[0].dtype)
        given = expected.clone()
        for weight in module.weights:
            expected = reference.residual_linear(expected, weight)
        with torch.no_grad():
            assert_close(module(given), expected.detach(), **SINGLE)
        assert_close(module(given), expected, **SINGLE)

    check_now()
    with torch.no_grad():
        module.weights[1].mul_(-2)
    check_now()
    module.weights[0].data = torch.randn(6, 6)
    check_now()
    module.load_state_dict({name: torch.randn(6, 6) for name in module.state_dict()})
    check_now()
    module.double()
    check_now()


def test_copies_and_pickles_are_bound_to_tensors_of_their_own():
    module, x = Module(), torch.randn(5, 6)
    with torch.no_grad():
        expected = module(x)
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert_close(other(x), expected, **SAME_BITS)
            assert other.network.parameters[0] is other.weights[0]
            other.weights[0].zero_()
            assert not torch.equal(other(x), expected)
            assert_close(module(x), expected, **SAME_BITS)


def test_its_handle_goes_with_it(monkeypatch):
    released: list[int] = []
    unbind = launch.unbind
    monkeypatch.setattr(launch, "unbind", lambda handle: (released.append(handle), unbind(handle)))
    network = Network([torch.randn(6, 6)])
    with torch.no_grad():
        network(torch.randn(2, 6))
    handle = network._handle
    del network
    gc.collect()
    assert released == [handle]
    with pytest.raises(RuntimeError, match="is not bound"):
        launch.run(handle, torch.randn(2, 6), 0, None, False)


def test_what_it_tells_of_itself():
    network = Network([torch.randn(4, 6), torch.randn(4, 4)], [torch.randn(4), None])
    assert network.sizes == (6, 4, 4)
    assert repr(network) == "Network([6, 4, 4], 2 layers)"
    assert [tuple(t.shape) for t in network.parameters] == [(4, 6), (4,), (4, 4)]
    assert network.spec == Network(network.parameters[::2], [torch.randn(4), None]).spec
    assert hash(network.spec) == hash(Network(network.parameters[::2], [torch.randn(4), None]).spec)
    assert network.spec != Network(network.parameters[::2]).spec
    assert "…" in repr(Network(torch.randn(100, 4, 4)))


@pytest.mark.parametrize("build", [FusedShapeGatedStack, FusedProjectionStack])
def test_the_studies_go_in_one_call(build):
    stack, x = build([6, 6, 4, 4, 1]), torch.randn(3, 6)
    twin = build.__mro__[2]([6, 6, 4, 4, 1])
    twin.load_state_dict(stack.state_dict())
    assert is_one_node(stack(x))
    assert_close(stack(x), twin(x), **SINGLE)
    stack.layers[1][0].weight = twin.layers[1][0].weight = nn.Parameter(torch.randn(4, 6))
    assert_close(stack(x), twin(x), **SINGLE)
    assert_close(copy.deepcopy(stack)(x), twin(x), **SINGLE)
    values = {name: torch.randn_like(p) for name, p in stack.named_parameters()}
    called = [torch.func.functional_call(module, values, (x,)) for module in (stack, twin)]
    assert_close(*called, **SINGLE)
    assert_close(stack(x), twin(x), **SINGLE)
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), twin(x), **SINGLE)


# ---------------------------------------------------------------------------------------------- errors


W66, W46 = torch.zeros(6, 6), torch.zeros(4, 6)
ERRORS = {
    "no-layers": (lambda: Network([]), ValueError, "weights must be one tensor at least, got none"),
    "no-tensor": (lambda: Network([W66, 3]), TypeError, "layer 1: weight must be a tensor, got int"),
    "one-dimension": (
        lambda: Network([W66, W66[0]]),
        ValueError,
        r"layer 1: weight must be \[out_features, in_features\], got shape \[6\]",
    ),
    "sizes-do-not-meet": (
        lambda: Network([W46, W66]),
        ValueError,
        r"layer 1: weight must be \[..., 4\], which the layer before puts out, got shape \[6, 6\]",
    ),
    "too-few-biases": (
        lambda: Network([W66, W66], [None]),
        ValueError,
        "biases must be 2 values, one for every entry of weights, got 1",
    ),
    "a-bias-of-another-size": (
        lambda: Network([W66, W66], [None, W46[:, 0]]),
        ValueError,
        r"layer 1: bias must be \[6\], one per output feature, got shape \[4\]",
    ),
    "another-dtype": (
        lambda: Network([W66, W66.double()]),
        TypeError,
        "layer 1: weight must be torch.float32, the dtype of the first weight, got torch.float64",
    ),
    "a-skip-that-cannot-be": (
        lambda: Network([W66, W46], skip="identity"),
        ValueError,
        "layer 1: skip='identity' adds the input to the output",
    ),
    "concat": (lambda: Network([W66], skip="concat"), ValueError, "layer 0: skip='concat' is a single layer's"),
    "a-scale-without-skip": (
        lambda: Network([W66, W46], skip_scale=torch.tensor(1.0)),
        ValueError,
        "layer 1: a learned skip_scale needs a skip",
    ),
    "an-unknown-activation": (lambda: Network([W66], activation="elu"), ValueError, "layer 0: activation must be one"),
    "an-unknown-head": (
        lambda: Network([W66], last_activation="gelu"),
        ValueError,
        "last_activation must be 'same' or 'none', got 'gelu'",
    ),
    "an-unknown-policy": (
        lambda: Network([W66], recompute="never"),
        ValueError,
        "recompute must be True, False or 'auto', got 'never'",
    ),
    "drop-path-for-some": (
        lambda: Network(torch.zeros(3, 6, 6), drop_path=[0.1]),
        ValueError,
        "drop_path must be 3 values, one for every layer, got 1",
    ),
    "stacked-and-oblong": (
        lambda: Network(torch.zeros(3, 4, 6)),
        ValueError,
        r"layer 0: a stacked weight must be \[layers, features, features\].*got shape \[3, 4, 6\]",
    ),
    "stacked-with-one-bias": (
        lambda: Network([W66, torch.zeros(3, 6, 6)], [None, torch.zeros(6)]),
        ValueError,
        r"layer 1: bias must be \[3, 6\], one for every layer of weight \[3, 6, 6\], got shape \[6\]",
    ),
    "x-is-no-tensor": (lambda: Network([W66])(3), TypeError, "x must be a tensor, got int"),
    "x-of-integers": (
        lambda: Network([W66])(torch.ones(2, 6, dtype=torch.int64)),
        TypeError,
        "x must be of a floating-point dtype, got torch.int64",
    ),
    "x-of-another-width": (
        lambda: Network([W66])(torch.ones(6, 4)),
        ValueError,
        r"x must be \[..., 6\], the in_features of the first layer, got shape \[6, 4\]",
    ),
    "x-of-another-dtype": (
        lambda: Network([W66])(torch.ones(2, 6).double()),
        TypeError,
        "layer 0: weight must be torch.float64, the dtype of x, got torch.float32",
    ),
}


@pytest.mark.parametrize(("call", "kind", "words"), ERRORS.values(), ids=ERRORS)
def test_errors_in_the_callers_words(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


@pytest.mark.parametrize("context", [torch.no_grad, nullcontext], ids=["no-grad", "grad"])
def test_a_tensor_that_no_longer_fits_is_told(context):
    weights = [nn.Parameter(torch.randn(6, 6)) for _ in range(2)]
    network = Network(weights)
    with context():
        network(torch.randn(2, 6))
        weights[1].data = torch.randn(4, 6)
        with pytest.raises(ValueError, match=r"layer 1: weight must stay \[6, 6\], got shape \[4, 6\]"):
            network(torch.randn(2, 6))
        weights[1].data = torch.randn(6, 6).double()
        with pytest.raises(
            TypeError, match=r"layer 1: weight must be torch\.float32, the dtype of x, got torch\.float64"
        ):
            network(torch.randn(2, 6))


def test_the_call_of_the_operator_is_the_networks_own():
    """The launcher and the operator decode the same plan: what one drops, the other does."""
    case = NETWORKS["drop-path"]
    tensors = case.tensors()
    network = case.network(tensors)
    torch.manual_seed(2)
    seeds = network_ops.draw_seeds(network.spec.dropping, case.depth)
    y = torch.ops.fusedres.residual_network(tensors["x"], network._tensors, seeds, *plan.encoded(network.spec))
    torch.manual_seed(2)
    assert_close(network(tensors["x"], training=True), y, **SINGLE)


def test_a_product_of_few_rows_is_summed_before_the_skip():
    """Term by term onto the skip's gradient, a product comes out six times as wrong as eager's."""
    torch.manual_seed(0)
    sizes = [1024] * 33
    weights = [torch.randn(N, K) * (32 * K) ** -0.5 for K, N in pairwise(sizes)]
    x, g = torch.randn(7, 1024), torch.randn(7, 1024)

    def gradients(dtype, layer):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, *weights)]
        return torch.autograd.grad(layer(*leaves), leaves, g.to(dtype))

    def eager(y, *weights):
        for weight in weights:
            y = reference.residual_linear(y, weight)
        return y

    (call,) = fusedres.explain(Network(weights), x)
    assert call.way.name == "dots"
    truth = gradients(torch.float64, eager)
    ours = gradients(torch.float32, lambda x, *weights: Network(weights)(x))
    for mine, theirs, true in zip(ours, gradients(torch.float32, eager), truth, strict=True):
        rule_for(torch.float32, "dweight").check("gradient", mine, theirs, true)
