"""Whole networks on the CPU: outputs and every gradient against float64, choices, bindings, errors."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from networks import NETWORKS, SAME_BITS, SINGLE, Case, Module, is_one_node, operator_arguments, outcome
from test_operator import LAYOUTS, Log
from tolerances import Rule, rule_for
from torch import Tensor, nn
from torch.testing import assert_close

import fusedres
from fusedres import Network, dispatch, philox, reference
from fusedres.dispatch import Eager, Way
from fusedres.kernels.cpu import launch
from fusedres.kernels.spec import WAYS

pytestmark = pytest.mark.usefixtures("engine")


def check(case: Case, layout: Callable[[str, Tensor], Tensor] = lambda name, t: t, rule: Rule | None = None) -> None:
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
        (rule or rule_for(case.dtype, kind)).check(name, fused[name], eager[name], truth[name], terms)


def forced(monkeypatch, name: str) -> None:
    """Every network goes this way."""
    way = Way(WAYS.index(name), name, "this test says so")
    monkeypatch.setattr(dispatch, "cpu_way", lambda M, widths, dtype: way)


# ---------------------------------------------------------------------------------------------- right


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


WIDE_ENOUGH = {"lanes": (5, 33, 33, 20, 7), "dots": (5, 33, 33, 150), "blocks": (5, 33, 33, 128)}
WIDE_ENOUGH["layers"] = WIDE_ENOUGH["dots"]


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


@pytest.mark.parametrize("width", [13, 100])
@pytest.mark.parametrize("way", WAYS)
def test_a_bias_is_added_to_a_sum_that_is_complete(way, width, monkeypatch):
    """Each term of a sum that began with a large bias would be rounded as if it were as large."""
    forced(monkeypatch, way)
    x, weight, bias = torch.randn(8, width), torch.randn(width, width) / width**0.5, torch.full((width,), 100.0)
    y = Network([weight], [bias], activation="none", skip=None)(x)
    truth = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    assert_close(y.double(), truth, rtol=torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.parametrize("width", [3, 40, 127])
def test_a_learned_scale_sums_many_numbers_exactly(width):
    """All terms are of one sign: a sum that takes them one by one would be rounded by its own size each time."""
    x, g = torch.rand(20_000, width), torch.rand(20_000, width)
    weights, lams = (
        [torch.randn(width, width) / 20 for _ in range(2)],
        [torch.ones((), requires_grad=True) for _ in range(2)],
    )

    def gradients(dtype: torch.dtype) -> Tensor:
        network = Network([w.to(dtype) for w in weights], skip_scale=(scales := [lam.to(dtype) for lam in lams]))
        return torch.stack(torch.autograd.grad(network(x.to(dtype)), scales, g.to(dtype)))

    assert_close(gradients(torch.float32).double(), gradients(torch.float64), rtol=1.5e-7, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("what", ["x", "g", "weight", "bias", "projection_weight", "branch_scale"])
@pytest.mark.parametrize("sizes", [(3, 5, 5), (33, 40, 40), (32, 48, 48), (33, 140, 140)], ids=str)
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


# ---------------------------------------------------------------------------------------------- choices


def test_explain_tells_the_way_and_its_reason(capsys):
    case = NETWORKS["medium"]
    tensors = case.tensors()
    (call,) = fusedres.explain(case.network(tensors), tensors["x"])
    assert (call.backend, call.M, call.K, call.N, call.way.name) == ("native", 150, 33, 10, "lanes")
    printed = capsys.readouterr().out
    assert printed.strip() == str(call)
    for words in ("network [150, 33] -> [150, 10] torch.float32, 4 layers: native", "no width is above 128", "threads"):
        assert words in printed
    assert "2 × gelu, order pre, skip none; 2 × gelu, order pre, skip identity; activations kept" in printed
    fusedres.explain(replace(case, recompute=True).network(tensors), tensors["x"])
    assert "activations computed again in backward" in capsys.readouterr().out


def test_the_table_of_ways():
    def way(M: int, *widths: int, dtype: torch.dtype = torch.float32) -> str:
        return dispatch.cpu_way(M, widths, dtype).name

    assert [way(M, 3, 15) for M in (1, 100_000)] == ["lanes", "lanes"]
    assert [way(M, 3, 16) for M in (dispatch.DOTS_UP_TO, dispatch.DOTS_UP_TO + 1)] == ["dots", "lanes"]
    assert [way(100, 64, width, 1) for width in (128, 129)] == ["lanes", "layers"]
    shallow, deep = ([64] * (dispatch.SHALLOW + 1 + more) for more in (0, 1))
    assert [way(100, *widths) for widths in (shallow, deep)] == ["blocks", "lanes"]
    assert [way(100, *widths, dtype=torch.float64) for widths in (shallow, deep)] == ["lanes", "lanes"]
    assert [way(100, *widths, dtype=torch.bfloat16) for widths in (deep, (17, 31, 31))] == ["blocks", "lanes"]
    assert [way(100, width, width) for width in (33, 65)] == ["lanes", "blocks"]


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
        r"layer 1: bias must be \[3, 6\] or \[18\], one for every layer of weight \[3, 6, 6\], got shape \[6\]",
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
