"""A layer's plain call on the engine: the bits of the general one, at the price of one operation."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
from layers import Case, Shape
from networks import SAME_BITS
from test_network_autograd import allocated
from test_operator import Log
from torch import Tensor, nn
from torch.testing import assert_close

import fusedres
from fusedres import FusedResidualLinear, checks, functional, plain_layer, reference
from fusedres.kernels.cpu import launch

pytestmark = pytest.mark.backends("cpu")

ALIKE = {"rtol": 1e-4, "atol": 1e-5}  # two computations in single precision of numbers near one
FINE = {"rtol": 1e-6, "atol": 1e-8}  # in double precision, where a wrong term stands far above what roundings do

SHAPE = Shape((2, 3), 6, 6)
PLAIN = {
    "identity": Case(SHAPE),
    "no-skip": Case(SHAPE, activation="relu", skip=None),
    "no-bias": Case(SHAPE, bias=False),
    "post": Case(SHAPE, activation="relu", order="post"),
    "residual-unread": Case(SHAPE, skip="residual"),
    "residual-unread-scaled": Case(SHAPE, skip="residual", skip_scale=0.5, activation="none", order="post"),
    "residual-read": Case(SHAPE, skip="residual", order="post", activation="tanh"),
    "residual-scaled": Case(SHAPE, skip="residual", skip_scale="scalar", branch_scale="channel"),
    "projection": Case(SHAPE, skip="projection", skip_scale="scalar", branch_scale="scalar"),
    "drop-path": Case(SHAPE, skip="residual", drop_path=0.5),
    "recompute": Case(SHAPE, recompute=True),
    "one-sample": Case(Shape((), 6, 6)),
    "wide": Case(Shape((300,), 160, 160), skip="residual", order="post"),
}
NARROW = {name: case for name, case in PLAIN.items() if case.shape.N < 100}  # to be differentiated number by number
every_layer = pytest.mark.parametrize("case", PLAIN.values(), ids=PLAIN)


def generally() -> AbstractContextManager:
    return mock.patch.object(plain_layer, "call", return_value=None)


def generally_forbidden() -> AbstractContextManager:
    return mock.patch.object(functional, "call", side_effect=AssertionError("the general call was made"))


def call(case: Case, tensors: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(1)
    return functional.residual_linear(**tensors, **case.options(), **case.numbers())


def gradients(case: Case, tensors: dict[str, Tensor], g: Tensor) -> list[Tensor]:
    wanted = [t for t in tensors.values() if t.requires_grad]
    return [*torch.autograd.grad(call(case, tensors), wanted, g)] if wanted else []


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_bits_are_those_of_the_general_call(case, dtype, backend, device):
    """For every choice of which tensors require a gradient."""
    tensors = replace(case, dtype=dtype).tensors(device)
    g = torch.randn_like(call(case, tensors))
    for chosen in product((False, True), repeat=len(tensors)):
        some = {n: t.detach().requires_grad_(wants) for (n, t), wants in zip(tensors.items(), chosen, strict=True)}
        y, found = call(case, some), gradients(case, some, g)
        with generally():
            assert_close(y, call(case, some), **SAME_BITS)
            assert y.requires_grad == any(chosen)
            for ours, expected in zip(found, gradients(case, some, g), strict=True):
                assert_close(ours, expected, **SAME_BITS)


@every_layer
def test_it_is_one_call_of_the_engine(case, backend, device):
    tensors = case.tensors(device)
    with mock.patch.object(launch, "layer", wraps=launch.layer) as plain, generally_forbidden():
        y = call(case, tensors)
    assert plain.call_count == 1
    assert "ResidualNetwork" in y.grad_fn.name()


def test_what_is_known_is_not_checked_again(backend):
    layer, x = FusedResidualLinear(6, learn_skip_scale=True), torch.randn(3, 6)
    layer(x, x)
    with mock.patch.object(checks, "described", side_effect=AssertionError("checked again")), generally_forbidden():
        layer(x + 1, x)


@pytest.mark.parametrize("name", ["activation", "order", "skip", "drop_path", "recompute", "skip_scale", "training"])
def test_an_option_that_changes_is_seen(name, backend):
    """All stand in what a call is known by."""
    layer, x = FusedResidualLinear(6, drop_path=0.5).eval(), torch.randn(64, 6)
    layer(x)
    values = {"activation": "tanh", "order": "post", "skip": None, "drop_path": 0.25, "recompute": True}
    values |= {"skip_scale": 2.0, "training": True}
    layer.train(name in ("drop_path", "training"))
    setattr(layer, name, values[name])
    if name == "skip":
        layer.drop_path = 0.0
    with generally():
        torch.manual_seed(0)
        expected = layer(x)
    torch.manual_seed(0)
    assert torch.equal(layer(x), expected)


WRONG = {
    "x-columns": {"x": torch.randn(3, 5)},
    "weight-dtype": {"weight": torch.randn(6, 6).double()},
    "weight-dimensions": {"weight": torch.randn(6, 6, 1)},
    "weight-device": {"weight": torch.empty(6, 6, device="meta")},
    "bias-size": {"bias": torch.randn(5)},
    "bias-dtype": {"bias": torch.randn(6).double()},
    "bias-device": {"bias": torch.empty(6, device="meta")},
    "residual-size": {"residual": torch.randn(3, 5)},
    "residual-rows": {"residual": torch.randn(2, 6)},
    "residual-dimensions": {"residual": torch.randn(3, 1, 6)},
    "residual-leading": {"residual": torch.randn(1, 3, 6)},
    "residual-dtype": {"residual": torch.randn(3, 6).double()},
    "residual-device": {"residual": torch.empty(3, 6, device="meta")},
    "scale-size": {"skip_scale": torch.ones(1)},
    "scale-dtype": {"skip_scale": torch.ones((), dtype=torch.float64)},
    "branch-size": {"branch_scale": torch.ones(5)},
    "no-tensor": {"weight": [[1.0]]},
    "a-word": {"activation": "swish"},
    "a-list": {"activation": ["gelu"]},
    "a-flag-for-a-number": {"drop_path": False},
    "a-flag-for-a-scale": {"branch_scale": True},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_mistakes_are_told_as_ever(wrong, backend):
    """Also where a call that is known by the same facts has been right."""
    given = {"x": torch.randn(3, 6), "weight": torch.randn(6, 6), "bias": torch.randn(6), "drop_path": 0.0}
    given |= {"residual": torch.randn(3, 6), "skip_scale": torch.ones(()), "branch_scale": torch.ones(6)}
    functional.residual_linear(**given)
    with generally(), pytest.raises((TypeError, ValueError)) as expected:
        functional.residual_linear(**(given | wrong))
    for _ in range(2):
        with pytest.raises(expected.type) as found:
            functional.residual_linear(**(given | wrong))
        assert str(found.value) == str(expected.value)


def test_what_is_known_is_not_without_end(backend, monkeypatch):
    monkeypatch.setattr(plain_layer, "_MOST", 3)
    weight = torch.randn(6, 6)
    for rows in range(1, 9):
        functional.residual_linear(torch.randn(rows, 6), weight)
    assert [facts[0][0] for facts in plain_layer._KNOWN] == [6, 7, 8], "the newest"


def test_a_mistake_is_all_that_is_told(backend):
    functional.residual_linear(torch.randn(3, 6), torch.randn(6, 6))
    with pytest.raises(ValueError, match="in_features of weight") as found:
        functional.residual_linear(torch.randn(3, 5), torch.randn(6, 6))
    assert found.value.__context__ is None


def test_sizes_are_known_apart(backend):
    for shape in ((6, 6), (4, 6), (5, 6), (5, 7)):
        for rows in (1, 3, 300):
            x, weight = torch.randn(rows, shape[1]), torch.randn(shape)
            expected = reference.residual_linear(x, weight)
            assert_close(functional.residual_linear(x, weight), expected, **ALIKE)


def test_numbers_may_be_integers(backend):
    x, weight = torch.randn(3, 6), torch.randn(6, 6)
    found = functional.residual_linear(x, weight, skip_scale=2, branch_scale=1, drop_path=0)
    assert torch.equal(found, functional.residual_linear(x, weight, skip_scale=2.0))


def test_what_is_bent_or_looked_at_is_not_plain(backend):
    layer, x = FusedResidualLinear(6), torch.randn(3, 6)
    layer(x)
    with mock.patch.object(launch, "layer", side_effect=AssertionError("a plain call")):
        assert fusedres.explain(layer, x)[0].backend == "native"
        for context in (fusedres.eager(), fusedres.batch_invariant(), Log(), torch.autocast("cpu", torch.bfloat16)):
            with context:
                layer(x)
        torch.func.vmap(layer)(x)
        layer(x.as_subclass(Subclass))
        layer(nn.Parameter(x))
        layer(x[:0])
        FusedResidualLinear(6, skip="concat")(x)


class Subclass(Tensor):
    pass


# ---------------------------------------------------------------------------------------------- gradients again


@pytest.mark.parametrize("case", NARROW.values(), ids=NARROW)
def test_second_derivatives(case, backend, device):
    tensors = replace(case, dtype=torch.float64).tensors(device)

    def layer(*values: Tensor) -> Tensor:
        return call(case, dict(zip(tensors, values, strict=True)))

    assert torch.autograd.gradcheck(layer, tuple(tensors.values()))
    assert torch.autograd.gradgradcheck(layer, tuple(tensors.values()))


@every_layer
def test_a_batch_of_gradients(case, backend, device):
    """Torch's own vmap, older than torch.func, and torch.func's."""
    tensors = case.tensors(device)
    values = list(tensors.values())
    y = call(case, tensors)
    g = torch.randn(3, *y.shape)
    one_by_one = [torch.autograd.grad(y, values, row, retain_graph=True) for row in g]
    expected = [torch.stack(rows) for rows in zip(*one_by_one, strict=True)]

    def pull(row: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, values, row, retain_graph=True)

    older = torch.autograd.grad(y, values, g, is_grads_batched=True, retain_graph=True)
    for found in (older, torch.func.vmap(pull)(g)):
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(ours, theirs, **ALIKE)


@every_layer
@pytest.mark.parametrize("transform", ["grad", "vjp", "vmap of grad", "jacrev"])
def test_transforms_of_a_gradient(case, transform, backend, device):
    """torch.func around a backward whose forward was outside."""
    tensors = replace(case, dtype=torch.float64).tensors(device)
    values = list(tensors.values())

    def of(layer: Any) -> Any:
        torch.manual_seed(1)
        y = layer(**tensors, **case.options(), **case.numbers())
        torch.manual_seed(2)
        g = torch.randn(2, *y.shape, dtype=y.dtype)

        def total(v: Tensor) -> Tensor:
            found = torch.autograd.grad(y, values, v, retain_graph=True, create_graph=True)
            return sum((t * torch.linspace(-1, 1, t.numel()).reshape(t.shape)).sum() for t in found)

        if transform == "grad":
            return torch.func.grad(total)(g[0])
        if transform == "vjp":
            return torch.func.vjp(total, g[0])[1](torch.ones((), dtype=y.dtype))[0]
        if transform == "jacrev":
            return torch.func.jacrev(total)(g[0])
        return torch.func.vmap(torch.func.grad(total))(g)

    assert_close(of(functional.residual_linear), of(reference.residual_linear), **FINE)


def test_compiled_autograd_runs_it(backend):
    from torch._dynamo import compiled_autograd

    layer, x, residual = FusedResidualLinear(6), torch.randn(3, 6), torch.randn(3, 6, requires_grad=True)
    tensors = [residual, *layer.parameters()]
    g = torch.randn(3, 6)
    expected = torch.autograd.grad(layer(x, residual), tensors, g)
    y = layer(x, residual)
    with warnings.catch_warnings(), compiled_autograd._enable(torch.compile(backend="eager")):
        warnings.simplefilter("ignore")  # that it cannot look inside
        y.backward(g)
    for found, theirs in zip(tensors, expected, strict=True):
        assert torch.equal(found.grad, theirs)
    torch._dynamo.reset()


@every_layer
def test_a_mode_around_backward_alone_sees_it(case, backend, device):
    tensors = case.tensors(device)
    y = call(case, tensors)
    g = torch.randn_like(y)
    expected = torch.autograd.grad(y, list(tensors.values()), g, retain_graph=True)
    with Log() as log:
        found = torch.autograd.grad(y, list(tensors.values()), g)
    assert "fusedres::residual_linear_backward" in log.seen
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, **ALIKE)


def test_a_residual_that_backward_does_not_read_is_let_go(backend):
    """As eager lets go of it, and may be changed in place."""
    x, weight, residual = torch.randn(3, 6), torch.randn(6, 6, requires_grad=True), torch.randn(3, 6)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        y = functional.residual_linear(x, weight, None, residual)
        assert residual.data_ptr() not in saved
        functional.residual_linear(x, weight, None, residual, order="post")
        assert residual.data_ptr() in saved
    residual.zero_()
    y.sum().backward()
    kept = functional.residual_linear(x, weight, None, residual, order="post")
    residual.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()


def test_frozen_parts_get_no_gradient_and_cost_nothing(backend):
    """Backward takes memory for the gradients asked for alone."""
    x, g = torch.randn(19, 20), torch.randn(19, 20)
    for wanted in (["weight", "bias"], ["x"], ["weight"], ["x", "bias"]):
        layer = FusedResidualLinear(20)
        leaves = {"x": x.clone(), "weight": layer.weight, "bias": layer.bias}
        for name, leaf in leaves.items():
            leaf.requires_grad_(name in wanted)
        y = layer(leaves["x"])
        with torch.profiler.profile(profile_memory=True) as log:
            found = torch.autograd.grad(y, [leaves[name] for name in wanted], g)
        assert allocated(log) == sum(t.nbytes for t in found)


def test_it_agrees_with_eager(backend):
    """As layers of blocks call it, one after another, and both ways through autograd."""
    torch.manual_seed(0)
    first, second = FusedResidualLinear(6, activation="relu", skip=None), FusedResidualLinear(6, order="post")
    x = torch.randn(5, 6, requires_grad=True)
    y = second(first(x), x)
    expected = reference.residual_linear(
        reference.residual_linear(x, first.weight, first.bias, activation="relu", skip=None),
        second.weight, second.bias, x, order="post",
    )  # fmt: skip
    tensors = [x, *first.parameters(), *second.parameters()]
    assert_close(y, expected)
    for ours, theirs in zip(
        torch.autograd.grad(y.square().sum(), tensors),
        torch.autograd.grad(expected.square().sum(), tensors),
        strict=True,
    ):
        assert_close(ours, theirs, **ALIKE)
