"""A stack in the hands of torch's tools, and the errors it raises."""

from __future__ import annotations

import pytest
import torch
from laplacian import laplacian
from networks import SINGLE
from stacks import STACKS, gradients, twins
from torch import nn
from torch.testing import assert_close

import fusedres
from fusedres import FusedResidualStack
from fusedres.reference import ResidualStack

pytestmark = pytest.mark.backends("triton", "cpu")


# ------------------------------------------------------------------------------------------------ torch's tools


def test_new_parameters_are_seen(device):
    fused, eager = twins([4, 4, 4, 2], {}, device)
    x = torch.randn(3, 4, device=device)
    fused(x)
    fused.layers[2][0].weight = eager.layers[2][0].weight = nn.Parameter(torch.randn(2, 4, device=device))
    fused.runs["0-1"].weight = nn.Parameter(torch.stack([layer[0].weight.detach() * 2 for layer in eager.layers[:2]]))
    for layer in eager.layers[:2]:
        layer[0].weight.data.mul_(2)
    assert_close(fused(x), eager(x), **SINGLE)
    assert_close(fused.double()(x.double()), eager.double()(x.double()), **SINGLE)


def test_functional_call_and_transforms(device):
    stack, eager = twins([4, 4, 4, 2], {}, device)
    values = {name: torch.randn_like(p) for name, p in stack.named_parameters()}
    x = torch.randn(3, 4, device=device)
    before = stack(x)
    called = torch.func.functional_call(stack, values, (x,))
    eager.load_state_dict(stack.by_layer(values))
    assert_close(called, eager(x), **SINGLE)
    assert torch.equal(stack(x), before)

    def loss(values, row):
        return torch.func.functional_call(stack, values, (row,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(values, x)
    whole = torch.func.grad(loss)(values, x)
    for name, value in whole.items():
        assert_close(each[name].sum(0), value, **SINGLE)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("name", ["system-a", "system-d", "drop-path", "learned-channels"])
def test_compiled_and_exported(name, backend):
    sizes, options = STACKS[name]
    fused, _ = twins(sizes, options)
    x, g = torch.randn(9, sizes[0]), torch.randn(9, sizes[-1])
    expected = gradients(fused, x, g)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    y = compiled(x)
    found = torch.autograd.grad(y, list(fused.parameters()), g)
    named = fused.by_layer(dict(zip(dict(fused.named_parameters()), found, strict=True)))
    assert_close(y, expected["y"], **SINGLE)
    for one, value in named.items():
        assert_close(value, expected[one], **SINGLE)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(fused.eval(), (x,), dynamic_shapes=({0: rows},))
    assert_close(program.module()(torch.cat([x, x])), fused(torch.cat([x, x])), **SINGLE)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_autocast(backend):
    fused, eager = twins([8, 8, 8, 3], {})
    x = torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = fused(x), eager(x)
    assert ours.dtype == theirs.dtype
    assert_close(ours.float(), theirs.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("activation", ["gelu", "sin"])
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_gradcheck_and_gradgradcheck(activation, backend):
    options = {"activation": activation, "learn_skip_scale": True, "learn_branch_scale": "channel"}
    stack = FusedResidualStack([4, 4, 4, 2], dtype=torch.float64, **options)
    names, parameters = zip(*stack.named_parameters(), strict=True)

    def call(x, *values):
        return torch.func.functional_call(stack, dict(zip(names, values, strict=True)), (x,))

    inputs = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True), *parameters)
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)
    assert torch.autograd.gradcheck(lambda x: stack(x), inputs[:1])
    assert torch.autograd.gradgradcheck(lambda x: stack(x), inputs[:1])


@pytest.mark.parametrize("activation", ["gelu", "sin", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_laplacians_and_their_gradients(activation, dtype, device):
    fused, eager = (
        twin.to(dtype)
        for twin in twins([2] + [64] * 6 + [1], {"activation": activation, "last_activation": "none"}, device)
    )
    if dtype == torch.float64 and device != "cpu":
        pytest.skip("float64 takes the eager formula on a GPU")
    x = torch.randn(20, 2, dtype=dtype, device=device)
    ours, theirs = laplacian(fused, x), laplacian(eager, x)
    close = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
    assert_close(ours, theirs, **close)
    ours.square().mean().backward()
    theirs.square().mean().backward()
    found = fused.by_layer({name: p.grad for name, p in fused.named_parameters()})
    for name, value in eager.named_parameters():
        if value.grad is None:  # a last bias
            assert found[name] is None or (found[name] == 0).all()
            continue
        assert_close(found[name], value.grad, **close, msg=lambda text, name=name: f"{name}: {text}")


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("sizes", "options", "error", "message"),
    [
        ([], {}, ValueError, r"sizes must be two at least, one layer's input and output, got \[\]"),
        ([3], {}, ValueError, "sizes must be two at least"),
        ([3, 0, 3], {}, ValueError, r"sizes\[1\] must be at least 1, got 0"),
        ([3, -1], {}, ValueError, r"sizes\[1\] must be at least 1, got -1"),
        ([3, 2.0], {}, TypeError, r"sizes\[1\] must be an integer, got 2.0"),
        ([3, True], {}, TypeError, r"sizes\[1\] must be an integer, got True"),
        ([3, "3"], {}, TypeError, r"sizes\[1\] must be an integer, got '3'"),
        ("33", {}, TypeError, "sizes must be a sequence of integers, d₀ to d_L of L layers, got str"),
        (3, {}, TypeError, "sizes must be a sequence of integers, d₀ to d_L of L layers, got int"),
        ([3, 3], {"activation": "elu"}, ValueError, "layer 0: activation must be one of"),
        ([3, 4, 3], {"skip": "identity"}, ValueError, "layer 0: skip='identity' adds the input to the output"),
        ([3, 3], {"skip": "concat"}, ValueError, "layer 0: skip='concat' makes every layer wider"),
        ([3, 3], {"skip": "dense"}, ValueError, "layer 0: skip must be one of"),
        ([3, 3], {"last_activation": "relu"}, ValueError, "last_activation must be 'same' or 'none', got 'relu'"),
        ([3, 3], {"recompute": "always"}, ValueError, "recompute must be True, False or 'auto', got 'always'"),
        (
            [3, 4],
            {"learn_skip_scale": True},
            ValueError,
            "a learned skip_scale needs a skip, and no layer of these sizes",
        ),
        ([3, 3], {"learn_branch_scale": True}, ValueError, "learn_branch_scale must be False, 'scalar' or 'channel'"),
        ([3, 4], {"drop_path": 0.1}, ValueError, "drop_path=0.1 needs a skip"),
        ([3, 3], {"drop_path": 1.0}, ValueError, r"layer 0: drop_path must be a probability in \[0, 1\), got 1.0"),
        ([3, 3, 3], {"drop_path": [0.1]}, ValueError, "drop_path must be 2 values, one for every layer, got 1"),
        ([3, 3, 3], {"skip_scale": [1.0] * 3}, ValueError, "skip_scale must be 2 values, one for every layer, got 3"),
        ([3, 3], {"skip_scale": "1"}, TypeError, "layer 0: skip_scale must be a number, got str"),
    ],
    ids=str,
)
def test_bad_descriptions(sizes, options, error, message):
    with pytest.raises(error, match=message):
        FusedResidualStack(sizes, **options)
    if "recompute" not in options:
        with pytest.raises(error, match=message):
            ResidualStack(sizes, **options)


def test_unknown_options():
    with pytest.raises(TypeError, match="unexpected keyword argument 'scale'"):
        FusedResidualStack([3, 3], scale=1)
    with pytest.raises(TypeError, match=r"options of a stack are activation, .*, got scale"):
        ResidualStack([3, 3], scale=1)


@pytest.mark.launches_nothing
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.ones(2, 4), ValueError, r"x must be \[..., 3\], the in_features of the first layer, got shape \[2, 4\]"),
        (torch.ones(()), ValueError, r"x must be \[..., 3\]"),
        (torch.ones(3, dtype=torch.int64), TypeError, "x must be of a floating-point dtype"),
        ([1.0, 2.0, 3.0], TypeError, "x must be a tensor, got list"),
        (torch.ones(2, 3, dtype=torch.float64), TypeError, "layer 0: weight must be torch.float64, the dtype of x"),
    ],
    ids=["width", "no-dimension", "integers", "list", "dtype"],
)
def test_bad_inputs(x, error, message, device):
    stack = FusedResidualStack([3, 3, 1], device=device)
    with pytest.raises(error, match=message):
        stack(x.to(device) if isinstance(x, torch.Tensor) else x)


@pytest.mark.launches_nothing
def test_repr_and_explain(device, fused, capsys):
    stack = FusedResidualStack([4] * 40 + [2], skip_scale=0.5, device=device)
    assert "[4, 4, 4, …, 2], skip_scale=0.5" in repr(stack)
    assert "(0-38): Run(weight=[39, 4, 4], bias=[156])" in repr(stack)
    assert {call.backend for call in fusedres.explain(stack, torch.randn(5, 4, device=device))} == {fused}
