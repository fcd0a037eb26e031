"""System C as a study: its claims as inequalities, which fail where a skip is missing or λ is another."""

from __future__ import annotations

from functools import cache

import pytest
import study
import torch

from fusedres.gradients import picture
from fusedres.gradients.fan import draw_fan
from fusedres.studies import skip_scale

pytestmark = pytest.mark.usefixtures("engine")
SMALL = ("--seeds", 2, "--depth", 12, "--width", 16, "--blocks", 2)
CPU = torch.device("cpu")


@cache
def _small_report():
    return study.run(skip_scale, *SMALL)


@pytest.fixture
def report(engine):
    return _small_report()


def test_claims_hold(report, tmp_path):
    assert study.holds(report, "equation", "∂F/∂x + 1", "identity path", "of this project") == [True] * 7
    assert study.holds(report, "λ x + F(x): ") == [False, True, False]
    assert report.holds, "two claims are known not to hold"
    assert "does not hold, as is known: λ x + F(x): at 1 it is left alone" in report.text()
    assert [path.name for path in report.write(tmp_path)] == ["lambda.json", "lambda.png"]


@pytest.mark.parametrize("scale", skip_scale.SCALES)
def test_the_identity_path_carries_the_product(report, scale):
    of = report.data["lambdas"][f"{scale:g}"]
    alone, small, whole = (of["branch_scales"][name][0] for name in ("0", "1/depth", "1"))
    assert alone["coefficient"] == pytest.approx([scale**k for k in range(13)], rel=1e-3)
    assert alone["norm"] == pytest.approx(alone["coefficient"], rel=1e-3)
    assert small["coefficient"] == pytest.approx([scale**k for k in range(13)], rel=0.1)
    assert small["coefficient"] != alone["coefficient"]
    assert abs(whole["norm"][-1] / scale**12 - 1) > 0.2  # branches of scale 1 outweigh it


def test_another_skip_scale_is_noticed(report, monkeypatch):
    build = skip_scale.FusedResidualLinear

    def of_another_scale(*sizes, **options):
        return build(
            *sizes, **options | ({"skip_scale": 1.01 * options["skip_scale"]} if "skip_scale" in options else {})
        )

    monkeypatch.setattr(skip_scale, "FusedResidualLinear", of_another_scale)
    broken = study.run(skip_scale, *SMALL)
    assert study.holds(broken, "∂F/∂x + 1", "are finite") == [True] * 2
    assert study.holds(broken, "identity path", "whole gradient still", "/ depth: ") == [False] * 5
    assert not broken.holds


def test_a_missing_skip_is_noticed(report, monkeypatch):
    build = skip_scale.FusedResidualLinear

    def without(*sizes, **options):
        return build(*sizes, **options | ({"skip": None, "skip_scale": 1.0} if "skip_scale" in options else {}))

    monkeypatch.setattr(skip_scale, "FusedResidualLinear", without)
    broken = study.run(skip_scale, *SMALL, "--seeds", 1)
    assert not any(study.holds(broken, "identity path", "/ depth: "))
    assert study.holds(broken, "λ x + F(x): ")[:2] == [True, False]
    assert not broken.holds


def test_what_is_known_not_to_hold_must_not(report, monkeypatch):
    """Where branches count nothing the write-up's recursion is its identity path: then all it says holds."""
    carried = skip_scale.carried
    monkeypatch.setattr(skip_scale, "carried", lambda scale, _, *rest: carried(scale, 0.0, *rest))
    broken = study.run(skip_scale, *SMALL, "--seeds", 1)
    assert study.holds(broken) == [True] * 10
    assert not broken.holds
    assert "HOLDS, which is known not to: λ x + F(x): at 1 it is left alone" in broken.text()
    assert "10 of 10 claims hold, 0 do not, of which 0 known not to; 2 came out other than expected" in broken.text()


@pytest.mark.parametrize("name", ["1/depth", "1", "0.1/depth"])
def test_a_gradient_that_is_not_finite_is_noticed(report, monkeypatch, name):
    carried = skip_scale.carried

    def spoilt(scale, branch_scale, depth, width, seed, device):
        found = carried(scale, branch_scale, depth, width, seed, device)
        if (scale, seed) == (1.1, 1) and branch_scale == skip_scale.branch_scales(depth)[name]:
            found.coefficient[-1] = found.norm[-1] = float("nan")
        return found

    monkeypatch.setattr(skip_scale, "carried", spoilt)
    broken = study.run(skip_scale, *SMALL)
    assert study.holds(broken, "are finite") == [False]
    assert study.holds(broken, "λ x + F(x): above 1", "whole gradient", "/ depth: above 1") == [
        name != "1",
        name != "1/depth",
        name != "1/depth",
    ]


@pytest.mark.parametrize(
    ("part", "is_right"),
    [(lambda block, x: block.second(block.first(x), x), True), (lambda block, x: block.second(block.first(x)), False)],
    ids=["as it is", "h in the place of x"],
)
def test_the_equation_of_a_block(monkeypatch, part, is_right):
    monkeypatch.setattr(skip_scale.Block, "forward", part)
    assert (max(skip_scale.equation_errors(3, 16, 0, CPU)) < skip_scale.ROUNDING) == is_right


def test_the_equation_needs_the_one_and_relu():
    """A pre-activation layer passes its input's gradient whole, where a block's ends at ReLU."""
    torch.manual_seed(0)
    block = skip_scale.Block(8)
    x = torch.randn(5, 8, requires_grad=True)
    y = block(x)
    assert (y >= 0).all()
    assert (y == 0).any()
    torch.testing.assert_close(y, torch.relu(torch.func.vmap(block.branch)(x.double()).float() + x))


def test_the_fan_is_drawn(tmp_path):
    figure = picture.new_figure(6, 4)
    axes = figure.subplots()
    draw_fan(axes, 10, (0.5, 1.0, 2.0), {0.5: [1, 0.4, -1.0], 2.0: [1, 2, 4]})
    assert [text.get_text() for text in axes.texts] == ["λ = 0.5", "λ = 1", "λ = 2"]
    lines = [list(map(float, line.get_ydata())) for line in axes.lines]
    assert lines[0] == pytest.approx([0.5**k for k in range(11)])
    assert lines[1] == [1, 0.4]  # what is not above 0 has no place on a log scale
    assert axes.get_yscale() == "log"
    picture.save(figure, tmp_path / "fan.png")
