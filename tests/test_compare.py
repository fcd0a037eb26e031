"""Fused against eager: errors against plain arithmetic, verdicts at their rules' edges, and where there is no truth."""

from __future__ import annotations

import json
import math
from copy import deepcopy

import pytest
import torch
from torch import nn
from twins import twins

import fusedres
from fusedres import FusedResidualStack, compare_gradients
from fusedres.gradients import verdict
from fusedres.gradients.verdict import AGREES, DIFFERS, NOT_FINITE
from fusedres.reference import ProjectionStack, ShapeGatedStack

CASE_1 = [3] * 13 + [1]
SIZES_D = [128, 64, 32, 16, 8, 1]


def fused_stack(sizes, has_skips=True):
    return FusedResidualStack(sizes, skip="auto" if has_skips else None)


def fused_projections(sizes, has_skips=True):
    return FusedResidualStack(sizes, skip="projection" if has_skips else None)


def by_hand(model, x):
    """Gradients of the mean square of the output, by name."""
    names, values = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(model(x).square().mean(), values), strict=True))


# ------------------------------------------------------------------------------------------------ fused networks


@pytest.mark.parametrize(
    ("fused", "eager", "sizes", "leading"),
    [
        (fused_stack, ShapeGatedStack, CASE_1, ()),
        (fused_stack, ShapeGatedStack, [16, 32, 64, 32, 16, 1], ()),
        (fused_projections, ProjectionStack, SIZES_D, (10,)),
        (fused_projections, ProjectionStack, [8, 8, 4, 4, 1], (2, 3)),
    ],
    ids=["A1", "A2-narrow", "D", "D-identity-and-projection"],
)
@pytest.mark.parametrize("has_skips", [True, False], ids=["skips", "plain"])
def test_fused_networks_have_the_gradients_of_eager_ones(fused, eager, sizes, leading, has_skips, device):
    first, second = twins(fused, eager, sizes, has_skips, device=device)
    x = torch.randn(*leading, sizes[0], device=device)
    comparison = compare_gradients(first, second, x)

    values, twins_values = first.state_dict(), second.state_dict()
    assert all(torch.equal(values[name], twins_values[name]) for name in twins_values)
    assert (comparison.agrees, comparison.exit_code, comparison.objections) == (True, 0, [])
    assert max(one.max_units for one in comparison.errors.values()) > 0  # 0 would mean that no kernel ran
    assert set(comparison.errors) == {name for name, _ in second.named_parameters()}
    assert set(comparison.layers) == {name.rpartition(".")[0] for name, _ in second.named_parameters()}
    assert comparison.fused.skips == comparison.eager.skips
    assert comparison.fused.skips in comparison.table()
    assert all(name in comparison.table() for name in comparison.eager.mean_abs)
    with fusedres.eager():
        assert compare_gradients(first, second, x).largest_relative_difference == 0


def test_fused_networks_run_the_kernels(device):
    model = fused_projections([8, 8, 4, 1]).to(device)
    calls = fusedres.explain(model, torch.randn(2, 8, device=device))
    assert [call.backend.split("-")[0] for call in calls] == ["triton"] * 3
    with fusedres.eager():
        calls = fusedres.explain(model, torch.randn(2, 8, device=device))
    assert [call.backend for call in calls] == ["eager"] * 3


@pytest.mark.parametrize("name", ["layers.1.0.weight", "layers.0.0.bias", "projections.1.weight"])
def test_a_wrong_gradient_shows(name):
    wrong, right = twins(ProjectionStack, ProjectionStack, [8, 8, 4, 1])
    wrong.get_parameter(name).register_hook(lambda gradient: 1.001 * gradient)
    comparison = compare_gradients(wrong, right, torch.randn(5, 8))
    assert comparison.largest_relative_difference == pytest.approx(1e-3, rel=1e-2)
    assert [at for at, difference in comparison.relative_difference.items() if difference > 0] == [name]

    layer, _, parameter = name.rpartition(".")
    assert [at for at, one in comparison.layers.items() if one.verdict != AGREES] == [layer]
    assert comparison.layers[layer].because.startswith(f"{parameter} is off by ")
    assert (comparison.agrees, comparison.exit_code) == (False, 1)
    table = comparison.table()
    assert f"({name})" in table
    assert f"\n{layer} DIFFERS: {parameter} is off by " in table
    assert table.endswith("fused and eager agree in 4 of 5 layers")


def test_both_models_draw_the_same_numbers():
    first, second = twins(*[lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(), nn.Linear(8, 1))] * 2)
    comparison = compare_gradients(first, second, torch.randn(4, 8))
    assert comparison.largest_relative_difference == 0
    assert comparison.unit  # and so does the float64 copy, whose gradients are near


# ------------------------------------------------------------------------------------------------ errors and units


def test_errors_are_those_of_plain_arithmetic():
    eager = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
    fused = deepcopy(eager)
    noise = {name: 1e-5 * torch.randn_like(value) for name, value in fused.named_parameters()}
    for name, value in fused.named_parameters():
        value.register_hook(lambda gradient, name=name: gradient + noise[name])
    x = torch.randn(7, 6)
    comparison = compare_gradients(fused, eager, x)

    of_fused, of_eager, truth = by_hand(fused, x), by_hand(eager, x), by_hand(deepcopy(eager).double(), x.double())
    for name, errors in comparison.errors.items():
        f, e, t = of_fused[name].double(), of_eager[name].double(), truth[name]
        rounding = 2**-23 * t.abs().max().item()
        assert errors.absolute == (f - e).abs().max().item()
        assert errors.relative == pytest.approx(errors.absolute / e.abs().max().item())
        assert errors.roundings == pytest.approx((f - t).abs().max().item() / rounding)
        unit = max((e - t).abs().max().item(), rounding)
        assert errors.max_units == pytest.approx((f - t).abs().max().item() / unit)
        unit = max((e - t).square().mean().sqrt().item(), 0.29 * rounding)
        assert errors.rms_units == pytest.approx((f - t).square().mean().sqrt().item() / unit)
        assert errors.numbers == t.numel()
    worst = comparison.layers["0"].worst
    assert worst.absolute == max(comparison.errors[name].absolute for name in ("0.weight", "0.bias"))


@pytest.mark.parametrize(
    ("fused_factor", "eager_factor", "relative", "said"),
    [
        (0.0, 0.0, 0.0, AGREES),
        (1.0, 0.0, math.inf, DIFFERS),
        (0.0, 1.0, 1.0, DIFFERS),
        (math.nan, 1.0, math.inf, NOT_FINITE),
        (1.0, math.nan, math.inf, NOT_FINITE),
        (math.inf, math.inf, math.inf, NOT_FINITE),
    ],
    ids=["both-zero", "only-eager-zero", "only-fused-zero", "nan", "eager-nan", "both-infinite"],
)
def test_the_edges(fused_factor, eager_factor, relative, said):
    """Where eager is nowhere near its float64 copy, that copy is no truth, and nothing is forgiven for eager's sake."""
    fused, eager = twins(nn.Linear, nn.Linear, 3, 3)
    fused.weight.register_hook(lambda gradient: gradient * fused_factor)
    eager.weight.register_hook(lambda gradient: gradient * eager_factor)
    comparison = compare_gradients(fused, eager, torch.ones(3))  # whose float64 copy has no hook
    assert comparison.relative_difference["weight"] == relative
    assert comparison.largest_relative_difference == relative
    assert comparison.layers["(model)"].verdict == said
    assert said == AGREES or comparison.objections[0].startswith(f"(model) {said}: ")
    json.dumps(comparison.to_dict(), allow_nan=False)


def test_a_truth_of_nothing_allows_what_float64_rounds_to_it():
    zero = torch.zeros(3)
    for value, agrees in ((1e-30, True), (1e-7, False)):
        errors = verdict.errors_of(torch.full((3,), value), zero, zero.double())
        assert (verdict.SINGLE.objection(errors) == "") == agrees
    assert verdict.errors_of(torch.empty(0), torch.empty(0), torch.empty(0).double()).max_units == 0


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)


def judged(dtype, fused_off, eager_off):
    """The errors, and what is against them, of numbers near one that are off by these roundings."""
    eps = torch.finfo(dtype).eps
    fused, eager = ((1 + torch.tensor(off, dtype=torch.float64) * eps).to(dtype) for off in (fused_off, eager_off))
    truth = eager if dtype == torch.float64 else torch.ones(len(eager))
    errors = verdict.errors_of(fused, eager, truth.double())
    return errors, verdict.rule_for(dtype).objection(errors)


@DTYPES
def test_one_wrong_number_is_found_at_the_edge_of_the_rule(dtype):
    rule = verdict.rule_for(dtype)
    own = {torch.float64: 0.0, torch.float32: 100.0}.get(dtype, 2.0)
    unit = max(own, rule.unit_roundings)
    rest = [0.0] * 7
    for factor, agrees in ((0.9, True), (1.2, False)):
        errors, objection = judged(dtype, [round(factor * rule.max_units * unit), *rest], [own, *rest])
        assert (objection == "") == agrees
        assert agrees or objection.startswith(f"is off by {errors.max_units:.3g} units and ")


@DTYPES
def test_eager_may_be_right_by_luck(dtype):
    rule = verdict.rule_for(dtype)
    allowed = max(rule.roundings, rule.unit_roundings * min(rule.max_units, rule.rms_units * 0.29))
    for factor, agrees in ((0.9, True), (1.2, False)):
        _, objection = judged(dtype, [float(round(factor * allowed))] * 100, [0.0] * 100)
        assert (objection == "") == agrees


def test_a_little_lost_everywhere_is_found():
    """Eager has one number of a thousand wrong by 100 roundings, fused all of them by less than six times that."""
    for off, agrees in ((500.0, True), (600.0, False)):
        errors, objection = judged(torch.float32, [off] * 1000, [100.0] + [0.0] * 999)
        assert errors.max_units < verdict.SINGLE.max_units
        assert (objection == "") == agrees
        assert agrees or objection.startswith("is off by 190 units rms and 600 roundings")


def test_float64_is_in_units_of_roundings():
    eager = nn.Linear(3, 3).double()
    fused = deepcopy(eager)
    for roundings, agrees in ((1000, True), (100_000, False)):
        hook = fused.weight.register_hook(lambda g, n=roundings: g * (1 + n * 2**-52))
        comparison = compare_gradients(fused, eager, torch.ones(3).double())
        hook.remove()
        assert comparison.errors["weight"].max_units == pytest.approx(roundings / 1024, rel=1e-2)
        assert comparison.agrees == agrees
        assert "one unit: 1024 float64 roundings of the largest |g|" in comparison.table()


# ------------------------------------------------------------------------------------------------ where no truth is


class StaysNarrow(nn.Linear):
    def double(self):
        raise NotImplementedError("there is no float64 here\nat all")


class CastsItself(nn.Linear):
    def forward(self, x):
        return super().forward(x.float())


class Noisy(nn.Linear):
    """Draws other numbers in float64 than in float32."""

    def forward(self, x):
        drawn = torch.rand(2 if x.dtype == torch.float64 else 1)[-1]
        return super().forward(x) * drawn


class Counting(nn.Linear):
    """Of each call something else, without drawing a number."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


class Clamps(nn.Linear):
    def forward(self, x):
        return super().forward(x).clamp(max=1e-3 if x.dtype == torch.float64 else None, min=-10.0)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (StaysNarrow, "no float64 copy of eager could be made and run: NotImplementedError: there is no float64 here"),
        (CastsItself, "no float64 copy of eager could be made and run: RuntimeError: "),
        (Noisy, "the float64 copy of eager has other gradients, "),
        (Counting, "the float64 copy of eager has other gradients, "),
        (Clamps, "the float64 copy of eager has other gradients, "),
    ],
)
def test_without_a_truth_relative_differences_judge(layer, why):
    fused, eager = twins(layer, layer, 3, 3)
    for factor, agrees in ((1 + 1e-4, True), (1 + 1e-3, False)):
        hook = fused.weight.register_hook(lambda g, by=factor: g * by)
        comparison = compare_gradients(fused, eager, torch.ones(3))
        hook.remove()
        assert comparison.why_no_units.startswith(why)
        assert comparison.unit is None
        assert comparison.errors["weight"].max_units is None
        assert comparison.agrees == agrees
        assert f"\nno units: {why}" in comparison.table()
        assert "relative differences of at most 0.00035" in comparison.table()
        assert comparison.to_dict()["parameters"]["weight"]["max_units"] is None


def test_under_autocast_there_are_no_units(device):
    fused, eager = twins(fused_stack, ShapeGatedStack, [8, 8, 8], device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        comparison = compare_gradients(fused, eager, torch.randn(5, 8, device=device))
    assert comparison.agrees
    assert "no units: autocast is active, so that eager rounds to torch.bfloat16" in comparison.table()
    assert "torch.bfloat16: relative differences of at most 0.088" in comparison.table()


# ------------------------------------------------------------------------------------------------ what is left behind


def test_the_models_are_left_as_they_were(device):
    eager = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2)).to(device)
    fused = deepcopy(eager)
    fused.__deepcopy__ = lambda memo: pytest.fail("the fused model is never copied")
    values = [tensor.clone() for model in (fused, eager) for tensor in model.state_dict().values()]
    x = torch.randn(6, 4, device=device, requires_grad=True)
    torch.manual_seed(5)
    comparison = compare_gradients(fused, eager, x)
    assert comparison.unit
    assert torch.initial_seed() == 5
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)
    now = [tensor for model in (fused, eager) for tensor in model.state_dict().values()]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(values, now, strict=True))
    assert x.grad is None
    assert all(p.grad is None and not p._backward_hooks for p in eager.parameters())
    assert not eager._forward_hooks


def test_it_compares_where_gradients_are_switched_off():
    fused, eager = twins(fused_stack, ShapeGatedStack, [3, 3, 1])
    x = torch.ones(3)
    expected = compare_gradients(fused, eager, x)
    with torch.no_grad():
        assert compare_gradients(fused, eager, x) == expected
    with torch.inference_mode():
        assert compare_gradients(fused, eager, x) == expected


def test_target_and_loss_are_taken_to_float64():
    fused, eager = twins(fused_stack, ShapeGatedStack, [4, 4, 3])
    x = torch.randn(5, 4)
    for arguments in ((torch.randn(5, 3),), (torch.tensor([0, 1, 2, 0, 1]), nn.functional.cross_entropy)):
        comparison = compare_gradients(fused, eager, x, *arguments)
        assert comparison.agrees
        assert comparison.unit
    weighted = nn.CrossEntropyLoss(weight=torch.ones(3))  # float32, whatever the logits are
    comparison = compare_gradients(fused, eager, x, torch.tensor([0, 1, 2, 0, 1]), weighted)
    assert comparison.agrees
    assert "expected scalar type" in comparison.why_no_units


# ------------------------------------------------------------------------------------------------ what is said


TABLE = """\
fused: loss 4.000e+00, none of 1 layers says whether it takes a skip
eager: loss 4.000e+00, none of 1 layers says whether it takes a skip
                                         largest error          in units
mean |∂L/∂W|      fused      eager  absolute  relative      max      rms  verdict
0.weight       5.33e+00   4.00e+00   4.0e+00   1.0e+00  8.4e+06  1.7e+07  DIFFERS
1                     -          -   0.0e+00   0.0e+00        0        0  agrees
largest of 3 parameters: 1.0e+00 relative (0.weight)
one unit: eager's own error against float64, at least one rounding of the largest |g|
rule for float32: an error of at most 16 units (rms 12), or of 512 roundings of the largest |g|
0 DIFFERS: weight is off by 8.39e+06 units and 8.39e+06 roundings of its largest
fused and eager agree in 1 of 2 layers"""


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.gain * x


def golden():
    """Small integers, so that all is exact but what is made wrong: one gradient of three is twice as large."""
    eager = nn.Sequential(nn.Linear(3, 1), Gain())
    nn.init.constant_(eager[0].weight, 0.5)
    nn.init.constant_(eager[0].bias, 0.5)
    fused = deepcopy(eager)
    fused[0].weight.register_hook(lambda gradient: gradient * torch.tensor([2.0, 1.0, 1.0]))
    return compare_gradients(fused, eager, torch.ones(3), torch.zeros(1), lambda y, t: (y - t).square().sum())


def test_the_table():
    assert golden().table() == TABLE


def test_as_a_dictionary():
    found = golden().to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["agrees"] is False
    assert found["layers"]["1"] == {"verdict": "agrees", "because": ""}
    assert found["layers"]["0"]["verdict"] == "DIFFERS"
    assert found["parameters"]["0.weight"]["relative"] == 1.0
    assert found["eager"] == {
        "loss": 4.0,
        "skips": "none of 1 layers says whether it takes a skip",
        "mean_abs": {"0.weight": 4.0},
    }


def test_a_picture_is_written(tmp_path):
    golden().plot(tmp_path / "comparison.pdf")
    assert (tmp_path / "comparison.pdf").stat().st_size > 5000


# ------------------------------------------------------------------------------------------------ errors


LINEAR, ONES = nn.Linear(3, 2), torch.ones(3)


def test_models_with_other_parameters_cannot_be_compared():
    with pytest.raises(ValueError, match=r"same names: fused lacks bias$"):
        compare_gradients(nn.Linear(3, 2, bias=False), LINEAR, ONES)
    with pytest.raises(ValueError, match=r"same names: fused lacks weight, bias; eager lacks 0\.weight, 0\.bias$"):
        compare_gradients(nn.Sequential(nn.Linear(3, 2)), LINEAR, ONES)
    with pytest.raises(ValueError, match=r"weight must be \[2, 3\], its shape in eager, got \[4, 3\] in fused"):
        compare_gradients(nn.Linear(3, 4), LINEAR, ONES)
    with pytest.raises(TypeError, match=r"eager must be a torch\.nn\.Module, got function"):
        compare_gradients(LINEAR, lambda x: x, ONES)
