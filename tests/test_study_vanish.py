"""System A as a study: its claims as inequalities, which fail where skips are not taken or a half is lost."""

from __future__ import annotations

from functools import cache

import pytest
import study
import torch
import torch.nn.functional as F

from fusedres import FusedResidualStack
from fusedres.studies import halves, vanish

pytestmark = pytest.mark.usefixtures("engine")
SMALL = ("--wide-seeds", 2, "--draws", 40)


@cache
def _small_report():
    return study.run(vanish, *SMALL)


@pytest.fixture
def report(engine):
    return _small_report()


def test_skips_keep_the_gradient(report):
    case = report.data["cases"]["case 1"]
    ends = {name: [(one[0], one[-1]) for one in case[name]["mean_abs"]] for name in ("with skips", "without")}
    gained = [a[0] / b[0] for a, b in zip(ends["with skips"], ends["without"], strict=True) if a[-1] > 1e-6]
    assert len(gained) >= 35
    assert min(gained) > 1e2
    assert all(first < 1e-3 * last for first, last in ends["without"])


def test_what_the_write_up_printed_is_found(report):
    assert all(study.holds(report, "decade", "skips keep", "vanished"))
    assert len(study.holds(report, "decade")) == 8
    assert "12 of 13 layers take the skip" in report.text()
    assert "0 of 7 layers take the skip" in report.text()


def test_why_a_skip_helps_the_weights(report):
    assert study.holds(report, "outer product", "so ∂L/∂W", "g is ∂L/∂x") == [True] * 3
    assert study.holds(report, "agree with eager", "are finite") == [True] * 2
    assert report.holds


def test_zeros_are_counted(report):
    for counts in report.data["draws_by_layers_of_gradient_0"].values():
        assert sum(counts.values()) == 40
    assert report.data["draws_by_layers_of_gradient_0"]["eager"]["13"] >= 1
    assert not any("exactly 0" in one.claim for one in report.findings), "counted, not judged"


def test_report_is_drawn_and_said(report, tmp_path):
    paths = report.write(tmp_path)
    assert [path.name for path in paths] == ["vanish.json", "vanish.png", "vanish-halves.png"]
    assert paths[1].read_bytes().startswith(b"\x89PNG")


def test_without_skips_nothing_is_kept(monkeypatch):
    build = vanish.Case.build
    monkeypatch.setattr(vanish.Case, "build", lambda case, has_skips, seed: build(case, False, seed))
    broken = study.run(vanish, *SMALL)
    assert study.holds(broken, "case 1, with skips: mean |∂L/∂W| of the first") == [False]
    assert study.holds(broken, "skips keep") == [False]
    assert study.holds(broken, "g is ∂L/∂x") == [False]


@pytest.mark.parametrize("seed", [100, 500, 1000, 3000])
def test_another_first_seed_finds_the_same(report, seed):
    assert study.holds(study.run(vanish, *SMALL, "--draws", 1, "--seed", seed)) == study.holds(report)


@pytest.mark.parametrize(("place", "seed"), [(0, 0), (-1, 3)])
def test_a_gradient_that_is_not_finite_is_noticed(report, monkeypatch, place, seed):
    drawn = vanish._draw

    def spoilt(case, has_skips, of_seed, device):
        draw = drawn(case, has_skips, of_seed, device)
        if has_skips and of_seed == seed:
            draw.mean_abs[place] = float("nan")
        return draw

    monkeypatch.setattr(vanish, "_draw", spoilt)
    broken = study.run(vanish, "--seeds", 5, "--wide-seeds", 1, "--draws", 1)
    assert study.holds(broken, "are finite", "outer product") == [False] * 2
    decades = study.holds(broken, "case 1, with skips: mean")
    assert decades == ([False, True] if place == 0 else [True, False])


def test_fused_gradients_that_are_not_eagers_are_noticed(report, monkeypatch):
    """A twin of other weights."""
    monkeypatch.setattr(vanish.ShapeGatedStack, "load_state_dict", lambda *_: None)
    broken = study.run(vanish, "--seeds", 2, "--wide-seeds", 1, "--draws", 1)
    assert study.holds(broken, "agree with eager") == [False]


def test_a_lost_gradient_is_noticed(report, monkeypatch):
    """Where what reaches a layer's output is not what its weight's gradient is made of."""
    reached = halves.reached
    monkeypatch.setattr(
        halves, "reached", lambda *arguments: [one._replace(g=1.001 * one.g) for one in reached(*arguments)]
    )
    assert study.holds(study.run(vanish, "--seeds", 2, "--wide-seeds", 1, "--draws", 1), "outer product") == [False]


@pytest.mark.parametrize(
    "options",
    [
        {"skip": "identity", "skip_scale": 0.7, "branch_scale": 0.5},
        {"skip": "identity", "order": "post", "activation": "relu"},
        {"skip": None, "activation": "gelu", "approximate": "tanh"},
    ],
    ids=["scaled", "post", "no-skip"],
)
def test_halves_add_up(options):
    stack = FusedResidualStack([5, 5, 5, 5], **options)
    x = torch.randn(4, 5)
    found = halves.reached(stack, x, lambda y: y.square().sum())
    h = x.double()
    for i, one in enumerate(found):
        rest = FusedResidualStack([5] * (4 - i), **options).to_eager().double()
        for mine, of_stack in zip(rest.layers, list(stack.layers)[i:], strict=True):
            mine[0].load_state_dict({name: value.detach() for name, value in of_stack[0].named_parameters()})
        h = one.x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(rest(h).square().sum(), h)
        torch.testing.assert_close(one.total, dx)
        assert (one.skip is None) == (options["skip"] is None)
    if options["skip"] is not None and options.get("order") != "post":
        torch.testing.assert_close(found[1].skip, options["skip_scale"] * found[1].g)
        product = options["skip_scale"] ** 3 * found[-1].g.norm().item()
        assert halves.through_skips_alone(found, [options["skip_scale"]] * 3)[0] == pytest.approx(product)


def test_projected_halves_add_up():
    stack = FusedResidualStack([6, 4, 2], skip="projection")
    x = torch.randn(3, 6)
    found = halves.reached(stack, x, lambda y: F.mse_loss(y, torch.ones_like(y)))
    x.requires_grad_()
    (dx,) = torch.autograd.grad(F.mse_loss(y := stack(x), torch.ones_like(y)), x)
    torch.testing.assert_close(found[0].total.float(), dx)
    torch.testing.assert_close(found[1].skip, found[1].g @ stack.projections["1"].weight.detach().double())
