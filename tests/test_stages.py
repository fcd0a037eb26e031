"""A deep stack cut into stages."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from fusedres import FusedResidualStack
from fusedres.parallel import stages

SIZES = [5, 8, 8, 8, 8, 6, 6, 6, 3]
OPTIONS = {
    "plain": {},
    "linear-at-the-end": {"last_activation": "none", "activation": "tanh"},
    "everything": {
        "skip": "projection",
        "order": "post",
        "activation": "gelu",
        "approximate": "tanh",
        "learn_skip_scale": True,
        "learn_branch_scale": "channel",
        "skip_scale": [0.5 + i / 10 for i in range(8)],
        "branch_scale": [1.5 - i / 10 for i in range(8)],
    },
    "some-without-skips": {"learn_skip_scale": True, "drop_path": 0.2},
    "dropping": {"drop_path": [0.0, 0.1, 0.2, 0.3, 0.4, 0.0, 0.5, 0.1, 0.0][:8], "skip": "projection"},
}


def drawn(**options):
    stack = FusedResidualStack(SIZES, dtype=torch.float64, **options)
    for parameter in stack.parameters():
        parameter.data.copy_(torch.randn_like(parameter) * 0.5)
    return stack


@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.usefixtures("engine")
def test_stages_compute_what_the_stack_does(name, n):
    stack = drawn(**OPTIONS[name])
    parts = stages(stack, n)
    assert len(parts) == n
    assert [size for part in parts for size in part.sizes[1:]] == SIZES[1:]
    assert max(len(part.layers) for part in parts) - min(len(part.layers) for part in parts) <= 1
    x = torch.randn(70, 5, dtype=torch.float64, requires_grad=True)
    found = []
    for model, cut in ((stack, [stack]), (nn.Sequential(*parts), parts)):
        torch.manual_seed(1)  # which rows drop is drawn layer by layer
        y = model(x)
        found.append({"y": y, "dx": torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0]})
        y.square().sum().backward()
        found[-1] |= by_layer(cut, [{name: p.grad for name, p in part.named_parameters()} for part in cut])
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-10, atol=1e-10 * value.abs().max().item())


def by_layer(parts, tensors):
    """Of all stages, by the names that the stack has."""
    found, first = {}, 0
    for part, own in zip(parts, tensors, strict=True):
        for name, value in part.by_layer(own).items():
            kind, i, *rest = name.split(".")
            found[".".join([kind, str(first + int(i)), *rest])] = value
        first += len(part.layers)
    return found


@pytest.mark.parametrize("name", OPTIONS)
def test_parameters_are_copies_by_the_names_of_the_layers(name):
    stack = drawn(**OPTIONS[name])
    parts = stages(stack, 3)
    own, copied = stack.by_layer(), by_layer(parts, [dict(part.named_parameters()) for part in parts])
    assert own.keys() == copied.keys()
    assert all(torch.equal(copied[name], value) for name, value in own.items())
    before = [p.clone() for p in stack.parameters()]
    for part in stages(stack, 3):
        for parameter in part.parameters():
            parameter.data.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, stack.parameters(), strict=True))


def test_mode_dtype_device_and_freezing_are_the_stacks():
    stack = drawn(recompute=True).eval()
    for name, parameter in stack.named_parameters():
        parameter.requires_grad_("weight" in name)
    for part in stages(stack, 3):
        assert not part.training
        assert part.recompute is True
        for name, parameter in part.named_parameters():
            assert parameter.requires_grad == ("weight" in name)
            assert parameter.dtype == torch.float64
    there = stages(FusedResidualStack(SIZES, device="meta"), 2)
    assert all(parameter.is_meta for part in there for parameter in part.parameters())


@pytest.mark.parametrize(
    ("stack", "n", "error", "words"),
    [
        (nn.Linear(2, 2), 2, TypeError, "stack must be a FusedResidualStack, got Linear"),
        (FusedResidualStack(SIZES), 2.0, TypeError, "n must be an integer, .* got float"),
        (FusedResidualStack(SIZES), True, TypeError, "n must be an integer, .* got bool"),
        (FusedResidualStack(SIZES), 0, ValueError, "between 1 and 8, .* got 0"),
        (FusedResidualStack(SIZES), 9, ValueError, "between 1 and 8, .* got 9"),
    ],
    ids=["no-stack", "no-integer", "bool", "none", "more-than-layers"],
)
def test_what_cannot_be_cut_is_told(stack, n, error, words):
    with pytest.raises(error, match=words):
        stages(stack, n)


def test_importing_fusedres_imports_nothing_of_it():
    code = (
        "import sys, fusedres; found = [m for m in sys.modules if m.startswith(('torch.distributed.tensor', "
        "'torch.distributed.pipelining', 'fusedres.parallel'))]; assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
