"""A program of a user's that `mypy --strict` is to pass: what each name of the public API is, and gives."""

from __future__ import annotations

from torch import Tensor, nn, randn
from typing_extensions import assert_type

import fusedres
from fusedres import (
    FusedResidualLinear,
    FusedResidualStack,
    GradientComparison,
    GradientProfile,
    Network,
    Residual,
    batch_invariant,
    compare_gradients,
    eager,
    explain,
    functional,
    gradient_profile,
    reference,
    warmup,
)
from fusedres.explanation import Call, Explanation
from fusedres.gradients import Halves, InputGradient, Recorder, Statistics

x = randn(8, 16, requires_grad=True)

layer = FusedResidualLinear(16, activation="silu", skip="projection", learn_skip_scale=True)
assert_type(layer(x), Tensor)
assert_type(FusedResidualLinear(16)(x, residual=x), Tensor)
assert_type(layer.forward(x), Tensor)
assert_type(layer.weight, Tensor)
assert_type(layer.projection, nn.Linear | None)
assert_type(layer.skip_scale, nn.Parameter | float)
assert_type(layer.resolved_skip, str)

stack = FusedResidualStack([16, 16, 4], dtype=x.dtype)
assert_type(stack(x), Tensor)
assert_type(stack.sizes, tuple[int, ...])
assert_type(stack.skips, list[bool])
assert_type(stack.by_layer(), dict[str, Tensor])
assert_type(stack.layers[0](x), Tensor)
assert_type(stack.to_eager(), reference.ResidualStack)
assert_type(stack.to_eager()(x), Tensor)
assert_type(FusedResidualStack.from_eager(stack.to_eager()), FusedResidualStack)

block = Residual(nn.Sequential(nn.Linear(16, 16), layer), branch_scale=0.0, learn_branch_scale=True)
assert_type(block(x), Tensor)
assert_type(block.branch_scale, nn.Parameter | float)

assert_type(functional.residual_linear(x, layer.weight, skip_scale=0.5), Tensor)
assert_type(functional.residual(x, x, drop_path=0.1), Tensor)
assert_type(reference.residual_linear(x, layer.weight), Tensor)

network = Network([layer.weight, layer.weight], last_activation="none")
assert_type(network(x, training=True), Tensor)
assert_type(network.parameters, tuple[Tensor, ...])

explanation = explain(stack, x)
assert_type(explanation, Explanation)
call = explanation[0]
assert_type(call, Call)
assert_type(call.backend, str)
assert_type(call.choice.because, str)

with eager(), batch_invariant():
    warmup(stack, [(8, 16), (1, 16)], dtype=x.dtype, backward=False)

profile = gradient_profile(stack, x)
assert_type(profile, GradientProfile)
assert_type(profile.loss, float | None)
assert_type(profile.parameters, dict[str, Statistics])
assert_type(profile.inputs, dict[str, InputGradient])
assert_type(profile.inputs["layers.1"].halves, Halves | None)

comparison = compare_gradients(stack, stack.to_eager(), x, loss_fn=lambda y: y.square().sum())
assert_type(comparison, GradientComparison)
assert_type(comparison.agrees, bool)
assert_type(comparison.layers["layers.0.0"].because, str)

with Recorder(stack, every=2, path=None) as recorder:
    assert_type(recorder, Recorder)
    stack(x).sum().backward()  # type: ignore[no-untyped-call] # torch's
    recorder.step(1.0)
assert_type(recorder.records, list[GradientProfile])

assert_type(fusedres.__version__, str)
